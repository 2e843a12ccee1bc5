"""What a dialogue's turns cost and how many they get right, under both policies of ``ChatSession`` and unrouted.

``python benchmarks/dialogue.py RUN [RUN …] --json RECORD`` takes runs on the digits. A dialogue asks four questions
about one held-out picture; a turn's history holds the contender's own answers, as in a real chat. Contenders take
turns dialogue by dialogue, so that what else the machine does meets all of them.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import numpy as np

from routing_experts.cli.judge import HELDOUT_SEED
from routing_experts.data.digits import DigitsTask
from routing_experts.data.records import IMAGE_PLACEHOLDER, Record
from routing_experts.evaluation.evaluate import MAX_NEW_TOKENS
from routing_experts.evaluation.paired import paired_difference
from routing_experts.evaluation.scoring import is_right
from routing_experts.inference.chat import ChatSession, Reply
from routing_experts.models.load import from_pretrained, load_base, load_processor
from routing_experts.records import environment, save_json
from routing_experts.training.folder import RunFolder

TURNS = 4
Told = list[list[tuple[bool, Reply]]]  # dialogue → turn → whether it was right, and how it came about


def converse(session: ChatSession, record: Record) -> list[tuple[bool, Reply]]:
    """One dialogue through a fresh session."""
    told = []
    for number, turn in enumerate(record.turns):
        question = turn.question.removeprefix(f"{IMAGE_PLACEHOLDER}\n")
        reply = session.ask(question, record.images if number == 0 else (), MAX_NEW_TOKENS)
        told.append((is_right(reply.text, turn.answer), reply))
    return told


def turn_row(number: int, told: Sequence[tuple[bool, Reply]]) -> dict[str, Any]:
    """All dialogues' turn of one number."""
    replies = [reply for _, reply in told]
    low, middle, high = quantiles([reply.seconds for reply in replies], n=4)
    return {
        "turn": number,
        "accuracy": mean(right for right, _ in told),
        "skip_rate": mean(reply.skip_rate for reply in replies),
        "prefilled_tokens": mean(reply.prefilled_tokens for reply in replies),
        "reused_tokens": mean(reply.reused_tokens for reply in replies),
        "layer_tokens": mean(reply.prefilled_tokens * sum(reply.route) for reply in replies),
        "cache_bytes": mean(reply.cache_bytes for reply in replies),
        "seconds": {"quartile_1": low, "median": middle, "quartile_3": high},
    }


def contender_row(name: str, told: Told) -> dict[str, Any]:
    """One contender, by turn; how often a turn took the route of the one before it; and all answers, right or wrong."""
    routes = [[reply.route for _, reply in dialogue] for dialogue in told]
    return {
        "contender": name,
        "turns": [turn_row(turn + 1, [dialogue[turn] for dialogue in told]) for turn in range(TURNS)],
        "same_route_as_before": mean(a == b for dialogue in routes for a, b in pairwise(dialogue)),
        "right": [[right for right, _ in dialogue] for dialogue in told],
    }


def rows_of(run: Path, records: Sequence[Record]) -> list[dict[str, Any]]:
    """One run's model under both policies, and the pocket model beside it."""
    folder = RunFolder(run).model
    routed, processor = from_pretrained(folder), load_processor(folder)
    dense = load_base("pocket")
    contenders = {
        "dense": lambda: ChatSession(dense, processor),
        "prefill": lambda: ChatSession(routed, processor, "prefill"),
        "project": lambda: ChatSession(routed, processor, "project"),
    }
    told: dict[str, Told] = {name: [] for name in contenders}
    for make in contenders.values():
        converse(make(), records[0])  # to warm up
    for record in records:
        for name, make in contenders.items():
            told[name].append(converse(make(), record))
    name = "/".join(run.parts[-2:])
    return [{"run": name, **contender_row(contender, told[contender])} for contender in contenders]


def difference(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of ``project`` minus ``prefill`` over all turns but the first, where they are the same.

    The dialogue is the unit, since its turns share a picture and a history.
    """

    def later(contender: str) -> np.ndarray:
        return np.array([[mean(d[1:]) for d in row["right"]] for row in rows if row["contender"] == contender])

    found = paired_difference(later("project"), later("prefill"))
    return {"mean": found.mean, "low": found.low, "high": found.high}


def main() -> None:
    """Measures every run and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--dialogues", type=int, default=500)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/dialogue.json"))
    asked = parser.parse_args()
    task = DigitsTask(split="heldout", seed=HELDOUT_SEED, min_turns=TURNS, max_turns=TURNS, text_share=0.0)
    records = [task[index] for index in range(asked.dialogues)]
    rows = []
    for run in asked.runs:
        rows += rows_of(run, records)
        for row in rows[-3:]:
            right = " / ".join(f"{turn['accuracy']:.1%}" for turn in row["turns"])
            print(f"{row['run']}, {row['contender']}: {right} right by turn")
    record = {
        "dialogues": len(records),
        "rows": rows,
        "project_minus_prefill": difference(rows),
        "environment": environment(),
    }
    save_json(asked.json, record)


if __name__ == "__main__":
    main()
