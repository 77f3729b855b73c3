"""What the GPU tests share: how messages may travel, how many GPUs there are."""

from __future__ import annotations

from itertools import count
from typing import Any

import jax
import pytest
from moe_oracle import make_mesh

from pplx_jax import ExpertParallel

# One rank a GPU. Through memory that ranks write directly, or by the host over two fabrics.
PATHS: dict[str, dict[str, Any]] = {
    "nvlink": {},
    "shm": {"nvlink": False, "fabric": "shm"},
    "tcp": {"nvlink": False, "fabric": "tcp"},
}
SKEWS = ["uniform", "zipf", "all to one", "holes", "nothing", "ragged"]
SMALL: dict[str, Any] = {"num_experts": 10, "top_k": 3, "hidden": 32, "max_tokens": 8, "dtype": "float32"}
# For processes that `pplx_jax.testing` starts: a GPU each. XLA shares out its autotuning, so that a
# compilation would wait for a process that compiles nothing, or something else.
PROCESS: dict[str, str | None] = {
    "JAX_PLATFORMS": "cuda",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": None,
    "XLA_FLAGS": "--xla_gpu_shard_autotuning=false",
}
_names = (f"gpu{i}" for i in count())


def need(gpus: int) -> None:
    """Skip where there are fewer GPUs."""
    here = len(jax.devices("gpu"))
    if here < gpus:
        pytest.skip(f"needs {gpus} GPUs, here is {here}")


def group(ranks: int, **options: Any) -> ExpertParallel:
    need(ranks)
    return ExpertParallel(make_mesh(ranks), **{"name": next(_names)} | SMALL | options)
