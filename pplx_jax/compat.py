"""Everything that touches JAX internals or differs between JAX versions (0.10.2 to 0.11.2 are tested)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar, cast

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax._src import config as _config  # no public way to trace a part without replication checks
from jax._src import (
    distributed,  # the coordination service has no public accessor
    xla_bridge,  # nothing public tells whether a backend has started
)
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec

_Tree = TypeVar("_Tree")


class CoordinationClient(Protocol):
    """The part of ``jax.distributed``'s client that bootstrap needs. Time-outs are in milliseconds."""

    def key_value_set_bytes(self, key: str, value: bytes, allow_overwrite: bool = False) -> None:
        """Publishes a value; raises where the key has one, unless that may be overwritten."""

    def key_value_delete(self, key: str) -> None:
        """Forgets it."""

    def key_value_try_get_bytes(self, key: str) -> bytes:
        """A value; raises where the key has none."""

    def key_value_dir_get_bytes(self, key: str) -> list[tuple[str, bytes]]:
        """All keys under ``key``, whole, and their values."""

    def blocking_key_value_get_bytes(self, key: str, timeout_in_ms: int) -> bytes:
        """Waits for a value."""


def coordination_client() -> CoordinationClient | None:
    """The client of ``jax.distributed.initialize``, or None where that was not called."""
    return cast("CoordinationClient | None", distributed.global_state.client)


def coordinator_address() -> str | None:
    """``host:port`` of the coordination service, or None."""
    return distributed.global_state.coordinator_address


def coordination_service(address: str, num_processes: int) -> object:
    """A coordination service for ``num_processes``, listening on ``address`` as long as the result lives."""
    service: object = distributed._jax.get_distributed_runtime_service(  # type: ignore[attr-defined]
        address,
        num_processes,
        recoverable=distributed._ENABLE_RECOVERABILITY.value,  # JAX_ENABLE_RECOVERABILITY, as JAX's own
    )
    return service


def use_external_coordination_service() -> None:
    """Keeps ``jax.distributed.initialize`` of process 0 from starting a service of its own."""
    nothing = lambda *args, **kwargs: None  # noqa: E731
    distributed._jax.get_distributed_runtime_service = nothing  # type: ignore[attr-defined]


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which ``x`` may differ from shard to shard; empty outside ``shard_map``."""
    return frozenset(cast("Iterable[str]", jax.typeof(x).manual_axis_type.varying))


def bound_axes() -> frozenset[str]:
    """Names of the mesh axes that are manual where we trace: those of the enclosing ``shard_map``."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset(mesh.manual_axes) if not mesh.empty else frozenset()


def checks_replication(x: jax.Array, axes: Iterable[str]) -> bool:
    """Whether the enclosing ``shard_map`` has ``check_vma=True``: only then do types say what varies."""
    if varying_axes(x):
        return True
    marked = jax.lax.pcast(x, tuple(axes), to="varying")
    return bool(varying_axes(marked))


def to_varying(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """``x``, its type varying over ``axes`` as well. The transpose sums over the axes that were added."""
    missing = tuple(axis for axis in sorted(axes) if axis not in varying_axes(x))
    return cast(jax.Array, jax.lax.pcast(x, missing, to="varying")) if missing else x


def as_unchecked(function: Callable[..., _Tree], *args: jax.Array) -> _Tree:
    """``function(*args)``, traced as in a ``shard_map`` without replication checks; varies where args do.

    For Pallas kernels of others, which don't say where their results vary. Not differentiable through: JAX
    would not know which gradients to sum.
    """
    axes = frozenset[str]().union(*(varying_axes(a) for a in args))
    if not axes:
        return function(*args)
    with _config._check_vma(False):
        # Types must agree within the function as well, as some rules trace again when lowering: a select,
        # which XLA removes, gives each operand the type of what is computed here.
        out = function(*(jax.lax.select(jnp.bool_(True), a, a) for a in args))
    varying: _Tree = jax.tree.map(lambda leaf: to_varying(leaf, axes), out)
    return varying


def result_type(
    like: Sequence[jax.Array], shape: tuple[int, ...], dtype: np.typing.DTypeLike
) -> jax.ShapeDtypeStruct:
    """Type of a custom call's result that varies wherever one of its operands does.

    A plain ShapeDtypeStruct would claim "replicated", which JAX believes.
    """
    axes = frozenset[str]().union(*(varying_axes(x) for x in like))
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    mesh = jax.sharding.get_abstract_mesh()
    return jax.ShapeDtypeStruct(
        shape,
        dtype,
        sharding=NamedSharding(mesh, PartitionSpec(*([None] * len(shape)))),
        manual_axis_type=ManualAxisType(varying=axes),
    )


def lift_closure(
    function: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """``function`` as ``lifted(captured, args)`` with every array that it closes over in ``captured``.

    ``jax.closure_convert`` lifts only what is being differentiated; integers stay behind as tracers.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    tree = jax.tree.structure(shapes)

    def lifted(captured: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        run = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(closed.jaxpr, captured))
        return jax.tree.unflatten(tree, run(*jax.tree.leaves(args)))

    return lifted, tuple(closed.consts)


def backends_started() -> bool:
    """Whether JAX has initialised a backend; until then no program can have run."""
    return bool(xla_bridge.backends_are_initialized())
