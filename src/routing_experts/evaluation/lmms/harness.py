"""lmms-eval's tasks, run for one model with all layers and with routes, and what they gave as one record."""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from routing_experts.errors import EvaluationError, RoutingExpertsError
from routing_experts.evaluation.lmms.isolation import isolated
from routing_experts.evaluation.lmms.judges import refuse_unjudged
from routing_experts.evaluation.lmms.local_data import prepared_anew
from routing_experts.evaluation.lmms.scores import task_scores
from routing_experts.optional import need
from routing_experts.records import TaskScores, environment

OWN_TASKS = Path(__file__).parent / "tasks"
WRITTEN = "written"  # what tasks write themselves
REFUSED_TYPES = ("generate_until_multi_round", "generate_until_agentic", "generate_visual_cot")
LIKELIHOOD_TYPES = ("loglikelihood", "multiple_choice")
DENSE, ROUTED, STATIC = "dense", "routed", "static"


@dataclass(frozen=True)
class Side:
    """A way to ask the model.

    Attributes:
        name: as records call it.
        settings: ``ChatModel``'s, beside those that all sides share.
    """

    name: str
    settings: dict[str, Any]

    @property
    def folder(self) -> str:
        """Its name, for a folder."""
        return self.name.replace(", ", "-").replace(" %", "")


def sides_of(is_routed: bool, skip_ratios: Sequence[float], is_static: bool = False) -> list[Side]:
    """A routed folder with all layers, as it is, and at ratios of one's own; a dense or static one alone."""
    if not is_routed:
        return [Side(DENSE, {"dense": True})]
    if is_static:
        return [Side(STATIC, {})]
    others = [Side(f"{ROUTED}, {100 * ratio:g} %", {"skip_ratio": ratio}) for ratio in skip_ratios]
    return [Side(DENSE, {"skip_ratio": 0.0}), Side(ROUTED, {}), *others]


@dataclass(frozen=True)
class Plan:
    """What is asked.

    Attributes:
        tasks: names of tasks, groups or tags.
        include: folders with tasks of one's own.
        limit: samples a task; None for all.
        batch_size: samples asked at a time.
        log: a folder for finished samples.
        output: a folder for what tasks write themselves, such as answers for a benchmark's server: they lie in
            ``written``, a folder a side.
        settings: ``ChatModel``'s, shared by all sides.
    """

    tasks: tuple[str, ...]
    include: tuple[Path, ...] = ()
    limit: int | None = None
    batch_size: int = 1
    log: Path | None = None
    output: Path = Path(".")
    settings: Mapping[str, Any] | None = None


def run_tasks(folder: str, plan: Plan, sides: Sequence[Side]) -> TaskScores:
    """Runs every task once a side.

    Args:
        folder: a run's or a model's.
        plan: which tasks, and how.
        sides: ways to ask; the first is what the others are held against.

    Raises:
        EvaluationError: for an unknown task, one whose data is not here, one that needs a judge that is not set up,
            or a sample that cannot be answered; finished samples are kept.
        MissingExtraError: without lmms-eval.
    """
    need("lmms_eval", "eval", "roe evaluate --tasks")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EvaluationError(
            "roe evaluate --tasks in several processes: it sets sides beside each other in one. Start lmms-eval itself "
            "on several, once a side: accelerate launch … -m lmms_eval --model roe …"
        )
    with isolated():
        manager = _manager(plan.include)
        _refuse_unknown(manager, plan.tasks)
        sets = {path for name in plan.tasks for path in _datasets_of(manager, name)}
        with prepared_anew([Path(path) for path in sorted(sets) if Path(path).is_dir()]):
            kinds = {name: _kinds_of(manager, name) for name in plan.tasks}  # before a model is loaded
            found = {side.name: [_run(folder, plan, side, manager, *one) for one in kinds.items()] for side in sides}
    scores, num_layers = task_scores(found)
    return TaskScores(
        model=Path(folder).name if Path(folder).exists() else folder,
        batch_size=plan.batch_size,
        num_layers=num_layers,
        scores=scores,
        lmms_eval=version("lmms-eval"),
        environment=environment(),
        limit=plan.limit,
        settings=dict(plan.settings or {}),
    )


@functools.cache
def _manager(include: tuple[Path, ...]) -> Any:
    """lmms-eval's index of tasks, which takes seconds to make."""
    from lmms_eval.tasks import TaskManager

    missing = [str(path) for path in include if not path.is_dir()]
    if missing:
        raise EvaluationError(f"{', '.join(missing)}: no folder of tasks is there. Check the path (--include).")
    return TaskManager("ERROR", include_path=[str(OWN_TASKS), *map(str, include)])


def _refuse_unknown(manager: Any, names: Sequence[str]) -> None:
    for name in names:
        if name not in manager.task_index:
            near = get_close_matches(name, manager.all_tasks, 5, 0.5) or manager.match_tasks([f"*{name}*"])[:5]
            raise EvaluationError(
                f"task {name!r}: lmms-eval {version('lmms-eval')} has no such task"
                + (f"; near it are {', '.join(near)}" if near else "")
                + ". `lmms-eval tasks` lists all; folders of your own come with --include."
            )


def _kinds_of(manager: Any, name: str) -> set[str]:
    """Loads a task's data; says what kinds of requests it makes.

    Raises:
        EvaluationError: if it is not here and cannot be fetched, naming what to download.
    """
    from lmms_eval.tasks import get_task_dict

    try:
        refuse_unjudged(name, ())  # before data is fetched
        leaves = dict(_leaves(get_task_dict([name], manager, "simple")))
    except EvaluationError:
        raise
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"task {name} needs the module {error.name}, which is not installed. Install the package that has it; "
            "lmms-eval's own page of the task names it."
        ) from error
    except Exception as error:  # whatever datasets, the hub or the task's own code raises: it is told, not swallowed
        cause = _root(error)
        sets = _datasets_of(manager, name)
        remedy = "See its YAML for what it needs."
        if sets:
            loads = "; ".join(f"hf download {one} --repo-type dataset --local-dir {one}" for one in sets)
            remedy = (
                f"It needs {', '.join(sets)}, from the hub or as a folder of that name where the command runs. On a "
                f"machine with a connection run `{loads}`, and bring it here."
            )
        raise EvaluationError(
            f"task {name}: its data cannot be loaded ({type(cause).__name__}: {cause}). {remedy}"
        ) from error
    for leaf, task in leaves.items():
        refuse_unjudged(leaf, filter(callable, (task.config.process_results, *task.aggregation().values())))
    kinds = {task.OUTPUT_TYPE for task in leaves.values()}
    if refused := sorted(kinds & set(REFUSED_TYPES)):
        raise EvaluationError(f"task {name} asks in a way that is not supported here ({refused[0]}). Leave it out.")
    return kinds


def _root(error: BaseException) -> BaseException:
    """What was raised first: retries wrap it."""
    last = getattr(error, "last_attempt", None)
    return last.exception() or error if last is not None else error


def _datasets_of(manager: Any, name: str) -> list[str]:
    """The datasets that a task, or the tasks of a group, name."""
    from lmms_eval.utils import load_yaml_config

    entry = manager.task_index[name]
    inner = entry.get("task")
    if entry.get("yaml_path") and not isinstance(inner, list):  # a tag has no file, and knows its tasks
        config = load_yaml_config(entry["yaml_path"], mode="simple")  # without the task's code
        if entry["type"] == "task":
            return [config["dataset_path"]] if config.get("dataset_path") else []
        inner = config.get("task")
    names = [one if isinstance(one, str) else one.get("task") for one in inner or ()]
    known = {one for one in names if isinstance(one, str) and one in manager.task_index}
    return sorted({path for one in known for path in _datasets_of(manager, one)})


def _run(folder: str, plan: Plan, side: Side, manager: Any, name: str, kinds: set[str]) -> dict[str, Any]:
    """lmms-eval's own results of one task, with all samples."""
    from lmms_eval.evaluator import simple_evaluate

    from routing_experts.evaluation.lmms.model import ChatModel, SimpleModel

    kind = SimpleModel if kinds & set(LIKELIHOOD_TYPES) else ChatModel
    log = None if plan.log is None else str(plan.log / side.folder)
    settings = {**(plan.settings or {}), **side.settings}
    model = kind(folder, batch_size=plan.batch_size, log=log, **settings)
    written = plan.output / WRITTEN / side.folder  # one side's answers for a server are not another's
    try:
        return simple_evaluate(
            model=model,
            tasks=[name],
            task_manager=manager,
            limit=plan.limit,
            batch_size=plan.batch_size,
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
            cli_args=SimpleNamespace(output_path=str(written), process_with_media=False, reasoning_tags=None),
        )
    except RoutingExpertsError:
        raise
    except Exception as error:  # a scorer's, told with what it was at
        cause = _root(error)
        kept = "" if log is None else f" Its answers are kept in {log}."
        raise EvaluationError(
            f"task {name}, {side.name}: lmms-eval failed with {type(cause).__name__}: {cause}.{kept} If a package or a "
            "program is missing, install it and give the same command again."
        ) from error


def _leaves(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            yield from _leaves(task)
        else:
            yield str(name), task
