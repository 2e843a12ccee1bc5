"""Paired comparison of two models on the same questions, and what routes say about tasks.

Shapes: S seeds, N questions, L layers.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """A difference of means with its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_difference(first_SN: np.ndarray, second_SN: np.ndarray) -> Difference:
    """First minus second, both asked the same N questions by models of S seeds.

    The seeds' answers to one question are not independent, so the question is the unit: its differences are averaged
    over seeds, and questions are drawn with replacement (Efron's percentile bootstrap). The interval speaks of these
    seeds; how much seeds differ must be shown beside it.

    Args:
        first_SN, second_SN: whether each answer was right, or its score.
    """
    assert first_SN.shape == second_SN.shape
    by_question_N = (first_SN.astype(float) - second_SN.astype(float)).mean(0)
    low, high = bootstrap_interval(by_question_N)
    return Difference(float(by_question_N.mean()), low, high)


def bootstrap_interval(values_N: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of a mean, from samples of N drawn with replacement.

    Drawn as counts of the distinct values, which come out as often as if items were drawn one by one.
    """
    distinct, counts = np.unique(values_N, return_counts=True)
    total = len(values_N)
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, size=resamples)
    low, high = np.percentile(drawn @ distinct / total, (2.5, 97.5))
    return float(low), float(high)


def varied_share(layer_skip_rates: Sequence[float], low: float = 0.05, high: float = 0.95) -> float:
    """The share of layers that some questions skip and others run: whose skip rate lies between the bounds."""
    return sum(low <= rate <= high for rate in layer_skip_rates) / len(layer_skip_rates)


def mutual_information(tasks: Sequence[str], routes: Sequence[tuple[bool, ...]]) -> float:
    """Bits that a question's route tells about its task (plug-in estimate, biased upwards by rare routes).

    The bias is about (routes − 1)(tasks − 1) / (2 N ln 2) bits; it is subtracted (Miller and Madow's correction), and
    what falls below 0 counts as 0.
    """
    pairs, by_task, by_route = Counter(zip(tasks, routes, strict=True)), Counter(tasks), Counter(routes)
    total = len(tasks)
    bits = sum(
        n / total * math.log2(n * total / (by_task[task] * by_route[route])) for (task, route), n in pairs.items()
    )
    cells = len(pairs) - len(by_task) - len(by_route) + 1
    return max(0.0, bits - cells / (2 * total * math.log(2)))
