"""Which records a share of a set is: by the authors' rule, or drawn evenly of every source and number of turns."""

from collections import Counter
from collections.abc import Callable, Iterable
from hashlib import blake2b
from math import floor
from random import Random
from typing import Any

from routing_experts.data.mixture.naming import Sources
from routing_experts.data.readers.conversation import LLAVA, MESSAGES, SYSTEM
from routing_experts.data.readers.items import Item
from routing_experts.data.readers.pictures import names_of

Stratum = tuple[str, int]
Keep = Callable[[Item, Stratum], bool]


class Strata:
    """Source and turns of the records of one set, in the order in which they come."""

    def __init__(self) -> None:
        self._name = Sources()

    def __call__(self, value: Any) -> Stratum:
        """Of what a file holds; records that are none make a stratum of their own."""
        if not isinstance(value, dict):
            return "no record", 0
        for layout in (LLAVA, MESSAGES):
            if isinstance(messages := value.get(layout.field), list):
                first = messages[0] if messages and isinstance(messages[0], dict) else {}
                turns = (len(messages) - (first.get(layout.speaker) == SYSTEM)) // 2
                break
        else:
            turns = 0
        return self._name(names_of(value)), turns


def authors_rule(item: Item, stratum: Stratum) -> bool:
    """RoE's own half of LLaVA's mixture: six records of every ten, by their numbers (``llava/train/train.py``)."""
    return item.index % 10 < 6


def counts_of(items: Iterable[Item]) -> Counter[Stratum]:
    """The records of each stratum."""
    strata = Strata()
    return Counter(strata(item.value) for item in items)


def shares(counts: Counter[Stratum], share: float, seed: str) -> dict[Stratum, int]:
    """How many records of each stratum make the share: exact in total, and within one record in each.

    Strata that lose the most by rounding down are rounded up, until the total is met; among equals the seed chooses.
    """
    exact = {stratum: share * count for stratum, count in counts.items()}
    wanted = {stratum: floor(value) for stratum, value in exact.items()}
    lacking = round(share * counts.total()) - sum(wanted.values())
    strata = sorted(exact)
    Random(seed).shuffle(strata)
    for stratum in sorted(strata, key=lambda one: wanted[one] - exact[one])[:lacking]:
        wanted[stratum] += 1
    return wanted


class Drawing:
    """Draws so many records of each stratum, each as likely as any other, in one pass and in constant memory.

    Selection sampling (Knuth, The Art of Computer Programming, volume 2, algorithm S). Each draw is a digest of its
    place, so that no generator is kept for a stratum, and what is drawn of one does not depend on the others.

    Args:
        counts: the records of each stratum.
        wanted: how many of them to draw.
        seed: of the draws.
    """

    def __init__(self, counts: Counter[Stratum], wanted: dict[Stratum, int], seed: str) -> None:
        self._left, self._wanted, self._seed = Counter(counts), dict(wanted), seed

    def __call__(self, item: Item, stratum: Stratum) -> bool:
        """Whether the next record is drawn."""
        left = self._left[stratum]
        place = f"{self._seed}/{stratum[1]}/{left}/{stratum[0]}".encode()
        draw = int.from_bytes(blake2b(place, digest_size=8).digest(), "little") / 2**64
        is_drawn = draw * left < self._wanted[stratum]
        self._left[stratum] -= 1
        self._wanted[stratum] -= is_drawn
        return is_drawn
