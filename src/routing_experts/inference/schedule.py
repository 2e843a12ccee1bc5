"""Which waiting requests decode together.

A decoding step reads the weights of every layer that any of its rows keeps, and the keys and values of the rows that
keep it. Rows of like routes share what is read, so who shares a batch decides what a step costs. A new group is the
cheapest that can be formed around any waiting request; a request joins a group that decodes already where that raises
tokens a second. Whoever was passed over too often starts the next group, and until then nobody else joins, so that
nobody waits for ever.

Routes are bit masks here: bit l is set where layer l is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_PASSED_OVER = 3  # groups


def mask_of(route: Sequence[bool]) -> int:
    """Keep flags as a bit mask."""
    return sum(1 << layer for layer, keep in enumerate(route) if keep)


@dataclass(frozen=True)
class StepCost:
    """What a decoding step costs, in units of one layer's weights read once.

    Attributes:
        row: of one row in one layer that it keeps, beside the weights: its keys, values and arithmetic.
        fixed: of a step, whatever its routes: embedding, head, launching.
    """

    row: float = 0.02
    fixed: float = 2.0

    def of(self, union: int, layer_rows: int) -> float:
        """The cost of a step.

        Args:
            union: mask of the layers that any row keeps.
            layer_rows: kept layers summed over rows.
        """
        return self.fixed + union.bit_count() + self.row * layer_rows


@dataclass
class _Group:
    """Rows that decode together: indices of those that join, and what all keep."""

    chosen: list[int]
    size: int
    union: int
    layer_rows: int

    def cost(self, by: StepCost) -> float:
        return by.of(self.union, self.layer_rows)

    def joined(self, index: int, mask: int) -> "_Group":
        return _Group([*self.chosen, index], self.size + 1, self.union | mask, self.layer_rows + mask.bit_count())


def pick(
    active: Sequence[int], waiting: Sequence[int], passed_over: Sequence[float], free: int, cost: StepCost
) -> list[int]:
    """Indices into ``waiting`` of those that should join now.

    Args:
        active: masks of the rows that decode already.
        waiting: masks of those that could join, the longest waiting first.
        passed_over: how many groups were formed while each of them waited; who joins a group in front of an earlier
            request counts for a part of one.
        free: how many can join.
        cost: of a step.
    """
    if not waiting or not free:
        return []
    overdue = [index for index, groups in enumerate(passed_over) if groups >= MAX_PASSED_OVER]
    everyone = range(len(waiting))
    if active:
        union = 0
        for mask in active:
            union |= mask
        group = _Group([], len(active), union, sum(mask.bit_count() for mask in active))
        return _grow(group, waiting, overdue[:1] or everyone, free, cost).chosen
    seeds = overdue[:1] or list({mask: index for index, mask in reversed(list(enumerate(waiting)))}.values())
    alone = [_Group([seed], 1, waiting[seed], waiting[seed].bit_count()) for seed in seeds]
    groups = [_grow(group, waiting, everyone, free, cost) for group in alone]
    return min(groups, key=lambda group: (group.cost(cost) / group.size, group.chosen[0])).chosen


def _grow(group: _Group, waiting: Sequence[int], among: Sequence[int], free: int, cost: StepCost) -> _Group:
    """Adds the cheapest one after the other, while that raises tokens a second."""
    left = [index for index in among if index not in group.chosen]
    while left and len(group.chosen) < free:
        best = min((group.joined(index, waiting[index]) for index in left), key=lambda g: (g.cost(cost), g.chosen[-1]))
        if best.size / best.cost(cost) <= group.size / group.cost(cost):
            break
        left.remove(best.chosen[-1])
        group = best
    return group
