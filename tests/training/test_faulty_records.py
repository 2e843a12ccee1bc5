"""Faults in training data: an error by default; left out, counted and listed where the recipe says so."""

import json
import shutil
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from runs import quiet_run, settings, weights

from routing_experts.data.dataset import EncodedDataset
from routing_experts.data.digits import DigitsTask
from routing_experts.data.encode import Encoder
from routing_experts.data.mixture.export import export_digits
from routing_experts.data.readers.sources import load_records
from routing_experts.errors import RecordError, TrainingError
from routing_experts.models.load import load_processor
from routing_experts.training import run
from routing_experts.training.folder import CONTENTS
from routing_experts.training.recipe import Recipe, recipe_from_dict

RECORDS = 40
GONE, CUT, EMPTY = 3, 8, 20  # a picture that is not there, one that is cut short, an answer without a word


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The digits in the layout of LLaVA's mixture, with three faulty records."""
    folder = tmp_path_factory.mktemp("mixture")
    path = export_digits(folder, RECORDS, DigitsTask(seed=5, text_share=0.0))
    records = json.loads(path.read_text())
    (folder / records[GONE]["image"]).unlink()
    cut = folder / records[CUT]["image"]
    cut.write_bytes(cut.read_bytes()[:-200])
    records[EMPTY]["conversations"][1]["value"] = " "
    path.write_text(json.dumps(records))
    return folder


def recipe(folder: Path, output: Path, training: dict[str, Any] | None = None, **data: Any) -> Recipe:
    made = settings(output, **({"steps": 8} | (training or {})))
    source = {"source": str(next(folder.glob("*.json"))), "on_fault": "skip", "max_faulty": 0.2}
    return recipe_from_dict(made | {"data": source | data})


def listed(output: Path) -> dict[int, str]:
    lines = (output / "faults.jsonl").read_text().splitlines()
    return {line["record"]: line["problem"] for line in map(json.loads, lines)}


def test_by_default_the_first_fault_ends_the_run_before_it_begins(folder, tmp_path):
    with pytest.raises(RecordError, match=rf"record {GONE} .*is not there"):
        quiet_run(recipe(folder, tmp_path, on_fault="error", max_faulty=0.01))
    assert not (tmp_path / "model").exists()


def test_faulty_records_are_left_out_counted_and_listed(folder, tmp_path):
    """Two epochs over what is left: each fault is listed once, by its number in the file."""
    quiet_run(recipe(folder, tmp_path))
    found = listed(tmp_path)
    assert set(found) == {GONE, CUT, EMPTY}
    assert "is not there" in found[GONE]
    assert "cut short" in found[CUT]
    assert "the answer is empty" in found[EMPTY]
    lines = (tmp_path / "faults.jsonl").read_text().splitlines()
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("training", "data"),
    [
        ({"batch_size": 4, "accumulation": 2}, {}),
        ({}, {"keep_encoded": False}),
        ({}, {"keep_encoded": False, "workers": 2}),
        ({}, {"token_cache": "tokens"}),
    ],
    ids=["divided", "not kept", "by workers", "from tokens on disk"],
)
def test_what_stands_in_is_the_same_however_it_is_read(folder, tmp_path, training, data):
    """Guards runs over processes: what trains in a record's place is drawn by its number, whoever meets the fault."""
    if "token_cache" in data:
        data = data | {"token_cache": str(tmp_path / data["token_cache"])}
    whole = weights(quiet_run(recipe(folder, tmp_path / "whole")).model)
    other = weights(quiet_run(recipe(folder, tmp_path / "other", training, **data)).model)
    for name, value in whole.items():
        torch.testing.assert_close(other[name], value, atol=2e-5, rtol=1e-4)
    assert listed(tmp_path / "other") == listed(tmp_path / "whole")


def test_too_many_end_the_run_and_the_list_says_which(folder, tmp_path):
    """Two of forty are found before the first step, the third while training; the first is quoted."""
    with pytest.raises(TrainingError, match=r"3 of 40 records cannot be used, more than data\.max_faulty=0\.06"):
        quiet_run(recipe(folder, tmp_path / "late", max_faulty=0.06))
    assert set(listed(tmp_path / "late")) == {GONE, CUT, EMPTY}
    with pytest.raises(TrainingError, match="2 of 40 records cannot be used"):
        quiet_run(recipe(folder, tmp_path / "early", max_faulty=0.03))


def test_a_fault_that_was_read_ahead_is_told_of_again(folder):
    """Guards stage boundaries: of a stage's last step a batch more is read, thrown away, and read by the next."""
    records = load_records(next(folder.glob("*.json")), faults=[])
    dataset = EncodedDataset(records, RECORDS, Encoder(load_processor("pocket")), keep=False, stand_ins=True)
    first, again = dataset[CUT], dataset[CUT]
    assert [fault.record for fault in first.faults] == [CUT]
    assert again.faults == first.faults


def test_a_worker_s_fault_ends_the_run_in_the_record_s_words(folder, tmp_path):
    """Nobody wants to read the traceback of another process in front of it."""
    own = tmp_path / "set"
    shutil.copytree(folder, own)
    path = next(own.glob("*.json"))
    records = json.loads(path.read_text())
    path.write_text(json.dumps([record for n, record in enumerate(records) if n not in (GONE, EMPTY)]))
    by_workers = {"on_fault": "error", "max_faulty": 0.01, "keep_encoded": False, "workers": 1}
    with pytest.raises(RecordError, match=r"^record \S+: picture .* it may be cut short or damaged") as caught:
        quiet_run(recipe(own, tmp_path / "run", **by_workers))
    assert "Traceback" not in str(caught.value)


def test_the_share_may_be_raised_on_the_way(folder, tmp_path):
    """As its message says: no weight depends on it."""
    one_step = {"save_steps": 1, "batch_size": 8, "steps": 8}
    with pytest.raises(TrainingError, match="3 of 40"):
        quiet_run(recipe(folder, tmp_path, one_step, max_faulty=0.06))
    quiet_run(recipe(folder, tmp_path, one_step, max_faulty=0.08))
    assert set(listed(tmp_path)) == {GONE, CUT, EMPTY}


def test_a_new_run_begins_an_empty_list(folder, tmp_path):
    (tmp_path / "faults.jsonl").write_text('{"record": 39, "problem": "of another run"}\n')
    quiet_run(recipe(folder, tmp_path))
    assert set(listed(tmp_path)) == {GONE, CUT, EMPTY}


def test_a_run_goes_on_once_its_records_are_mended(folder, tmp_path):
    """Too many end it behind a checkpoint; what was mended since counts no longer, what was not still does."""
    own = tmp_path / "set"
    shutil.copytree(folder, own)
    one_step = {"save_steps": 1, "batch_size": 8, "steps": 8}
    of = recipe(own, tmp_path / "run", one_step, max_faulty=0.06)
    with pytest.raises(TrainingError, match="3 of 40"):
        quiet_run(of)
    assert any((tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(TrainingError, match="3 of 40"):
        quiet_run(of)
    records = json.loads(next(own.glob("*.json")).read_text())
    shutil.copy(own / records[CUT + 1]["image"], own / records[CUT]["image"])
    quiet_run(of)
    assert set(listed(tmp_path / "run")) == {GONE, EMPTY}


def test_a_run_goes_on_once_its_records_are_taken_out(folder, tmp_path):
    """Guards lists against numbers of records that are no longer there."""
    own = tmp_path / "set"
    shutil.copytree(folder, own)
    path, one_step = next(own.glob("*.json")), {"save_steps": 1, "batch_size": 8, "steps": 8}
    records = json.loads(path.read_text())
    faulty = {GONE, CUT, EMPTY}
    path.write_text(
        json.dumps([one for n, one in enumerate(records) if n not in faulty] + [records[n] for n in faulty])
    )
    of = recipe(own, tmp_path / "run", one_step, max_faulty=0.06)
    with pytest.raises(TrainingError, match="3 of 40"):
        quiet_run(of)
    path.write_text(json.dumps([one for n, one in enumerate(records) if n not in faulty]))
    quiet_run(of, accept=True)
    assert listed(tmp_path / "run") == {}


def test_another_state_of_a_set_of_the_hub_is_refused(tmp_path, monkeypatch):
    """Guards going on with records that were changed on the hub, as a file's are guarded."""
    talk = [{"role": "user", "content": "Add 1 and 1."}, {"role": "assistant", "content": "2"}]
    answer = "2"

    def load(*_: Any, **__: Any) -> Any:
        rows = [{"id": str(n), "messages": [talk[0], talk[1] | {"content": answer}]} for n in range(8)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    of = recipe_from_dict(settings(tmp_path) | {"data": {"source": "owner/talks"}})
    quiet_run(of)
    noted = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(noted | {"finished": False}))
    answer = "3"
    with pytest.raises(TrainingError, match=rf"another run: {CONTENTS}: '\w+' there, '\w+' asked for"):
        quiet_run(of)
    quiet_run(of, accept=True)
    noted = json.loads((tmp_path / "run.json").read_text())
    assert [change["change"].split(":")[0] for change in noted["changes"]] == [CONTENTS]
    quiet_run(of)


def test_a_stage_s_readers_end_with_it(folder, tmp_path, monkeypatch):
    """Guards memory: processes that read for a stage would stay beside those of all later ones."""
    alive: list[int] = []
    begin = run._train_stage

    def watched(*args: Any) -> Any:
        alive.append(len(active_children()))
        return begin(*args)

    monkeypatch.setattr(run, "_train_stage", watched)
    quiet_run(recipe(folder, tmp_path, workers=2, keep_encoded=False))
    assert alive == [0, 0, 0]


def test_held_out_records_may_be_faulty_too(folder, tmp_path):
    """Numbers are those of the file; what is met behind the last step is listed as well."""
    own = tmp_path / "set"
    shutil.copytree(folder, own)
    records = json.loads(next(own.glob("*.json")).read_text())
    (own / records[38]["image"]).write_bytes(b"no picture")
    quiet_run(recipe(own, tmp_path / "run", {"eval_steps": 4}, held_out=8))
    assert set(listed(tmp_path / "run")) == {GONE, CUT, EMPTY, 38}


def test_a_window_s_steps_do_not_depend_on_what_is_kept(folder, tmp_path):
    """Guards runs that go on with workers: over several steps, lengths decide what a step learns from."""
    window = {"length_window": 4}
    kept = weights(quiet_run(recipe(folder, tmp_path / "kept", window)).model)
    other = weights(quiet_run(recipe(folder, tmp_path / "other", window, keep_encoded=False)).model)
    for name, value in kept.items():
        torch.testing.assert_close(other[name], value, atol=2e-5, rtol=1e-4)


def test_runs_share_tokens_on_disk(folder, tmp_path):
    """Guards caches against runs that take other parts of one set: held-out records, other batches."""
    cache = str(tmp_path / "tokens")
    quiet_run(recipe(folder, tmp_path / "first", {"eval_steps": 4}, held_out=16, token_cache=cache))
    (only,) = (path for path in (tmp_path / "tokens").iterdir() if path.is_dir())
    before = {path.name: path.stat().st_mtime_ns for path in only.iterdir()}
    with_cache = weights(quiet_run(recipe(folder, tmp_path / "second", {"batch_size": 4}, token_cache=cache)).model)
    without = weights(quiet_run(recipe(folder, tmp_path / "third", {"batch_size": 4})).model)
    assert {path.name: path.stat().st_mtime_ns for path in only.iterdir()} == before
    for name, value in without.items():
        assert torch.equal(with_cache[name], value), name
