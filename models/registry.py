"""The families, by the names that configurations use, and published checkpoints by short names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pplx_jax.models.config import DecoderConfig
from pplx_jax.models.decoder import Decoder
from pplx_jax.models.deepseek import DeepSeek, DeepSeekConfig
from pplx_jax.models.deepseek import params as deepseek_params
from pplx_jax.models.errors import ModelError
from pplx_jax.models.mixtral import Mixtral, MixtralConfig
from pplx_jax.models.mixtral import params as mixtral_params
from pplx_jax.models.qwen3_moe import Qwen3Moe, Qwen3MoeConfig
from pplx_jax.models.qwen3_moe import params as qwen3_moe_params
from pplx_jax.models.sources import Source


class ParamSources(Protocol):
    """A family's map from parameters to tensors."""

    def __call__(self, config: Any, *, fused: bool = ...) -> dict[str, Source]:
        """The source of every parameter, by its path."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      model: its class.
      from_hf: from a config.json to its configuration.
      param_sources: from that to where parameters come from, experts fused or one by one.
      ignored: from that to tensors that are passed over.
    """

    model: type[Decoder]
    from_hf: Callable[[Mapping[str, Any]], Any]
    param_sources: ParamSources
    ignored: Callable[[Any], re.Pattern[str]]


_DEEPSEEK = Family(DeepSeek, DeepSeekConfig.from_hf, deepseek_params.param_sources, deepseek_params.ignored)
#: By config.json's ``model_type``. Kimi K2's is its own, its architecture DeepSeek-V3's.
FAMILIES: Mapping[str, Family] = {
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "qwen3_moe": Family(
        Qwen3Moe, Qwen3MoeConfig.from_hf, qwen3_moe_params.param_sources, qwen3_moe_params.ignored
    ),
    "mixtral": Family(Mixtral, MixtralConfig.from_hf, mixtral_params.param_sources, mixtral_params.ignored),
}

#: Configurations of published checkpoints.
PUBLISHED: Mapping[str, Callable[[], DecoderConfig]] = {
    "deepseek-v3": DeepSeekConfig.deepseek_v3,
    "deepseek-v3.1": DeepSeekConfig.deepseek_v3_1,
    "deepseek-r1": DeepSeekConfig.deepseek_r1,
    "kimi-k2": DeepSeekConfig.kimi_k2,
    "kimi-k2-0905": DeepSeekConfig.kimi_k2_0905,
    "qwen3-30b-a3b": Qwen3MoeConfig.qwen3_30b_a3b,
    "qwen3-30b-a3b-2507": Qwen3MoeConfig.qwen3_30b_a3b_2507,
    "qwen3-235b-a22b": Qwen3MoeConfig.qwen3_235b_a22b,
    "qwen3-235b-a22b-2507": Qwen3MoeConfig.qwen3_235b_a22b_2507,
    "qwen3-coder-480b-a35b": Qwen3MoeConfig.qwen3_coder_480b_a35b,
    "mixtral-8x7b": MixtralConfig.mixtral_8x7b,
    "mixtral-8x22b": MixtralConfig.mixtral_8x22b,
    "mixtral-8x22b-instruct": MixtralConfig.mixtral_8x22b_instruct,
}


#: Those of them whose weights are float8 in blocks of 128 x 128.
PUBLISHED_FLOAT8 = frozenset({"deepseek-v3", "deepseek-v3.1", "deepseek-r1", "kimi-k2", "kimi-k2-0905"})


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
      ModelError: it is none of those known.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    architectures = ", ".join(map(str, config.get("architectures") or ())) or "none"
    raise ModelError(
        f"config.json has model_type={kind!r} (architectures: {architectures}), which is not supported; "
        f"supported are {', '.join(FAMILIES)}: give a checkpoint of one of these"
    )


def family_of_config(config: DecoderConfig) -> Family:
    """The family of a configuration."""
    for family in FAMILIES.values():
        if type(config) is family.model.config_class:
            return family
    raise ModelError(f"config must be one of a family's own, got {type(config).__name__}")
