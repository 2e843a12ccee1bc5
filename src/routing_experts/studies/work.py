"""Doing a study's jobs, one after the other, beside other processes that do the same."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from routing_experts.studies.contest import Contest
from routing_experts.studies.jobs import Job


def work_on(
    contest: Contest, jobs: Sequence[Job], minutes: float | None = None, on_done: Callable[[], object] = lambda: None
) -> None:
    """Does what is left of the jobs; what another process has begun is left to it, and what waits for that as well.

    Args:
        contest: the study's.
        jobs: in order.
        minutes: after which none is begun; None for no end.
        on_done: told after each.
    """
    started = time.monotonic()
    for job in jobs:
        source = contest.source_of(job)
        for one in (job,) if source is None else (source, job):
            if contest.found(one) is not None:
                continue
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                return
            if not _do(contest, one):
                break
            on_done()


def _do(contest: Contest, job: Job) -> bool:
    """Says whether the job is done now. The run whose model it asks is claimed too: it may have to be trained again."""
    with ExitStack() as claims:
        if not all(claims.enter_context(one.claimed(contest.output)) for one in {job, contest.model_job(job)}):
            return False
        contest.run(job)
        return True
