"""``roe study``: contenders trained alike and asked the same questions, over seeds and skip rates."""

from pathlib import Path
from typing import Annotated

import typer


def study(
    name: Annotated[str, typer.Argument(help="A study's YAML file, or the name of a shipped one.")],
    output: Annotated[Path | None, typer.Option(help="The study's folder; runs/NAME by default.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Train this arm alone; repeat for several.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Begin no run after so many minutes.")] = None,
    json: Annotated[
        Path | None, typer.Option(help="Where the record goes as well as into the folder; - for standard output.")
    ] = None,
) -> None:
    """Train every contender of a study and compare them; a study that was cut short goes on.

    Example: roe study digits --minutes 50
    """
    import time

    from routing_experts.cli.contenders import Contest, jobs_of
    from routing_experts.cli.output import start, write_json
    from routing_experts.errors import ConfigError
    from routing_experts.records import STUDY_NAME
    from routing_experts.reports import print_study
    from routing_experts.training.study import load_study

    say, plan = start(), load_study(name)
    console = say.progress
    unknown = sorted(set(only or []) - set(plan.arms))
    if unknown:
        raise ConfigError(f"--only {', '.join(unknown)}: the study's arms are {', '.join(plan.arms)}. Name some.")
    folder = output or Path("runs") / Path(name).stem
    contest = Contest(plan, folder, console)
    jobs = [job for job in jobs_of(plan) if not only or job.arm in only]
    started = time.monotonic()
    for job in filter(contest.is_done, jobs_of(plan)):
        contest.run(job)  # one of another plan is refused now, not after hours
    for job in jobs:
        late = minutes is not None and time.monotonic() - started > 60 * minutes
        if not late and not contest.is_done(job):
            console.print(f"[bold]{job.arm}[/] at {job.rate:.1%}, seed {job.seed}")
            contest.run(job)
    left = sum(not contest.is_done(job) for job in jobs)
    runs = [contest.run(job) for job in jobs_of(plan) if contest.is_done(job)]
    record = contest.record(Path(name).stem, runs, contest.ask_base())
    if str(json) != "-":
        print_study(record, say.results)
    write_json(record.to_dict(), folder / STUDY_NAME, say, "study")  # where `roe report` looks for it
    if json is not None:
        write_json(record.to_dict(), json, say, "study")
    if left:
        console.print(f"{left} of {len(jobs)} runs are left: give the same command again.")
