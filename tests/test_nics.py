"""Which NICs a group's devices open: by nearness, by PPLX_NICS, by nics=."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import pplx_jax
from pplx_jax import nics, topology
from pplx_jax.errors import FabricError

pytestmark = pytest.mark.smoke
TOPOLOGIES = Path(__file__).parent / "topology"


@pytest.fixture(autouse=True)
def no_choice(monkeypatch, tmp_path):
    monkeypatch.delenv("PPLX_NICS", raising=False)
    monkeypatch.setattr(nics, "_SYSFS", tmp_path)


def machine(name: str) -> topology.Topology:
    return topology.discover(str(TOPOLOGIES / f"{name}.xml"))


def test_every_gpu_opens_the_nics_behind_its_switch():
    seen = machine("p5.48xlarge")
    opened: list[str] = []
    for number, gpu in enumerate(seen.gpus):
        chosen = nics.choose("efa", number, pci=gpu.pci, topology=seen)
        placement = seen.placements[number]
        assert chosen.names == tuple(seen.nics[nic].name for nic in placement.nics)
        assert gpu.pci in chosen.why
        assert placement.distance in chosen.why
        opened += chosen.names
    assert len(opened) == len(set(opened)) == 32


def test_the_fabric_decides_which_devices_count():
    dgx, p5 = machine("dgx-h100"), machine("p5.48xlarge")
    assert nics.choose("verbs", 0, pci=dgx.gpus[0].pci, topology=dgx).names[0].startswith("mlx5_")
    for fabric, seen in (("efa", dgx), ("verbs", p5)):
        chosen = nics.choose(fabric, 0, pci=seen.gpus[0].pci, topology=seen)
        assert chosen.names == ("",)
        assert "the first that fits" in chosen.why
    assert nics.choose("tcp", 0, pci=dgx.gpus[0].pci, topology=dgx).names == ("",)


def test_a_nic_that_is_down_is_left_out(tmp_path):
    seen = machine("dgx-h100")
    name = seen.nics[seen.placements[0].nics[0]].name
    state = tmp_path / name / "ports" / "1" / "state"
    state.parent.mkdir(parents=True)
    state.write_text("4: ACTIVE\n")
    assert name in nics.choose("verbs", 0, pci=seen.gpus[0].pci, topology=seen).names
    state.write_text("1: DOWN\n")
    assert name not in nics.choose("verbs", 0, pci=seen.gpus[0].pci, topology=seen).names


def test_cpu_ranks_share_out_what_is_nearest_to_their_cores(monkeypatch):
    seen = machine("dgx-h100")
    near = seen.nics[0]
    monkeypatch.setattr(nics.os, "sched_getaffinity", lambda _: set(near.cpus[:4]))
    of_node = [nic.name for nic in seen.nics if nic.cpus == near.cpus and nic.name]
    chosen = [nics.choose("verbs", number, topology=seen) for number in range(len(of_node) + 1)]
    assert [one.names[0] for one in chosen] == [*of_node, of_node[0]]
    assert "this process's cores" in chosen[0].why


def test_what_is_asked_for_comes_first(monkeypatch):
    seen = machine("dgx-h100")
    pci = seen.gpus[0].pci
    monkeypatch.setenv("PPLX_NICS", "one,two")
    assert [nics.choose("verbs", n, pci=pci, topology=seen).names for n in range(3)] == [
        ("one",),
        ("two",),
        ("one",),
    ]
    chosen = nics.choose("verbs", 0, wanted=("a", "b"), pci=pci, topology=seen)
    assert chosen == nics.Chosen(("a", "b"), "nics=")


def test_without_hwloc_the_first_that_fits_is_opened(monkeypatch):
    def absent() -> Any:
        raise FabricError("hwloc was not found")

    monkeypatch.setattr(nics, "discover", absent)
    chosen = nics.choose("verbs", 0, pci="0000:1b:00.0")
    assert chosen.names == ("",)
    assert "hwloc was not found" in chosen.why


def group(**options: Any) -> pplx_jax.ExpertParallel:
    return pplx_jax.ExpertParallel(
        Mesh(np.array(jax.devices()[:1]), ("ep",)), num_experts=2, top_k=1, hidden=8, max_tokens=4, **options
    )


def test_a_group_says_what_it_opened(monkeypatch):
    with group(name="nics said") as ep:
        ep.connect()
        assert ep.stats()["nics"] == [{"names": [""], "why": "fabric local has no NICs to choose from"}]
    with (
        group(name="nics asked", fabric="tcp", nics=["no such interface"]) as ep,
        pytest.raises(FabricError, match="no such interface"),
    ):
        ep.connect()


@pytest.mark.parametrize(
    ("bad", "match"), [([], "1 to 8"), (["a", "a"], "distinct"), ("mlx5_0", "a list"), ([1], "a list")]
)
def test_bad_lists(bad, match):
    with pytest.raises((TypeError, ValueError), match=match):
        group(name="bad nics", nics=bad)
