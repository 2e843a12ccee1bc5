"""What becomes of lmms-eval's results: differences only where samples have scores of the metric that is shown."""

import math

import numpy as np
import pytest

from routing_experts.errors import EvaluationError
from routing_experts.evaluation.lmms.scores import task_scores

COUNTS = {
    "route": "1101",
    "skip_rate": 0.25,
    "seconds_to_first": 0.1,
    "decode_seconds": 0.6,
    "steps": 4,
    "batch_size": 2,
    "asked_at": 2,
}


def results(metrics, samples, filters=("none",)):
    """One task's results as lmms-eval gives them: of several filters, all samples one after the other."""
    logged = [
        {"doc_id": n, "filtered_resps": ["word"], "token_counts": [dict(COUNTS)], **sample}
        for _ in filters
        for n, sample in enumerate(samples)
    ]
    named = {f"{metric},{name}": value for metric, value in metrics.items() for name in filters}
    return {
        "results": {"t": {"alias": "t", **named}},
        "samples": {"t": logged},
        "higher_is_better": {"t": {"wer": False}},
    }


def score_of(dense, routed):
    scores, num_layers = task_scores({"dense": [dense], "routed": [routed]})
    assert num_layers == 4
    return {score.metric: score for score in scores}


def test_a_mean_over_samples_is_compared_sample_by_sample():
    dense = results({"acc": 0.5}, [{"acc": 1.0}, {"acc": 0.0}])
    routed = results({"acc": 1.0}, [{"acc": 1.0}, {"acc": 1.0}])
    side = score_of(dense, routed)["acc"].sides[1]
    assert (side.difference, side.value) == (0.5, 1.0)
    assert 0 <= side.low <= side.high <= 1


def test_samples_are_paired_by_document_whatever_their_order():
    """Several processes log theirs as they come; the same answers differ by nothing, and for certain."""
    dense = results({"acc": 0.5}, [{"acc": 1.0}, {"acc": 0.0}])
    routed = results({"acc": 0.5}, [{"doc_id": 1, "acc": 0.0}, {"doc_id": 0, "acc": 1.0}])
    side = score_of(dense, routed)["acc"].sides[1]
    assert (side.difference, side.low, side.high) == (0, 0, 0)


def test_a_scorer_that_counts_in_per_cent_keeps_its_unit():
    dense = results({"acc": 50.0}, [{"acc": {"score": 1}}, {"acc": {"score": 0}}])
    routed = results({"acc": 100.0}, [{"acc": {"score": 1}}, {"acc": {"score": 1}}])
    assert score_of(dense, routed)["acc"].sides[1].difference == 50.0


def test_a_rate_whose_samples_hold_another_score_has_no_difference():
    """POPE logs right or wrong under every metric: a yes ratio's samples are the accuracy's."""
    dense = results({"acc": 0.5, "ratio": 0.9}, [{"acc": {"score": s}, "ratio": {"score": s}} for s in (1.0, 0.0)])
    routed = results({"acc": 0.5, "ratio": 0.7}, [{"acc": {"score": s}, "ratio": {"score": s}} for s in (0.0, 1.0)])
    found = score_of(dense, routed)
    assert found["acc"].sides[1].difference == 0
    assert found["ratio"].sides[1].difference is None


def test_a_side_is_never_its_own_reference():
    dense = results({"acc": 0.5}, [{"acc": "unreadable"}, {"acc": 0.0}])
    routed = results({"acc": 1.0}, [{"acc": 1.0}, {"acc": 1.0}])
    assert score_of(dense, routed)["acc"].sides[1].difference is None


def test_several_filters_are_rows_of_their_own_without_differences():
    samples = [{"acc": 1.0}, {"acc": 1.0}]
    found = score_of(
        results({"acc": 1.0}, samples, ("strict", "loose")), results({"acc": 1.0}, samples, ("strict", "loose"))
    )
    assert set(found) == {"acc, strict", "acc, loose"}
    assert {score.samples for score in found.values()} == {2}
    assert all(side.difference is None for score in found.values() for side in score.sides)


def test_a_judge_s_score_goes_before_a_match():
    values = [{"acc": {"pred": "A", "answer": "A", "score": 3.0}}, {"acc": {"pred": "B", "answer": "A", "score": 5.0}}]
    assert score_of(results({"acc": 4.0}, values), results({"acc": 4.0}, values))["acc"].sides[1].difference == 0


def test_times_belong_to_the_batch_s_steps():
    side = score_of(results({"acc": 1.0}, [{"acc": 1.0}]), results({"acc": 1.0}, [{"acc": 1.0}]))["acc"].sides[0]
    assert side.seconds_a_token.median == pytest.approx(0.2)
    assert side.layer_skip_rates == [0, 0, 1, 0]


def test_what_is_no_finite_number_is_no_score():
    """Any library's numbers count; a metric that one side lacks is compared on none."""
    samples = [{"acc": np.float32(1.0)}, {"acc": np.float32(0.0)}]
    dense = results({"acc": np.float32(0.5), "f1": math.nan, "ok": True, "n": np.int64(2), "only": 1.0}, samples)
    routed = results({"acc": np.float32(0.5), "f1": 0.3, "n": np.int64(2)}, samples)
    found = score_of(dense, routed)
    assert set(found) == {"acc", "n"}
    assert found["acc"].sides[1].difference == 0


def test_lower_may_be_better():
    one = results({"wer": 0.5}, [{"wer": 0.5}])
    assert not score_of(one, one)["wer"].higher_is_better


def test_no_number_at_all_is_refused():
    with pytest.raises(EvaluationError, match="nothing to compare"):
        task_scores({"dense": [results({"text": "n/a"}, [{}])]})
