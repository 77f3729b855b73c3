"""Configuration of the tests: eight virtual CPU devices here, pools of processes on request.

``pytest -m gpu`` (or ``JAX_PLATFORMS=cuda``) runs the tests that need GPUs instead; without either they are
skipped.
"""

import os

import pytest

# Before anything imports JAX.
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
_chosen = "JAX_PLATFORMS" in os.environ
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Processes that tests start share the GPUs with this one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

pytest_plugins = ["pplx_jax.testing", "engine_fixtures", "models_fixtures"]


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu" and not _chosen:
        import jax

        del os.environ["JAX_PLATFORMS"]
        jax.config.update("jax_platforms", None)


def _why_no_gpu() -> str | None:
    import jax

    if jax.config.jax_platforms == "cpu":
        return "runs on CPU here; on GPUs with `pytest -m gpu`"
    try:
        jax.devices("gpu")
    except RuntimeError as error:
        return f"JAX has no GPU: {error}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    why = _why_no_gpu() if gpu else None
    if why is not None:
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason=why))
