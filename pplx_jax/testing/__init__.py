"""Run test functions in several processes, or on several hosts, that form one JAX program.

A multi-controller JAX program needs one fresh Python process a rank, all connected by
:func:`jax.distributed.initialize`. :func:`run_processes` starts them, calls a function in each, and returns
what each rank returned::

    def step(scale):                       # in test_step.py, at module level
        import jax
        return jax.process_index() * scale

    def test_step():
        assert run_processes(step, 4, args=(10,)) == [0, 10, 20, 30]

Starting Python and JAX costs seconds, so :class:`ProcessPool` keeps the ranks alive and runs many functions
one after another. :class:`HostPool` does the same with each rank on a host of its own: network namespaces
with addresses, names and cables that can be pulled (:class:`Network`), or plain processes where there is no
root. The pytest fixtures ``processes`` and ``hosts`` share such pools between tests; load them in a
``conftest.py`` with ``pytest_plugins = ["pplx_jax.testing"]`` (this package imports neither JAX nor pytest's
internals until they are needed, but ``import pplx_jax`` may import JAX: set ``XLA_FLAGS`` and
``JAX_PLATFORMS`` before).

Nothing here can hang: a call that does not return within its timeout makes every rank print the stacks of
its threads, kills the ranks and raises :class:`ProcessFailure`. So does a rank that raises or dies, with
its traceback and the end of its output, unless the caller asked for that (``allow_failures``,
``expect_death``). The processes run on CPU with gloo collectives unless ``env`` says otherwise
(``JAX_PLATFORMS=cuda``: each on GPUs of its own), and end with the process that started them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from pplx_jax.testing.hosts import HostPool, slurm_environment
from pplx_jax.testing.network import Host, Network, remove_leftovers
from pplx_jax.testing.pool import Outcome, ProcessFailure, ProcessPool, run_processes
from pplx_jax.testing.shared import Hosts, Processes

__all__ = [
    "Host",
    "HostPool",
    "Hosts",
    "Network",
    "Outcome",
    "ProcessFailure",
    "ProcessPool",
    "Processes",
    "remove_leftovers",
    "run_processes",
    "slurm_environment",
]


if "pytest" in sys.modules:  # loaded as a pytest plugin; ranks and other users need no pytest
    import pytest

    @pytest.fixture(scope="session")
    def processes() -> Iterator[Processes]:
        """Pools of processes that form one JAX program: a :class:`Processes`."""
        shared = Processes()
        try:
            yield shared
        finally:
            shared.close()

    @pytest.fixture(scope="session")
    def hosts() -> Iterator[Hosts]:
        """Pools of hosts with a process of one JAX program on each: a :class:`Hosts`."""
        shared = Hosts()
        try:
            yield shared
        finally:
            shared.close()

    def pytest_report_header() -> str:
        """Say whether hosts will be isolated, as results mean less where they are not."""
        with Network(1) as network:
            return f"pplx_jax hosts: {network.why or 'network namespaces'}"
