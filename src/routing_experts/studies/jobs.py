"""The runs of a study as jobs, which several processes may share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from routing_experts.studies.plan import DEPENDENT, Study


@dataclass(frozen=True)
class Job:
    """An arm at a rate with a seed."""

    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arm} at {self.rate:.1%}, seed {self.seed}"

    def folder(self, output: Path) -> Path:
        """Where the run lies."""
        return output / f"{self.arm}-{100 * self.rate:.4g}" / f"seed-{self.seed}"

    @contextmanager
    def claimed(self, output: Path) -> Iterator[bool]:
        """Says whether this process may do the job; no other one may, then. The system frees it when a process ends."""
        folder = self.folder(output)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".claim")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def jobs_of(study: Study) -> list[Job]:
    """All runs, a seed after the other; arms that look at others come behind them."""
    order = sorted(study.arms, key=lambda name: study.arms[name].control in DEPENDENT)
    return [
        Job(name, rate, seed) for seed in study.seeds for name in order for rate in study.rates_of(study.arms[name])
    ]
