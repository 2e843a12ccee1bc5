"""The part of ``roe evaluate`` that runs lmms-eval's tasks."""

import io
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from routing_experts.cli.common import model_folder
from routing_experts.cli.output import Output, write_json
from routing_experts.config import CONFIG_NAME, RoEConfig
from routing_experts.errors import ConfigError
from routing_experts.evaluation.lmms.harness import Plan, run_tasks, sides_of
from routing_experts.models.load import is_routed_folder, is_static_folder
from routing_experts.records import TASKS_NAME
from routing_experts.reports import print_tasks
from routing_experts.training.folder import RunFolder

SAMPLES = "samples"


@dataclass(frozen=True)
class TaskOptions:
    """What the verb was given beside the folder.

    Attributes:
        tasks: names with commas between them.
        include: folders of tasks.
        skip_ratios: at which a routed model is asked besides.
        limit: samples a task.
        batch_size: samples asked at a time.
        log: a folder for finished samples; in a run's own folder by default.
        device: by name.
        target: of the record; ``tasks.json`` in a run's folder by default.
    """

    tasks: str
    include: tuple[Path, ...]
    skip_ratios: tuple[float, ...]
    limit: int | None
    batch_size: int
    log: Path | None
    device: str
    target: Path | None


def evaluate_tasks(folder: str, asked: TaskOptions, say: Output) -> None:
    """Runs tasks on a folder's model and puts what they gave where it belongs."""
    names = tuple(filter(None, (name.strip() for name in asked.tasks.split(","))))
    if not names:
        raise ConfigError(f"--tasks {asked.tasks!r}: name at least one, such as gqa,pope.")
    is_run, source = RunFolder(folder).model.is_dir(), model_folder(folder)
    routed, static = is_routed_folder(source), is_static_folder(source)
    _check_ratios(folder, source, asked.skip_ratios, routed and not static)
    plan = Plan(
        tasks=names,
        include=asked.include,
        limit=asked.limit,
        batch_size=asked.batch_size,
        log=asked.log or (Path(folder) / SAMPLES if is_run else None),
        output=Path(folder) if is_run else Path("."),
        settings={"device": asked.device},
    )
    with ExitStack() as quiet:
        if say.quiet:  # the bars and notices of lmms-eval and its libraries
            quiet.enter_context(redirect_stderr(io.StringIO()))
            quiet.enter_context(redirect_stdout(io.StringIO()))
        record = run_tasks(folder, plan, sides_of(routed, asked.skip_ratios, static))
    if str(asked.target) != "-":
        print_tasks(record, say.results)
    target = asked.target or (Path(folder) / TASKS_NAME if is_run else None)
    if target is not None:
        write_json(record.to_dict(), target, say, "tasks")


def _check_ratios(folder: str, source: str, ratios: tuple[float, ...], decides: bool) -> None:
    """Refuses ratios now that the model would refuse after hours of other sides."""
    if ratios and not decides:
        raise ConfigError(f"--skip-ratio for {folder}, which is not routed: it runs the same for all. Leave it out.")
    if ratios and (Path(source) / CONFIG_NAME).is_file():
        config = RoEConfig.load(Path(source))
        for ratio in ratios:
            config.keep_bias_for(ratio)
