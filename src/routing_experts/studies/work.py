"""Doing a study's jobs, one after the other, beside other processes that do the same."""

import time
from collections.abc import Sequence

from routing_experts.studies.contest import Contest
from routing_experts.studies.jobs import Job


def work_on(contest: Contest, jobs: Sequence[Job], minutes: float | None = None) -> None:
    """Does what is left of the jobs; what another process has begun is left to it, and what waits for that as well.

    Args:
        contest: the study's.
        jobs: in order.
        minutes: after which none is begun; None for no end.
    """
    started = time.monotonic()
    for job in jobs:
        late = minutes is not None and time.monotonic() - started > 60 * minutes
        if late or contest.found(job) is not None:
            continue
        source = contest.source_of(job)
        if source is None or contest.found(source) is not None or _do(contest, source):
            _do(contest, job)


def _do(contest: Contest, job: Job) -> bool:
    """Says whether the job is done now."""
    with job.claimed(contest.output) as free:
        if free:
            contest.run(job)
        return free
