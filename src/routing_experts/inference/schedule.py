"""Which waiting requests decode together.

A decoding step reads the weights of every layer that any of its rows keeps, and the keys and values of the rows that
keep it. Rows of like routes share what is read, so which requests share a batch decides what a step costs. A request
joins where it raises tokens a second by the cost below; the one that has waited longest starts a new group, so nobody
waits for ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Route = tuple[bool, ...]


@dataclass(frozen=True)
class StepCost:
    """What a decoding step costs, in units of one layer's weights read once.

    Attributes:
        row: of one row in one layer that it keeps, beside the weights: its keys, values and arithmetic.
        fixed: of a step, whatever its route: embedding, head, launching.
    """

    row: float = 0.02
    fixed: float = 2.0

    def of(self, routes: Sequence[Route]) -> float:
        """The cost of a step of these rows."""
        union = sum(map(any, zip(*routes, strict=True)))
        return self.fixed + union + self.row * sum(map(sum, routes))


def pick(active: Sequence[Route], waiting: Sequence[Route], free: int, cost: StepCost) -> list[int]:
    """Indices into ``waiting``, the longest waiting first in it, of those that should join now.

    Args:
        active: routes of the rows that decode already.
        waiting: routes of those that could join.
        free: how many can.
        cost: of a step.
    """
    chosen: list[int] = []
    group = list(active)
    if not group and waiting and free:
        chosen, group = [0], [waiting[0]]
    left = [index for index in range(len(waiting)) if index not in chosen]
    while left and len(chosen) < free:
        best = min(left, key=lambda index: (cost.of([*group, waiting[index]]), index))
        rate, joined = len(group) / cost.of(group), (len(group) + 1) / cost.of([*group, waiting[best]])
        if joined <= rate:
            break
        chosen.append(best)
        group.append(waiting[best])
        left.remove(best)
    return chosen
