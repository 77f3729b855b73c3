"""From a Hugging Face folder to a model, each process reading its own experts and shards."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from pplx_jax.config import ExchangeConfig
from pplx_jax.expert_parallel import ExpertParallel
from pplx_jax.models.checkpoint import DTYPES, Checkpoint, read_json
from pplx_jax.models.config import DecoderConfig, end_tokens
from pplx_jax.models.decoder import Decoder
from pplx_jax.models.errors import CheckpointError, ModelError
from pplx_jax.models.layers import FLOAT8
from pplx_jax.models.quantized import SUFFIX, block_of, dequantize_part, scale_shape
from pplx_jax.models.registry import Family, family_of, family_of_config
from pplx_jax.models.sharding import Placement, check_mesh, plain_mesh
from pplx_jax.models.sources import Source, is_fused

#: Tokens that a rank may bring to one call of an MoE layer; costs no memory until a call has as many.
MAX_TOKENS = 8192

# Most bytes of a tensor's rows that are converted at once, in float32.
_WINDOW = 8 << 20

_Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class LoadProgress:
    """How far loading is.

    Attributes:
      done, total: parameters of the model.
      bytes_read: by this process.
      path: of the parameter that was loaded last.
    """

    done: int
    total: int
    bytes_read: int
    path: str


def _dtype(dtype: Any) -> np.dtype[Any]:
    try:
        found: np.dtype[Any] = jnp.dtype(dtype)
    except TypeError as error:
        raise ModelError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}") from error
    return found


def placement_of(
    config: DecoderConfig,
    mesh: Mesh | None,
    dtype: Any,
    *,
    block: tuple[int, int] | None = None,
    max_tokens: int = MAX_TOKENS,
    name: str = "model",
    overlap_shared: bool = False,
    exchange: Mapping[str, Any] | None = None,
) -> Placement:
    """How a model lies on a mesh; makes the experts' group, which connects when it runs.

    Args:
      config: sizes.
      mesh: axes among dp, ep and tp, with ep; or None: one device.
      dtype: of activations, caches and weights: float32, bfloat16 or float16.
      block: of weights that stay float8, or None.
      max_tokens: most tokens of a rank in one call.
      name: of the group: models that live at the same time need different ones.
      overlap_shared: whether shared experts run while tokens travel, see `pplx_jax.moe.MoEConfig`.
      exchange: further arguments of `pplx_jax.ExpertParallel`, or fields of its `ExchangeConfig`.

    Raises:
      ModelError: the mesh doesn't fit the model.
    """
    compute = _dtype(dtype)
    if compute.name not in ("float32", "bfloat16", "float16"):
        raise ModelError(f"dtype must be float32, bfloat16 or float16, got {compute.name}")
    if mesh is None:
        return Placement(dtype=compute, block=block, overlap_shared=overlap_shared)
    check_mesh(config, dict(mesh.shape))
    mesh = plain_mesh(mesh)
    options = dict(exchange or {})
    fields = {field.name for field in dataclasses.fields(ExchangeConfig)}
    sizes = {
        "num_experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "hidden": config.hidden_size,
        "max_tokens": max_tokens,
        "dtype": compute,
        **{key: options.pop(key) for key in list(options) if key in fields},
    }
    ep = ExpertParallel(mesh, "ep", config=ExchangeConfig(**sizes), name=name, **options)
    return Placement(dtype=compute, mesh=mesh, ep=ep, block=block, overlap_shared=overlap_shared)


def _abstract(model: type[Decoder], config: DecoderConfig, placement: Placement) -> tuple[Any, Any]:
    """The model's structure, and its state without values."""
    return nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0), placement=placement)))  # type: ignore[no-any-return]


def _paths(state: Any) -> list[tuple[str, tuple[Any, ...], Any]]:
    """(path as text, path, variable) of every leaf."""
    return [(".".join(map(str, path)), path, leaf) for path, leaf in nnx.to_flat_state(state)]


def _sharding(leaf: Any, placement: Placement) -> Any:
    spec = leaf.get_metadata().get("out_sharding") if placement.mesh is not None else None
    return placement.sharding(*(spec or ()))


def from_config(
    config: DecoderConfig,
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.bfloat16,
    seed: int = 0,
    **options: Any,
) -> Decoder:
    """A model with random weights, born where they belong.

    Args:
      config: a family's, such as ``DeepSeekConfig.kimi_k2()``, maybe with fewer layers.
      mesh, dtype: as in `from_pretrained`.
      seed: of the weights.
      **options: of `placement_of`.

    Raises:
      ModelError: the mesh doesn't fit the model.
    """
    family = family_of_config(config)
    placement = placement_of(config, mesh, dtype, **options)
    graph, abstract = _abstract(family.model, config, placement)

    def create() -> Any:
        return nnx.state(family.model(config, rngs=nnx.Rngs(seed), placement=placement))

    shardings = nnx.from_flat_state(
        [(path, leaf.replace(_sharding(leaf, placement))) for _, path, leaf in _paths(abstract)]
    )
    # Random numbers take long to compile and moments to make: don't optimise that program.
    options_xla = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    state = jax.jit(create, out_shardings=shardings, compiler_options=options_xla)()
    model: Decoder = nnx.merge(graph, state)
    return model


def from_arrays(
    config: DecoderConfig,
    placement: Placement,
    array: Callable[[str, jax.ShapeDtypeStruct], jax.Array],
) -> Decoder:
    """A model of arrays that a function gives, such as those of another model with the same sizes.

    Args:
      config: a family's.
      placement: of `placement_of`.
      array: from a parameter's path, such as "layers.0.attention.out.kernel", and its shape, dtype and
        sharding to its values.
    """
    graph, abstract = _abstract(family_of_config(config).model, config, placement)
    leaves = []
    for name, path, leaf in _paths(abstract):
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf, placement))
        leaves.append((path, leaf.replace(array(name, shape))))
    model: Decoder = nnx.merge(graph, nnx.from_flat_state(leaves))
    return model


def read_config(path: str | os.PathLike[str]) -> tuple[Family, DecoderConfig, dict[str, Any]]:
    """Family, configuration and config.json of a checkpoint's folder. Which tokens end a text is
    generation_config.json's to say, where there is one that does.

    Raises:
      CheckpointError: there is no such folder or file.
      ModelError: an unknown architecture, or one of its fields isn't supported.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give the folder of a Hugging Face checkpoint")
    raw = read_json(folder / "config.json")
    family = family_of(raw)
    config: DecoderConfig = family.from_hf(raw)
    generation = folder / "generation_config.json"
    if generation.exists():
        ends = read_json(generation).get("eos_token_id")
        if ends is not None:
            # Chat models end their turn with another token than config.json's.
            config = dataclasses.replace(config, eos_token_ids=end_tokens(ends, generation.name))
    return family, config, raw


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    progress: Callable[[LoadProgress], None] | None = None,
    **options: Any,
) -> Decoder:
    """Loads a Hugging Face checkpoint. Each process of the mesh calls it, and reads only what it keeps.

    Args:
      path: folder with config.json and safetensors files.
      mesh: with an axis ``ep`` for the experts, and maybe ``tp`` and ``dp``; None: one device.
      dtype: float32, bfloat16 or float16, which float8 weights are converted to as well; None: the one that
        config.json names, as a rule bfloat16. float8_e4m3fn: a checkpoint's float8 weights and their scales
        are kept, and dequantised to what config.json names, layer by layer at each use.
      progress: is called after each parameter.
      **options: of `placement_of`: ``max_tokens``, ``name``, ``overlap_shared``, ``exchange``.

    Returns:
      A model: ``model(tokens)``, `pplx_jax.models.generate`.

    Raises:
      CheckpointError: files are missing, truncated or corrupt; or tensors are missing, surplus or of another
        shape or dtype than config.json asks for: all of them are listed.
      ModelError: an unknown architecture, or a mesh that doesn't fit the model.
    """
    folder = Path(path)
    family, config, raw = read_config(folder)
    block = block_of(raw)
    keep = dtype is not None and _dtype(dtype) == FLOAT8
    if keep and block is None:
        raise ModelError(
            f"dtype=float8_e4m3fn keeps float8 weights, but {folder} has none: give another dtype"
        )
    if dtype is None or keep:
        named = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
        dtype = named if named in ("float32", "float16", "bfloat16") else "bfloat16"
    placement = placement_of(config, mesh, dtype, block=block if keep else None, **options)
    try:
        return _load(folder, family, config, placement, block, progress)
    except BaseException:
        # Nobody else has the group to close it, and others would wait for this rank.
        if placement.ep is not None:
            placement.ep.close()
        raise


def _load(
    folder: Path,
    family: Family,
    config: DecoderConfig,
    placement: Placement,
    block: tuple[int, int] | None,
    progress: Callable[[LoadProgress], None] | None,
) -> Decoder:
    graph, abstract = _abstract(family.model, config, placement)
    leaves = _paths(abstract)
    with Checkpoint(folder) as checkpoint:
        sources = _with_scales(family, config, leaves, fused=is_fused(checkpoint.tensors))
        _check_tensors(checkpoint, family.ignored(config), sources, leaves, block)
        if placement.ep is not None and jax.process_count() > 1:
            # Now, as processes don't end reading together, and connecting has a time limit.
            placement.ep.connect()
        loaded = []
        for number, (name, where, leaf) in enumerate(leaves):
            reader = _Reader(checkpoint, sources[name], leaf.shape, np.dtype(leaf.dtype), block)
            array = jax.make_array_from_callback(leaf.shape, _sharding(leaf, placement), reader)
            loaded.append((where, leaf.replace(jax.block_until_ready(array))))
            if progress is not None:
                progress(LoadProgress(number + 1, len(leaves), checkpoint.bytes_read, name))
    model: Decoder = nnx.merge(graph, nnx.from_flat_state(loaded))
    return model


def _with_scales(
    family: Family, config: DecoderConfig, leaves: list[Any], *, fused: bool
) -> dict[str, Source]:
    """Sources of all parameters, with those of the scales of weights that stay float8."""
    sources = family.param_sources(config, fused=fused)
    for name, _, _ in leaves:
        if name in sources:
            continue
        for scales, weights in (
            (".expert_scales.", ".experts."),
            (".shared_scales.", ".shared."),
            (".scale", ".kernel"),
        ):
            if scales in name and (of := name.replace(scales, weights)) in sources:
                sources[name] = sources[of].with_suffix(SUFFIX)
                break
    missing = [name for name, _, _ in leaves if name not in sources]
    assert not missing, missing
    return sources


def _check_tensors(
    checkpoint: Checkpoint, ignored: Any, sources: dict[str, Source], leaves: list[Any], block: Any
) -> None:
    """Raises CheckpointError unless the checkpoint holds what the model needs, and nothing else."""
    # By what is wrong and with which tensor: several parameters may be made of one.
    problems: dict[tuple[str, str], str] = {}

    def note(what: str, name: str, text: str = "") -> None:
        problems.setdefault((what, name), f"{what}: {name}{text}")

    wanted: set[str] = set()
    for path, _, leaf in leaves:
        source = sources[path]
        shape = source.stored(tuple(leaf.shape))
        for name in source.names:
            wanted.add(name)
            info = checkpoint.tensors.get(name)
            if info is None:
                note("missing", name, f" {list(shape)}")
                continue
            if info.shape != shape:
                note("misshapen", name, f" is {list(info.shape)}, the model needs {list(shape)}")
            if info.dtype not in DTYPES:
                note("of unknown dtype", name, f" is {info.dtype}, known are {', '.join(DTYPES)}")
            elif np.dtype(leaf.dtype) == FLOAT8 and info.dtype != "F8_E4M3":
                note("not float8", name, f" is {info.dtype}; load with dtype=bfloat16")
            elif info.dtype == "F8_E4M3":
                scale = name + SUFFIX
                wanted.add(scale)
                if block is None:
                    note("float8 without a weight_block_size in config.json", name)
                    continue
                blocks = scale_shape(shape, block)
                found = checkpoint.tensors.get(scale)
                if found is None:
                    note("missing", scale, f" {list(blocks)}")
                elif found.shape != blocks:
                    note("misshapen", scale, f" is {list(found.shape)}, the model needs {list(blocks)}")
    for name in sorted(set(checkpoint.tensors) - wanted):
        if not ignored.fullmatch(name):
            note("surplus", name)
    if problems:
        raise CheckpointError(
            f"{checkpoint.folder} doesn't hold the model that its config.json describes; "
            f"{len(problems)} differences:\n  " + "\n  ".join(problems.values())
        )


class _Reader:
    """Reads any part of one parameter; what is asked for twice in a row is read once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        source: Source,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        block: tuple[int, int] | None,
    ) -> None:
        self.checkpoint, self.source, self.shape, self.dtype, self.block = (
            checkpoint,
            source,
            shape,
            dtype,
            block,
        )
        self._last: tuple[Any, np.ndarray[Any, Any]] | None = None

    def __call__(self, index: _Index | None) -> np.ndarray[Any, Any]:
        parts = (slice(None),) * len(self.shape) if index is None else index
        spans = tuple(part.indices(size)[:2] for part, size in zip(parts, self.shape, strict=True))
        if self._last is None or self._last[0] != spans:
            self._last = (spans, self._read(spans))
        return self._last[1]

    def _read(self, spans: tuple[tuple[int, int], ...]) -> np.ndarray[Any, Any]:
        source = self.source
        out = np.empty([stop - start for start, stop in spans], self.dtype)
        if not source.stacked:
            self._tensor(out, source.names[0], spans)
            return out
        for row, number in enumerate(range(*spans[0])):
            if source.fused is None:
                self._tensor(out[row], source.names[number], spans[1:])
            else:
                self._tensor(out[row], source.names[0], spans[1:], expert=number)
        return out

    def _tensor(
        self,
        out: np.ndarray[Any, Any],
        name: str,
        spans: tuple[tuple[int, int], ...],
        expert: int | None = None,
    ) -> None:
        """Into ``out``: a part of a tensor, or of one expert's matrix in a fused one.

        A window of its rows at a time: converting and turning the whole takes several times its memory.
        """
        if self.source.transposed:
            out, spans = out.T, spans[::-1]
        if self.source.fused is not None:
            part, parts = self.source.fused
            first = part * (self.checkpoint.tensors[name].shape[1] // parts)
            spans = ((spans[0][0] + first, spans[0][1] + first), *spans[1:])
        (begin, end), others = spans[0], spans[1:]
        # float8 is converted by way of float32; a block's scales are read once.
        rows = max(1, _WINDOW // (4 * max(1, math.prod(stop - start for start, stop in others))))
        if self.block is not None:
            rows = -(-rows // self.block[0]) * self.block[0]
        start = begin
        while start < end:
            stop = min(end, (start // rows + 1) * rows)
            out[start - begin : stop - begin] = self._values(name, ((start, stop), *others), expert)
            start = stop

    def _values(
        self, name: str, spans: tuple[tuple[int, int], ...], expert: int | None
    ) -> np.ndarray[Any, Any]:
        """Such a part as it is stored, or in float32 where float8 isn't kept."""
        values = self._matrix(name, tuple(slice(*span) for span in spans), expert)
        if values.dtype != FLOAT8 or self.dtype == FLOAT8:
            return values
        assert self.block is not None
        blocks = tuple(
            slice(start // size, -(-stop // size))
            for (start, stop), size in zip(spans, self.block, strict=True)
        )
        scales = self._matrix(name + SUFFIX, blocks, expert)
        return dequantize_part(values, scales, (spans[0][0], spans[1][0]), self.block)

    def _matrix(self, name: str, index: _Index, expert: int | None) -> np.ndarray[Any, Any]:
        if expert is None:
            return self.checkpoint.read(name, index)
        matrix: np.ndarray[Any, Any] = self.checkpoint.read(name, (slice(expert, expert + 1), *index))[0]
        return matrix
