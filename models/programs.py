"""A model's compiled programs: forward, prefill of a chunk, decoding of a token.

They are compiled once for each shape and kept with the model, so that a step costs one call.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pplx_jax.errors import PplxError
from pplx_jax.models.cache import LayerCache
from pplx_jax.models.decoder import Decoder, LayerReport, check_range, check_tokens
from pplx_jax.models.errors import ModelError
from pplx_jax.models.sampling import sample

#: Logits are below 1e8, float32's largest number is 3e38.
_COLDEST = 1e-30


def failed_elsewhere() -> PplxError:
    """Of NaN that this process's own groups have not failed with."""
    return PplxError(
        "the model's logits are NaN, and no exchange of this process has failed: one of another group of its "
        "mesh did, whose ranks say why, or weights are NaN"
    )


class Programs:
    """The programs of one model; `of` gives them. Parameters are passed at each call, so a model may learn.

    Args:
      model: a decoder; only its structure is kept.
    """

    _known: ClassVar[weakref.WeakKeyDictionary[Decoder, Programs]] = weakref.WeakKeyDictionary()

    def __init__(self, model: Decoder) -> None:
        placement = self.placement = model.placement
        graph, _ = nnx.split(model)
        replicated = model.placement.sharding()

        @jax.jit
        def forward(state: Any, tokens: jax.Array) -> jax.Array:
            logits: jax.Array = nnx.merge(graph, state).step(tokens, None, 0)[0]
            return placement.constrain(logits)

        @partial(jax.jit, static_argnums=(1, 2))
        def caches(state: Any, batch: int, length: int) -> list[LayerCache]:
            made: list[LayerCache] = nnx.merge(graph, state).caches(batch, length)
            return made

        @partial(jax.jit, static_argnames=("report",), donate_argnames=("caches",))
        def step(
            state: Any,
            caches: list[LayerCache],
            tokens: jax.Array,
            position: jax.Array,
            num_tokens: jax.Array | None,
            options: tuple[jax.Array, jax.Array, jax.Array] | None,
            report: bool,
        ) -> tuple[jax.Array, list[LayerCache], list[LayerReport]]:
            logits, caches, reports = nnx.merge(graph, state).step(
                tokens, caches, position, num_tokens=num_tokens, last=True, report=report
            )
            # Each rank draws for its own sequences; only the tokens are gathered.
            if options is None:
                chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            else:
                key, temperature, top_p = options
                chosen = sample(logits, jax.random.fold_in(as_key(key), position), temperature, top_p)
            if placement.several_groups:
                # What failed in one group all processes have to hear of: they would go on without its ranks.
                chosen = jnp.where(jnp.isnan(logits).any(axis=-1), -1, chosen)
            return placement.constrain(chosen), caches, reports

        self._forward, self._caches, self._step = forward, caches, step
        self._replicated = replicated

    @classmethod
    def of(cls, model: Decoder) -> Programs:
        """The model's own, made at the first call."""
        found = cls._known.get(model)
        if found is None:
            found = cls._known[model] = cls(model)
        return found

    def place(self, value: Any) -> jax.Array:
        """A value that all processes have, on all devices of the mesh."""
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            return value
        array = np.asarray(value)
        return jax.make_array_from_callback(array.shape, self._replicated, lambda index: array[index])

    def forward(self, model: Decoder, tokens: Any) -> jax.Array:
        """Logits float32 [B, S, V] of tokens [B, S], on every device; done where experts are spread."""
        if not isinstance(tokens, jax.Array):
            tokens = np.asarray(tokens)
        check_tokens(model.config, tokens, tokens.shape[1] if tokens.ndim == 2 else 0)
        check_range(model.config, tokens)
        most = self.placement.longest(tokens.shape[0])
        if most is not None and self.placement.ep is not None and tokens.shape[1] > most:
            needed = -(-tokens.size // self.placement.size("dp", "ep"))
            raise ModelError(
                f"{tokens.shape[0]} sequences of {tokens.shape[1]} tokens are {needed} on each rank, more "
                f"than the {self.placement.ep.config.max_tokens} that the model was loaded for: give "
                f"from_pretrained max_tokens={needed}, or use generate, which goes in chunks"
            )
        if self.placement.ep is None:
            plain: jax.Array = self._forward(nnx.state(model), self.place(tokens))
            return plain
        with self.placement.checking():
            logits: jax.Array = self._forward(nnx.state(model), self.place(tokens))
            jax.block_until_ready(logits)
        if self.placement.several_groups and np.isnan(np.asarray(logits.addressable_data(0)[..., 0])).any():
            raise failed_elsewhere()
        return logits

    def caches(self, model: Decoder, batch: int, length: int) -> list[LayerCache]:
        """Empty caches."""
        made: list[LayerCache] = self._caches(nnx.state(model), batch, length)
        return made

    def step(
        self,
        state: Any,
        caches: list[LayerCache],
        tokens: Any,
        position: int,
        *,
        num_tokens: int | None = None,
        options: tuple[jax.Array, jax.Array, jax.Array] | None = None,
        report: bool = False,
    ) -> tuple[jax.Array, list[LayerCache], list[LayerReport]]:
        """A chunk of a prompt, or one token of each sequence.

        Args:
          state: ``nnx.state(model)``.
          caches: of the tokens before; donated.
          tokens: integers [B, S].
          position: of the first.
          num_tokens: how many of S are no padding; None: all.
          options: key, temperature and top_p as `sampling_options` places them; None: greedy.
          report: whether to report about exchanges.

        Returns:
          (next, caches, reports): int32 [B], the next token, the same on every device; -1 where logits are
          NaN on a mesh with several groups of experts.
        """
        count = None if num_tokens is None else self.place(np.int32(num_tokens))
        out: tuple[jax.Array, list[LayerCache], list[LayerReport]] = self._step(
            state,
            caches,
            self.place(tokens),
            self.place(np.int32(position)),
            count,
            options,
            report,
        )
        return out

    def lowered_step(self, state: Any, caches: list[LayerCache], tokens: Any) -> Any:
        """The greedy program of `step` as ``jax.stages.Lowered``, to look into."""
        return self._step.lower(
            state, caches, self.place(tokens), self.place(np.int32(0)), None, None, report=False
        )

    def sampling_options(
        self, temperature: float, top_p: float, seed: int
    ) -> tuple[jax.Array, jax.Array, jax.Array] | None:
        """How to sample, as arrays, whose change compiles nothing; None at temperature 0, or so near to it
        that logits divided by it exceed float32."""
        if temperature < _COLDEST:
            return None
        key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        return (
            self.place(key),
            self.place(np.float32(temperature)),
            self.place(np.float32(top_p)),
        )


def as_key(data: jax.Array) -> jax.Array:
    """The key of `Programs.sampling_options`."""
    key: jax.Array = jax.random.wrap_key_data(jnp.asarray(data))
    return key
