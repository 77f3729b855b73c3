"""Decoding goes on when ranks have died: ``ExpertParallel.mask``."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from moe_oracle import Case, make_mesh, same_bits, sharded
from test_multiprocess import error_of, on_mesh

import pplx_jax
from pplx_jax import ExpertParallel, errors

pytestmark = pytest.mark.multiprocess
SMALL = dict(num_experts=8, top_k=2, hidden=16, max_tokens=8, dtype="float32")
#: Expert 6 of the rank that dies first is on rank 1 too.
REPLICAS = [[0, 1, -1], [2, 3, 6], [4, 5, -1], [6, 7, -1]]


def remaining(case, masked, experts_map):
    """The case as it is without the experts of ``masked`` ranks, and what its tokens lost: routed, some, all,
    by share, weight."""
    table = np.array(experts_map)
    table[list(masked)] = -1
    hosted = np.isin(case.indices, table[table >= 0])
    before = np.where(case.indices >= 0, case.weights, 0).sum(1, dtype=np.float32)
    case.indices = np.where(hosted, case.indices, -1).astype(np.int32)
    after = np.where(hosted, case.weights, 0).sum(1, dtype=np.float32)
    factor = np.where(after > 0, before / np.where(after > 0, after, 1), 1)
    case.weights = (case.weights * factor[:, None]).astype(np.float32)
    whole = ~hosted.any(1)
    some = ~hosted.all(1) & ~whole
    share = (before - after)[some] / before[some]
    by_share = np.bincount(np.minimum(share * 4, 3).astype(int), minlength=4)
    return len(before), some | whole, whole, by_share, before - after


def documented():
    """``decode`` of docs/reliability.md, as it is written there."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "reliability.md").read_text()
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "ep.mask(" in block]
    scope = {"jax": jax, "pplx_jax": pplx_jax}
    exec(lines, scope)
    return scope["decode"]


def limit():
    """Seconds from an error to the first right step, also on a machine that is busy."""
    return 2.0


def decode(experts_map, deaths, idle):
    """Steps during which ranks die, one after the other; what the others see.

    Args:
      deaths: ranks by step.
      idle: steps before which the others have noticed, as in a server that nobody asks anything.
    """
    rank, size = jax.process_index(), jax.process_count()
    ep = ExpertParallel(
        make_mesh(size), name="decode", timeout=3.0, stall_timeout=60, expert_map=experts_map, **SMALL
    )

    def step_of(x, i, w):
        batch, route = ep.dispatch(x, i, w)
        # Twice the token: which expert it was is not the point here.
        return ep.combine(2 * batch.tokens, route)

    step = jax.jit(jax.shard_map(step_of, mesh=ep.mesh, in_specs=P("ep"), out_specs=P("ep")))
    report = {"masks": [], "stats": [], "raised": []}
    number = 0
    masking = []
    plain_mask, go_on = ep.mask, documented()

    def mask(ranks):
        masking.append((ranks, time.monotonic()))
        plain_mask(ranks)
        masking.append(time.monotonic())

    def seen(*args):
        try:
            return jax.block_until_ready(step(*args))
        except (jax.errors.JaxRuntimeError, ValueError):
            report["raised"].append(number)
            raise

    ep.mask = mask  # type: ignore[method-assign]
    while number < 3 * (len(deaths) + 1):
        case = Case(ep, 8, number)
        case.scale = np.full_like(case.scale, 2)
        args = [on_mesh(ep, a) for a in case.args[:3]]
        if number in deaths and rank == deaths[number]:
            os.kill(os.getpid(), signal.SIGKILL)
        if number in idle:
            deadline = time.monotonic() + 20
            while not any(member.failure() for member in ep._membership._members.values()):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        died = None
        out = go_on(ep, seen, *args)
        if masking:
            ((died,), began), connected = masking
            report["masks"].append((died, ep.masked, connected - began, time.monotonic() - began))
            masking.clear()
        if (number in deaths) != (died is not None):
            raise AssertionError(f"step {number}: rank {died} has died")
        counted = remaining(case, ep.masked, experts_map)
        mine = slice(8 * rank, 8 * rank + 8)
        got = np.asarray(out.addressable_shards[0].data)
        np.testing.assert_allclose(got, case.expected()[mine], rtol=1e-5, atol=1e-6)
        if died is not None:  # since it connected anew: this step
            stats = ep.stats()
            _, some, whole, _, weight = counted
            assert stats["masked"]["ranks"] == list(ep.masked)
            assert stats["masked"]["routed_tokens"] == 8
            assert stats["masked"]["tokens"] == some[mine].sum()
            assert stats["masked"]["whole_tokens"] == whole[mine].sum()
            assert sum(stats["masked"]["by_share"]) == (some & ~whole)[mine].sum()
            np.testing.assert_allclose(stats["masked"]["weight"], weight[mine].sum(), rtol=1e-4)
            report["stats"].append(stats["masked"])
        number += 1
    report["compiled"] = step._cache_size()
    gradient = jax.jit(lambda *a: jax.grad(lambda x: (_run(ep, step_of)(x, *a[1:]) ** 2).sum())(a[0]))
    report["gradient"] = error_of(lambda: jax.block_until_ready(gradient(*args)))[:2]
    out = jax.block_until_ready(step(*args))  # nothing has failed of that
    ep.check()
    ep.close()
    return report


def _run(ep, function):
    return jax.shard_map(function, mesh=ep.mesh, in_specs=P("ep"), out_specs=P("ep"))


def check_reports(reports, deaths, idle):
    seconds = []
    for report in (one for one in reports if one is not None):
        assert [died for died, *_ in report["masks"]] == list(deaths.values())
        assert [list(masked) for _, masked, *_ in report["masks"]] == [
            sorted(list(deaths.values())[: n + 1]) for n in range(len(deaths))
        ]
        assert set(report["raised"]) == idle, "jit raises in the step after a death, and only there"
        assert report["compiled"] == 1
        kind, text = report["gradient"]
        assert kind in ("JaxRuntimeError", "ValueError")
        assert "masked ranks" in text
        assert sum(stats["tokens"] for stats in report["stats"]) > 0
        seconds.append([whole for *_, whole in report["masks"]])
    return np.array(seconds)


@pytest.mark.parametrize(
    ("experts_map", "idle"),
    [([[0, 1], [2, 3], [4, 5], [6, 7]], {5}), (REPLICAS, {2})],
    ids=["plain", "replicas"],
)
def test_decoding_goes_on_without_the_dead(experts_map, idle, record_property):
    from pplx_jax.testing import HostPool

    deaths = {2: 3, 5: 1}
    # As a deployment has to, for JAX to live with dead processes.
    with HostPool(4, timeout=120, env={"JAX_ENABLE_RECOVERABILITY": "1"}) as pool:
        expected = dict.fromkeys(deaths.values(), signal.SIGKILL)
        reports = pool.run(decode, experts_map, deaths, idle, expect_death=expected)
        pool.close(graceful=False)
    assert [report is None for report in reports] == [rank in expected for rank in range(4)]
    seconds = check_reports(reports, deaths, idle)
    print(f"from the error to the first right step, by survivor and death: {seconds.round(3).tolist()} s")
    record_property("seconds", seconds.tolist())
    assert seconds.max() < limit(), seconds  # of every death


def unplugged(key):
    from test_hosts import _kept

    ep = ExpertParallel(make_mesh(jax.process_count()), name="cable", timeout=2.0, **SMALL)
    ep.connect()
    case = Case(ep, 8, 1)
    step = _kept[key] = jax.jit(sharded(ep))
    args = [on_mesh(ep, a) for a in case.args]
    jax.block_until_ready(step(*args))
    _kept[key] = ep, step, args


def masks_the_unplugged(key):
    from test_hosts import _kept

    ep, step, args = _kept.pop(key)
    deadline = time.monotonic() + 20
    died = None
    while died is None and time.monotonic() < deadline:
        time.sleep(0.02)
        try:
            ep.check()
        except errors.PplxError as error:
            died = error.rank
    if jax.process_index() == 2:
        ep.close()
        return died, 0.0
    began = time.monotonic()
    ep.mask([died])
    jax.block_until_ready(step(*args))
    seconds = time.monotonic() - began
    ep.check()
    ep.close()
    return died, seconds


def test_a_host_without_its_cable_is_masked(hosts, record_property):
    pool = hosts.pool(3)
    if not pool.network.isolated:
        pytest.skip(pool.network.why)
    pool.run(unplugged, "cable")
    with pool.network.unplugged(2):
        (first, took), (second, other), _ = pool.run(masks_the_unplugged, "cable")
    assert first == second == 2
    print(f"from the error to the first right step, without a cable: {took:.3f} and {other:.3f} s")
    record_property("seconds", [took, other])
    assert max(took, other) < limit()


def refusals():
    rank = jax.process_index()
    ep = ExpertParallel(make_mesh(jax.device_count()), name="refusals", timeout=1.5, **SMALL)
    ep.connect()
    answers = [
        error_of(lambda ranks=ranks: ep.mask(ranks))[:2] for ranks in ([7], [2 * rank], "1", [1.0], [0])
    ]
    # The other process masks nothing.
    if rank == 0:
        answers.append(error_of(lambda: ep.mask([2, 3]))[:2])
    ep.close()
    answers.append(error_of(lambda: ep.mask([2, 3]))[:2])
    return answers


def test_what_cannot_be_masked(processes):
    answers = processes.run(refusals, 2, devices_per_process=2)
    for rank, (outside, own, text, number, part, *late) in enumerate(answers):
        assert outside == ("ValueError", "ranks to mask must be in 0..3, got 7")
        assert own[0] == "ValueError"
        assert f"rank {2 * rank} is of this process" in own[1]
        assert text[0] == number[0] == "TypeError"
        assert part[0] == "ValueError"
        assert "process 0" in part[1] or "this process" in part[1]
        if rank == 0:
            assert late[0] == ("nothing", "")  # nobody is left to disagree with
        assert late[-1][0] == "GroupClosedError"


def disagree():
    rank = jax.process_index()
    ep = ExpertParallel(make_mesh(jax.device_count()), name="disagree", timeout=1.5, **SMALL)
    ep.connect()
    if rank == 2:
        ep.close()
        return "", ""
    answer = error_of(lambda: ep.mask([2] if rank == 0 else [3]))[:2]
    ep.close()
    return answer


def test_ranks_that_mask_others_say_so(processes):
    for rank, (kind, text) in enumerate(processes.run(disagree, 4)):
        if rank in (0, 1):
            assert kind == "TimeoutError"
            assert f"ranks [{2 + rank}] are masked here" in text


def takes_a_name():
    if jax.process_index() == 1:
        return []
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("ep",))
    with ExpertParallel(mesh, name="taken", **SMALL) as ep:
        ep.connect()
        other = ExpertParallel(make_mesh(jax.device_count()), name="taken", timeout=1.5, **SMALL)
        answers = [error_of(lambda: other.mask([1]))[:2], error_of(other.connect)[:2]]
        ep.check()
    return [*answers, other.masked]


def test_masking_takes_no_other_groups_name(processes):
    (by_mask, by_connect, masked), _ = processes.run(takes_a_name, 2)
    assert by_mask == by_connect
    assert by_mask[0] == "ValueError"
    assert "a group named 'taken' is already connected" in by_mask[1]
    assert masked == ()


def test_one_process_has_nobody_to_mask():
    with ExpertParallel(make_mesh(2), name="one process", **SMALL) as ep:
        with pytest.raises(ValueError, match="of this process"):
            ep.mask([1])
        with pytest.raises(TypeError, match="nobody responsible"):
            ep.mask([errors.RoutingError("of data").rank])
        assert ep.masked == ()
        assert ep.stats()["masked"] is None
        case = Case(ep, 8, 0)
        same_bits(jax.jit(sharded(ep))(*case.args), case.expected())
