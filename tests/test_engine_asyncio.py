"""The engine in asyncio programs: awaits, timeouts, cancellation."""

import asyncio

import numpy as np
import pytest

from pplx_jax.engine import Pages, SimOptions, TransferEngine
from pplx_jax.engine_asyncio import AsyncEngine
from pplx_jax.errors import GroupClosedError, PplxError
from pplx_jax.errors import TimeoutError as PplxTimeoutError

pytestmark = pytest.mark.smoke


def test_everything_is_awaited(pair):
    left, right = pair

    async def main():
        here, there = AsyncEngine(left), AsyncEngine(right)
        source, target = left.empty(1000), right.empty(1000)
        source.array[:] = np.arange(1000) % 251
        waiting = asyncio.create_task(there.wait(right.imm_counter(1), 2))
        await here.write(source, target.descriptor, length=500, imm=1)
        await here.paged_write(source, target.descriptor, 100, Pages([7]), Pages([9]), imm=1)
        await waiting
        np.testing.assert_array_equal(target.array[900:], source.array[700:800])
        back = left.empty(500)
        await here.read(back, target.descriptor)
        np.testing.assert_array_equal(back.array, source.array[:500])
        received = [asyncio.create_task(there.recv()) for _ in range(3)]
        for number in range(3):
            await here.send(right.address, bytes([number]))
        assert sorted(payload for _, payload in await asyncio.gather(*received)) == [b"\0", b"\1", b"\2"]
        pool = right.receive_pool(1000, 2)
        sending = asyncio.create_task(here.send_to_pool(left.open_pool(pool.descriptor), source))
        with await there.recv_from_pool(pool) as message:
            np.testing.assert_array_equal(message.array, source.array)
        await sending
        groups = [one.peer_group([left.address, right.address], 5) for one in (left, right)]
        await asyncio.gather(here.barrier(groups[0]), there.barrier(groups[1]))

    asyncio.run(main())


def test_many_at_once(pair):
    left, right = pair

    async def main():
        here = AsyncEngine(left)
        source, target = left.empty(8000), right.empty(8000)
        source.array[:] = np.arange(8000) % 251
        await asyncio.gather(
            *(here.write(source, target.descriptor, 8, 8 * i, 8 * i, imm=2) for i in range(500))
        )
        await AsyncEngine(right).wait(right.imm_counter(2), 500)
        np.testing.assert_array_equal(target.array[:4000], source.array[:4000])

    asyncio.run(main())


def test_timeouts(pair):
    left, _ = pair

    async def main():
        aio = AsyncEngine(left)
        with pytest.raises(PplxTimeoutError, match=r"imm_counter\(3\)\.wait\(1\): not within 0\.05 s"):
            await aio.wait(left.imm_counter(3), 1, timeout=0.05)
        with pytest.raises(PplxTimeoutError, match=r"recv\(\): not within 0\.05 s"):
            await aio.recv(timeout=0.05)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await aio.wait(left.imm_counter(3), 1)
        await aio.wait(left.imm_counter(3), 0)

    asyncio.run(main())


def test_cancelling_waits_for_what_had_begun():
    sim = SimOptions(seed=1, max_delay=300, queue_depth=4)
    with TransferEngine("sim", sim=sim) as left, TransferEngine("sim", sim=sim) as right:
        source, target = left.empty(100_000), right.empty(100_000)
        pages = Pages(range(0, 100, 2))

        async def main():
            aio = AsyncEngine(left)
            task = asyncio.create_task(aio.paged_write(source, target.descriptor, 1000, pages, pages, imm=2))
            await asyncio.sleep(0)
            task.cancel()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # Nothing is under way: memory is ours again.
            assert left.stats()["peers"][0]["outstanding"] == 0
            assert left.stats()["cancelled"] > 0
            waiting = asyncio.create_task(aio.wait(left.imm_counter(5), 1))
            await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

        asyncio.run(main())
        assert right.imm_counter(2).value == 0


def test_closing_ends_awaits():
    async def main():
        engine = TransferEngine("local")
        aio = AsyncEngine(engine)
        tasks = [asyncio.create_task(aio.wait(engine.imm_counter(1), 1)), asyncio.create_task(aio.recv())]
        await asyncio.sleep(0.01)
        await asyncio.to_thread(engine.close)
        for task in tasks:
            with pytest.raises(GroupClosedError):
                await task
        with pytest.raises(PplxError):
            await aio.recv()

    asyncio.run(main())


def test_is_checked():
    with pytest.raises(TypeError, match="engine: must be a TransferEngine"):
        AsyncEngine(3)
