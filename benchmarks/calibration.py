"""How near calibrated skip rates come to the wanted ones on held-out questions, and what each rate costs.

``python benchmarks/calibration.py RUN [RUN …] --json RECORD`` takes runs on the digits, trained for whatever rate, and
calibrates each to every rate in turn; the runs' folders stay as they are.
"""

import argparse
from pathlib import Path
from typing import Any

from routing_experts.cli.judge import HELDOUT_SEED, TRAINING_SEED
from routing_experts.errors import ConfigError
from routing_experts.evaluation.calibration import RateMeter, calibration, with_bias
from routing_experts.evaluation.evaluate import ask
from routing_experts.evaluation.questions import digits_questions
from routing_experts.models.load import from_pretrained, load_processor
from routing_experts.records import environment, save_json
from routing_experts.training.folder import RunFolder

RATES = (0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40)
TRAINING_QUESTIONS, HELDOUT_QUESTIONS = 1000, 2000


def rows_of(run: Path) -> list[dict[str, Any]]:
    """One run at every rate."""
    folder = RunFolder(run).model
    model, processor = from_pretrained(folder), load_processor(folder)
    heldout = digits_questions(HELDOUT_QUESTIONS, HELDOUT_SEED)
    meters = [
        RateMeter(model, processor, questions)
        for questions in (digits_questions(TRAINING_QUESTIONS, TRAINING_SEED, split="train"), heldout)
    ]
    rows, name = [], "/".join(run.parts[-2:])
    for wanted in RATES:
        try:
            found = calibration(*meters, wanted)
        except ConfigError as error:  # a rate that no bias gives is a finding, too
            rows.append({"run": name, "wanted": wanted, "refused": str(error)})
            print(f"{run}: {error}")
            continue
        asked = ask(with_bias(model, found.keep_bias), processor, heldout)
        rows.append({"run": name, **found.to_dict(), "accuracy": asked.accuracy})
        print(f"{run}: {wanted:.0%} wanted, {found.heldout_skip_rate:.1%} held out, {asked.accuracy:.1%} right")
    return rows


def main() -> None:
    """Measures every run and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/calibration.json"))
    asked = parser.parse_args()
    rows = [row for run in asked.runs for row in rows_of(run)]
    record = {"heldout_questions": HELDOUT_QUESTIONS, "rows": rows, "environment": environment()}
    save_json(asked.json, record)


if __name__ == "__main__":
    main()
