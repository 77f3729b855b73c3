"""The decoder that all families share: embedding, blocks of attention and MLP or experts, norm, head.

A family gives its attention; see `pplx_jax.models.deepseek.modeling`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pplx_jax.flax import MoEAux, name_layers
from pplx_jax.models.cache import LayerCache
from pplx_jax.models.config import DecoderConfig
from pplx_jax.models.errors import ModelError
from pplx_jax.models.layers import MLP, ExpertLayer, Matrix, RMSNorm
from pplx_jax.models.sharding import Placement


class Attention(Protocol):
    """What a family's attention does, from [B, S, H] to [B, S, H]."""

    def cache(self, batch: int, length: int) -> LayerCache:
        """An empty cache."""

    def __call__(
        self, x: jax.Array, cache: LayerCache | None, position: jax.Array | int
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends tokens to themselves and those before them; returns the cache with them."""


@partial(jax.tree_util.register_dataclass, data_fields=("loads", "copies", "dropped", "ok"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What an MoE layer's exchange did in a step, over all ranks.

    Attributes:
      loads: int32 [E], choices that fell on each expert.
      copies: int32 [], rows that dispatch carried: a token counts once for each rank that hosts some of its
        experts, its own rank included.
      dropped: int32 [], choices that found no room.
      ok: int32 [], 0 if the exchange failed.
    """

    loads: jax.Array
    copies: jax.Array
    dropped: jax.Array
    ok: jax.Array


def check_tokens(config: DecoderConfig, tokens: Any, length: int) -> None:
    """Whether these are tokens, and as many fit a model's context.

    Args:
      config: of the model.
      tokens: integers [B, S].
      length: tokens of each sequence in all, with those to come.

    Raises:
      ModelError: they aren't, or don't.
    """
    if getattr(tokens, "ndim", None) != 2 or not np.issubdtype(tokens.dtype, np.integer):
        what = f"{tokens.dtype} {list(tokens.shape)}" if hasattr(tokens, "dtype") else type(tokens).__name__
        raise ModelError(f"tokens must be integers [B, S], got {what}")
    if 0 in tokens.shape:
        raise ModelError(f"tokens must be at least one sequence of one token, got {list(tokens.shape)}")
    limit = config.max_position_embeddings
    if length > limit:
        raise ModelError(
            f"{length} tokens exceed the model's context of {limit} (max_position_embeddings): "
            f"shorten the prompt or max_new_tokens"
        )


def check_range(config: DecoderConfig, tokens: Any) -> None:
    """Whether tokens are of a model's vocabulary. Not of an array whose parts lie on several processes: one
    that raised by its part would leave the others waiting.

    Raises:
      ModelError: some aren't.
    """
    if isinstance(tokens, jax.Array) and not (tokens.is_fully_addressable or tokens.is_fully_replicated):
        return
    whole = np.asarray(tokens)
    if whole.size and (whole.min() < 0 or whole.max() >= config.vocab_size):
        raise ModelError(
            f"tokens must be from 0 to {config.vocab_size - 1}, got {whole.min()} to {whole.max()}: "
            f"do they come from this model's tokenizer?"
        )


class Block(nnx.Module):  # type: ignore[misc]
    """Attention, then an MLP or experts, each on the normalised residual stream.

    Args:
      config: sizes.
      layer: its number, from 0.
      attention: the family's.
      rngs: Flax's generators.
      placement: where and in which dtype.
    """

    moe: ExpertLayer | None
    mlp: MLP | None

    def __init__(
        self, config: DecoderConfig, layer: int, attention: Any, *, rngs: nnx.Rngs, placement: Placement
    ) -> None:
        self.placement = placement
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement.dtype)
        self.attention = attention
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement.dtype)
        if config.is_moe(layer):
            self.moe, self.mlp = ExpertLayer(config, rngs=rngs, placement=placement), None
        else:
            self.moe = None
            self.mlp = MLP(config.hidden_size, config.intermediate_size, rngs=rngs, placement=placement)

    def __call__(
        self,
        x: jax.Array,
        cache: LayerCache | None,
        position: jax.Array | int,
        mask: jax.Array | None,
        report: bool,
    ) -> tuple[jax.Array, LayerCache | None, LayerReport | None]:
        """Applies the block to [B, S, H]; tokens that the mask [B, S] leaves out reach no expert."""
        y, cache = self.attention(self.attention_norm(x), cache, position)
        x = x + y
        h = self.mlp_norm(x)
        result = None
        if self.moe is None:
            assert self.mlp is not None
            y = self.mlp(h)
        else:
            y, aux = self.moe(h, mask=mask, return_routing=report)
            result = self._report(aux) if report else None
        x = x + y
        return self.placement.constrain(x, self.placement.batch(x.shape[0]), None, None), cache, result

    def _report(self, aux: MoEAux) -> LayerReport:
        assert aux.routing is not None
        per_rank = -(-aux.expert_loads.shape[0] // self.placement.size("ep"))
        ranks = jnp.where(aux.routing.indices < 0, -1, aux.routing.indices // per_rank)
        hosts = ranks[..., None] == jnp.arange(self.placement.size("ep"))
        copies = hosts.any(axis=-2).sum(dtype=jnp.int32)
        return LayerReport(aux.expert_loads, copies, aux.num_dropped, aux.ok)


class Decoder(nnx.Module):  # type: ignore[misc]
    """A causal language model with MoE layers.

    Called with concrete tokens it runs compiled, on its mesh, and is done when it returns; called under
    ``jax.jit`` or ``nnx.jit`` it is part of that program, which checks neither that tokens are of the
    vocabulary nor that exchanges went well: ``model.placement.check()`` says the latter once it has run.
    Processes of a mesh call it alike, each with all tokens.

    Args:
      config: sizes.
      rngs: Flax's generators; parameters are random until loaded.
      placement: where and in which dtype; see `pplx_jax.models.from_pretrained`.
    """

    config_class: ClassVar[type[DecoderConfig]]

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, placement: Placement) -> None:
        self.config, self.placement = config, placement
        vocab, hidden = config.vocab_size, config.hidden_size
        table = jax.nn.initializers.normal(0.02)(rngs.params(), (vocab, hidden), jnp.float32)
        self.embedding = nnx.Param(
            table.astype(placement.dtype), **placement.metadata(None, placement.tp(hidden))
        )
        self.layers = nnx.List(
            [
                Block(
                    config,
                    layer,
                    self.make_attention(config, rngs=rngs, placement=placement),
                    rngs=rngs,
                    placement=placement,
                )
                for layer in range(config.num_hidden_layers)
            ]
        )
        self.norm = RMSNorm(hidden, config.rms_norm_eps, placement.dtype)
        if config.tie_word_embeddings:
            self.head = None
        else:
            spec = (None, placement.tp(vocab))
            self.head = Matrix(hidden, vocab, spec, rngs=rngs, placement=placement, quantized=False)
        name_layers(self)

    def make_attention(self, config: Any, *, rngs: nnx.Rngs, placement: Placement) -> Any:
        """One layer's attention, see `Attention`."""
        raise NotImplementedError

    def __call__(self, tokens: Any) -> jax.Array:
        """Predicts each next token.

        Args:
          tokens: integers [B, S], the same in every process; S at most max_position_embeddings.

        Returns:
          float32 [B, S, V]: logits[:, i] for the token after tokens[:, i].

        Raises:
          ModelError: tokens have another shape or dtype, aren't of the vocabulary, or are more than the
            model's context.
          PplxError: an exchange failed, see `pplx_jax.ExpertParallel.check`.
        """
        if isinstance(tokens, jax.core.Tracer):
            check_tokens(self.config, tokens, tokens.shape[1] if tokens.ndim == 2 else 0)
            logits, _, _ = self.step(tokens, None, 0)
            return logits
        from pplx_jax.models.programs import Programs  # a compiled step needs this module

        return Programs.of(self).forward(self, tokens)

    def caches(self, batch: int, length: int) -> list[LayerCache]:
        """Empty caches of all layers for ``length`` tokens of each of ``batch`` sequences."""
        return [block.attention.cache(batch, length) for block in self.layers]

    def step(
        self,
        tokens: jax.Array,
        caches: list[LayerCache] | None,
        position: jax.Array | int,
        *,
        num_tokens: jax.Array | None = None,
        last: bool = False,
        report: bool = False,
    ) -> tuple[jax.Array, list[LayerCache] | None, list[LayerReport]]:
        """Some tokens of each sequence, under jit.

        Args:
          tokens: integers [B, S], at ``position`` and after it.
          caches: of the tokens before, or None: there are none, and none are kept.
          position: int32 scalar.
          num_tokens: int32 scalar: tokens at and past it are padding; they reach no expert, and what the
            caches hold of them is overwritten before anybody looks at it. None: none are.
          last: logits of the last token that is no padding only.
          report: whether to report about the layers' exchanges.

        Returns:
          (logits, caches, reports): float32 [B, S, V] or, with ``last``, [B, V]; the caches with these
          tokens; a report for each MoE layer, or none.
        """
        batch, length = tokens.shape
        mask = None
        if num_tokens is not None:
            mask = jnp.broadcast_to(jnp.arange(length) < num_tokens, (batch, length))
        x = self.embedding[...][tokens]
        x = self.placement.constrain(x, self.placement.batch(batch), None, None)
        kept: list[LayerCache] = []
        reports: list[LayerReport] = []
        for number, block in enumerate(self.layers):
            cache = None if caches is None else caches[number]
            x, cache, result = block(x, cache, position, mask, report)
            if cache is not None:
                kept.append(cache)
            if result is not None:
                reports.append(result)
        if last:
            at = length - 1 if num_tokens is None else num_tokens - 1
            final = jax.lax.dynamic_index_in_dim(x, at, axis=1, keepdims=False)
            if self.placement.several_groups:
                # An exchange of another group may have failed for tokens that the last doesn't look back to.
                final = jnp.where(jnp.isnan(x).any(), jnp.nan, final)
            x = final
        x = self.norm(x)
        weights = self.embedding[...].T if self.head is None else self.head.value()
        logits = jnp.dot(x, weights, preferred_element_type=jnp.float32)
        # Said here, or the partitioner may gather the head's weights to make logits that are whole.
        middle = (None,) * (logits.ndim - 2)
        tp = self.placement.tp(self.config.vocab_size)
        logits = self.placement.constrain(logits, self.placement.batch(batch), *middle, tp)
        return logits, (kept if caches is not None else None), reports
