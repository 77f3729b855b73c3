"""The multi-process launcher: results, failures of every kind, deadlines, reuse."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pplx_jax.testing import Outcome, Processes, ProcessFailure, ProcessPool, run_processes

pytestmark = pytest.mark.multiprocess

_calls: list[str] = []


def rank_and_args(*args, **kwargs):
    import jax

    return jax.process_index(), jax.process_count(), jax.local_device_count(), args, kwargs


def global_sum():
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    values = np.arange(jax.device_count(), dtype=np.float32)
    array = jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
    return float(jax.jit(jnp.sum)(array))


def remember(word):
    _calls.append(word)
    return list(_calls)


def raise_on(rank):
    import jax

    print(f"hello from {jax.process_index()}")
    if jax.process_index() == rank:
        raise ValueError(f"rank {rank} was told to")
    return "fine"


def raise_or_wait(rank):
    import jax

    if jax.process_index() == rank:
        raise ValueError(f"rank {rank} was told to")
    time.sleep(300)


def die_on(rank, number):
    import jax

    if jax.process_index() == rank:
        os.kill(os.getpid(), number)
        time.sleep(60)
    time.sleep(0.5)
    return jax.process_index()


def exit_on(rank, code):
    import jax

    if jax.process_index() == rank:
        sys.stdout.flush()
        os._exit(code)
    return "fine"


def stuck_in_here(rank):
    import jax

    if jax.process_index() == rank:
        time.sleep(300)
    return "fine"


def unpicklable():
    return lambda: None


def leave_a_grandchild(path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    Path(path).write_text(str(child.pid))
    time.sleep(300)


def die_and_leave_a_grandchild(path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    Path(path).write_text(str(child.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def environment(name):
    return os.environ.get(name)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie of a process that nobody waits for is not alive.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.fixture(scope="module")
def pool():
    with ProcessPool(2, devices_per_process=2, timeout=60) as shared:
        yield shared


def test_results_come_by_rank(pool):
    results = pool.run(rank_and_args, 1, two=2)
    assert results == [(rank, 2, 2, (1,), {"two": 2}) for rank in range(2)]


def test_ranks_form_one_program(pool):
    assert pool.run(global_sum) == [6.0, 6.0]


def test_pool_keeps_state_and_processes(pool):
    pids = pool.pids
    pool.run(remember, "a")
    assert pool.run(remember, "b") == [["a", "b"]] * 2
    assert pool.pids == pids


def test_function_by_name(pool):
    assert pool.run("os:getpid") == pool.pids


def test_an_exception_carries_its_rank_and_traceback(pool):
    pids = pool.pids
    with pytest.raises(ProcessFailure, match="rank 1 raised ValueError: rank 1 was told to") as caught:
        pool.run(raise_on, 1)
    assert "in raise_on" in str(caught.value)
    assert "hello from 1" in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)
    assert [outcome.status for outcome in caught.value.outcomes] == ["ok", "raised"]
    # Every rank answered, so the pool is as good as before.
    assert pool.run("os:getpid") == pids


def test_outcomes_on_request(pool):
    first, second = pool.run(raise_on, 0, allow_failures=True)
    assert isinstance(first, Outcome)
    assert first.status == "raised"
    assert isinstance(first.error, ValueError)
    assert second.value == "fine"
    assert second.stdout == "hello from 1\n"


def test_an_unpicklable_result_is_an_error(pool):
    with pytest.raises(ProcessFailure, match="returned function cannot be pickled"):
        pool.run(unpicklable)


@pytest.mark.slow
def test_a_failing_rank_ends_the_others():
    with ProcessPool(2, timeout=100) as pool:
        pool.run("os:getpid")
        pids = pool.pids
        start = time.monotonic()
        with pytest.raises(ProcessFailure, match=r"rank 0 was stopped.*rank 1 raised ValueError"):
            pool.run(raise_or_wait, 1)
        assert time.monotonic() - start < 20
        assert not any(alive(pid) for pid in pids)
        # The next call gets fresh ranks.
        assert [rank for rank, *_ in pool.run(rank_and_args)] == [0, 1]


@pytest.mark.slow
def test_a_timeout_shows_every_stack():
    start = time.monotonic()
    with (
        pytest.raises(ProcessFailure, match=r"rank 0 did not return in time") as caught,
        ProcessPool(2, timeout=60) as pool,
    ):
        pool.run(stuck_in_here, 0, timeout=2)
    assert time.monotonic() - start < 60
    assert "timeout 2 s" in str(caught.value)
    assert "stuck_in_here" in caught.value.outcomes[0].stderr
    assert caught.value.outcomes[1].value == "fine"


@pytest.mark.slow
def test_a_timeout_ends_grandchildren(tmp_path):
    path = tmp_path / "pid"
    with pytest.raises(ProcessFailure, match="did not return"), ProcessPool(1, timeout=60) as pool:
        pool.run(leave_a_grandchild, str(path), timeout=5)
    pid = int(path.read_text())
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


@pytest.mark.slow
def test_children_of_a_killed_rank_end_with_it(tmp_path):
    path = tmp_path / "pid"
    with ProcessPool(1, timeout=60) as pool:
        pool.run(die_and_leave_a_grandchild, str(path), expect_death={0: signal.SIGKILL})
    pid = int(path.read_text())
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    survived = alive(pid)
    if survived:
        os.kill(pid, signal.SIGKILL)
    assert not survived


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_expected_death(rank):
    number = signal.SIGKILL
    results = run_processes(die_on, 3, args=(rank, number), timeout=60, expect_death={rank: number})
    assert results == [None if index == rank else index for index in range(3)]


@pytest.mark.slow
def test_unexpected_deaths():
    with ProcessPool(2, timeout=60) as pool:
        with pytest.raises(ProcessFailure, match="rank 1 died: exit status 3"):
            pool.run(exit_on, 1, 3)
        with pytest.raises(ProcessFailure, match="rank 0 died: killed by SIGKILL"):
            pool.run(die_on, 0, signal.SIGKILL)
        with pytest.raises(ProcessFailure, match="rank 1 returned, but was expected to be killed by SIGKILL"):
            pool.run(raise_on, -1, expect_death={1: signal.SIGKILL})


@pytest.mark.slow
def test_scripts(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import sys
            import jax
            if __name__ == "__main__":
                print(sys.argv[1], jax.process_index())
        """)
    )
    outcomes = run_processes(script, 2, args=("word",), allow_failures=True)
    assert [outcome.stdout for outcome in outcomes] == ["word 0\n", "word 1\n"]


@pytest.mark.slow
def test_functions_of_a_main_script(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent("""
            from pplx_jax.testing import run_processes

            def double(x):
                return 2 * x

            if __name__ == "__main__":
                print(run_processes(double, 2, args=(21,), distributed=False))
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[42, 42]\n", done.stderr


@pytest.mark.slow
def test_ranks_end_with_their_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
            import os, time
            from pplx_jax.testing import ProcessPool

            pool = ProcessPool(2, distributed=False)
            print(*pool.run("os:getpid"), flush=True)
            os._exit(1)
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.slow
def test_environment_and_fixture_pools():
    shared = Processes(keep=1)
    try:
        env = {"PPLX_TEST_WORD": "word", "HOME": None}
        first = shared.pool(1, env=env)
        assert shared.run(environment, 1, "PPLX_TEST_WORD", env=env) == ["word"]
        assert shared.run(environment, 1, "HOME", env=env) == [None]
        assert shared.pool(1, env=env) is first
        assert shared.pool(1) is not first
        with pytest.raises(ValueError, match="closed"):
            first.run("os:getpid")
    finally:
        shared.close()


@pytest.mark.slow
def test_fixture(processes):
    assert processes.run("os:getppid", 2) == [os.getpid()] * 2


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_processes": 0}, "num_processes: must be an integer of at least 1, is 0"),
        ({"num_processes": 2.0}, "num_processes"),
        ({"num_processes": 1, "devices_per_process": 0}, "devices_per_process"),
        ({"num_processes": 1, "timeout": 0}, "timeout"),
    ],
)
def test_bad_pool_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        ProcessPool(**arguments)


def test_bad_call_arguments(pool):
    with pytest.raises(ValueError, match="top level"):
        pool.run(lambda: None)
    with pytest.raises(TypeError, match="fn: must be a function"):
        pool.run(3)
    with pytest.raises(ValueError, match="neither"):
        pool.run("nothing")
    with pytest.raises(ValueError, match="no script"):
        pool.run("/nonexistent/script.py")
    with pytest.raises(ValueError, match=r"rank 2 is not in 0\.\.1"):
        pool.run(rank_and_args, expect_death={2: signal.SIGKILL})
    with pytest.raises(ValueError, match="timeout"):
        pool.run(rank_and_args, timeout=-1)
