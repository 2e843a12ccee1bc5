"""A small LLaVA-HR, trained on small digits in large pictures, needs its high resolution and learns to skip.

``python benchmarks/llava_hr.py`` builds it around the pocket model's language model, teaches its ConvNeXt to see,
trains it dense and then to skip, with three seeds: what the steps of teaching, of the base and of the first seed take
on two CPU cores is at most 45 minutes. Beside it a twin is taught and trained on the same pictures at the low
resolution alone, and the base is trained on, dense, on the routed ones' data for as many steps, with one seed each. All
are asked the same held-out questions; those with pictures count. It writes ``benchmarks/results/llava-hr.json``, and
fails where a bar is missed; a run that was cut short goes on.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from routing_experts.evaluation.evaluate import ask
from routing_experts.evaluation.paired import paired_difference
from routing_experts.evaluation.questions import Question, digits_questions
from routing_experts.evaluation.scoring import Evaluation
from routing_experts.models.load import from_pretrained, load_base, load_processor
from routing_experts.pocket import build_hr
from routing_experts.records import environment, read_log, save_json
from routing_experts.training.folder import RunFolder
from routing_experts.training.recipe import Recipe, load_recipe
from routing_experts.training.run import train, tuned_base

ROOT = Path(__file__).parents[1]
HERE, RECORD = ROOT / "benchmarks/llava_hr", ROOT / "benchmarks/results/llava-hr.json"
SIGHT = "sight.json"  # how long a ConvNeXt was taught, and what it learned
QUESTION_SEED, QUESTIONS, SEEDS = 1000, 4000, (0, 1, 2)
LEAST_STEPS, LEAST_QUESTIONS = 10, 100  # of a try: to have a line in its log, and questions with and without pictures
SKIPPED, LOST, MINUTES, NEEDED = 0.2, 0.02, 45, 0.1  # the bars: at least, at most, at most, more than


def recipes(folder: Path, steps: int | None) -> dict[str, Recipe]:
    """What is trained, by name: ``base``, ``routed 0`` and so on, ``dense 0``, and ``low resolution``, base's twin."""
    changes = {"training.steps": steps} if steps else {}
    start = {"model": str(folder / "start")}
    low = {"data.digits.width": build_hr.LOW_RESOLUTION, "output": str(folder / "low")}
    low["model"] = str(folder / "low-start")
    found = {"base": load_recipe(HERE / "base.yaml", changes | start | {"output": str(folder / "base")})}
    for seed in SEEDS:
        told = {"model": str(folder / "base/model"), "output": str(folder / f"routed-{seed}"), "training.seed": seed}
        found[f"routed {seed}"] = load_recipe(HERE / "routed.yaml", changes | told)
    found["dense 0"] = tuned_base(found["routed 0"])
    return found | {"low resolution": load_recipe(HERE / "base.yaml", changes | low)}


def begun(folder: Path, blur: int) -> dict[str, float]:
    """A model to begin with, its ConvNeXt taught, unless it is there: how long it took, what share it saw right."""
    sight = folder / SIGHT
    if not sight.is_file():  # what was begun goes on from the start that it had
        started = time.monotonic()
        right = build_hr.main(folder, sees=True, blur=blur)
        save_json(sight, {"seconds": time.monotonic() - started, "right": right})
    found: dict[str, float] = json.loads(sight.read_text(encoding="utf-8"))
    return found


def trained(recipe: Recipe) -> float:
    """Trains a recipe, or goes on; returns the seconds of its training steps, those of earlier calls too."""
    train(recipe)
    return read_log(RunFolder(recipe.output).log)[-1].seconds


def asked(recipe: Recipe, questions: Sequence[Question]) -> Evaluation:
    """What a trained model answers."""
    folder = RunFolder(recipe.output).model
    load = from_pretrained if recipe.is_routed else load_base
    return ask(load(folder), load_processor(folder), questions)


def row(name: str, with_pictures: Evaluation, texts: Evaluation) -> dict[str, Any]:
    """One contender."""
    by_task = {task: part.accuracy for task, part in with_pictures.by_task().items()}
    print(f"{name}: {with_pictures.accuracy:.1%} right, {with_pictures.skip_rate:.1%} skipped", flush=True)
    return {
        "contender": name,
        "accuracy": with_pictures.accuracy,
        "skip_rate": with_pictures.skip_rate,
        "text_accuracy": texts.accuracy,
        "text_skip_rate": texts.skip_rate,
        "by_task": by_task,
    }


def constant_answers(questions: Sequence[Question]) -> float:
    """How often the commonest answer of each task is right: about the best that a model can do which sees nothing."""
    answers: dict[str, Counter[str]] = {}
    for question in questions:
        answers.setdefault(question.task, Counter())[question.answer] += 1
    return sum(counts.most_common(1)[0][1] for counts in answers.values()) / len(questions)


def difference(first: Sequence[Evaluation], second: Evaluation) -> dict[str, float]:
    """First minus second, on the same questions, over the first's seeds."""
    rights = np.array([one.right for one in first])
    found = paired_difference(rights, np.array([second.right] * len(first)))
    return {"mean": found.mean, "low": found.low, "high": found.high}


def measured(plans: dict[str, Recipe], count: int) -> dict[str, Any]:
    """Trains and asks all of them."""
    blurs = {"base": 1, "low resolution": build_hr.PICTURE_SIZE // build_hr.LOW_RESOLUTION}
    sight, seconds = {}, {}
    for name, recipe in plans.items():
        if name in blurs:
            sight[name] = begun(Path(recipe.model), blurs[name])
        seconds[name] = trained(recipe)
    questions = digits_questions(count, QUESTION_SEED, cell=build_hr.CELL)
    small = digits_questions(count, QUESTION_SEED, cell=build_hr.CELL, width=build_hr.LOW_RESOLUTION)
    pictured = [place for place, question in enumerate(questions) if question.record.images]
    written = [place for place, question in enumerate(questions) if not question.record.images]
    found: dict[str, Evaluation] = {}
    rows = []
    for name, recipe in plans.items():
        whole = small if name == "low resolution" else questions
        parts = [asked(recipe, [whole[place] for place in places]) for places in (pictured, written)]
        rows.append(row(name, *parts))
        found[name] = parts[0]
    routed = [found[f"routed {seed}"] for seed in SEEDS]
    return {
        "questions": len(pictured),
        "text_questions": len(written),
        "steps": {name: recipe.training.steps for name, recipe in plans.items()},
        "sight": sight,
        "training_seconds": seconds,
        "minutes": (sight["base"]["seconds"] + seconds["base"] + seconds["routed 0"]) / 60,
        "constant_answers": constant_answers([questions[place] for place in pictured]),
        "rows": rows,
        "base_minus_low_resolution": difference([found["base"]], found["low resolution"]),
        "routed_minus_base": difference(routed, found["base"]),
        "routed_minus_dense": difference(routed, found["dense 0"]),
        "routed_skip_rate": mean(one.skip_rate for one in routed),
    }


def missed(record: dict[str, Any]) -> list[str]:
    """The bars that a record does not meet."""
    lost = f"at most {100 * LOST:.0f} points below"
    bars = {
        f"at least {SKIPPED:.0%} skipped": record["routed_skip_rate"] >= SKIPPED,
        f"{lost} the base": record["routed_minus_base"]["mean"] >= -LOST,
        f"{lost} the base trained on": record["routed_minus_dense"]["mean"] >= -LOST,
        f"at most {MINUTES} minutes": record["minutes"] <= MINUTES,
        f"{100 * NEEDED:.0f} points above the low resolution": record["base_minus_low_resolution"]["low"] > NEEDED,
    }
    return [name for name, is_met in bars.items() if not is_met]


def main() -> None:
    """Trains, asks, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=RECORD)
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--steps", type=int, help="Of each training, for a try; a file of its own is needed (--json).")
    told = parser.parse_args()
    if (told.steps or told.questions != QUESTIONS) and told.json.resolve() == RECORD:
        parser.error("--steps and --questions make a try, no record: give another file (--json)")
    if (told.steps or LEAST_STEPS) < LEAST_STEPS or told.questions < LEAST_QUESTIONS:
        parser.error(f"a try takes at least {LEAST_STEPS} steps and {LEAST_QUESTIONS} questions")
    folder = ROOT / (f"runs/llava-hr-{told.steps}" if told.steps else "runs/llava-hr")
    made = environment()  # before the hours in which the tree may change
    record = measured(recipes(folder, told.steps), told.questions) | {"environment": made}
    record["missed"] = missed(record)
    save_json(told.json, record)
    print(f"{record['minutes']:.1f} minutes; missed: {', '.join(record['missed']) or 'nothing'}")
    sys.exit(bool(record["missed"]))


if __name__ == "__main__":
    main()
