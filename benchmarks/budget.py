"""What a model gives at every skip ratio of its budget: the rate on held-out questions, and right answers.

``python benchmarks/budget.py RUN [RUN …] --json RECORD`` takes runs on the digits and traces each one's budget on
training handwriting; the runs' folders stay as they are.
"""

import argparse
from pathlib import Path
from typing import Any

from routing_experts.cli.judge import HELDOUT_SEED, TRAINING_SEED
from routing_experts.errors import RouteError
from routing_experts.evaluation.calibration import RateMeter, trace_budget, wanted_ratios, with_budget
from routing_experts.evaluation.evaluate import ask
from routing_experts.evaluation.questions import digits_questions
from routing_experts.models.load import from_pretrained, load_processor
from routing_experts.models.options import RoutingOptions
from routing_experts.records import environment, save_json
from routing_experts.training.folder import RunFolder

TRAINING_QUESTIONS, HELDOUT_QUESTIONS = 1000, 2000


def rows_of(run: Path) -> list[dict[str, Any]]:
    """One run at every ratio, from the dense model to the end of its budget."""
    folder, name = RunFolder(run).model, "/".join(run.parts[-2:])
    model, processor = from_pretrained(folder), load_processor(folder)
    heldout = digits_questions(HELDOUT_QUESTIONS, HELDOUT_SEED)
    meter = RateMeter(model, processor, digits_questions(TRAINING_QUESTIONS, TRAINING_SEED, split="train"))
    budget = trace_budget(meter)
    config = with_budget(model, budget).roe_config
    print(f"{run}: {len(budget)} biases, up to {budget[-1][0]:.1%}")
    rows = []
    for wanted in wanted_ratios(config):
        try:
            asked = ask(model, processor, heldout, options=RoutingOptions(skip_ratio=wanted))
        except RouteError as error:  # a ratio that no bias gives is a finding, too
            rows.append({"run": name, "wanted": wanted, "refused": str(error)})
            print(f"{run}: {error}")
            continue
        routes = len({given.route for given in asked.answers})
        found = {"heldout_skip_rate": asked.skip_rate, "accuracy": asked.accuracy, "routes": routes}
        rows.append({"run": name, "wanted": wanted, **found})
        print(f"{run}: {wanted:.0%} wanted, {asked.skip_rate:.1%} held out, {asked.accuracy:.1%} right")
    return rows


def main() -> None:
    """Measures every run and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/budget.json"))
    asked = parser.parse_args()
    rows = [row for run in asked.runs for row in rows_of(run)]
    counts = {"training_questions": TRAINING_QUESTIONS, "heldout_questions": HELDOUT_QUESTIONS}
    save_json(asked.json, counts | {"rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
