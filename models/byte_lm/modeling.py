"""A decoder transformer over bytes: rotary positions, RMSNorm, causal attention, an MoE layer in each block.

It needs no tokeniser and no downloaded weights, so it serves as demo and test of the layer. B is the batch, S
the sequence length (at most the window, for training), V = 256 the vocabulary of bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from pplx_jax.flax import MoE, MoEAux, name_layers
from pplx_jax.router import ScoreFn

if TYPE_CHECKING:
    from pplx_jax.expert_parallel import ExpertParallel


@dataclasses.dataclass(frozen=True)
class ByteLMConfig:
    """Sizes of the model; frozen and hashable.

    Attributes:
      vocab: V, number of symbols.
      hidden: H, a multiple of 2 * heads.
      layers: number of blocks.
      heads: attention heads.
      intermediate: inner size of an expert.
      num_experts, top_k: E and K of each block's MoE layer.
      shared_experts: see `pplx_jax.flax.MoE`.
      router: "softmax" or "sigmoid" scores.
      window: bytes that the model looks at.
      rope_theta: base of the rotary frequencies.
      balance_coef, z_coef: factors of the MoE layers' mean balancing and z losses in `loss_fn`.
      dtype: what blocks compute in; parameters are float32.
    """

    vocab: int = 256
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    intermediate: int = 256
    num_experts: int = 8
    top_k: int = 2
    shared_experts: int = 0
    router: ScoreFn = "softmax"
    window: int = 128
    rope_theta: float = 10_000.0
    balance_coef: float = 1e-2
    z_coef: float = 1e-3
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name in ("vocab", "hidden", "layers", "heads", "intermediate", "window"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden must be a multiple of 2 * heads = {2 * self.heads}, got {self.hidden}")
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    @classmethod
    def tiny(cls) -> ByteLMConfig:
        """Sizes for tests: compiles and steps in moments."""
        return cls(hidden=32, layers=2, heads=2, intermediate=48, num_experts=4, window=32)


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) on x [B, S, heads, D], in float32."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):  # type: ignore[misc]
    """Causal self-attention, [B, S, H] to [B, S, H]."""

    def __init__(self, config: ByteLMConfig, *, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=config.dtype, rngs=rngs)
        self.config = config
        self.qkv = linear(config.hidden, 3 * config.hidden)
        self.out = linear(config.hidden, config.hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attends each position to itself and those before it."""
        batch, length, hidden = x.shape
        heads = (batch, length, 3, self.config.heads, hidden // self.config.heads)
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(heads), 2, 0)
        theta = self.config.rope_theta
        y = jax.nn.dot_product_attention(rotate(q, theta), rotate(k, theta), v, is_causal=True)
        out: jax.Array = self.out(y.reshape(batch, length, hidden))
        return out


class Block(nnx.Module):  # type: ignore[misc]
    """Attention and an MoE layer, each on the normalised residual stream."""

    def __init__(self, config: ByteLMConfig, *, rngs: nnx.Rngs, ep: ExpertParallel | None) -> None:
        norm = functools.partial(nnx.RMSNorm, config.hidden, dtype=config.dtype, rngs=rngs)
        self.attention_norm = norm()
        self.attention = Attention(config, rngs=rngs)
        self.moe_norm = norm()
        self.moe = MoE(
            config.hidden,
            config.intermediate,
            config.num_experts,
            config.top_k,
            rngs=rngs,
            ep=ep,
            router=config.router,
            shared_experts=config.shared_experts,
            dtype=config.dtype,
        )

    def __call__(self, x: jax.Array) -> tuple[jax.Array, MoEAux]:
        """Applies the block to [B, S, H]."""
        x = x + self.attention(self.attention_norm(x))
        y, aux = self.moe(self.moe_norm(x))
        return x + y, aux


class ByteLM(nnx.Module):  # type: ignore[misc]
    """The model.

    Args:
      config: its sizes.
      rngs: Flax's generators; the stream "params" is used.
      ep: the group over which every block's experts are sharded, or None for dense layers.
    """

    def __init__(self, config: ByteLMConfig, *, rngs: nnx.Rngs, ep: ExpertParallel | None = None) -> None:
        self.config = config
        self.embed = nnx.Embed(config.vocab, config.hidden, dtype=config.dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs, ep=ep) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.hidden, dtype=config.dtype, rngs=rngs)
        self.head = nnx.Linear(config.hidden, config.vocab, use_bias=False, dtype=config.dtype, rngs=rngs)
        name_layers(self)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, list[MoEAux]]:
        """Predicts each next byte.

        Args:
          tokens: integers [B, S].

        Returns:
          (logits, aux): float32 [B, S, V], logits[:, i] for the byte after tokens[:, i]; each block's
          `MoEAux`.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers [B, S], got {tokens.dtype} {tuple(tokens.shape)}")
        x = self.embed(tokens)
        reports = []
        for block in self.blocks:
            x, aux = block(x)
            reports.append(aux)
        return self.head(self.norm(x)).astype(jnp.float32), reports


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("nats_per_byte", "load_balance_loss", "z_loss", "ok"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Metrics:
    """What `loss_fn` reports: scalars, the losses float32 and means over the blocks.

    Attributes:
      nats_per_byte: the cross entropy.
      load_balance_loss, z_loss: of the MoE layers.
      ok: int32, 0 if an exchange failed on any rank: a training step must then keep its old state.
    """

    nats_per_byte: jax.Array
    load_balance_loss: jax.Array
    z_loss: jax.Array
    ok: jax.Array


def loss_fn(model: ByteLM, tokens: jax.Array) -> tuple[jax.Array, Metrics]:
    """Mean cross entropy of each byte after the first, plus the MoE layers' losses.

    Args:
      model: the model.
      tokens: integers [B, S + 1].

    Returns:
      (loss, metrics): float32 [], what to minimise; its parts.
    """
    logits, reports = model(tokens[:, :-1])
    targets = tokens[:, 1:].astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jnp.mean(jax.scipy.special.logsumexp(logits, axis=-1) - chosen)
    balance = jnp.mean(jnp.stack([aux.load_balance_loss for aux in reports]))
    z = jnp.mean(jnp.stack([aux.z_loss for aux in reports]))
    ok = jnp.min(jnp.stack([aux.ok for aux in reports]))
    loss = nats + model.config.balance_coef * balance + model.config.z_coef * z
    return loss, Metrics(nats, balance, z, ok)


@nnx.jit  # type: ignore[untyped-decorator]
def _sample_next(
    model: ByteLM, window: jax.Array, position: jax.Array, key: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One sampled byte [B] after the first `position` bytes of each row, and the window with it appended."""
    width = window.shape[1]
    logits, _ = model(window)
    last = jax.lax.dynamic_index_in_dim(logits, position - 1, axis=1, keepdims=False)
    sampled = jax.random.categorical(key, last / jnp.maximum(temperature, 1e-6))
    chosen = jnp.where(temperature > 0, sampled, jnp.argmax(last, axis=-1)).astype(window.dtype)
    # A full window moves on by one byte.
    shifted = jnp.where(position < width, window, jnp.roll(window, -1, axis=1))
    return shifted.at[:, jnp.minimum(position, width - 1)].set(chosen), chosen


def generate(
    model: ByteLM, prompt: jax.Array, length: int, *, key: jax.Array, temperature: float = 0.8
) -> jax.Array:
    """Continues each prompt by `length` bytes. Every process of the model's mesh must call it alike.

    The model sees the last `config.window` bytes; bytes behind the current position are padding, which causal
    attention never looks at. There is no cache: each byte costs a forward pass over the window.

    Args:
      model: the model.
      prompt: integers [B, P], 1 <= P <= window; a global array, sharded in any way.
      length: bytes to add, at least 0.
      key: a PRNG key, the same on every process.
      temperature: divides the logits; 0 takes the likeliest byte.

    Returns:
      Integers [B, length] of prompt's dtype, sharded as the compiler likes.
    """
    width = model.config.window
    if prompt.ndim != 2 or not 1 <= prompt.shape[1] <= width:
        raise ValueError(f"prompt must have shape [B, P] with 1 <= P <= {width}, got {tuple(prompt.shape)}")
    if not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise TypeError(f"prompt must hold integers, got {prompt.dtype}")
    if not isinstance(length, int) or length < 0:
        raise ValueError(f"length must be an int of at least 0, got {length!r}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature!r}")
    window = jnp.pad(prompt, ((0, 0), (0, width - prompt.shape[1])))
    chosen = []
    for i in range(length):
        position = jnp.int32(min(prompt.shape[1] + i, width))
        window, byte = _sample_next(
            model, window, position, jax.random.fold_in(key, i), jnp.float32(temperature)
        )
        # Programs queued without a pause can starve each other of threads on CPU.
        chosen.append(jax.block_until_ready(byte))
    return jnp.stack(chosen, axis=1) if chosen else prompt[:, :0]
