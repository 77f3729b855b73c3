"""What all families' configurations have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pplx_jax.models.errors import ModelError
from pplx_jax.models.rope import Rope, number


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a layer chooses experts; see `pplx_jax.router.route`."""

    score_fn: Literal["softmax", "sigmoid"]
    normalize: bool
    selection_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder with MoE layers. Frozen and hashable; names are those of config.json.

    Attributes:
      vocab_size: V.
      hidden_size: H.
      num_hidden_layers: layers.
      num_attention_heads: query heads, over all tp ranks.
      intermediate_size: inner size of dense layers' MLP.
      moe_intermediate_size: I, inner size of an expert.
      num_experts: E, routed experts of a layer.
      num_experts_per_tok: K.
      num_shared_experts: experts that every token passes.
      rms_norm_eps: of the norms on the residual stream.
      max_position_embeddings: longest context, tokens; where YaRN stretches it, the stretched one.
      rope: rotary positions.
      tie_word_embeddings: whether the head is the embedding's transpose.
      eos_token_ids: tokens that end a text.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int = 0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    rope: Rope = dataclasses.field(default_factory=Rope)
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                least = 0 if field.name in self._may_be_zero() else 1
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise ModelError(f"{field.name} must be an int of at least {least}, got {value!r}")
        if self.num_experts_per_tok > self.num_experts:
            raise ModelError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {self.num_experts} experts"
            )

    @classmethod
    def _may_be_zero(cls) -> tuple[str, ...]:
        return ("num_shared_experts",)

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts; else it has a dense MLP."""
        return True

    @property
    def router(self) -> RouterConfig:
        """Of the MoE layers."""
        raise NotImplementedError

    @property
    def cache_elements(self) -> int:
        """Numbers that a layer's cache keeps for one token, over all tp ranks."""
        raise NotImplementedError

    @property
    def cache_splits(self) -> int:
        """Into how many parts, at most, tp can split them; 1: it can't."""
        raise NotImplementedError

    @property
    def attention_flops(self) -> int:
        """Operations of a layer's attention for one query and one cached token, besides matrices."""
        raise NotImplementedError

    def attention_matrices(self) -> dict[str, tuple[int, int, Literal["in", "out", ""]]]:
        """A layer's matrices by name: inputs, outputs, and which of the two tp splits."""
        raise NotImplementedError

    @property
    def moe_layers(self) -> int:
        """How many layers have experts."""
        return sum(self.is_moe(layer) for layer in range(self.num_hidden_layers))


def required(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """These fields of a config.json, all ints.

    Raises:
      ModelError: some are missing, and it names all of them; or one is no int.
    """
    names = tuple(names)
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise ModelError(f"config.json lacks {', '.join(missing)}: is it the checkpoint's own?")
    for name in names:
        if type(config[name]) is not int:
            raise ModelError(f"config.json has {name}={config[name]!r}, which must be an int")
    return {name: config[name] for name in names}


def end_tokens(value: Any, file: str = "config.json") -> tuple[int, ...]:
    """``eos_token_id`` of a file: an int, several, or None.

    Raises:
      ModelError: it is something else.
    """
    several = () if value is None else value if isinstance(value, (list, tuple)) else (value,)
    if not all(type(token) is int for token in several):
        raise ModelError(f"{file} has eos_token_id={value!r}, which must be an int or a list of ints")
    return tuple(several)


def common(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every family's config.json has under the same name.

    Raises:
      ModelError: something is missing, or asks for what isn't built.
    """
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"hidden_act={activation!r} is not supported, only 'silu'")
    if config.get("attention_bias"):
        raise ModelError("attention_bias=true is not supported: no published checkpoint of the family has it")
    sizes = required(
        config,
        ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    )
    rope = Rope.from_hf(config)
    context = number(config, "max_position_embeddings", 4096)
    if rope.yarn is not None:
        # Cards say to add YaRN to config.json, and leave the context as it is.
        context = max(context, rope.yarn.factor * rope.yarn.original_max_position_embeddings)
    return {
        **sizes,
        "num_experts_per_tok": required(config, ["num_experts_per_tok"])["num_experts_per_tok"],
        "rms_norm_eps": number(config, "rms_norm_eps", 1e-6),
        "max_position_embeddings": int(context),
        "rope": rope,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "eos_token_ids": end_tokens(config.get("eos_token_id")),
    }
