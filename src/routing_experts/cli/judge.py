"""The evaluation that `roe evaluate` and `roe quickstart` share: every model asked, timed, and put into one record."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from routing_experts.cli.common import MODEL_FOLDER, model_folder, progress_bar
from routing_experts.evaluation.evaluate import SWEEP_BIASES, ask, compare, scores, sweep_bias, task_results
from routing_experts.evaluation.gallery import write_gallery
from routing_experts.evaluation.questions import Question
from routing_experts.evaluation.scoring import Evaluation
from routing_experts.evaluation.speed import measure_speed
from routing_experts.models.load import from_pretrained, load_base, load_processor
from routing_experts.records import Dense, Results, Score, Speed, environment, write_text

SWEEP_QUESTIONS = 512


def judge(
    folder: str,
    questions: list[Question],
    console: Console,
    seed: int,
    with_speed: bool = True,
    seconds_before: float = 0.0,
) -> Results:
    """Asks base, tuned base (where the run has one), routed model and controls the same questions.

    Args:
        folder: a run's or a routed model's.
        questions: what is asked.
        console: where progress is shown.
        seed: of the controls.
        with_speed: measure seconds, too.
        seconds_before: what the run took until now; part of its ``seconds_total``.
    """
    started = time.monotonic()
    source = model_folder(folder)
    routed, processor = from_pretrained(source), load_processor(source)
    dense_models = _dense_models(folder, routed)
    swept = questions[:SWEEP_QUESTIONS]
    total = len(questions) * (len(dense_models) + 3) + len(swept) * len(SWEEP_BIASES)
    with progress_bar(console, "evaluating", total) as advance:
        asked_as = routed.roe_config.prompt_format
        dense = {
            name: ask(model, processor, questions, prompt_format=asked_as, advance=advance)
            for name, model in dense_models.items()
        }
        comparison = compare(routed, processor, questions, seed, advance)
        sweep = sweep_bias(routed, processor, swept, advance=advance)
    best = max(dense, key=lambda name: dense[name].accuracy)
    speed = Speed(dense_seconds=0.0, routed_seconds=0.0, cases=[], note="not measured")
    if with_speed:
        with console.status("measuring seconds …"):
            speed = measure_speed(dense_models[best], routed, processor, questions)
    if Path(folder, MODEL_FOLDER).is_dir():
        write_gallery(Path(folder), questions, dense[best], comparison.routed)
    routed_score, static_score, random_score = scores(comparison)
    return Results(
        base=Score(accuracy=dense["base"].accuracy),
        tuned=Score(accuracy=dense["tuned"].accuracy) if "tuned" in dense else None,
        dense=Dense(accuracy=dense[best].accuracy, source=best),  # type: ignore[arg-type]
        routed=routed_score,
        static=static_score,
        random=random_score,
        speed=speed,
        tasks=task_results(dense[best], comparison.routed),
        sweep=sweep,
        questions=len(questions),
        seed=seed,
        environment=environment(),
        seconds_total=seconds_before + time.monotonic() - started,
        recipe=Path(folder).name,
        num_layers=len(routed_score.layer_skip_rates),
    )


def _dense_models(folder: str, routed: Any) -> dict[str, Any]:
    """What routing is held against: the base model, and the run's dense control if it was trained."""
    models = {"base": load_base(routed.roe_config.base.name_or_path)}
    tuned = Path(folder) / "tuned" / MODEL_FOLDER
    return models | ({"tuned": load_base(tuned)} if tuned.is_dir() else {})


def judge_dense(folder: str, questions: list[Question], console: Console, target: Path | None, seed: int) -> None:
    """A model without routes: its accuracy by task."""
    source = model_folder(folder)
    model, processor = load_base(source), load_processor(source)
    with progress_bar(console, "evaluating", len(questions)) as advance:
        asked = ask(model, processor, questions, advance=advance)
    for task, part in asked.by_task().items():
        console.print(f"{task:12} {part.accuracy:7.2%}  of {len(part.answers)}")
    console.print(f"{'all':12} {asked.accuracy:7.2%}  of {len(questions)}", style="bold")
    if target is not None:
        write_text(target, json.dumps(_dense_record(folder, asked, seed), indent=2) + "\n")
        console.print(f"results: {target}")


def _dense_record(folder: str, asked: Evaluation, seed: int) -> dict[str, Any]:
    return {
        "model": folder,
        "dense": {"accuracy": asked.accuracy},
        "tasks": {t: {"dense": p.accuracy, "questions": len(p.answers)} for t, p in asked.by_task().items()},
        "questions": len(asked.questions),
        "seed": seed,
        "environment": environment(),
    }
