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
    from routing_experts.cli.output import print_json, start
    from routing_experts.errors import ConfigError
    from routing_experts.reports import print_study, reference_run
    from routing_experts.studies.checks import check_plan
    from routing_experts.studies.contest import Contest
    from routing_experts.studies.gallery import write_wins_and_losses
    from routing_experts.studies.jobs import jobs_of
    from routing_experts.studies.ledger import Ledger
    from routing_experts.studies.plan import load_study
    from routing_experts.studies.speed import timed
    from routing_experts.studies.work import work_on

    say, plan = start(), load_study(name)
    console, shown = say.progress, str(json) == "-"
    unknown = sorted(set(only or []) - set(plan.arms))
    if unknown:
        raise ConfigError(f"--only {', '.join(unknown)}: the study's arms are {', '.join(plan.arms)}. Name some.")
    folder = output or Path("runs") / Path(name).stem
    contest = Contest(plan, folder, console, lambda *what: progress_bar(console, *what))
    ledger = Ledger(Path(name).stem, contest, None if shown else json)
    every = jobs_of(plan)
    done = sum(contest.found(job) is not None for job in every)  # one of another plan is refused now, not after hours
    check_plan(contest)
    console.print(f"{done} of {len(every)} runs are done.")
    jobs = [job for job in every if not only or job.arm in only]
    work_on(contest, jobs, minutes, ledger.write)
    record = ledger.write(timed(contest) if speed else ())
    write_wins_and_losses(contest, reference_run(record))
    if shown:
        print_json(record.to_dict(), say)
    else:
        print_study(record, say.results)
    for path in ledger.paths:
        console.print(f"study: {path}")
    if left := sum(contest.found(job) is None for job in jobs):
        console.print(f"{left} of {len(jobs)} runs are left: give the same command again.")
