"""Records by hand, as small as their readers allow."""

from typing import Any

from routing_experts.records import StudyRun


def study_run(arm: str, wanted: float, seed: int, right: str, **changes: Any) -> StudyRun:
    """A study's run of few questions: as accurate as its marks say, and as sparse as wanted.

    Args:
        arm: its name.
        wanted: the skip rate that was asked for.
        seed: of training.
        right: one mark a question, "1" where the answer was right.
        **changes: any other of the record's values.
    """
    values: dict[str, Any] = {
        "accuracy": right.count("1") / len(right),
        "skip_rate": wanted,
        "raw_skip_rate": None,
        "keep_bias": None,
        "layer_skip_rates": [],
        "task_accuracy": {},
        "task_skip_rate": {},
        "route_information": 0.0,
        "varied_layers": 0.0,
        "training_seconds": 1.0,
        "steps": 1,
    }
    return StudyRun(arm=arm, wanted=wanted, seed=seed, right=right, **(values | changes))
