"""Several NICs: properties over sizes, offsets and numbers of NICs; removal."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pplx_jax.engine import Nic, Pages, SimOptions, TransferEngine

pytestmark = pytest.mark.smoke
SIZE = 300_000
_networks = itertools.count()


@settings(max_examples=60, deadline=None)
@given(
    ours=st.integers(1, 8),
    theirs=st.integers(1, 8),
    seed=st.integers(0, 2**32),
    writes=st.lists(
        st.tuples(
            st.integers(0, SIZE), st.integers(0, SIZE), st.sampled_from([0, 1, 8191, 16385, 65537, SIZE])
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_every_byte_arrives_once_and_no_other(ours, theirs, seed, writes):
    sim = SimOptions(
        seed=seed,
        network=f"nics {next(_networks)}",
        reorder=True,
        max_delay=3,
        max_pieces=3,
        max_write=100_000,
    )
    with (
        TransferEngine("sim", sim=sim, nics=[Nic()] * ours) as left,
        TransferEngine("sim", sim=sim, nics=[Nic()] * theirs) as right,
    ):
        source, target = left.empty(SIZE), right.empty(SIZE)
        source.array[:] = np.random.default_rng(seed).integers(1, 256, SIZE, np.uint8)
        wanted = np.zeros(SIZE, np.uint8)
        for number, (start, place, length) in enumerate(writes):
            length = min(length, SIZE - start, SIZE - place)
            left.write(source, target.descriptor, length, start, place, imm=1).result(20)
            right.imm_counter(1).wait(number + 1)
            wanted[place : place + length] = source.array[start : start + length]
            np.testing.assert_array_equal(target.array, wanted)
        assert right.imm_counter(1).value == len(writes)
        back = left.empty(SIZE)
        left.read(back, target.descriptor).result(20)
        np.testing.assert_array_equal(back.array, wanted)


@settings(max_examples=40, deadline=None)
@given(
    ours=st.integers(1, 8),
    theirs=st.integers(1, 8),
    pages=st.lists(
        st.tuples(st.integers(0, 31), st.integers(0, 63)), max_size=40, unique_by=lambda pair: pair[1]
    ),
    group=st.integers(0, 9),
    page_bytes=st.sampled_from([1, 100, 4096]),
)
def test_pages_over_nics(ours, theirs, pages, group, page_bytes):
    network = f"paged {next(_networks)}"
    sim = SimOptions(seed=len(pages), network=network, reorder=True, max_delay=3)
    with (
        TransferEngine("sim", sim=sim, nics=[Nic()] * ours) as left,
        TransferEngine("sim", sim=sim, nics=[Nic()] * theirs) as right,
    ):
        source, target = left.empty((32, page_bytes)), right.empty((64, page_bytes))
        source.array[:] = np.arange(32)[:, None] + 1
        wanted = np.zeros(64)
        for start, place in pages:
            wanted[place] = start + 1
        left.paged_write(
            source,
            target.descriptor,
            page_bytes,
            Pages([start for start, _ in pages]),
            Pages([place for _, place in pages]),
            imm=3,
            group=group,
        ).result(20)
        groups = 1 if group == 0 or not pages else -(-len(pages) // group)
        right.imm_counter(3).wait(groups)
        np.testing.assert_array_equal(target.array, np.broadcast_to(wanted[:, None], (64, page_bytes)))
        assert right.imm_counter(3).value == groups


@pytest.mark.parametrize("fabric", ["sim", "tcp"])
def test_a_removed_nic_is_used_no_more(fabric):
    nics = [Nic(bind_address=f"127.0.0.{2 + index}") for index in range(3)]
    with TransferEngine(fabric, nics=nics) as left, TransferEngine(fabric, nics=nics[:2]) as right:
        source, target = left.empty(500_000), right.empty(500_000)
        for number in range(3):
            source.array[:] = number + 1
            left.write(source, target.descriptor, imm=1).result(20)
            right.imm_counter(1).wait(number + 1)
            assert (target.array == number + 1).all()
            if number < 2:
                left.remove_nic(number)
        stats = left.stats()
        assert [bool(nic["error"]) for nic in stats["nics"]] == [True, True, False]
        assert all(nic["write_bytes"] > 0 for nic in stats["nics"])
        with pytest.raises(ValueError, match="cannot be taken out"):
            left.remove_nic(2)


def test_bad_nics():
    with pytest.raises(ValueError, match="nics: must be a list of 1 to 8"):
        TransferEngine("sim", nics=[Nic()] * 9)
    with pytest.raises(ValueError, match="nics: must be a list of 1 to 8"):
        TransferEngine("sim", nics="mlx5_0")
    with pytest.raises(TypeError, match=r"nics\[0\]: must be a Nic or a name"):
        TransferEngine("sim", nics=[3])
    with pytest.raises(ValueError, match="shm has no NICs to choose from"):
        TransferEngine("shm", nics=["a", "b"])
