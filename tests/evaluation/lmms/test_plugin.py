"""lmms-eval's own run of the digits gives what `roe evaluate` gives; its log says what really ran."""

import json
from collections import Counter

import pytest

from routing_experts.evaluation.evaluate import ask
from routing_experts.models.families import family_of
from routing_experts.models.load import from_pretrained, load_base, load_processor
from routing_experts.models.options import RoutingOptions


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("side", ["routed", "all layers", "dense"])
def test_it_gives_exactly_what_we_give(side, batch_size, run, routed_folder, digits, questions):
    """What the issue asks for: dense and routed, batch 1 and 8; every answer and every route, not the mean alone."""
    settings = {"all layers": {"skip_ratio": 0}, "dense": {"dense": True}}.get(side, {})
    source = "pocket" if side == "dense" else routed_folder
    found = run({"pretrained": source} | settings, "roe_digits", digits, batch_size=batch_size)
    model = load_base("pocket") if side == "dense" else from_pretrained(routed_folder)
    options = RoutingOptions(skip_ratio=0.0) if side == "all layers" else None
    own = ask(model, load_processor(source), questions, batch_size, options)
    assert found["results"]["roe_digits"]["exact_match,none"] == own.accuracy
    samples = sorted(found["samples"]["roe_digits"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0] for sample in samples] == [answer.text for answer in own.answers]
    logged = [sample["token_counts"][0] for sample in samples]
    assert [counts["route"] for counts in logged] == ["".join("01"[k] for k in a.route) for a in own.answers]
    assert [counts["output_tokens"] for counts in logged] == [answer.num_tokens for answer in own.answers]
    assert (len({counts["route"] for counts in logged}) > 3) == (side == "routed")
    assert 0.1 < own.accuracy < 1


def test_the_log_counts_the_layers_that_ran(run, routed_folder, digits, questions):
    """Contract 4 through the plug-in: calls are counted in the layers themselves, row by row."""
    from routing_experts.evaluation.lmms.model import ChatModel

    model = ChatModel(str(routed_folder), batch_size=8, device="cpu")
    rows = Counter()

    def count(index):
        def hook(module, args, kwargs):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            if hidden.shape[1] > 1:  # prefills
                rows[index] += len(hidden)

        return hook

    for index, layer in enumerate(family_of(model.model).decoder_layers(model.model)):
        layer.self_attn.register_forward_pre_hook(count(index), with_kwargs=True)
    found = run(model, "roe_digits", digits)
    routes = [sample["token_counts"][0]["route"] for sample in found["samples"]["roe_digits"]]
    assert [rows[index] for index in range(12)] == [sum(route[index] == "1" for route in routes) for index in range(12)]
    assert sum(rows.values()) < 12 * len(questions)


def test_times_are_those_of_the_batch(run, routed_folder, digits):
    found = run({"pretrained": routed_folder}, "roe_digits", digits, batch_size=8)
    samples = sorted(found["samples"]["roe_digits"], key=lambda sample: sample["doc_id"])
    counts = [sample["token_counts"][0] for sample in samples]
    assert all(one["seconds_to_first"] > 0 and one["decode_seconds"] > 0 for one in counts)
    for start in range(0, 40, 8):
        assert len({one["seconds_to_first"] for one in counts[start : start + 8]}) == 1
    assert len({one["seconds_to_first"] for one in counts}) == 5


def test_a_skip_ratio_moves_the_budget(run, routed_folder, digits):
    routes = []
    for ratio in (0.05, 0.07):
        found = run({"pretrained": routed_folder, "skip_ratio": ratio}, "roe_digits", digits, batch_size=8)
        routes.append([s["token_counts"][0]["skip_rate"] for s in found["samples"]["roe_digits"]])
    assert sum(routes[0]) < sum(routes[1])


def test_finished_samples_are_not_asked_again(run, routed_folder, digits, tmp_path, monkeypatch):
    """Guards a run that was cut short: the second one asks what the first did not, and comes to the same."""
    from routing_experts.evaluation.lmms import model as model_module

    settings = {"pretrained": routed_folder, "log": tmp_path / "log"}
    whole = run(settings, "roe_digits", digits, batch_size=8)
    path = tmp_path / "log" / "samples-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:18]) + lines[18][:40])  # killed while it wrote
    asked = []
    answer = model_module.answer

    def watched(model, processor, records, *args, **kwargs):
        asked.extend(record.id for record in records)
        return answer(model, processor, records, *args, **kwargs)

    monkeypatch.setattr(model_module, "answer", watched)
    again = run(settings, "roe_digits", digits, batch_size=8)
    assert asked == [f"roe_digits/test/{index}" for index in range(18, 40)]
    assert again["results"] == whole["results"]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == [
        f"roe_digits/test/{index}" for index in range(40)
    ]


def test_questions_that_changed_are_asked_again(run, routed_folder, digits, tmp_path, questions):
    """Guards scores against answers to other questions of the same numbers."""
    from routing_experts.evaluation.lmms.digits import write_task
    from routing_experts.evaluation.questions import digits_questions

    settings = {"pretrained": routed_folder, "log": tmp_path / "log"}
    run(settings, "roe_digits", digits, batch_size=8)
    other = digits_questions(40, 78)
    write_task(tmp_path / "other", other)
    found = run(settings, "roe_digits", tmp_path / "other", batch_size=8)
    own = ask(from_pretrained(routed_folder), load_processor(routed_folder), other, 8)
    assert found["results"]["roe_digits"]["exact_match,none"] == own.accuracy
