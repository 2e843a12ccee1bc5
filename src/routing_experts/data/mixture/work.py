"""Work that other processes share: handed out a block at a time, a few blocks ahead, taken back in order."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Generic, TypeVar

from routing_experts.errors import WorkerError

AHEAD = 3  # blocks a process that wait or are being worked on: enough to keep it busy, few enough to stay small
B = TypeVar("B")
R = TypeVar("R")


class Shared(Generic[B, R]):
    """Blocks given to processes.

    Args:
        pool: the processes.
        do: what is done with a block; a function of a module, or something else that can be sent to processes.
        take: called with each block and what was made of it, in the order in which they were given.
        limit: blocks that may be on their way.
    """

    def __init__(
        self, pool: ProcessPoolExecutor, do: Callable[[B], R], take: Callable[[B, R], object], limit: int
    ) -> None:
        self.pool, self.do, self.take, self.limit = pool, do, take, limit
        self._given: deque[tuple[B, Future[R]]] = deque()

    def give(self, block: B) -> None:
        """Hands a block out; waits while too many are on their way."""
        while len(self._given) >= self.limit:
            self._take()
        try:
            self._given.append((block, self.pool.submit(self.do, block)))
        except BrokenProcessPool as error:
            raise _lost() from error

    def finish(self) -> None:
        """Takes back all that is on its way."""
        while self._given:
            self._take()

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
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))  # bars run threads, which forks would break
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
