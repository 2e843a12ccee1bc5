"""The order that records train in: shuffled anew every epoch, then by length, which pads less.

A step's loss is a mean over its records, however they are divided into batches and processes: within a step, batches of
like lengths change how long it takes, and nothing else. Over several steps they change what each step learns from.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from random import Random

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler

Size = tuple[bool, int]  # whether there are pictures, and something that grows with the tokens


class StepOrder(Sampler[int]):
    """Indices of a dataset in the order that batches take them: one batch of every process, then the next of each.

    Args:
        shuffled: the order by epoch; its number is a whole number of steps.
        batch_size: records of one batch.
        batches: that each process sums before a step.
        processes: that train together. Records of like lengths are dealt out to them, so that none waits for another.
        size: of the record of an index. Records with pictures and without come apart as well.
        window: so many steps' records are sorted together and cut into steps, whose order is drawn; 1 leaves to each
            step the records that the shuffle gave it.
    """

    def __init__(
        self,
        shuffled: SeedableRandomSampler,
        batch_size: int,
        batches: int,
        processes: int,
        size: Callable[[int], Size],
        window: int = 1,
    ) -> None:
        self.shuffled, self.size, self.processes, self.window = shuffled, size, processes, window
        self.together = batch_size * processes
        self.a_step = self.together * batches

    def __len__(self) -> int:
        return len(self.shuffled)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's order comes next."""
        self.shuffled.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        draw = Random(f"{self.shuffled.initial_seed}/{self.shuffled.epoch}")
        indices = iter(self.shuffled)
        while records := list(islice(indices, self.a_step * self.window)):
            # The largest of a step first: what does not fit into memory fails at once.
            steps = _cut(sorted(records, key=self.size, reverse=True), self.a_step)
            draw.shuffle(steps)
            for step in steps:
                for alike in _cut(step, self.together):
                    for process in range(self.processes):
                        yield from alike[process :: self.processes]


def _cut(values: Sequence[int], size: int) -> list[Sequence[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
