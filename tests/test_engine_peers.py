"""Peers that leave, and what is left of operations that were given up."""

from __future__ import annotations

import gc
import itertools
import time
import weakref

import numpy as np
import pytest

from pplx_jax import PeerError
from pplx_jax.engine import TransferEngine
from pplx_jax.engine_types import SimOptions

_networks = itertools.count()


@pytest.mark.parametrize("fabric", ["sim", "tcp"])
def test_a_removed_peer_is_forgotten(fabric):
    sim = SimOptions(network=f"removed {next(_networks)}") if fabric == "sim" else None
    with TransferEngine(fabric, sim=sim) as left, TransferEngine(fabric, sim=sim) as right:
        source, target = left.empty(64), right.empty(64)
        opened = left.open(target.descriptor)
        left.write(source, opened, imm=1).result(20)
        left.write(source, target.descriptor, imm=1).result(20)
        assert left.remove_peer(right.address)
        assert not left.remove_peer(right.address)
        assert left.stats()["peers"] == []
        with pytest.raises(PeerError, match="it was removed"):
            left.write(source, opened, imm=1).result(20)
        source.array[:] = 7
        left.write(source, target.descriptor, imm=1).result(20)
        right.imm_counter(1).wait(3, timeout=20)
        assert (target.array == 7).all()
        with pytest.raises(TypeError, match="address: must be an Address"):
            left.remove_peer("somebody")


def test_memory_of_what_was_given_up_outlives_its_region():
    network = f"given up {next(_networks)}"
    deaf = SimOptions(network=network, stall_every=1, stall_polls=2**32 - 1)
    with TransferEngine("sim", sim=deaf) as right:
        left = TransferEngine("sim", sim=SimOptions(network=network), timeout=0.2)
        target = right.empty(4096)
        memory = np.zeros(4096, np.uint8)
        alive = weakref.ref(memory)
        region = left.register(memory)
        read = left.read(region, target.descriptor)
        with pytest.raises(TimeoutError):
            read.result(20)
        del memory, region, read
        gc.collect()
        assert alive() is not None
        left.close()
        deadline = time.monotonic() + 10
        while alive() is not None and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
        assert alive() is None
