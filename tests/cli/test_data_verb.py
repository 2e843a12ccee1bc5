"""`roe data`: a set made, checked, halved, joined and trained on, as a user would; and every refusal of the verbs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from routing_experts.data.encode import Encoder
from routing_experts.data.readers.sources import load_records
from routing_experts.models.load import load_processor

FILE = "llava_v1_5_mix.json"


@pytest.fixture
def digits(roe, tmp_path) -> Path:
    """Sixty records in the layout of LLaVA's mixture."""
    code, said, _ = roe("data", "export", "digits", tmp_path / "digits", "--layout", "llava", "--records", "60")
    assert code == 0
    assert FILE in said
    return tmp_path / "digits"


def test_a_set_is_checked_halved_joined_and_trained_on(roe, digits, tmp_path, monkeypatch):
    """From one command to the next, images included: a recipe trains end to end from the mixture's layout."""
    code, said, _ = roe("data", "check", digits / FILE, "--verify-images", "--json")
    assert code == 0
    found = json.loads(said)
    assert sum(one["records"] for one in found["sources"]) == 60
    assert {one["source"] for one in found["sources"]} >= {"coco/train2017", "ocr_vqa/images", "vg/VG_100K"}
    assert sum(one["misnamed"] for one in found["sources"]) > 0  # OCR-VQA's covers, as in the mixture

    half = digits / "half.jsonl"
    code, said, _ = roe("data", "subset", digits / FILE, "--output", half, "--seed", "1")
    assert code == 0
    assert "30 records" in said
    manifest = json.loads((digits / "half.jsonl.manifest.json").read_text())
    assert (manifest["records"], manifest["parts"][0]["weight"]) == (30, 0.5)

    parts = (f"{digits / FILE}=0.5", f"{half}@{digits}=2")
    code, said, _ = roe("data", "mix", *parts, "--output", tmp_path / "mix.json", "--images", tmp_path)
    assert code == 0
    assert "90 records" in said
    names = [one["image"] for one in json.loads((tmp_path / "mix.json").read_text()) if "image" in one]
    assert all(name.startswith("digits/") for name in names)

    made = {
        "model": "pocket",
        "output": str(tmp_path / "run"),
        "data": {"source": str(tmp_path / "mix.json"), "pad_to_square": True, "keep_encoded": False},
        "training": {"steps": 4, "batch_size": 4, "accumulation": 2, "length_window": 2, "logging_steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
    code, _, errors = roe("train", tmp_path / "recipe.yaml")
    assert code == 0, errors
    assert json.loads((tmp_path / "run" / "model" / "processor_config.json").read_text())["image_processor"]["do_pad"]
    asked = ("--data", half, "--images", digits, "--questions", "8")
    code, said, errors = roe("evaluate", tmp_path / "run", *asked, "--json", "-")
    assert code == 0, errors


def test_a_part_is_not_called_the_whole(roe, digits):
    """Guards the verdict and the record of a check of the first records alone."""
    code, said, _ = roe("data", "check", digits / FILE, "--first", "5", "--verify-images")
    assert code == 0
    assert "up to 5 of the first records, is sound as far as was looked: --lengths MODEL" in " ".join(said.split())
    assert "All of it" not in said
    code, said, _ = roe("data", "check", digits / FILE, "--first", "5", "--verify-images", "--lengths", "pocket")
    assert "up to 5 of the first records, can be trained on." in " ".join(said.split())
    code, said, _ = roe("data", "check", digits / FILE, "--first", "5", "--json")
    found = json.loads(said)
    assert (found["first"], sum(one["records"] for one in found["sources"])) == (5, 5)
    code, _, errors = roe("data", "check", digits / FILE, "--split", "test")
    assert code == 1
    assert "these are of sets on the hub" in " ".join(errors.split())


def test_a_faulty_set_is_told_of_and_listed(roe, digits, tmp_path):
    """Exit code 1, the first faults in words, all of them in a file."""
    records = json.loads((digits / FILE).read_text())
    pictured = [n for n, record in enumerate(records) if "image" in record]
    for number in pictured[:7]:
        (digits / records[number]["image"]).unlink()
    records[pictured[7]]["conversations"].reverse()
    (digits / FILE).write_text(json.dumps(records))
    code, said, _ = roe("data", "check", digits / FILE, "--list", tmp_path / "faults.jsonl")
    assert code == 1
    assert "7 pictures that are not there" in said
    assert "1 records that training would refuse" in said
    assert "…" in said
    listed = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert sorted(one["record"] for one in listed) == pictured[:8]


def test_lengths_are_counted_by_the_model_s_processor(roe, digits):
    """As the encoder that trains counts them; a limit one lower than the longest finds that one alone."""
    encoder = Encoder(load_processor("pocket"), max_length=10_000)
    lengths = sorted(len(encoder(record).input_ids) for record in load_records(digits / FILE))
    assert lengths[-2] < lengths[-1]
    for limit, over in ((lengths[-1], 0), (lengths[-1] - 1, 1)):
        code, said, _ = roe("data", "check", digits / FILE, "--lengths", "pocket", "--max-length", limit, "--json")
        found = [one["lengths"] for one in json.loads(said)["sources"]]
        assert code == over
        assert sum(one["over"] for one in found) == over
        assert sum(one["tokens"] for one in found) == sum(lengths)
        assert max(one["longest"] for one in found) == lengths[-1]


def test_lengths_are_counted_for_a_run_s_folder_and_tried_out_first(roe, digits, tmp_path):
    """A processor or a prompt format that cannot be is said once, not of every record."""
    load_processor("pocket").save_pretrained(tmp_path / "run" / "model")
    code, said, _ = roe("data", "check", digits / FILE, "--lengths", tmp_path / "run", "--json")
    assert code == 0
    assert all(one["lengths"] for one in json.loads(said)["sources"])
    code, _, errors = roe("data", "check", digits / FILE, "--lengths", "pocket", "--prompt-format", "mine")
    assert code == 1
    assert "prompt format 'mine': the formats are" in " ".join(errors.split())


def test_checking_needs_no_torch():
    """Guards memory, of which torch alone would take half of what a check may, in each of its processes."""
    code = "import routing_experts.cli.mixture, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("check", "none.json"), "none.json: there is no such file"),
        (("subset", "none.json", "--output", "half.json"), "none.json: there is no such file"),
        (("subset", "x.json", "--output", "y.json", "--share", "2"), "a share of a set lies below 1"),
        (("subset", "x.json", "--output", "y.json", "--rule", "mine"), "there is one, authors"),
        (("subset", "x.json", "--output", "y.json", "--rule", "authors", "--share", "0.3"), "each says which records"),
        (("check", "none.json", "--max-length", "9"), "are of --lengths MODEL"),
        (("check", "none.json", "--prompt-format", "llama_3"), "are of --lengths MODEL"),
        (("check", "none.json", "--list", "faults.txt"), "Give a .jsonl file"),
        (("mix", "x.json=much", "--output", "y.json"), "x.json=much: there is no such file"),
        (("mix", "x.json=0", "--output", "y.json"), "a number above 0"),
        (("mix", "x.json@pictures", "--output", "y.json"), "not the one above all"),
        (("mix", "x.json@/elsewhere", "--output", "y.json", "--images", "."), "does not lie below"),
        (("export", "digits", "folder", "--layout", "coco"), "it is one of llava, lmms-eval"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_said(roe, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, errors = roe("data", *words)
    assert code in (1, 2)
    assert message in " ".join(errors.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_names_of_files_may_hold_the_signs_of_parts(roe, digits, tmp_path, monkeypatch):
    """Guards ``lr=0.1`` and ``v@2`` in paths: what is there is a file, and signs count behind it."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "lr=0.1" / "v@2" / "mine.json"
    shutil.copytree(digits, path.parent)
    (path.parent / FILE).rename(path)
    name = str(path.relative_to(tmp_path))
    for part, times in ((name, 1), (f"{name}=2", 2), (f"{name}@{path.parent}", 1), (f"{name}@{path.parent}=2", 2)):
        code, said, errors = roe("data", "mix", part, "--output", tmp_path / "mix.json", "--images", ".", "--json")
        assert code == 0, errors
        assert (json.loads(said)["parts"][0]["weight"], json.loads(said)["parts"][0]["prefix"]) == (times, "lr=0.1/v@2")
    code, _, errors = roe("data", "mix", f"{name}=much", "--output", "mix.json")
    assert code == 1
    assert "weight 'much' is no number" in " ".join(errors.split())


def test_pictures_are_not_mixed_into_another_set(roe, digits):
    code, _, errors = roe("data", "export", "digits", digits, "--layout", "llava")
    assert code == 1
    assert "is there already" in errors
