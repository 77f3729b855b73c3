"""The job's token: engines and groups of different jobs refuse each other, with both sides named."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pytest
from engine_fixtures import NETWORKS, make
from jax.sharding import Mesh

import pplx_jax
from pplx_jax import bootstrap, membership
from pplx_jax.errors import MismatchError, PeerError

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("fabric", NETWORKS)
def test_engines_of_different_jobs_refuse_each_other(fabric, monkeypatch):
    monkeypatch.setenv("PPLX_JOB", "one")
    with make(fabric) as first, make(fabric, job="one") as same, make(fabric, job="another") as other:
        source, target, foreign = first.register(np.arange(10)), same.empty(80), other.empty(80)
        first.write(source, target.descriptor, imm=1).result(10)
        same.imm_counter(1).wait(1)
        for refused in (
            lambda: first.write(source, foreign.descriptor, imm=1),
            lambda: first.send(other.address, b"hello"),
            lambda: other.send(first.address, b"hello"),
        ):
            with pytest.raises(PeerError, match="different jobs") as caught:
                refused()
            assert len(re.findall(r"\(engine [0-9a-f]{8}\)", str(caught.value))) == 2


def test_processes_of_different_jobs_make_no_group(monkeypatch):
    """What process 1 says at the bootstrap is made up: its token is another one."""

    def exchange(self: bootstrap.Bootstrap, stage: str, value: dict[str, str]) -> Mapping[int, object]:
        return {0: value, 1: {**value, "job": "PPLX_JOB with the hash 123456", "host": "elsewhere/1/2"}}

    monkeypatch.setattr(bootstrap.Bootstrap, "exchange_json", exchange)
    monkeypatch.setenv("PPLX_JOB", "one")
    mesh = Mesh(np.array(jax.devices()[:1]), ("ep",))
    with (
        pplx_jax.ExpertParallel(mesh, num_experts=2, top_k=1, hidden=8, max_tokens=4, name="jobs") as ep,
        pytest.raises(MismatchError) as caught,
    ):
        ep.connect()
    text = str(caught.value)
    assert "process 0" in text
    assert "process 1 on elsewhere (PPLX_JOB with the hash 123456)" in text
    assert "one" not in re.findall(r"\w+", text.partition(":")[0]), "the token is not told"


def test_hashes_that_errors_show_cannot_be_looked_up(monkeypatch):
    """A short token could be found by hashing all of them."""
    monkeypatch.setenv("PPLX_JOB", "42")
    labels = [membership._job_label(secret) for secret in (b"a" * 32, b"a" * 32, b"b" * 32)]
    assert labels[0] == labels[1] != labels[2]
    assert hashlib.blake2b(b"42", digest_size=6).hexdigest() not in "".join(labels)


def test_bad_tokens():
    value: Any = 5
    with pytest.raises(TypeError, match="job"):
        make("local", job=value)
