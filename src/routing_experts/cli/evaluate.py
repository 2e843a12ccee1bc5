"""``roe evaluate``: a run's (or any model's) accuracy, skip rate and speed, on fresh questions or lmms-eval's tasks."""

from pathlib import Path
from typing import Annotated

import typer

from routing_experts.cli.common import BatchSize, Device, refuse_beside
from routing_experts.cli.output import Output

Folder = Annotated[str, typer.Argument(help="A run's folder, a model's folder, a hub name, or `pocket`.")]
Data = Annotated[str, typer.Option(help="`digits` (fresh held-out questions) or a file in LLaVA's JSON.")]
Images = Annotated[str | None, typer.Option(help="The folder that the file's image paths start from.")]
Questions = Annotated[int | None, typer.Option(min=1, help="How many (digits: 2000; a file: all).")]
Seed = Annotated[int, typer.Option(help="Of the digits questions and of the random control.")]
Target = Annotated[
    Path | None, typer.Option(help="Where the results go; into a run's folder by default; - for standard output.")
]
Speed = Annotated[bool, typer.Option(help="Measure seconds, too.")]
Routes = Annotated[Path | None, typer.Option(help="Where the questions' routes go, a JSON object a line.")]
Tasks = Annotated[str | None, typer.Option(help="Tasks of lmms-eval instead, with commas: gqa,pope,textvqa_val …")]
Include = Annotated[
    list[Path] | None, typer.Option(help="With --tasks: a folder of your own tasks; repeat for several.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="With --tasks: samples a task; all by default.")]
Ratios = Annotated[
    list[float] | None,
    typer.Option(min=0, max=1, help="With --tasks: also at this share of layers skipped; repeat for several."),
]
Log = Annotated[
    Path | None, typer.Option(help="With --tasks: a folder for finished samples, which are not asked again.")
]


def evaluate(
    folder: Folder,
    data: Data = "digits",
    images: Images = None,
    questions: Questions = None,
    seed: Seed = 1000,
    tasks: Tasks = None,
    include: Include = None,
    limit: Limit = None,
    skip_ratio: Ratios = None,
    log: Log = None,
    json: Target = None,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    speed: Speed = True,
    record_routes: Routes = None,
) -> None:
    """Evaluate a model: dense, routed, and the controls at the same skip rate; or on lmms-eval's tasks.

    Example: roe evaluate runs/digits --data digits --questions 2000 --seed 7 --json results.json

    Example: roe evaluate runs/mine --tasks gqa,pope --batch-size 8 --skip-ratio 0.2
    """
    from routing_experts.cli.output import start
    from routing_experts.evaluation.questions import load_questions

    say = start()
    if tasks is not None:
        from routing_experts.cli.benchmarks import TaskOptions, evaluate_tasks

        other = {"--data": data != "digits", "--images": images, "--questions": questions, "--seed": seed != 1000}
        refuse_beside("--tasks", other | {"--record-routes": record_routes, "--no-speed": not speed})
        options = TaskOptions(
            tasks=tasks,
            include=tuple(include or ()),
            skip_ratios=tuple(skip_ratio or ()),
            limit=limit,
            batch_size=batch_size,
            log=log,
            device=device,
            target=json,
        )
        evaluate_tasks(folder, options, say)
        return
    refuse_beside("no --tasks", {"--include": include, "--skip-ratio": skip_ratio, "--limit": limit, "--log": log})
    asked = load_questions(data, images, questions, seed)
    _evaluate_questions(folder, asked, data, seed, json, batch_size, device, speed, record_routes, say)


def _evaluate_questions(
    folder: str,
    asked: list,
    data: str,
    seed: int,
    json: Path | None,
    batch_size: int,
    device: str,
    speed: bool,
    record_routes: Path | None,
    say: Output,
) -> None:
    """Questions whose answers we check ourselves."""
    from routing_experts.cli.common import model_folder
    from routing_experts.cli.judge import judge, judge_dense
    from routing_experts.cli.output import write_json
    from routing_experts.errors import RouteError
    from routing_experts.inference.routes import refuse_repeated, write_routes
    from routing_experts.models.device import pick_device
    from routing_experts.models.load import is_routed_folder, is_static_folder
    from routing_experts.records import RESULTS_NAME
    from routing_experts.reports import print_results
    from routing_experts.training.folder import RunFolder

    on = pick_device(device)
    if record_routes is not None:  # before hours are spent
        refuse_repeated([question.record.id for question in asked], f"the questions of {data}")
    if not is_routed_folder(model_folder(folder)) or is_static_folder(model_folder(folder)):
        if record_routes is not None:
            raise RouteError(
                f"{folder} is not routed, or static: there are no routes to record. Leave out --record-routes."
            )
        judge_dense(folder, asked, say, json, seed, on, batch_size)
        return
    results, routes = judge(folder, asked, say.progress, seed=seed, with_speed=speed, device=on, batch_size=batch_size)
    target = json or (Path(folder) / RESULTS_NAME if RunFolder(folder).model.is_dir() else None)
    if str(target) != "-":
        print_results(results, say.results)
    if target is not None:
        write_json(results.checked_dict(), target, say, "results")
    if record_routes is not None:
        write_routes(record_routes, routes)
        say.progress.print(f"routes: {record_routes}")
