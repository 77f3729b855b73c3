"""fabric="verbs" from Python, as far as it needs no NIC; tests/soft_roce has the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pplx_jax import FabricError, TransferEngine, VerbsOptions
from pplx_jax.fabric import Fabric

DEVICES = Path("/sys/class/infiniband")
HAS_DEVICE = DEVICES.is_dir() and any(DEVICES.iterdir())


@pytest.mark.parametrize(
    ("error", "options", "says"),
    [
        (ValueError, {"gid_index": 256}, r"gid_index: must be in -1\.\.255, is 256"),
        (ValueError, {"traffic_class": -1}, r"traffic_class: must be in 0\.\.255"),
        (ValueError, {"service_level": 16}, r"service_level: must be in 0\.\.15"),
        (ValueError, {"ack_timeout": 0}, r"ack_timeout: must be in 1\.\.31"),
        (ValueError, {"retries": 8}, r"retries: must be in 0\.\.7"),
        (ValueError, {"send_depth": 1}, "send_depth: must be in 2"),
        (TypeError, {"relaxed_ordering": 1}, "relaxed_ordering: must be a bool"),
        (ValueError, {"connect_timeout": -1.0}, "connect_timeout"),
    ],
)
def test_options_are_checked(error, options, says):
    with pytest.raises(error, match=says):
        VerbsOptions(**options)


def test_options_belong_to_verbs():
    with pytest.raises(ValueError, match="verbs: has a meaning for fabric='verbs' only"):
        TransferEngine("tcp", verbs=VerbsOptions())
    with pytest.raises(TypeError, match="verbs: must be VerbsOptions or None"):
        TransferEngine("verbs", verbs={})


@pytest.mark.parametrize("text", ["verbs", "verbs:endpoints=2", "verbs:gid_index=3,traffic_class=106"])
def test_fabric_names(text):
    assert str(Fabric.parse(text)) == text


def test_bad_fabric_names():
    with pytest.raises(ValueError, match="allowed are ack_timeout, endpoints, gid_index"):
        Fabric.parse("verbs:seed=1")
    with pytest.raises(ValueError, match="traffic_class: must be in"):
        Fabric.parse("verbs:traffic_class=256")


@pytest.mark.skipif(HAS_DEVICE, reason="this machine has an RDMA device")
def test_without_a_device_it_says_what_is_missing():
    with pytest.raises(FabricError, match=r"no RDMA device.*|needs libibverbs.*"):
        TransferEngine("verbs")


@pytest.mark.skipif(not HAS_DEVICE, reason="this machine has no RDMA device")
def test_writes_over_a_device():
    with TransferEngine("verbs", job="test") as a, TransferEngine("verbs", job="test") as b:
        source, target = a.register(np.arange(1000)), b.empty(1000, np.int64)
        a.write(source, target.descriptor, imm=7).result(30)
        b.imm_counter(7).wait(1, timeout=30)
        np.testing.assert_array_equal(target.array, source.array)
