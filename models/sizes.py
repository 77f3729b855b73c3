"""How many parameters a model has, and where they are."""

from __future__ import annotations

import dataclasses

from pplx_jax.models.config import DecoderConfig

#: Most tokens of a prompt that go through a model at once, unless told otherwise.
PREFILL_CHUNK = 512
#: Bytes of attention scores that these may make on a device, unless told otherwise.
PREFILL_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Counts of numbers, norms and biases left out (less than 0.01 %).

    Attributes:
      embedding, head: the table and the matrix that makes logits; 0 for a head that is tied.
      attention_split, attention_whole: of all layers' attention, what tp splits and what each rank holds.
      dense: MLPs of layers without experts.
      expert: one expert of one layer.
      shared: shared experts of all layers.
      router: of all layers.
      routed: experts of all layers.
      active: what one token meets; of the embedding a row.
    """

    embedding: int
    head: int
    attention_split: int
    attention_whole: int
    dense: int
    expert: int
    shared: int
    router: int
    routed: int
    active: int

    @property
    def attention(self) -> int:
        """Of all layers."""
        return self.attention_split + self.attention_whole

    @property
    def total(self) -> int:
        """All of them."""
        others = self.embedding + self.head + self.dense + self.shared + self.router
        return others + self.attention + self.routed


def parameters(config: DecoderConfig) -> Parameters:
    """The counts of a configuration."""
    hidden, layers, moe = config.hidden_size, config.num_hidden_layers, config.moe_layers
    split = whole = 0
    for inputs, outputs, how in config.attention_matrices().values():
        if how:
            split += inputs * outputs * layers
        else:
            whole += inputs * outputs * layers
    table = config.vocab_size * hidden
    expert = 3 * hidden * config.moe_intermediate_size
    counts = Parameters(
        embedding=table,
        head=0 if config.tie_word_embeddings else table,
        attention_split=split,
        attention_whole=whole,
        dense=3 * hidden * config.intermediate_size * (layers - moe),
        expert=expert,
        shared=expert * config.num_shared_experts * moe,
        router=hidden * config.num_experts * moe,
        routed=expert * config.num_experts * moe,
        active=0,
    )
    met = counts.dense + counts.shared + counts.router + counts.attention + table
    return dataclasses.replace(counts, active=met + expert * config.num_experts_per_tok * moe)


def score_bytes(config: DecoderConfig, batch: int, length: int, *, tp: int = 1) -> int:
    """Bytes of the float32 scores [B, heads / tp, 1, L] that a layer makes for one query of each sequence.

    Args:
      config: sizes.
      batch: B, sequences of a device.
      length: L, positions of the cache; all of them have scores, whether they are filled or not.
      tp: ranks that share the heads.
    """
    return batch * -(-config.num_attention_heads // tp) * length * 4


def prefill_chunk(config: DecoderConfig, batch: int, length: int, *, tp: int = 1) -> int:
    """The largest power of two, at most `PREFILL_CHUNK` and at least 1, of queries whose scores are at most
    `PREFILL_BYTES`; arguments as in `score_bytes`."""
    fitting = PREFILL_BYTES // score_bytes(config, batch, length, tp=tp)
    return min(PREFILL_CHUNK, 1 << max(fitting.bit_length() - 1, 0))
