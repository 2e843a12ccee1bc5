"""The order that records train in: shuffled anew every epoch, and within each step by length, which pads less.

A step's loss is a mean over its records, however they are divided into batches and processes; batches of like lengths
change how long it takes, and nothing else.
"""

from collections.abc import Callable, Iterator
from itertools import islice

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler


class StepOrder(Sampler[int]):
    """Indices of a dataset in the order that batches take them: one batch of every process, then the next of each.

    Args:
        shuffled: the order by epoch; its size is a whole number of steps.
        batch_size: records of one batch.
        batches: that each process sums before a step.
        processes: that train together. Records of like lengths are dealt out to them, so that none waits for another.
        length: something that grows with an index's tokens.
    """

    def __init__(
        self,
        shuffled: SeedableRandomSampler,
        batch_size: int,
        batches: int,
        processes: int,
        length: Callable[[int], int],
    ) -> None:
        self.shuffled, self.length, self.processes = shuffled, length, processes
        self.together = batch_size * processes
        self.a_step = self.together * batches

    def __len__(self) -> int:
        return len(self.shuffled)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's order comes next."""
        self.shuffled.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        indices = iter(self.shuffled)
        while step := list(islice(indices, self.a_step)):
            step.sort(key=self.length, reverse=True)  # the largest batch first: what does not fit fails at once
            for start in range(0, len(step), self.together):
                alike = step[start : start + self.together]
                for process in range(self.processes):
                    yield from alike[process :: self.processes]
