"""The allocator against brute force: the best choice, never over the limit."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.search.allocate import NUM_BINS, Option, allocate, undominated


def menus(largest: int, num_sites: int = 4):
    option = st.builds(
        Option, st.just("x"), st.integers(0, largest), st.floats(0, 100, allow_subnormal=False) | st.just(0.0)
    )
    return st.lists(st.lists(option, min_size=1, max_size=5), max_size=num_sites)


def num_bytes(chosen: list[Option]) -> int:
    return sum(option.num_bytes for option in chosen)


def loss(chosen: list[Option]) -> float:
    return sum(option.loss for option in chosen)


def best_by_force(sites: list[list[Option]], limit: float) -> float | None:
    return min((loss(c) for c in itertools.product(*sites) if num_bytes(c) <= limit), default=None)


@given(menus(60), st.integers(-5, 260))
@settings(deadline=None, max_examples=300)
def test_small_budgets_are_solved_exactly(sites, limit):
    chosen = allocate(sites, limit)
    best = best_by_force(sites, limit)
    if best is None:
        assert chosen is None
        return
    assert chosen is not None
    assert num_bytes(chosen) <= limit
    assert all(option in menu for option, menu in zip(chosen, sites, strict=True))
    assert abs(loss(chosen) - best) <= 1e-9 * (1 + best)


@given(menus(10**9), st.integers(0, 4 * 10**9))
@settings(deadline=None, max_examples=300)
def test_large_budgets_are_solved_up_to_rounding(sites, limit):
    chosen = allocate(sites, limit)
    smallest = sum(min(option.num_bytes for option in menu) for menu in sites)
    if smallest > limit:
        assert chosen is None
        return
    assert chosen is not None
    assert num_bytes(chosen) <= limit
    # Every site wastes less than one step of the finely divided budget.
    step = max(1.0, (limit - smallest) / NUM_BINS)
    best = best_by_force(sites, max(smallest, limit - (len(sites) + 1) * step))
    assert best is not None
    assert loss(chosen) <= best + 1e-9 * (1 + best)


@given(menus(1000))
@settings(deadline=None)
def test_nothing_affordable_is_left_unbought(sites):
    """No single site could take a better option within the limit."""
    limit = sum(max(option.num_bytes for option in menu) for menu in sites) // 2
    chosen = allocate(sites, limit)
    for option, menu in zip(chosen or [], sites, strict=False):
        rest = limit - num_bytes(chosen)
        assert not any(o.loss < option.loss and o.num_bytes - option.num_bytes <= rest for o in menu)


@given(st.lists(st.builds(Option, st.just("x"), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_undominated(options):
    kept = undominated(options)
    sizes, losses = [o.num_bytes for o in kept], [o.loss for o in kept]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)
    assert all(any(k.num_bytes <= o.num_bytes and k.loss <= o.loss for k in kept) for o in options)


def test_extremes():
    small, large = Option("int4", 4, 1.0), Option("int8", 8, 0.1)
    assert allocate([], 0) == []
    assert allocate([[small, large]], 3) is None
    assert allocate([[small, large]], 4) == [small]
    assert allocate([[small, large]], 10**12) == [large]
    assert sorted(option.scheme for option in allocate([[large, small]] * 3, 16)) == ["int4", "int4", "int8"]


def test_many_sites_stay_within_the_limit():
    sites = [[Option(str(b), 1000 * b + i, 2.0**-b * (i + 1)) for b in (2, 3, 4, 5, 6, 8)] for i in range(120)]
    for limit in (260_000, 333_333, 480_001, 900_000):
        chosen = allocate(sites, limit)
        assert limit - 1000 < num_bytes(chosen) <= limit
