"""`roe export --static`: a folder that loads and answers, its row in a record, and what is refused."""

import json

import pytest

from routing_experts.cli.static import drawn_halves
from routing_experts.models.load import from_pretrained
from routing_experts.records import StaticExport


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return tmp_path_factory.mktemp("static") / "model"


def test_a_static_model_comes_with_its_own_row(roe, routed_run, exported):
    code, said, complaint = roe("export", routed_run, exported, "--static", "--layers", "3", "--questions", "32")
    assert code == 0, complaint
    assert "Static export" in said
    record = StaticExport.load(exported / "static.json")
    assert [row.name for row in record.rows] == ["dense", "routed", "static"]
    dense, routed, static = record.rows
    assert (dense.skip_rate, static.skip_rate) == (0, 0.25)
    assert static.parameters < dense.parameters < routed.parameters
    assert all(len(seconds) == 9 for row in record.rows for seconds in row.seconds.values())
    assert record.low <= record.difference <= record.high
    assert record.difference == pytest.approx(static.accuracy - routed.accuracy)
    kept = [rate for layer, rate in enumerate(record.layer_skip_rates) if layer not in record.dropped]
    assert min(record.layer_skip_rates[layer] for layer in record.dropped) >= max(kept)
    config = from_pretrained(exported).roe_config
    assert (config.stripped, list(config.routed_layers)) == (True, record.dropped)


def test_its_card_says_what_it_is(exported):
    """Guards what is published: nothing of routes that are gone, and no use without this library."""
    card = (exported / "README.md").read_text()
    record = StaticExport.load(exported / "static.json")
    assert f"Decoder layers {', '.join(map(str, record.dropped))} (counted from 0) are gone" in card
    assert f"| right answers, static | {record.rows[-1].accuracy:.1%} of 32 |" in card
    assert "Without `import routing_experts` the folder must not be used" in card
    for untrue in ("decides for every request", "calibrate", "not evaluated yet", "is the dense model"):
        assert untrue not in card


def test_it_is_generated_with_and_evaluated(roe, exported):
    code, said, complaint = roe("generate", exported, "--prompt", "Read all digits.", "--json")
    assert code == 0, complaint
    assert json.loads(said)["route"].count(False) == 3
    code, said, complaint = roe("evaluate", exported, "--questions", "24")
    assert code == 0, complaint
    assert "of 24" in said
    code, _, complaint = roe("evaluate", exported, "--questions", "8", "--record-routes", exported / "routes.jsonl")
    assert code == 1
    assert "no routes to record" in complaint


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--layers", "3"], 2, "--layers with no --static"),
        (["--device", "cpu"], 2, "--device with no --static"),
        (["--static", "--parts-only"], 2, "--parts-only with --static"),
        (["--static", "--layers", "12"], 1, "dropping 12 layers: 11 are routed"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, code, message, roe, routed_run, tmp_path):
    found, _, complaint = roe("export", routed_run, tmp_path / "out", *arguments)
    assert found == code
    assert message in " ".join(complaint.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_halves_of_a_sorted_file_are_alike():
    tasks = ["a"] * 200 + ["b"] * 201
    choosing, asking = drawn_halves(tasks)
    assert (len(choosing), len(asking)) == (200, 201)
    assert 70 < choosing.count("a") < 130
    assert choosing.count("a") + asking.count("a") == 200


def test_a_file_chooses_by_one_half_and_asks_the_other(roe, routed_run, tmp_path):
    records = [
        {
            "id": str(n),
            "conversations": [{"from": "human", "value": f"{n} plus 1?"}, {"from": "gpt", "value": str(n + 1)}],
        }
        for n in range(9)
    ]
    (tmp_path / "mine.json").write_text(json.dumps(records))
    code, _, complaint = roe(
        "export", routed_run, tmp_path / "out", "--static", "--layers", "2", "--data", tmp_path / "mine.json"
    )
    assert code == 0, complaint
    record = StaticExport.load(tmp_path / "out" / "static.json")
    assert (record.chosen_on, record.questions) == (4, 5)
    (tmp_path / "mine.json").write_text(json.dumps(records[:1]))
    code, _, complaint = roe("export", routed_run, tmp_path / "x", "--static", "--data", tmp_path / "mine.json")
    assert code == 1
    assert "layers are chosen by one half" in complaint
