"""Whether a run is worth going on with: losses that are no numbers or explode, and skip rates that are stuck.

Shapes: B examples.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from routing_experts.data.collate import example_key
from routing_experts.data.dataset import EncodedDataset
from routing_experts.data.faults import UNUSABLE
from routing_experts.errors import TrainingError
from routing_experts.training.folder import last_complete

EXPLODED = 2.0  # times what guessing among all tokens costs: no model that still reads its input is as bad
STUCK = 0.01  # of the routed layers: so near to none or all that routers no longer tell examples apart
NAMED = 8  # records of a batch that a message names


class StepLosses:
    """The losses of one optimiser step's batches, kept on the device until the step is done.

    Args:
        vocabulary: size of the model's.
    """

    def __init__(self, vocabulary: int) -> None:
        self.limit = EXPLODED * math.log(vocabulary)
        self._batches: list[tuple[Tensor, Tensor]] = []

    def add(self, cross_entropy_B: Tensor, keys_B: Tensor) -> None:
        """One batch's cross-entropy and the keys of its records."""
        self._batches.append((cross_entropy_B.detach(), keys_B))

    def check(self, accelerator: Any, dataset: EncodedDataset, step: int, checkpoints: Path) -> None:
        """Ends the step; one read from the device.

        Args:
            accelerator: of all processes, which stop together.
            dataset: whose records a message names.
            step: that was taken.
            checkpoints: that a message looks for a whole one in.

        Raises:
            TrainingError: if a loss is no number or has exploded.
        """
        batches, self._batches = self._batches, []
        if not batches:
            return
        means = torch.stack([losses.float().mean() for losses, _ in batches])
        bad = ~(means <= self.limit)  # NaN is not below anything
        if not float(accelerator.reduce(bad.any().float(), reduction="sum")):
            return
        mine = [
            (float(mean), keys.tolist()) for mean, (_, keys), is_bad in zip(means, batches, bad, strict=True) if is_bad
        ]
        # The first process that ends takes the others along: each must be able to say all.
        raise TrainingError(_told(gather_object(mine), dataset, step, self.limit) + _what_is_left(checkpoints))


def check_numbers(named: Iterable[tuple[str, Tensor]], step: int, checkpoints: Path) -> None:
    """Looks at weights before they are kept: a loss tells of the step before, not of what the last update did.

    Args:
        named: the weights.
        step: that they were after.
        checkpoints: that the message looks for a whole one in.

    Raises:
        TrainingError: if one of them is no number.
    """
    spoiled = next((name for name, value in named if not bool(value.isfinite().all())), None)
    if spoiled is not None:
        raise TrainingError(
            f"step {step}: {spoiled} holds what is no number, from a gradient that overflowed. Lower "
            "training.learning_rate, training.base_learning_rate or training.max_grad_norm. "
            + _what_is_left(checkpoints)
        )


def _told(bad: Sequence[tuple[float, list[int]]], dataset: EncodedDataset, step: int, limit: float) -> str:
    loss, keys = bad[0]
    what = "no number" if math.isnan(loss) else f"above {limit:.1f}, twice what guessing costs"
    names = ", ".join(_ids(dataset, set(keys)))
    return (
        f"step {step}: the loss is {loss:g}, {what}, on records {names}. Look at these records, and lower "
        "training.learning_rate or training.base_learning_rate. "
    )


def _what_is_left(checkpoints: Path) -> str:
    last = last_complete(checkpoints)
    if last is None:
        return "There is no whole checkpoint: the next run begins anew. Set training.save_steps to lose less."
    return (
        f"{last.name} is whole and from before: --accept-changes goes on from it with other rates or records, "
        "--restart begins anew."
    )


def _ids(dataset: EncodedDataset, keys: set[int]) -> list[str]:
    """Ids by key: a message is worth a walk over the records."""
    names = _all_ids(dataset)
    found = list(islice((name for name in names if example_key(name) in keys), min(NAMED, len(keys))))
    return [*found, "…"] if len(keys) > NAMED else found


def _all_ids(dataset: EncodedDataset) -> Iterator[str]:
    """Of records that can be read; one that cannot is not what trained."""
    for index in range(len(dataset)):
        try:
            yield str(dataset.records[dataset.first + index].id)
        except UNUSABLE:
            continue


def stuck_rate(rate: float, target: float) -> str:
    """What to say of a skip rate of the routed layers once routers have been trained; empty if nothing.

    Args:
        rate: over the last steps.
        target: ρ.
    """
    if rate < STUCK and target > STUCK:
        return (
            f"skip rate stuck at {rate:.1%} after the routers' stage, target {target:.0%}: nothing is skipped. Raise "
            "roe.sparsity_loss_coef or lower roe.ce_sharpness, or give the routers' stage a larger share of the run."
        )
    if rate > 1 - STUCK:
        return (
            f"skip rate stuck at {rate:.1%} after the routers' stage, target {target:.0%}: every routed layer is "
            "skipped. Lower training.learning_rate, or give adapter_warmup a larger share of the run."
        )
    return ""
