"""Where messages of GPUs lie that go by the host, and that the user is told."""

from __future__ import annotations

import jax
import pytest
from gpu import PATHS, group
from moe_oracle import Case, same_bits, sharded

from pplx_jax import FabricError

pytestmark = pytest.mark.gpu


def step(ep, seed=1):
    case = Case(ep, 8, seed)
    same_bits(jax.jit(sharded(ep))(*case.args), case.expected())
    ep.check(sync=True)


@pytest.mark.parametrize("path", ["shm", "tcp"])
def test_pinned_where_the_fabric_knows_no_gpus(path):
    with group(2, **PATHS[path]) as ep:
        step(ep)
        for rank in ep.stats()["ranks"]:
            assert rank["regions"]["memory"] == "pinned"
            assert "cannot register GPU memory" in rank["regions"]["why"]
            # Whether GDRCopy is there is the machine's affair.
            assert rank["flags"]["memory"] in ("pinned", "device")
            assert rank["flags"]["why"]


def test_the_user_may_forbid_both(monkeypatch):
    monkeypatch.setenv("PPLX_GPU_REGIONS", "pinned")
    monkeypatch.setenv("PPLX_GDRCOPY", "off")
    with group(2, **PATHS["shm"]) as ep:
        step(ep)
        for rank in ep.stats()["ranks"]:
            assert rank["regions"] == {"memory": "pinned", "why": "PPLX_GPU_REGIONS=pinned"}
            assert rank["flags"] == {"memory": "pinned", "why": "PPLX_GDRCOPY=off"}


def test_a_library_that_is_no_gdrcopy_is_named(monkeypatch):
    monkeypatch.setenv("PPLX_GDRCOPY", "libm.so.6")
    with group(2, **PATHS["shm"]) as ep:
        step(ep)
        assert "libm.so.6: not GDRCopy 2" in ep.stats()["ranks"][0]["flags"]["why"]


def test_the_user_may_insist_in_vain(monkeypatch):
    monkeypatch.setenv("PPLX_GPU_REGIONS", "device")
    ep = group(2, **PATHS["tcp"])
    with pytest.raises(FabricError, match=r"PPLX_GPU_REGIONS=device: fabric .*cannot register GPU memory"):
        ep.connect()
    ep.close()


def test_over_nvlink_nothing_goes_by_the_host():
    with group(2) as ep:
        step(ep)
        for rank in ep.stats()["ranks"]:
            assert "regions" not in rank
            assert "flags" not in rank
