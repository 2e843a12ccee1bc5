"""Work that other processes share: handed out a block at a time, a few blocks ahead, taken back in order."""

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Generic, TypeVar

from routing_experts.errors import WorkerError

AHEAD = 3  # blocks a process that wait or are being worked on: enough to keep it busy, few enough to stay small
BLOCK = 500  # pieces of work that a process takes at a time
BLOCK_BYTES = 8 << 20  # of pictures that a table holds, which travel with the work
B = TypeVar("B")
R = TypeVar("R")


class Shared(Generic[B, R]):
    """Work given to processes, a block at a time.

    Args:
        pool: the processes.
        do: what is done with a block; a function of a module, or something else that can be sent to processes.
        take: called with each block and what was made of it, in the order in which they were given.
        limit: blocks that may be on their way.

    Raises:
        WorkerError: from any method, if a process has ended.
    """

    def __init__(
        self,
        pool: ProcessPoolExecutor,
        do: Callable[[list[B]], Sequence[R]],
        take: Callable[[Sequence[B], Sequence[R]], object],
        limit: int,
    ) -> None:
        self.pool, self.do, self.take, self.limit = pool, do, take, limit
        self._block: list[B] = []
        self._bytes = 0
        self._given: deque[tuple[list[B], Future[Sequence[R]]]] = deque()

    def add(self, one: B, pictures: Iterable[object] = ()) -> None:
        """Takes a piece of work, with pictures of which some may be held in memory; a full block is handed out."""
        self._block.append(one)
        self._bytes += sum(len(picture) for picture in pictures if isinstance(picture, bytes))
        if len(self._block) >= BLOCK or self._bytes >= BLOCK_BYTES:
            self._give()

    def finish(self) -> None:
        """Hands out the rest, and takes back all that is on its way."""
        if self._block:
            self._give()
        while self._given:
            self._take()

    def _give(self) -> None:
        """Hands the block out; waits while too many are on their way."""
        while len(self._given) >= self.limit:
            self._take()
        try:
            self._given.append((self._block, self.pool.submit(self.do, self._block)))
        except BrokenProcessPool as error:
            raise _lost() from error
        self._block, self._bytes = [], 0

    def _take(self) -> None:
        block, future = self._given.popleft()
        try:
            made = future.result()
        except BrokenProcessPool as error:
            raise _lost() from error
        self.take(block, made)


def _lost() -> WorkerError:
    return WorkerError(
        "a process that shares the work on the records has ended: memory may have run out, or the program that began "
        "it runs again where it is imported (see multiprocessing's `__main__`). Give fewer workers."
    )


@contextmanager
def processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes that begin afresh; what they have not begun is dropped if this one fails or is interrupted."""
    # Spawned: bars run threads, which forks would break. Ctrl-C is for this process, which ends the others.
    pool = ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
