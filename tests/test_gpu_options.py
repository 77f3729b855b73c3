"""Which ranks reach which over NVLink, and what ExpertParallel is told about GPUs. Needs none."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pplx_jax import ExpertParallel, FabricError, gpu

SMALL = {"num_experts": 4, "top_k": 1, "hidden": 32, "max_tokens": 8}


def topology(hosts, processes=None, **options):
    return gpu.Topology(tuple(hosts), tuple(processes or range(len(hosts))), gpu.Options(**options))


def test_one_host_is_one_node():
    arguments = topology("aaaa").arguments(1, 132)
    assert arguments == {"nvlink": [True] * 4, "proxies": False, "shares": True, "num_sms": 64}
    assert not topology("aaaa", [7] * 4).arguments(1, 132)["shares"]


def test_hosts_are_nodes():
    arguments = topology("aabb").arguments(2, 132)
    assert arguments["nvlink"] == [False, False, True, True]
    assert arguments["proxies"]


def test_node_size_parts_a_host():
    some = topology("aaaa", node_size=2)
    assert some.arguments(1, 132)["nvlink"] == [True, True, False, False]
    assert all(some.nvlink(a, b) == some.nvlink(b, a) for a in range(4) for b in range(4))


def test_ranks_agree_on_proxies_even_where_they_have_none():
    uneven = topology("aab")
    assert [uneven.arguments(rank, 132)["proxies"] for rank in range(3)] == [True] * 3
    assert uneven.arguments(2, 132)["nvlink"] == [False, False, True]


def test_no_nvlink():
    arguments = topology("aa", nvlink=False).arguments(0, 132)
    assert arguments["nvlink"] == [True, False]
    assert arguments["proxies"]
    assert not arguments["shares"]


def test_num_sms():
    assert gpu.Options().sms(20) == 20
    assert gpu.Options(num_sms=8).sms(132) == 8
    with pytest.raises(ValueError, match="at most 132"):
        gpu.Options(num_sms=133).sms(132)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"nvlink": 1}, TypeError, "nvlink must be True or False"),
        ({"node_size": 0}, ValueError, "node_size must be at least 1"),
        ({"node_size": True}, TypeError, "node_size must be an int"),
        ({"num_sms": "8"}, TypeError, "num_sms must be an int"),
    ],
)
def test_arguments_are_checked(options, error, says):
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("ep",))
    with pytest.raises(error, match=says):
        ExpertParallel(mesh, **SMALL, **options)


def test_they_are_no_part_of_the_groups_value():
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("ep",))
    assert ExpertParallel(mesh, **SMALL, num_sms=3) == ExpertParallel(mesh, **SMALL, nvlink=False)


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(gpu, "extension", lambda: None)
    with pytest.raises(FabricError, match=r"no CUDA kernels: .*pip install -e .*docs/wheels.md"):
        gpu.require()
    with pytest.raises(FabricError, match="no CUDA kernels"):
        gpu.open_member(1, jax.devices("cpu")[0], None, None)


def test_memory_is_what_the_largest_rank_has_allocated():
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("ep",))
    membership = ExpertParallel(mesh, **SMALL)._membership
    ranks = [{"device_bytes": 5, "pinned_bytes": 2}, {"device_bytes": 6, "pinned_bytes": 3}]
    assert membership._memory(ranks) == {"device": 6, "pinned": 3, "total": 9}
    computed = membership._memory([{"exchanges": 0}])
    assert set(computed) == {"regions", "staging", "total"}
    assert computed == membership._memory([])
