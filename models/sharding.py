"""Where a model lies on a mesh: experts over ep, heads and inner sizes over tp, sequences over dp and ep.

An ``ep`` rank holds its own experts and, for attention, its own sequences: attention is data parallel over dp
and ep. Where the batch doesn't divide, activations are replicated and only the experts' work is split.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pplx_jax.models.errors import ModelError

if TYPE_CHECKING:
    from pplx_jax.expert_parallel import ExpertParallel
    from pplx_jax.models.config import DecoderConfig

AXES = ("dp", "ep", "tp")


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a model computes and where it lies; a value.

    Attributes:
      dtype: what activations and caches are, and matrices unless ``block`` says otherwise.
      mesh: axes among `AXES`, or None: one device.
      ep: the experts' group, or None.
      block: (rows, columns) of a block of float8 weights that shares a scale, where matrices stay float8.
      overlap_shared: whether shared experts run while tokens travel, see `pplx_jax.moe.MoEConfig`.
    """

    dtype: Any = jnp.bfloat16
    mesh: Mesh | None = None
    ep: ExpertParallel | None = None
    block: tuple[int, int] | None = None
    overlap_shared: bool = False

    def size(self, *axes: str) -> int:
        """Ranks along these axes; those that the mesh lacks count as 1."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape.get(axis, 1) for axis in axes)

    def tp(self, size: int) -> str | None:
        """The tp axis where it divides a dimension, else None."""
        return (
            "tp"
            if self.mesh is not None and "tp" in self.mesh.shape and size % self.size("tp") == 0
            else None
        )

    def batch(self, batch: int) -> Any:
        """The entry of a PartitionSpec for the batch: dp and ep where they divide it, else None."""
        if self.mesh is None or batch % self.size("dp", "ep"):
            return None
        return tuple(axis for axis in self.mesh.axis_names if axis in ("dp", "ep"))

    def longest(self, batch: int) -> int | None:
        """Most tokens of each of ``batch`` sequences that the experts' group takes at once; None: any."""
        if self.ep is None:
            return None
        # Tokens are split evenly over dp and ep, the last rank's padded.
        return self.ep.config.max_tokens * self.size("dp", "ep") // batch

    def check(self) -> None:
        """Raises what an exchange of a program failed with; call it once the program's results are there.

        An execution does not always raise it itself: one whose data is wrong never does, nor does a recorded
        one on GPUs. Their results are NaN, which the choice of a token would hide.

        Raises:
          PplxError: see `pplx_jax.ExpertParallel.check`.
        """
        if self.ep is not None:
            self.ep.check()

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """`check` once what is done under it, results included, has ended; also where that raises: after a
        peer's death an execution fails with whatever error the runtime made of it."""
        try:
            yield
        except (jax.errors.JaxRuntimeError, ValueError):
            self.check()
            raise
        self.check()

    @property
    def several_groups(self) -> bool:
        """Whether exchanges may fail of which `check` knows nothing on some processes: the mesh has an
        experts' group for each position along its other axes."""
        return self.ep is not None and self.size("dp", "tp") > 1

    def metadata(self, *spec: Any) -> dict[str, Any]:
        """Of an `nnx.Param` that lies so."""
        if self.mesh is None or all(entry is None for entry in spec):
            return {}
        return {"out_sharding": P(*spec), "mesh": self.mesh}

    def constrain(self, x: jax.Array, *spec: Any) -> jax.Array:
        """x, lying so; itself without a mesh."""
        if self.mesh is None:
            return x
        placed: jax.Array = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*spec)))
        return placed

    def sharding(self, *spec: Any) -> Any:
        """The sharding of an array that lies so."""
        if self.mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return NamedSharding(self.mesh, P(*spec))


def plain_mesh(mesh: Mesh) -> Mesh:
    """The mesh with automatic axes, which is how models are written."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def check_mesh(config: DecoderConfig, shape: Mapping[str, int]) -> None:
    """Whether a model can lie on a mesh of this shape.

    Raises:
      ModelError: it can't; says which sizes can.
    """
    unknown = [axis for axis in shape if axis not in AXES]
    if unknown:
        raise ModelError(f"the mesh has an axis {unknown[0]!r}; models know dp, ep and tp: rename or drop it")
    if "ep" not in shape:
        raise ModelError(
            f"the mesh has axes {tuple(shape)} and no 'ep' for the experts: add one, of size 1 or more"
        )
    for axis, count, what in (
        ("ep", config.num_experts, "experts"),
        ("tp", config.num_attention_heads, "attention heads"),
    ):
        parts = shape.get(axis, 1)
        if count % parts:
            near = [n for n in range(1, count + 1) if count % n == 0 and n <= 2 * parts]
            raise ModelError(
                f"the mesh has {axis}={parts}, which doesn't divide the model's {count} {what}: "
                f"choose one of {', '.join(map(str, near))}"
            )
    for size, what in (
        (config.moe_intermediate_size, "experts' inner size moe_intermediate_size"),
        (config.intermediate_size, "dense layers' intermediate_size"),
    ):
        if size % shape.get("tp", 1):
            raise ModelError(f"the mesh has tp={shape['tp']}, which doesn't divide the {what}={size}")
