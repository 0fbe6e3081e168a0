"""The smallest damage under a budget, against all combinations."""

from __future__ import annotations

import itertools
import random

import pytest

from qat.allocation.knapsack import allocate

Options = list[list[tuple[int, float]]]


def made(seed: int, layers: int, unit: int) -> Options:
    """Options of every shape: not in the order of their bytes, damages not in the order of theirs."""
    draw = random.Random(seed)
    return [
        [(draw.randint(1, 40) * unit, draw.choice([0.0, draw.random(), 2.0])) for _ in range(draw.randint(1, 4))]
        for _ in range(layers)
    ]


def total(options: Options, numbers: list[int]) -> tuple[int, float]:
    picked = [layer[number] for layer, number in zip(options, numbers, strict=True)]
    return sum(size for size, _ in picked), sum(damage for _, damage in picked)


def best(options: Options, budget: int) -> float | None:
    """By trying everything."""
    sums = [total(options, list(numbers)) for numbers in itertools.product(*(range(len(layer)) for layer in options))]
    fitting = [damage for size, damage in sums if size <= budget]
    return min(fitting) if fitting else None


@pytest.mark.parametrize("unit", [1, 192, 4096])
@pytest.mark.parametrize("seed", range(12))
def test_as_good_as_the_best_of_all_combinations(seed: int, unit: int) -> None:
    options = made(seed, 5, unit)
    largest = sum(max(size for size, _ in layer) for layer in options)
    least = sum(min(size for size, _ in layer) for layer in options)
    for budget in {least - 1, least, *range(least, largest, max(1, largest // 7)), largest, 2 * largest}:
        found, wanted = allocate(options, budget), best(options, budget)
        if wanted is None:
            assert found is None
            continue
        assert found is not None
        size, damage = total(options, found)
        assert size <= budget
        assert damage == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_sizes_without_a_common_step_fit_and_leave_less_than_a_step_a_layer(seed: int) -> None:
    draw = random.Random(seed)
    options = [[(draw.randrange(10**8, 10**9), draw.random()) for _ in range(3)] for _ in range(5)]
    least = sum(min(size for size, _ in layer) for layer in options)
    budget = least + 10**9
    found = allocate(options, budget)
    assert found is not None
    size, damage = total(options, found)
    assert size <= budget
    wanted = best(options, budget - len(options) * (10**9 // (1 << 16) + 1))
    assert wanted is not None
    assert damage <= wanted + 1e-12


def test_no_layers_need_nothing() -> None:
    assert allocate([], 0) == []
    assert allocate([], -1) is None
