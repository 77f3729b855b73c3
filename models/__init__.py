"""Flax models whose experts are spread over processes; installed as ``pplx_jax.models``.

`from_pretrained` loads a Hugging Face checkpoint of DeepSeek-V3, Kimi K2, Qwen3-MoE or Mixtral, `generate`
continues texts with it. See docs/models.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pplx_jax.models.errors import CheckpointError, ModelError
    from pplx_jax.models.generation import generate, stream
    from pplx_jax.models.loading import from_config, from_pretrained

__all__ = ["CheckpointError", "ModelError", "from_config", "from_pretrained", "generate", "stream"]

_WHERE = {
    "CheckpointError": "errors",
    "ModelError": "errors",
    "from_config": "loading",
    "from_pretrained": "loading",
    "generate": "generation",
    "stream": "generation",
}


def __getattr__(name: str) -> Any:
    # Lazily: the demo's model, in this package too, needs none of them.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
