"""The job's secret, and what must not be seen: keys and tokens in logs or in the key-value store."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
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


def talks(fabrics):
    """Runs groups and engines, and fails a write; what was published, and the secret."""
    endpoints, tokens, descriptors, told = [], [], [], ""
    plain, new = bootstrap.Bootstrap.exchange, hmac.new

    def exchange(self, stage, value):
        values = plain(self, stage, value)
        endpoints.extend(values.values() if stage == "endpoints" else ())
        return values

    def token(*args):
        made = new(*args)
        tokens.append(made.hexdigest())
        return made

    bootstrap.Bootstrap.exchange, hmac.new = exchange, token  # type: ignore[method-assign]
    for fabric in fabrics:
        with group(f"talks {fabric}", fabric=fabric) as ep:
            case = Case(ep, 8, 1)
            check_rows(jax.jit(sharded(ep))(*(on_mesh(ep, a) for a in case.args)), case.expected())
        with TransferEngine(fabric) as one, TransferEngine(fabric) as two:
            source, target = one.empty(64), two.empty(64)
            one.write(source, target.descriptor).result(20)
            descriptors.append(bytes(target.descriptor))
            del target
            told += repr(error_of(lambda: one.write(source, descriptors[-1]).result(3)))  # noqa: B023
    bootstrap.Bootstrap.exchange, hmac.new = plain, new  # type: ignore[method-assign]
    return endpoints, tokens, descriptors, bootstrap.job_secret(5), told


def test_logs_tell_no_keys():
    fabrics = ("tcp", "shm")
    with ProcessPool(2, env={"PPLX_LOG_LEVEL": "debug"}) as pool:
        outcomes = pool.run(talks, fabrics, allow_failures=True)
    logs = "".join(outcome.stdout + outcome.stderr for outcome in outcomes)
    assert all(outcome.ok for outcome in outcomes), logs
    assert logs.count("event=connected") >= 2 * len(fabrics)
    assert "engine" in logs
    hidden = set()
    for endpoints, tokens, descriptors, secret, told in (outcome.value for outcome in outcomes):
        logs += told
        hidden |= {secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1]}
        hidden |= set(tokens)
        assert len(tokens) == len(fabrics)
        assert len(endpoints) == 2 * len(fabrics)
        for value in endpoints:
            for text in json.loads(value).values():
                hidden.add(text)
                for number in numbers(base64.b64decode(text)):
                    hidden |= spellings(number)
        for number in numbers(b"".join(descriptors)):
            hidden |= spellings(number)
    assert len(hidden) > 200
    lines = logs.lower()
    assert [text for text in hidden if len(text) >= 8 and text.lower() in lines] == []


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


def test_the_secret_is_the_jobs(processes):
    jobs = []
    with ProcessPool(2) as another:
        for pool in (another, processes.pool(2)):
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
