"""``roe study``: contenders trained alike and asked the same questions, over seeds and skip rates."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console


def study(
    name: Annotated[str, typer.Argument(help="A study's YAML file, or the name of a shipped one.")],
    output: Annotated[Path | None, typer.Option(help="The study's folder; runs/NAME by default.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Train this arm alone; repeat for several.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Begin no run after so many minutes.")] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            help="Where the record goes as well as into the folder; runs that it holds already are not repeated. - for "
            "standard output."
        ),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Afterwards time the models that are at hand; let nothing else run.")
    ] = False,
) -> None:
    """Train every contender of a study and compare them; a study that was cut short goes on.

    Several processes may work on one study at a time: each takes runs that no other has begun.

    Example: roe study front --minutes 50
    """
    from routing_experts.cli.common import progress_bar
    from routing_experts.cli.output import start, write_json
    from routing_experts.errors import ConfigError
    from routing_experts.records import STUDY_NAME, StudyRecord
    from routing_experts.reports import print_study, reference_run
    from routing_experts.studies.compare import study_record
    from routing_experts.studies.contest import Contest
    from routing_experts.studies.gallery import write_wins_and_losses
    from routing_experts.studies.jobs import jobs_of
    from routing_experts.studies.plan import load_study
    from routing_experts.studies.work import work_on

    say, plan = start(), load_study(name)
    console = say.progress
    unknown = sorted(set(only or []) - set(plan.arms))
    if unknown:
        raise ConfigError(f"--only {', '.join(unknown)}: the study's arms are {', '.join(plan.arms)}. Name some.")
    folder = output or Path("runs") / Path(name).stem
    known = StudyRecord.load(json) if json is not None and json.is_file() else None
    contest = Contest(plan, folder, console, lambda *what: progress_bar(console, *what), known)
    every = jobs_of(plan)
    done = sum(contest.found(job) is not None for job in every)  # one of another plan is refused now, not after hours
    console.print(f"{done} of {len(every)} runs are done.")
    jobs = [job for job in every if not only or job.arm in only]
    work_on(contest, jobs, minutes)
    runs = [found for job in every if (found := contest.found(job)) is not None]
    speeds = _timed(contest, console) if speed else []
    record = study_record(Path(name).stem, contest, runs, speeds)
    if (shown := reference_run(record)) is not None:
        write_wins_and_losses(contest, shown)
    if str(json) != "-":
        print_study(record, say.results)
    write_json(record.to_dict(), folder / STUDY_NAME, say, "study")  # where `roe report` looks for it
    if json is not None:
        write_json(record.to_dict(), json, say, "study")
    if left := sum(contest.found(job) is None for job in jobs):
        console.print(f"{left} of {len(jobs)} runs are left: give the same command again.")


def _timed(contest: Any, console: Console) -> list[Any]:
    """Seconds of every contender whose model is at hand."""
    from routing_experts.cli.common import progress_bar
    from routing_experts.studies.speed import arm_speeds, timed_jobs

    jobs = timed_jobs(contest)
    with progress_bar(console, "timing", len(jobs)) as advance:
        return arm_speeds(contest, jobs, advance)
