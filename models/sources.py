"""Which tensors of a checkpoint a model's parameters are made of.

A family's ``params.py`` maps paths of parameters, such as "layers.0.attention.out.kernel", to sources.
Hugging Face stores a matrix as [outputs, inputs]; here it is [inputs, outputs], and experts are stacked.
Experts are stored one by one, or "fused", as transformers 5 has them in memory: one tensor for all experts of
a layer, gate and up one after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from pplx_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one parameter comes from.

    Attributes:
      names: of the tensors; several are stacked on a leading axis.
      transposed: whether their two axes are swapped.
      stacked: whether the parameter has that leading axis.
      fused: (part, parts) of a single tensor that has the leading axis too: the parameter is this one of the
        equal parts of its next axis; or None.
    """

    names: tuple[str, ...]
    transposed: bool = False
    stacked: bool = False
    fused: tuple[int, int] | None = None

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each tensor, where the parameter has this one."""
        experts, shape = (shape[:1], shape[1:]) if self.stacked else ((), shape)
        shape = shape[::-1] if self.transposed else shape
        if self.fused is None:
            return shape
        return (*experts, shape[0] * self.fused[1], *shape[1:])

    def with_suffix(self, suffix: str) -> Source:
        """The tensors of these names with something appended."""
        return dataclasses.replace(self, names=tuple(name + suffix for name in self.names))


def vector(name: str) -> Source:
    """A tensor as it is."""
    return Source((name,))


def matrix(name: str) -> Source:
    """A matrix's weight."""
    return Source((f"{name}.weight",), transposed=True)


def mlp(path: str, name: str) -> dict[str, Source]:
    """A gated MLP's."""
    return {f"{path}.{part}.kernel": matrix(f"{name}.{part}_proj") for part in ("gate", "up", "down")}


def experts(path: str, name: str, count: int, parts: Mapping[str, str]) -> dict[str, Source]:
    """Stacked experts'.

    Args:
      path: of the MoE layer.
      name: of the experts in the checkpoint, before their number.
      count: E.
      parts: name of a part in the checkpoint for each of gate, up and down.
    """
    return {
        f"{path}.experts.{part}": Source(
            tuple(f"{name}.{expert}.{parts[part]}.weight" for expert in range(count)),
            transposed=True,
            stacked=True,
        )
        for part in ("gate", "up", "down")
    }


HF_PARTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def fused_experts(path: str, name: str) -> dict[str, Source]:
    """Experts of one layer in two tensors; arguments as in `experts`."""
    parts = {"gate": ("gate_up_proj", 0, 2), "up": ("gate_up_proj", 1, 2), "down": ("down_proj", 0, 1)}
    return {
        f"{path}.experts.{part}": Source((f"{name}.{tensor}",), transposed=True, stacked=True, fused=(at, of))
        for part, (tensor, at, of) in parts.items()
    }


def is_fused(tensors: Iterable[str]) -> bool:
    """Whether a checkpoint with tensors of these names has fused experts."""
    return any(name.endswith(".experts.gate_up_proj") for name in tensors)


def decoder(
    config: DecoderConfig,
    attention: Callable[[str, str], Mapping[str, Source]],
    feed_forward: Callable[[int, str, str], Mapping[str, Source]],
) -> dict[str, Source]:
    """Those of a whole model.

    Args:
      config: sizes.
      attention: from (path, name) of a layer's attention to its sources.
      feed_forward: from (layer, path, name) of a layer to those of its MLP or experts.
    """
    found = {
        "embedding": vector("model.embed_tokens.weight"),
        "norm.weight": vector("model.norm.weight"),
    }
    if not config.tie_word_embeddings:
        found["head.kernel"] = matrix("lm_head")
    for layer in range(config.num_hidden_layers):
        path, name = f"layers.{layer}", f"model.layers.{layer}"
        found[f"{path}.attention_norm.weight"] = vector(f"{name}.input_layernorm.weight")
        found[f"{path}.mlp_norm.weight"] = vector(f"{name}.post_attention_layernorm.weight")
        found.update(attention(f"{path}.attention", f"{name}.self_attn"))
        found.update(feed_forward(layer, path, name))
    return found
