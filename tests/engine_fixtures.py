"""Engines for tests: of one process, over every fabric that one process can use."""

import pytest

from pplx_jax.engine import Nic, SimOptions, TransferEngine

FABRICS = ["local", "sim", "tcp", "shm"]
#: Besides, networks that stand for others: two NICs, and the limits of EFA.
NETWORKS = [*FABRICS, "nics", "efa_like"]


def make(fabric, **options):
    """An engine over ``fabric``, whose name may be one of NETWORKS."""
    if fabric == "sim":
        options.setdefault("sim", SimOptions(seed=3, reorder=True, max_delay=5, max_pieces=4))
    if fabric == "efa_like":
        return TransferEngine("sim", sim=SimOptions.efa(seed=4), endpoints=4, **options)
    if fabric == "nics":
        nics = [Nic(bind_address="127.0.0.2"), Nic(bind_address="127.0.0.3")]
        return TransferEngine("tcp", nics=nics, **options)
    return TransferEngine(fabric, **options)


@pytest.fixture(params=NETWORKS)
def pair(request):
    """Two engines that reach each other."""
    with make(request.param) as left, make(request.param) as right:
        yield left, right


@pytest.fixture
def engine():
    """An engine by itself."""
    with TransferEngine("local") as made:
        yield made
