"""The evaluation that `roe evaluate` and `roe quickstart` share: every model asked, timed, and put into one record."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from routing_experts.cli.common import model_folder, progress_bar
from routing_experts.cli.output import Output, write_json
from routing_experts.data.digits import DIGITS
from routing_experts.errors import CheckpointError
from routing_experts.evaluation.calibration import (
    RateMeter,
    calibration,
    check_budget,
    trace_budget,
    with_bias,
    with_budget,
)
from routing_experts.evaluation.evaluate import (
    SWEEP_BIASES,
    Comparison,
    ask,
    compare,
    information,
    route_counts,
    scores,
    sweep_bias,
    task_results,
)
from routing_experts.evaluation.gallery import write_gallery
from routing_experts.evaluation.questions import BATCH_SIZE, Question, digits_questions, load_questions
from routing_experts.evaluation.scoring import Evaluation
from routing_experts.evaluation.speed import measure_speed
from routing_experts.inference.routes import RouteLine, recorded
from routing_experts.models.card import write_card
from routing_experts.models.load import from_pretrained, is_static_folder, load_base, load_processor
from routing_experts.records import (
    CALIBRATION_NAME,
    BudgetRecord,
    Calibration,
    Dense,
    Results,
    Score,
    Speed,
    SweepPoint,
    environment,
)
from routing_experts.training.folder import RunFolder

SWEEP_QUESTIONS = 512
TRAINING_SEED, HELDOUT_SEED = 3, 2000  # of digits questions that calibration measures on


def judge(
    folder: str,
    questions: list[Question],
    console: Console,
    seed: int,
    with_speed: bool = True,
    seconds_before: float = 0.0,
    device: torch.device | None = None,
    batch_size: int = BATCH_SIZE,
) -> tuple[Results, list[RouteLine]]:
    """Asks base, tuned base (where the run has one), routed model and controls the same questions.

    Args:
        folder: a run's or a routed model's.
        questions: what is asked.
        console: where progress is shown.
        seed: of the controls.
        with_speed: measure seconds, too.
        seconds_before: what the run took until now; part of its ``seconds_total``.
        device: of the models; the CPU by default.
        batch_size: questions asked at a time.

    Returns:
        What was measured, and the routes that the questions took.
    """
    started = time.monotonic()
    source = model_folder(folder)
    device = device or torch.device("cpu")
    routed, processor = from_pretrained(source).to(device), load_processor(source)
    dense_models = {name: model.to(device) for name, model in _dense_models(folder, routed, console).items()}
    asked = _ask_all(dense_models, routed, processor, questions, seed, console, batch_size)
    speed = Speed(dense_seconds=0.0, routed_seconds=0.0, cases=[], note="not measured")
    if with_speed:
        with console.status("measuring seconds …"):
            speed = measure_speed(dense_models[asked.best], routed, processor, questions)
    results = _results(asked, speed, len(questions), seed, Path(folder).name)
    results = replace(
        results,
        seconds_total=seconds_before + time.monotonic() - started,
        keep_bias=routed.roe_config.keep_bias,
        calibration=read_calibration(source, routed.roe_config.keep_bias),
    )
    try:
        if RunFolder(folder).model.is_dir():
            write_gallery(Path(folder), questions, asked.dense[asked.best], asked.comparison.routed)
        if Path(source).is_dir():
            write_card(Path(source), routed.roe_config, results)
    except OSError as error:  # what was measured matters more than the pictures beside it
        console.print(f"gallery and model card of {folder} were not written: {error}", markup=False)
    return results, recorded(routed, asked.comparison.routed.answers)


@dataclass(frozen=True)
class _Asked:
    """All answers: of the dense models by name, of routed model and controls, and of the routed one by bias."""

    dense: dict[str, Evaluation]
    comparison: Comparison
    sweep: list[SweepPoint]

    @property
    def best(self) -> str:
        """The dense model that routing is held against."""
        return max(self.dense, key=lambda name: self.dense[name].accuracy)


def _ask_all(
    dense_models: dict[str, Any],
    routed: Any,
    processor: Any,
    questions: list[Question],
    seed: int,
    console: Console,
    batch_size: int,
) -> _Asked:
    swept = questions[:SWEEP_QUESTIONS]
    total = len(questions) * (len(dense_models) + 3) + len(swept) * len(SWEEP_BIASES)
    with progress_bar(console, "evaluating", total) as advance:
        asked_as = routed.roe_config.prompt_format
        dense = {
            name: ask(model, processor, questions, batch_size, prompt_format=asked_as, advance=advance)
            for name, model in dense_models.items()
        }
        comparison = compare(routed, processor, questions, seed, advance, batch_size)
        return _Asked(dense, comparison, sweep_bias(routed, processor, swept, SWEEP_BIASES, advance, batch_size))


def _results(asked: _Asked, speed: Speed, num_questions: int, seed: int, name: str) -> Results:
    dense, best = asked.dense, asked.best
    routed, static, random = scores(asked.comparison)
    return Results(
        base=Score(accuracy=dense["base"].accuracy),
        tuned=Score(accuracy=dense["tuned"].accuracy) if "tuned" in dense else None,
        dense=Dense(accuracy=dense[best].accuracy, source=best),  # type: ignore[arg-type]
        routed=routed,
        static=static,
        random=random,
        speed=speed,
        tasks=task_results(dense[best], asked.comparison.routed),
        sweep=asked.sweep,
        questions=num_questions,
        seed=seed,
        environment=environment(),
        seconds_total=0.0,
        recipe=name,
        num_layers=len(routed.layer_skip_rates),
        routes=route_counts(asked.comparison.routed),
        route_information=information(asked.comparison.routed),
    )


def _dense_models(folder: str, routed: Any, console: Console) -> dict[str, Any]:
    """What routing is held against: the base model, and the run's dense control if it was trained as the run was."""
    models = {"base": load_base(routed.roe_config.base.name_or_path)}
    run, tuned = RunFolder(folder).recipe, RunFolder(Path(folder) / "tuned")
    if not tuned.is_finished or run is None or tuned.recipe is None:
        return models
    differing = [name for name in ("model", "data", "training") if run[name] != tuned.recipe[name]]
    if differing:
        console.print(f"{tuned.path} is left out: its {', '.join(differing)} settings are not the run's.")
        return models
    return models | {"tuned": load_base(tuned.model)}


def meters(
    folder: Path, data: str, heldout: str | None, images: str | None, count: int, device: torch.device, batch_size: int
) -> tuple[RateMeter, RateMeter | None]:
    """A model's skip rates on training data, and on other questions if there are any."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder here: the bias is written into one. Download the model first.")
    model, processor = from_pretrained(folder).to(device), load_processor(folder)
    if data == DIGITS:
        training = digits_questions(count, TRAINING_SEED, split="train")
    else:
        training = load_questions(data, images, count, TRAINING_SEED)
    meter = RateMeter(model, processor, training, batch_size)
    if heldout is None:
        return meter, None
    return meter, RateMeter(model, processor, load_questions(heldout, images, count, HELDOUT_SEED), batch_size)


def calibrated(
    folder: Path, wanted: float, meter: RateMeter, heldout: RateMeter | None, console: Console
) -> Calibration:
    """Finds the bias for a wanted skip rate, writes it into the model's folder, and checks it on held-out questions."""
    with console.status("measuring skip rates …"):
        found = calibration(meter, heldout, wanted)
    config = with_bias(meter.model, found.keep_bias).roe_config
    config.save(folder)
    write_card(folder, config)  # scores, if it had some, were those of another bias
    return found


def budgeted(folder: Path, meter: RateMeter, heldout: RateMeter | None, console: Console) -> BudgetRecord:
    """Traces the model's budget, writes it into its folder, and checks it on held-out questions."""
    with console.status("measuring skip rates …"):
        config = with_budget(meter.model, trace_budget(meter)).roe_config
        config.save(folder)
        return check_budget(config, meter, heldout)


def read_calibration(folder: str | Path, keep_bias: float) -> Calibration | None:
    """What ``roe calibrate`` left beside a model, if the model still has the bias that it found."""
    path = Path(folder) / CALIBRATION_NAME
    found = Calibration.load(path) if path.is_file() else None
    return found if found is not None and found.keep_bias == keep_bias else None


def judge_dense(
    folder: str,
    questions: list[Question],
    say: Output,
    target: Path | None,
    seed: int,
    device: torch.device,
    batch_size: int = BATCH_SIZE,
) -> None:
    """A model that decides nothing, dense or static: its accuracy by task."""
    source = model_folder(folder)
    model = from_pretrained(source) if is_static_folder(source) else load_base(source)
    model, processor = model.to(device), load_processor(source)
    with progress_bar(say.progress, "evaluating", len(questions)) as advance:
        asked = ask(model, processor, questions, batch_size, advance=advance)
    if str(target) != "-":
        for task, part in asked.by_task().items():
            say.results.print(f"{task:12} {part.accuracy:7.2%}  of {len(part.answers)}")
        say.results.print(f"{'all':12} {asked.accuracy:7.2%}  of {len(questions)}", style="bold")
    if target is not None:
        write_json(_dense_record(folder, asked, seed), target, say, "results")


def _dense_record(folder: str, asked: Evaluation, seed: int) -> dict[str, Any]:
    return {
        "model": folder,
        "dense": {"accuracy": asked.accuracy},
        "tasks": {t: {"dense": p.accuracy, "questions": len(p.answers)} for t, p in asked.by_task().items()},
        "questions": len(asked.questions),
        "seed": seed,
        "environment": environment(),
    }
