"""Controls that need no training: the same skip rate spent on fixed layers, or at random.

Both skip, over all questions, exactly as many layers as the routed model did (to within one layer of one question),
so that only the choice of layers differs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from routing_experts.inference.routes import draw_routes


def most_skipped(layer_skip_rates: Sequence[float], routed_layers: Sequence[int]) -> list[int]:
    """Routed layers, the most skipped first; ties by index."""
    return sorted(routed_layers, key=lambda layer: (-layer_skip_rates[layer], layer))


def static_routes(order: Sequence[int], skip_rate: float, num_questions: int, num_layers: int, seed: int) -> Tensor:
    """Every question skips the first layers of ``order``, as many as ``skip_rate`` asks.

    A rate between two whole numbers of layers is met by giving some questions, drawn by ``seed``, one layer more.

    Returns:
        Keep flags [N, L].
    """
    routes = torch.ones(num_questions, num_layers, dtype=torch.bool)
    for row, count in enumerate(_counts(skip_rate, num_questions, num_layers, len(order), seed)):
        routes[row, list(order[:count])] = False
    return routes


def random_routes(
    routed_layers: Sequence[int], skip_rate: float, num_questions: int, num_layers: int, seed: int
) -> Tensor:
    """Every question skips layers drawn at random, as many as ``skip_rate`` asks. Keep flags [N, L]."""
    counts = _counts(skip_rate, num_questions, num_layers, len(routed_layers), seed)
    return draw_routes(counts, routed_layers, num_layers, seed)


def _counts(skip_rate: float, num_questions: int, num_layers: int, most: int, seed: int) -> list[int]:
    """Layers to skip a question; their sum is the rate's share of all layers of all questions."""
    total = min(round(skip_rate * num_layers * num_questions), most * num_questions)
    base, more = divmod(total, num_questions)
    counts = np.full(num_questions, base)
    counts[np.random.default_rng(seed).permutation(num_questions)[:more]] += 1
    return counts.tolist()
