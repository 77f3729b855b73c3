"""What tests/soak.py calls growth."""

from __future__ import annotations

import dataclasses
import random

import pytest
import soak
from soak import Sample

pytestmark = pytest.mark.smoke


def samples(count: int, **leaks: float) -> list[Sample]:
    """Of a healthy process, whose figures go up and down a little, with what it loses for each sample."""
    draw = random.Random(1)
    seen = []
    for number in range(count):
        breath = draw.uniform(-1.0, 1.0)
        one = Sample(3.0 * number, 200 * number, 1 + number // 5, 240 + breath, 33 + number % 2, 34, 9)
        for name, each in leaks.items():
            value = getattr(one, name) + each * number
            one = dataclasses.replace(one, **{name: value if name == "mib" else int(value)})
        seen.append(one)
    return seen


@pytest.mark.parametrize("count", [4, 9, 40, 400])
def test_what_is_flat_passes(count):
    assert soak.verdict(samples(count)) == []


def test_warming_up_is_no_leak():
    warm = samples(40)
    for number in range(10):
        warm[number].mib -= 50.0 - 5 * number
        warm[number].threads -= 5
    assert soak.verdict(warm) == []


@pytest.mark.parametrize("name", ["descriptors", "threads", "registrations"])
@pytest.mark.parametrize("each", [1.0, 0.2])  # of a sample, or of a group
def test_one_more_of_something_each_time_is_told(name, each):
    (grown,) = soak.verdict(samples(40, **{name: each}))
    assert grown.startswith(f"{name} from ")


def test_memory_that_grows_is_told():
    (grown,) = soak.verdict(samples(40, mib=0.5))  # 20 MiB in all, and half of that between the quarters
    assert grown.startswith("memory from 24")
    assert soak.verdict(samples(40, mib=0.02)) == [], "allocators breathe"


def test_all_that_grows_is_told():
    assert len(soak.verdict(samples(100, mib=1, descriptors=1, threads=1, registrations=1))) == 4
