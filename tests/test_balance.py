"""The balancer: what its maps promise, how good they are, and weights in their order."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pplx_jax.balance import MovingLoads, balance, imbalance, place


def zipf(experts: int, seed: int, power: float = 1.0) -> np.ndarray:
    loads = 1000.0 / np.arange(1, experts + 1) ** power
    return np.random.default_rng(seed).permutation(loads)


def check_map(table: np.ndarray, experts: int, ranks: int, slots: int) -> None:
    assert table.shape == (ranks, slots)
    assert table.dtype == np.int32
    assert set(table[table >= 0].tolist()) == set(range(experts))
    for row in table:
        hosted = row[row >= 0]
        assert len(set(hosted.tolist())) == hosted.size
        assert (row[hosted.size :] == -1).all()


@pytest.mark.parametrize(
    "experts, ranks, slots",
    [(8, 4, 2), (8, 4, 3), (7, 3, 3), (5, 8, 1), (1, 4, 1), (3, 4, 5), (64, 8, 9), (2, 1, 2), (2, 1, 4)],
)
def test_maps_place_every_expert_and_none_twice_on_a_rank(experts: int, ranks: int, slots: int) -> None:
    for seed, power in itertools.product(range(4), (0.0, 1.0, 3.0)):
        loads = zipf(experts, seed, power)
        table = balance(loads, ranks, slots)
        check_map(table, experts, ranks, slots)
        # No slot stays empty that another copy could have filled.
        assert (table >= 0).sum() == min(ranks * slots, ranks * experts)
        np.testing.assert_array_equal(table, balance(loads, ranks, slots))
        assert imbalance(loads, table) >= 1 - 1e-12
    check_map(balance(np.zeros(experts, int), ranks, slots), experts, ranks, slots)


def test_one_expert_with_all_the_load_goes_everywhere() -> None:
    loads = np.zeros(8)
    loads[5] = 100
    table = balance(loads, 4, 3)
    check_map(table, 8, 4, 3)
    assert (table == 5).sum() == 4
    assert imbalance(loads, table) == 1
    assert imbalance(loads, np.arange(8).reshape(4, 2)) == 4


def test_packing_reaches_the_optimum_of_small_problems() -> None:
    # Without spare slots every placement of 6 experts on 3 ranks can be tried.
    for seed in range(20):
        loads = np.random.default_rng(seed).integers(1, 100, 6)
        best = min(
            imbalance(loads, np.array(order).reshape(3, 2)) for order in itertools.permutations(range(6))
        )
        assert imbalance(loads, balance(loads, 3, 2)) <= best * 1.0001


def test_skewed_loads_become_nearly_even() -> None:
    worst_before, worst_after = 0.0, 0.0
    for seed in range(5):
        loads = zipf(64, seed, 0.8)
        before = imbalance(loads, np.arange(64).reshape(8, 8))
        after = imbalance(loads, balance(loads, 8, 10))
        assert after < before
        worst_before, worst_after = max(worst_before, before), max(worst_after, after)
    assert worst_before > 1.5
    assert worst_after < 1.03


def test_layers_are_balanced_each_for_itself() -> None:
    loads = np.stack([zipf(12, seed) for seed in range(3)])
    tables = balance(loads, 4, 4)
    assert tables.shape == (3, 4, 4)
    for row, table in zip(loads, tables, strict=True):
        np.testing.assert_array_equal(table, balance(row, 4, 4))
    np.testing.assert_allclose(
        imbalance(loads, tables), [imbalance(row, table) for row, table in zip(loads, tables, strict=True)]
    )


def test_groups_stay_on_their_node() -> None:
    loads = zipf(32, 3)
    table = balance(loads, 8, 5, num_groups=8, num_nodes=2)
    check_map(table, 32, 8, 5)
    nodes = [set((half[half >= 0] // 4).tolist()) for half in table.reshape(2, -1)]
    assert [len(groups) for groups in nodes] == [4, 4]
    assert not nodes[0] & nodes[1]
    assert imbalance(loads, table) < imbalance(loads, np.arange(32).reshape(8, 4))
    # Groups whose loads differ are not all the heavy ones on one node.
    skewed = np.repeat([8.0, 7.0, 2.0, 1.0], 4)
    table = balance(skewed, 4, 4, num_groups=4, num_nodes=2)
    assert imbalance(skewed, table) == pytest.approx(1)


def test_moving_loads() -> None:
    loads = MovingLoads(decay=0.5)
    with pytest.raises(ValueError, match="update"):
        _ = loads.values
    first = loads.update([4, 0])
    np.testing.assert_allclose(first.values, [4, 0])
    # Weights 1/3 and 2/3: the later count is twice the earlier one.
    np.testing.assert_allclose(first.update(np.array([1, 3])).values, [2, 2])
    np.testing.assert_allclose(first.values, [4, 0])
    np.testing.assert_allclose(MovingLoads(decay=0).update([1, 2]).update([5, 6]).values, [5, 6])
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        first.update([1, 2, 3])


def test_place_gathers_and_its_gradient_sums_over_replicas() -> None:
    table = np.array([[2, 0, -1], [1, 2, 0]], np.int32)
    rng = np.random.default_rng(0)
    weights = {"up": rng.normal(size=(3, 2, 5)), "bias": rng.normal(size=(3, 4))}
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights)
    run = jax.jit(place)
    placed = run(weights, table)
    for name, value in placed.items():
        want = np.where(
            (table.reshape(-1) < 0).reshape(-1, *[1] * (value.ndim - 1)),
            0,
            np.asarray(weights[name])[table.reshape(-1)],
        )
        np.testing.assert_array_equal(value, want)
    cotangent = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), w.dtype), placed)
    _, transpose = jax.vjp(lambda w: place(w, table), weights)
    (gradient,) = transpose(cotangent)
    for name, value in gradient.items():
        summed = np.zeros(value.shape, np.float32)
        for slot, expert in enumerate(table.reshape(-1)):
            if expert >= 0:
                summed[expert] += cotangent[name][slot]
        np.testing.assert_allclose(value, summed, rtol=1e-6)
    run(weights, table[::-1])
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    "error, match, arguments, options",
    [
        (TypeError, "loads", ("abc", 2, 2), {}),
        (ValueError, "loads", ([[[1]]], 2, 2), {}),
        (ValueError, "loads", ([1, -1], 2, 2), {}),
        (ValueError, "loads", ([1, float("nan")], 2, 2), {}),
        (ValueError, "num_ranks", ([1, 1], 0, 2), {}),
        (TypeError, "num_ranks", ([1, 1], 2.0, 2), {}),
        (ValueError, "slots_per_rank must be at least 3", ([1] * 5, 2, 2), {}),
        (ValueError, "num_groups must divide", ([1] * 4, 2, 2), {"num_groups": 3}),
        (ValueError, "num_nodes must divide", ([1] * 4, 2, 2), {"num_nodes": 2}),
        (ValueError, "num_nodes must divide", ([1] * 4, 4, 2), {"num_nodes": 3, "num_groups": 4}),
    ],
)
def test_bad_arguments_are_named(
    error: type[Exception], match: str, arguments: tuple[Any, ...], options: dict[str, int]
) -> None:
    with pytest.raises(error, match=match):
        balance(*arguments, **options)


def test_bad_maps_are_named() -> None:
    with pytest.raises(TypeError, match="expert_map must hold ints"):
        imbalance([1, 1], [[0.0], [1.0]])
    with pytest.raises(ValueError, match="expert_map must be"):
        imbalance([1, 1], [0, 1])
    with pytest.raises(ValueError, match=r"-1 or 0\.\.1"):
        imbalance([1, 1], [[0], [2]])
    with pytest.raises(ValueError, match="no rank for expert 1"):
        imbalance([1, 1], [[0], [0]])
    with pytest.raises(TypeError, match="expert_map must hold ints"):
        place(jnp.zeros((2, 3)), [0.0, 1.0])
    with pytest.raises(ValueError, match="one E"):
        place([jnp.zeros((2, 3)), jnp.zeros((3, 3))], [0, 1])
    with pytest.raises(TypeError, match="decay"):
        MovingLoads(decay="0.9")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decay"):
        MovingLoads(decay=1.0)
