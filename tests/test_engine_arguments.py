"""The Python TransferEngine: bad arguments."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pplx_jax.engine import (
    ScatterEntry,
    SimOptions,
    TransferEngine,
)
from pplx_jax.errors import FabricError

pytestmark = pytest.mark.smoke

# ---- bad arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "fabric: must be a string, is int", {"fabric": 3}),
        (ValueError, "fabric: must not be empty", {"fabric": ""}),
        (FabricError, "nonsense", {"fabric": "nonsense"}),
        (ValueError, r"endpoints: must be in 1\.\.64, is 0", {"endpoints": 0}),
        (TypeError, r"endpoints: must be an integer, is 1\.5", {"endpoints": 1.5}),
        (TypeError, "bind_address: must be an IP address or None, is int", {"bind_address": 1}),
        (ValueError, "timeout: must be a finite number of seconds", {"timeout": -1}),
        (ValueError, "timeout: must be a finite", {"timeout": float("nan")}),
        (TypeError, "timeout: must be a number of seconds, is '3'", {"timeout": "3"}),
        (TypeError, "sim: must be SimOptions or None, is dict", {"sim": {}}),
        (ValueError, "sim: has a meaning for fabric='sim' only", {"sim": SimOptions()}),
        (ValueError, r"cpu: must be in 0", {"cpu": -2}),
        (ValueError, r"cpu: must be a core's number, 'auto' or None", {"cpu": "all"}),
    ],
)
def test_bad_engine_arguments(error, match, arguments):
    with pytest.raises(error, match=match):
        TransferEngine(**arguments)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ValueError, {"seed": -1}),
        (ValueError, {"max_pieces": 0}),
        (TypeError, {"reorder": 1}),
        (TypeError, {"network": 1}),
        (ValueError, {"max_delay": 2**32}),
    ],
)
def test_bad_sim_options(error, arguments):
    with pytest.raises(error, match=f"SimOptions.{next(iter(arguments))}"):
        SimOptions(**arguments)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "region: must be a Region, is bytes", {"region": b""}),
        (TypeError, "remote: must be a RegionDescriptor or a RemoteRegion, is bytes", {"remote": b""}),
        (ValueError, r"length: must be in 0\.\.8, is 9", {"length": 9}),
        (ValueError, r"length: must be in 0\.\.5, is 6", {"length": 6, "src_offset": 3}),
        (ValueError, r"src_offset: must be in 0\.\.8, is 9", {"src_offset": 9}),
        (ValueError, r"dst_offset: must be in 0\.\.8, is -1", {"dst_offset": -1}),
        (ValueError, "length: 8 bytes at dst_offset 1 do not fit", {"dst_offset": 1}),
        (ValueError, r"imm: must be in 0\.\.2147483647, is 2147483648", {"imm": 2**31}),
        (TypeError, "imm: must be an integer, is True", {"imm": True}),
    ],
)
def test_bad_write_arguments(engine, error, match, arguments):
    good = {"region": engine.empty(8), "remote": engine.empty(8).descriptor}
    with pytest.raises(error, match=match):
        engine.write(**(good | arguments))


def test_bad_arguments(engine):
    with TransferEngine("local") as other:
        with pytest.raises(ValueError, match="region: is registered with another engine"):
            engine.write(other.empty(8), engine.empty(8).descriptor)
        with pytest.raises(ValueError, match="remote: was opened by another engine"):
            engine.write(engine.empty(8), other.open(engine.empty(8).descriptor))
        with pytest.raises(ValueError, match="own address is not among"):
            engine.peer_group([other.address], 1)
        with pytest.raises(ValueError, match="group: was made by another engine"):
            engine.barrier(other.peer_group([other.address], 1))
    with pytest.raises(ValueError, match="appears twice"):
        engine.peer_group([engine.address, engine.address], 1)
    with pytest.raises(TypeError, match=r"addresses\[0\]: must be an Address"):
        engine.peer_group([b""], 1)
    with pytest.raises(ValueError, match="id: must be in"):
        engine.peer_group([engine.address], -1)
    with pytest.raises(TypeError, match="group: must be a PeerGroup"):
        engine.barrier(1)
    with pytest.raises(TypeError, match="address: must be an Address, is bytes"):
        engine.send(b"", b"")
    with pytest.raises(TypeError, match="payload: must be bytes, is str"):
        engine.send(engine.address, "text")
    with pytest.raises(ValueError, match="timeout"):
        engine.recv(timeout=-1)
    with pytest.raises(ValueError, match="n: must be in"):
        engine.imm_counter(1).wait(-1)
    with pytest.raises(ValueError, match="imm: must be in"):
        engine.imm_counter(2**31)
    with pytest.raises(TypeError, match=r"entries\[0\]: must be a ScatterEntry"):
        engine.scatter(engine.empty(8), [1])
    with pytest.raises(ValueError, match=r"entries\[0\]\.length: 8 bytes at dst_offset 4"):
        engine.scatter(engine.empty(8), [ScatterEntry(engine.empty(8).descriptor, 8, dst_offset=4)])
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(engine)


def test_bad_arrays(engine):
    with pytest.raises(ValueError, match="array: must be C-contiguous"):
        engine.register(np.zeros((4, 4))[:, ::2])
    with pytest.raises(TypeError, match="array: must hold plain data"):
        engine.register(np.array([object()]))
    with pytest.raises(TypeError, match=r"array: must be a NumPy array, a jax\.Array or have the buffer"):
        engine.register([1, 2])
    with pytest.raises(TypeError, match="is a Region already"):
        engine.register(engine.empty(4))
    with pytest.raises(ValueError, match="shape: must be in"):
        engine.empty(-1)
    with pytest.raises(TypeError, match="dtype: must hold plain data"):
        engine.empty(1, object)
    with pytest.raises(TypeError, match="tracer"):
        jax.jit(lambda x: engine.register(x))(jnp.ones(4))
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    with pytest.raises(ValueError, match=r"array: a jax\.Array must be on one device, is on 2"):
        engine.register(jax.device_put(jnp.ones(4), sharding))
