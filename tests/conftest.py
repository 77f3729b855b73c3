"""Configuration of the tests: eight virtual CPU devices here, pools of processes on request."""

import os

# Before anything imports JAX.
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

pytest_plugins = ["pplx_jax.testing"]
