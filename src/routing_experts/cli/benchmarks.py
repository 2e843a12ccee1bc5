"""The part of ``roe evaluate`` that runs lmms-eval's tasks."""

import io
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

from routing_experts.cli.common import model_folder
from routing_experts.cli.output import Output, write_json
from routing_experts.errors import ConfigError
from routing_experts.evaluation.lmms.harness import Plan, run_tasks, sides_of
from routing_experts.models.load import is_routed_folder
from routing_experts.records import TASKS_NAME
from routing_experts.reports import print_tasks
from routing_experts.training.folder import RunFolder

SAMPLES = "samples"


def evaluate_tasks(
    folder: str,
    tasks: str,
    include: Sequence[Path],
    skip_ratios: Sequence[float],
    limit: int | None,
    batch_size: int,
    log: Path | None,
    device: str,
    target: Path | None,
    say: Output,
) -> None:
    """Runs tasks on a folder's model and puts what they gave where it belongs.

    Args:
        folder: a run's or a model's.
        tasks: names with commas between them.
        include: folders of tasks.
        skip_ratios: at which a routed model is asked besides.
        limit: samples a task.
        batch_size: samples asked at a time.
        log: a folder for finished samples; in a run's own folder by default.
        device: by name.
        target: of the record; ``tasks.json`` in a run's folder by default.
        say: where it is told.
    """
    names = tuple(filter(None, (name.strip() for name in tasks.split(","))))
    if not names:
        raise ConfigError(f"--tasks {tasks!r}: name at least one, such as gqa,pope.")
    is_run = RunFolder(folder).model.is_dir()
    routed = is_routed_folder(model_folder(folder))
    if skip_ratios and not routed:
        raise ConfigError(f"--skip-ratio for {folder}, which is not routed: it runs all its layers. Leave it out.")
    plan = Plan(
        tasks=names,
        include=tuple(include),
        limit=limit,
        batch_size=batch_size,
        log=log or (Path(folder) / SAMPLES if is_run else None),
        output=Path(folder) if is_run else Path("."),
        settings={"device": device},
    )
    with redirect_stderr(io.StringIO()) if say.quiet else nullcontext():  # the bars of lmms-eval and its libraries
        record = run_tasks(folder, plan, sides_of(routed, skip_ratios))
    if str(target) != "-":
        print_tasks(record, say.results)
    target = target or (Path(folder) / TASKS_NAME if is_run else None)
    if target is not None:
        write_json(record.to_dict(), target, say, "tasks")
