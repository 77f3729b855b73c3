"""The slice of a model that model_slice_gpu.py measures: weights, caches, whole steps and a layer's parts."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import ragged_baseline
from exchange_gpu import RECORDED, SPEC, STACK, Ours, Ragged, Shape, compiled, make_load, measure
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pplx_jax.experts import apply_experts
from pplx_jax.models.deepseek import DeepSeekConfig
from pplx_jax.models.loading import from_arrays, placement_of
from pplx_jax.models.programs import Programs

STEPS = 8
# Agreement of greedy tokens below which a contender computes something else; float8 moves some.
LEAST_AGREEMENT = 0.5
#: In place of Kimi K2's sizes: a slice that runs anywhere, to try the benchmark itself.
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to decode the slice."""

    name: str
    quant: str | None = None
    overlap: bool = False
    ragged: bool = False


@dataclasses.dataclass
class Row:
    """A line of the result; microseconds but for the step, and of one layer with experts."""

    contender: str
    step_ms: float | None = None
    tokens_per_second: float | None = None  # of all GPUs
    layer: float | None = None
    attention: float | None = None
    experts: float | None = None
    dispatch: float | None = None
    combine: float | None = None
    shared: float | None = None
    other: float | None = None
    agree: float | None = None
    captured: dict[str, Any] | None = None
    error: str | None = None

    PARTS = ("attention", "experts", "dispatch", "combine", "shared")

    def settle(self) -> None:
        """What the parts leave of the layer."""
        parts = [getattr(self, part) for part in self.PARTS]
        if self.layer is not None and None not in parts:
            self.other = self.layer - sum(parts)


# --- the run ---------------------------------------------------------------------------------------------


# --- weights and caches ----------------------------------------------------------------------------------


@functools.cache
def _maker(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Callable[..., jax.Array]:
    def make(seed: jax.Array, scale: jax.Array) -> jax.Array:
        bits = jnp.full(shape, seed, jnp.uint32)
        for axis, factor in enumerate((0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)[: len(shape)]):
            bits += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(factor)
        # The finaliser of MurmurHash3 (Appleby): every input bit moves every output bit.
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
        signed = jax.lax.bitcast_convert_type(bits ^ (bits >> 16), jnp.int32)
        return (signed.astype(jnp.float32) * (scale * (3**0.5 / 2**31))).astype(dtype)

    return jax.jit(make, out_shardings=sharding)


def hashed(seed: int, like: Any, scale: float) -> jax.Array:
    """Uniform numbers of this standard deviation, on their devices; fast, as each is written once."""
    return _maker(tuple(like.shape), jnp.dtype(like.dtype), like.sharding)(np.uint32(seed), np.float32(scale))


class Arrays:
    """The slice's weights by path, made once."""

    def __init__(self) -> None:
        self.known: dict[str, jax.Array] = {}

    def __call__(self, path: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        if path not in self.known:
            if len(like.shape) == 1:  # norms, and the selection's bias
                scale = jnp.zeros if path.endswith("bias") else jnp.ones
                self.known[path] = scale(like.shape, like.dtype, device=like.sharding)
            else:
                deviation = 1.0 if path == "embedding" else like.shape[-2] ** -0.5
                self.known[path] = hashed(len(self.known) + 1, like, deviation)
        return self.known[path]


# --- timing ----------------------------------------------------------------------------------------------


def timed_us(call: Callable[[], Any], calls: int, turns: int) -> float:
    """Microseconds a call: of some one after the other, each of which continues what the last one left."""
    at_once = jax.default_backend() != "cpu"  # programs queued on CPU can starve each other of threads
    for _ in range(3):  # the first ones record
        jax.block_until_ready(call())
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        for _ in range(calls):
            last = call()
            if not at_once:
                jax.block_until_ready(last)
        jax.block_until_ready(last)
        times.append((time.perf_counter() - began) / calls)
    return 1e6 * statistics.median(times)


def captured(dump: Path) -> dict[str, Any] | None:
    """Operations in command buffers, and kinds of those outside, of the largest program in XLA's dump."""
    texts = [path.read_text() for path in dump.rglob("*thunk_sequence*")]
    if not texts:
        return None
    inside, outside, within = 0, collections.Counter[str](), False
    # XLA dumps the sequence before and after it has made command buffers.
    for line in max(texts, key=lambda text: ("kCommandBuffer" in text, len(text))).splitlines():
        found = re.match(r"(\s*)\d+:\s*k(\w+)", line)
        if found is None:
            continue
        if not found[1]:
            within = found[2] == "CommandBuffer"
        if found[2] == "CommandBuffer":
            continue
        if within:
            inside += 1
        else:
            outside[found[2]] += 1
    return {"inside": inside, "outside": dict(outside)}


class Slice:
    """Weights, caches and what is measured of them.

    Args:
      options: of the command line.
      mesh: of the GPUs, with axis "ep".
    """

    def __init__(self, options: argparse.Namespace, mesh: Mesh) -> None:
        self.options, self.mesh = options, mesh
        sizes = SMALL if options.small else {}
        self.config = dataclasses.replace(
            DeepSeekConfig.kimi_k2(), num_hidden_layers=1 + options.layers, first_k_dense_replace=1, **sizes
        )
        self.dtype = jnp.float32 if options.small else jnp.bfloat16
        self.batch = options.tokens * mesh.size
        self.arrays = Arrays()
        self.position = options.context - STEPS * (options.turns + 1) - 8
        self.base_us = 0.0
        self.prompt = np.random.default_rng(0).integers(0, self.config.vocab_size, (self.batch, 1), np.int32)
        self.first_tokens: np.ndarray[Any, Any] | None = None
        plain = self.model(Contender("parts"))
        self.state = jax.block_until_ready(nnx.state(plain))
        self.graph = nnx.split(plain)[0]
        self.placement = plain.placement
        self.caches: list[Any] = []
        self.fill_caches()

    def fill_caches(self) -> None:
        """Makes them, unless they are there: programs that fail have taken them."""
        if any(a.is_deleted() for a in jax.tree.leaves(self.caches)) or not self.caches:
            model = nnx.merge(self.graph, self.state)
            self.caches = [
                jax.tree.map(lambda a, seed=seed: hashed(1000 + seed, a, 1.0), cache)
                for seed, cache in enumerate(
                    Programs.of(model).caches(model, self.batch, self.options.context)
                )
            ]

    def model(self, contender: Contender, layers: int | None = None) -> Any:
        """The slice, or its first layers; over the same weights."""
        config = self.config if layers is None else dataclasses.replace(self.config, num_hidden_layers=layers)
        placement = placement_of(
            config,
            self.mesh,
            self.dtype,
            max_tokens=self.options.tokens,
            name=f"{contender.name}-{config.num_hidden_layers}",
            overlap_shared=contender.overlap,
            exchange={
                "quant": contender.quant,
                "chunk": self.options.tokens,
                "depth": 1 + contender.overlap,
                "zero_tail": False,
            },
        )
        if contender.ragged:
            assert placement.ep is not None
            group = ragged_baseline.Group(self.mesh, config=placement.ep.config, name=contender.name)
            placement = dataclasses.replace(placement, ep=group)
        return from_arrays(config, placement, self.arrays)

    # --- whole steps ---

    def step(self, model: Any) -> tuple[float, np.ndarray[Any, Any], dict[str, Any] | None]:
        """Microseconds of a step, the tokens of the first one, and what was captured."""
        self.fill_caches()
        programs, state = Programs.of(model), nnx.state(model)
        layers = model.config.num_hidden_layers
        caches = [self.caches[layer] for layer in range(layers)]
        tokens = programs.place(self.prompt)
        count = STEPS * (self.options.turns + 1)
        positions = [programs.place(np.int32(self.position + i)) for i in range(count)]
        with tempfile.TemporaryDirectory() as folder:
            lowered = programs.lowered_step(state, caches, tokens)
            run = lowered.compile(compiler_options={**RECORDED, "xla_dump_to": folder})
            found = captured(Path(folder))
        count = 0
        # Caches are donated: whoever comes next continues with these.
        chosen, caches, _ = run(state, caches, tokens, positions[0], None, None)
        self.caches[:layers] = caches
        first = np.asarray(chosen)

        def call() -> jax.Array:
            nonlocal count, chosen
            count += 1
            position = positions[count % len(positions)]
            chosen, self.caches[:layers], _ = run(
                state, self.caches[:layers], chosen[:, None], position, None, None
            )
            return chosen

        us = timed_us(call, STEPS, self.options.turns)
        if self.options.trace and layers > 1:
            with jax.profiler.trace(str(self.options.trace / model.placement.ep.name)):
                jax.block_until_ready([call() for _ in range(3)])
        return us, first, found

    def without_experts(self) -> None:
        """Times what a step takes besides its layers with experts."""
        self.base_us = self.step(self.model(Contender("dense"), layers=1))[0]

    def decode(self, contender: Contender, row: Row) -> None:
        """Times a contender's steps."""
        model = self.model(contender)
        with model.placement.ep:
            us, tokens, row.captured = self.step(model)
        row.step_ms = us / 1e3
        row.tokens_per_second = 1e6 * self.batch / us
        row.layer = (us - self.base_us) / self.options.layers
        if self.first_tokens is None:
            self.first_tokens = tokens
        row.agree = float((tokens == self.first_tokens).mean())
        if row.agree < LEAST_AGREEMENT:
            raise AssertionError(f"only {row.agree:.0%} of the tokens are those of the first contender")

    # --- parts ---

    def _per_layer_us(self, run: Any, *args: Any) -> float:
        return timed_us(lambda: run(*args), STEPS, self.options.turns) / self.options.layers

    def attention_us(self) -> float:
        """Of a layer, with its norm, residual and cache."""
        self.fill_caches()
        first = 1

        def attention(state: Any, caches: Any, x: jax.Array, position: jax.Array) -> Any:
            kept = []
            for block, cache in zip(nnx.merge(self.graph, state).layers[first:], caches, strict=True):
                y, cache = block.attention(block.attention_norm(x), cache, position)
                x = self.placement.constrain(x + y, self.placement.batch(self.batch), None, None)
                kept.append(cache)
            return x, kept

        spread = self.placement.sharding(self.placement.batch(self.batch), None, None)
        shape = (self.batch, 1, self.config.hidden_size)
        x = hashed(3, jax.ShapeDtypeStruct(shape, self.dtype, sharding=spread), 1)
        run = jax.jit(attention, donate_argnums=1, compiler_options=RECORDED)
        position = jax.device_put(np.int32(self.position), self.placement.sharding())

        def call() -> jax.Array:
            y, self.caches[first:] = run(self.state, self.caches[first:], x, position)
            return y

        return timed_us(call, STEPS, self.options.turns) / self.options.layers

    def _moe_weights(self, path: str) -> tuple[list[Any], Any]:
        """Experts' arrays of each layer, and their specs."""
        weights = [
            getattr(layer.moe, path).params() for layer in nnx.merge(self.graph, self.state).layers[1:]
        ]
        return weights, jax.tree.map(lambda _: SPEC if path == "experts" else P(), weights)

    def experts_us(self) -> tuple[float, float]:
        """Of a layer: microseconds, and bytes of weights that a rank reads in them."""
        weights, specs = self._moe_weights("experts")
        load = make_load(self.shape(None), self.mesh)
        model = self.model(Contender("rows"))
        with model.placement.ep as ep:

            def lay_out(x: Any, indices: Any, w: Any) -> Any:
                batch, _ = ep.dispatch(x, indices[0], w[0])
                return batch.values, batch.group_sizes

            mapped = compiled(Ours(ep), self.mesh, **RECORDED)
            rows, sizes = mapped(lay_out, (SPEC, STACK, STACK), (SPEC, SPEC))(
                load.x.astype(self.dtype), load.indices, load.weights
            )
            jax.block_until_ready(sizes)

        def chain(rows: jax.Array, sizes: jax.Array, weights: list[Any]) -> jax.Array:
            for layer in weights:
                rows = apply_experts(layer, rows, sizes)
            return rows

        def error(rows: jax.Array, sizes: jax.Array, layer: Any) -> jax.Array:
            # The last row of all belongs to the last expert that has any, far back in the weights.
            last, expert = sizes.sum() - 1, jnp.max(jnp.where(sizes > 0, jnp.arange(len(sizes)), 0))
            alone = apply_experts(jax.tree.map(lambda a: a[expert], layer), rows[last][None], None)[0]
            found = apply_experts(layer, rows, sizes)[last]
            off, size = (jnp.abs(a.astype(jnp.float32)).max() for a in (found - alone, alone))
            return (off / size)[None]

        wrong = float(mapped(error, (SPEC, SPEC, specs[0]), SPEC)(rows, sizes, weights[0]).max())
        if not wrong < 0.05:
            raise AssertionError(f"the grouped product is wrong by {wrong:.3g} of the largest")
        run = mapped(chain, (SPEC, SPEC, specs), SPEC)
        used = float((np.asarray(sizes) > 0).sum()) / self.mesh.size
        expert = 3 * self.config.hidden_size * self.config.moe_intermediate_size
        bytes_read = used * expert * jnp.dtype(self.dtype).itemsize
        return self._per_layer_us(run, rows, sizes, weights), bytes_read

    def shared_us(self) -> float:
        """Of a layer."""
        weights, specs = self._moe_weights("shared")

        def chain(x: jax.Array, weights: list[Any]) -> jax.Array:
            for layer in weights:
                x = apply_experts(layer, x, None)
            return x

        spread = self.placement.sharding("ep", None)
        shape = (self.batch, self.config.hidden_size)
        x = hashed(4, jax.ShapeDtypeStruct(shape, self.dtype, sharding=spread), 1)
        whole = jax.shard_map(chain, mesh=self.mesh, in_specs=(SPEC, specs), out_specs=SPEC)
        return self._per_layer_us(jax.jit(whole, compiler_options=RECORDED), x, weights)

    def shape(self, quant: str | None) -> Shape:
        """What a layer exchanges."""
        config = self.config
        return Shape(
            self.options.tokens,
            quant,
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            self.mesh.size,
        )

    def exchange_us(self, quant: str | None, *, ragged: bool) -> tuple[float, float]:
        """Dispatch and combine."""
        shape = self.shape(quant)
        load = make_load(shape, self.mesh)
        load.x = load.x.astype(self.dtype)
        with contextlib.ExitStack() as stack:
            if ragged:
                contender: Any = Ragged(shape)
            else:
                model = self.model(Contender(f"alone-{quant}", quant=quant))
                contender = Ours(stack.enter_context(model.placement.ep))
            only = ("dispatch", "combine")
            found = measure(contender, self.mesh, load, self.options.turns, only=only, options=RECORDED)
        return tuple(found[stage] for stage in only)  # type: ignore[return-value]
