"""The job's secret, and what must not be seen: keys and tokens in logs or in the key-value store."""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import pytest
from moe_oracle import Case, sharded
from test_multiprocess import check_rows, error_of, group, on_mesh

from pplx_jax import bootstrap, compat
from pplx_jax.engine import TransferEngine
from pplx_jax.testing import ProcessPool

pytestmark = pytest.mark.multiprocess


def numbers(data: bytes) -> set[int]:
    """Every eight bytes of it as a number, if a large one: keys are, sizes are not."""
    found = {int.from_bytes(data[at : at + 8], "little") for at in range(len(data) - 7)}
    return {number for number in found if number >> 40 and number >> 40 != 0xFFFFFF}


def spellings(number: int) -> set[str]:
    """How a log might show it."""
    raw = number.to_bytes(8, "little")
    return {str(number), f"{number:x}", raw.hex(), raw[::-1].hex()}


def talks(fabric):
    """Runs a group and an engine, and fails a write; what was published, and the secret."""
    published = []
    plain = bootstrap.Bootstrap.exchange

    def exchange(self, stage, value):
        values = plain(self, stage, value)
        published.extend((stage, one) for one in values.values())
        return values

    bootstrap.Bootstrap.exchange = exchange  # type: ignore[method-assign]
    ep = group("talks", fabric=fabric)
    ep.connect()
    case = Case(ep, 8, 1)
    check_rows(jax.jit(sharded(ep))(*(on_mesh(ep, a) for a in case.args)), case.expected())
    ep.close()
    bootstrap.Bootstrap.exchange = plain  # type: ignore[method-assign]
    endpoints = [value for stage, value in published if stage == "endpoints"]
    with TransferEngine(fabric) as one, TransferEngine(fabric) as two:
        source, target = one.empty(64), two.empty(64)
        one.write(source, target.descriptor).result(20)
        descriptor = bytes(target.descriptor)
        del target
        told = error_of(lambda: one.write(source, descriptor).result(3))
    return endpoints, descriptor, bootstrap.job_secret(5), told


@pytest.mark.parametrize("fabric", ["tcp", "shm"])
def test_logs_tell_no_keys(fabric):
    import base64
    import json

    with ProcessPool(2, env={"PPLX_LOG_LEVEL": "debug"}) as pool:
        outcomes = pool.run(talks, fabric, allow_failures=True)
    logs = "".join(outcome.stdout + outcome.stderr for outcome in outcomes)
    assert all(outcome.ok for outcome in outcomes), logs
    assert "event=connected" in logs
    assert "engine" in logs
    secrets = set()
    for endpoints, descriptor, secret, told in (outcome.value for outcome in outcomes):
        logs += told[1]
        logs += repr(told)
        secrets |= {secret.hex(), base64.b64encode(secret).decode(), repr(secret)}
        assert len(endpoints) == 2
        for value in endpoints:
            for text in json.loads(value).values():
                secrets |= {text}
                for number in numbers(base64.b64decode(text)):
                    secrets |= spellings(number)
        for number in numbers(descriptor):
            secrets |= spellings(number)
    assert len(secrets) > 100
    lines = logs.lower()
    assert [secret for secret in secrets if len(secret) >= 8 and secret.lower() in lines] == []


def keys_of(fabric):
    with TransferEngine(fabric) as engine:
        descriptors = [bytes(engine.empty(4096).descriptor) for _ in range(64)]
    # The last field before the checksum.
    return [int.from_bytes(descriptor[-16:-8], "little") for descriptor in descriptors]


@pytest.mark.parametrize("fabric", ["tcp", "shm"])
def test_keys_cannot_be_guessed(fabric):
    keys = keys_of(fabric)
    assert len(set(keys)) == 64
    ones = sum(bin(key).count("1") for key in keys) / len(keys)
    assert 28 < ones < 35  # of 63 random bits
    assert set(keys).isdisjoint(keys_of(fabric))


def secret_of_job():
    client: Any = compat.coordination_client()
    return bootstrap.job_secret(5), client.key_value_try_get_bytes("pplx_jax/secret")


def test_the_secret_is_the_jobs():
    jobs = []
    for _ in range(2):
        with ProcessPool(2) as pool:
            (one, kept), (two, again) = pool.run(secret_of_job)
        assert one == two == kept == again
        assert len(one) == 32
        jobs.append(hashlib.sha256(one).hexdigest())
    assert jobs[0] != jobs[1]
    assert bootstrap.job_secret(1) == bootstrap.job_secret(1)  # of this process alone
    assert hashlib.sha256(bootstrap.job_secret(1)).hexdigest() not in jobs


def listeners():
    """Addresses on which this process listens by TCP."""
    inodes = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            name = str(entry.readlink())
        except OSError:
            continue
        if name.startswith("socket:["):
            inodes.add(name[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                raw = bytes.fromhex(fields[1].split(":")[0])
                words = [raw[at : at + 4][::-1] for at in range(0, len(raw), 4)]
                family = socket.AF_INET if table == "tcp" else socket.AF_INET6
                found.append(socket.inet_ntop(family, b"".join(words)))
    return found


def listens(fabric):
    jax.devices()  # JAX's collectives listen from then on
    before = Counter(listeners())
    with group(f"listens {fabric}", fabric=fabric) as ep:
        ep.connect()
        found = Counter(listeners()) - before
    return sorted(found), sorted(Counter(listeners()) - before)


def test_what_listens(processes, hosts):
    assert processes.run(listens, 2, "shm") == [([], [])] * 2
    for found, left in processes.run(listens, 2, "tcp"):
        assert found == ["127.0.0.1"]
        assert left == []
    pool = hosts.pool(2)
    if not pool.network.isolated:
        pytest.skip(pool.network.why)
    for rank, (found, left) in enumerate(pool.run(listens, "tcp")):
        assert found == [pool.network.hosts[rank].address]  # one address, not all of them
        assert left == []
