"""Which waiting requests share a batch: like routes together, nobody for ever."""

from hypothesis import given
from hypothesis import strategies as st

from routing_experts.evaluation.bench.serving import ARRIVAL, authors_routes
from routing_experts.inference.schedule import MAX_PASSED_OVER, StepCost, mask_of, pick

masks = st.lists(st.integers(0, 255), max_size=12)
WEIGHTS = StepCost(row=0.0, fixed=0.0)  # reading weights is all that costs


@given(masks, masks, st.integers(0, 6))
def test_no_more_than_fit_and_nobody_twice(active, waiting, free):
    """Guards the bound on rows; an idle engine always takes somebody."""
    chosen = pick(active, waiting, [0] * len(waiting), free, StepCost())
    assert len(set(chosen)) == len(chosen) <= free
    assert all(0 <= index < len(waiting) for index in chosen)
    if waiting and free and not active:
        assert chosen


def test_like_routes_go_together():
    """Guards the choice: of two kinds that wait, one kind fills the batch."""
    left, right = 0b00001111, 0b11110000
    chosen = pick([], [left, right, left, right, left], [0] * 5, 3, StepCost(row=0.01, fixed=0.0))
    assert chosen in ([0, 2, 4], [0, 4, 2])
    assert pick([right], [left, right], [0, 0], 1, StepCost(row=0.01, fixed=0.0)) == [1]


def test_who_was_passed_over_starts_the_next_group():
    """Guards against waiting for ever: an odd route gets its turn."""
    common, odd = 0b0001, 0b1110
    waiting = [odd] + [common] * 4
    assert 0 not in pick([], waiting, [0] * 5, 4, StepCost(row=0.0, fixed=0.0))
    assert pick([], waiting, [MAX_PASSED_OVER, 0, 0, 0, 0], 4, StepCost(row=0.0, fixed=0.0))[0] == 0


def test_nobody_joins_in_front_of_who_was_passed_over():
    """Guards against waiting for ever behind a group that never ends, because its likes keep coming."""
    common, odd = 0b0001, 0b1110
    assert pick([common], [odd, common], [MAX_PASSED_OVER - 0.5, 0], 4, WEIGHTS) == [1]
    assert pick([common], [odd, common], [MAX_PASSED_OVER, 0], 4, WEIGHTS) == []
    assert pick([common], [common, odd], [MAX_PASSED_OVER, 0], 4, WEIGHTS) == [0]


def gain(waiting: int, rows: int = 16) -> float:
    """Dense over routed weights read, when groups of the authors' routes decode to their end one after the other."""
    cost = ARRIVAL if waiting == rows else StepCost()
    queue = [mask_of(route.tolist()) for route in authors_routes((8, 12), 512)]
    pool: list[tuple[int, int]] = []
    dense = routed = 0
    while queue or pool:
        while queue and len(pool) < waiting:
            pool.append((queue.pop(0), 0))
        chosen = pick([], [mask for mask, _ in pool], [over for _, over in pool], rows, cost)
        union = 0
        for index in chosen:
            union |= pool[index][0]
        dense, routed = dense + 32 * len(chosen) / rows, routed + union.bit_count()
        pool = [(mask, over + 1) for index, (mask, over) in enumerate(pool) if index not in chosen]
    return dense / routed


def test_more_that_wait_find_better_company():
    """Guards what grouping is worth on real routes: weights read fall as more requests wait."""
    arrival, some, many = gain(16), gain(32), gain(64)
    assert 1.1 < arrival < some < many
    assert many > 1.28
