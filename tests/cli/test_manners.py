"""Manners: JSON and nothing else, silence when asked, exit codes, hints for what is missing, one folder to publish."""

import errno
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import BitsAndBytesConfig

from routing_experts import from_pretrained, is_routed
from routing_experts.cli import judge
from routing_experts.errors import CheckpointError, MissingExtraError
from routing_experts.models.card import CARD_NAME, is_hand_written
from routing_experts.models.device import pick_device
from routing_experts.models.families import known_families
from routing_experts.models.load import load_base
from routing_experts.optional import need
from routing_experts.records import Results

ROE = [sys.executable, "-c", "from routing_experts.cli import main; main()"]


def test_json_is_all_that_standard_output_gets():
    """Guards programs that read it: what libraries print goes to standard error."""
    said = subprocess.run([*ROE, "families", "--json"], capture_output=True, text=True, check=True)
    assert set(json.loads(said.stdout)) == set(known_families())


def test_piped_output_has_no_colours():
    said = subprocess.run([*ROE, "families"], capture_output=True, text=True, check=True)
    assert "llava" in said.stdout
    assert "\x1b" not in said.stdout + said.stderr


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["families"], 0),
        (["evaluate", "/nowhere/at/all"], 1),
        (["evaluate"], 2),
        (["train", "digits", "--set", "training.stepz=3"], 1),
        (["--quiet", "--verbose", "families"], 2),
        (["frain"], 2),
    ],
)
def test_exit_codes(command, code, roe):
    assert roe(*command)[0] == code


def test_an_unknown_setting_is_told_the_nearest(roe):
    code, _, complaint = roe("train", "digits", "--set", "training.stepz=3")
    assert code == 1
    assert "Did you mean steps?" in " ".join(complaint.split())


def test_verbose_shows_where_an_error_came_from(roe):
    assert "Traceback" not in roe("evaluate", "/nowhere/at/all")[2]
    assert "Traceback" in roe("--verbose", "evaluate", "/nowhere/at/all")[2]


def test_quiet_leaves_results_alone(roe, routed_run):
    """Guards scripts: no bars, no notes, the answer."""
    code, out, complaint = roe("--quiet", "generate", routed_run, "--prompt", "Add 3 and 4.", "--max-new-tokens", "2")
    assert code == 0
    assert "layers skipped" in out
    assert complaint == ""


def test_results_go_to_standard_output_on_request(roe, routed_run):
    code, out, _ = roe("evaluate", routed_run, "--questions", "16", "--no-speed", "--json", "-", "--device", "cpu")
    assert code == 0
    assert json.loads(out)["questions"] == 16


def test_the_shell_completes_verbs(roe):
    """Guards completion as bash asks for it."""
    assert "--install-completion" in roe("--help")[1]
    asks = {"_ROE_COMPLETE": "complete_bash", "COMP_WORDS": "roe t", "COMP_CWORD": "1"}
    script = "import sys; sys.argv = ['roe']; from routing_experts.cli import main; main()"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | asks)
    assert said.stdout.split() == ["train"], said


def test_scores_survive_a_folder_that_takes_nothing(roe, routed_run, tmp_path, monkeypatch):
    """Guards an evaluation of hours: what cannot be put beside a model is a note, and the record is written."""

    def refuse(*args):
        raise OSError(errno.EROFS, "Read-only file system", "gallery")

    monkeypatch.setattr(judge, "write_gallery", refuse)
    target = tmp_path / "scores.json"
    code, _, complaint = roe("evaluate", routed_run, "--questions", "16", "--no-speed", "--json", target)
    assert code == 0
    assert "were not written" in complaint
    assert Results.load(target).questions == 16


def test_a_quantised_base_needs_its_extra(routed_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r'pip install "routing-experts\[quant\]"'):
        from_pretrained(routed_run / "model", quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_reports_are_told_where_they_may_go(roe, routed_run, tmp_path):
    """Guards an option that would be ignored, and a study handed to the wrong page."""
    assert roe("report", routed_run, "--output", tmp_path)[0] == 2
    (tmp_path / "study.json").write_text("{}")
    code, _, complaint = roe("report", "--compare", routed_run, tmp_path)
    assert code == 1
    assert "leave --compare out" in " ".join(complaint.split())


def test_two_runs_are_compared_on_one_page(roe, routed_run, tmp_path):
    """Guards `roe report --compare` from the command to the page."""
    assert roe("evaluate", routed_run, "--questions", "16", "--no-speed")[0] == 0
    other = tmp_path / "other"
    shutil.copytree(routed_run, other)
    code, out, _ = roe("report", "--compare", routed_run, other, "--output", tmp_path, "--json")
    assert code == 0
    assert json.loads(out) == {"reports": [str(tmp_path / "compare.html")]}
    assert "2 runs side by side" in (tmp_path / "compare.html").read_text()


def test_a_missing_package_is_a_hint_with_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r'pip install "routing-experts\[lora\]"'):
        need("peft", "lora", "the recipe's `lora`")


def test_a_package_that_is_broken_inside_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_inside.py").write_text("import there_is_no_such_module")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
        need("broken_inside", "extra", "this")


def test_devices_are_named_or_refused(monkeypatch):
    from routing_experts.errors import ConfigError

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu") == pick_device("cpu")
    with pytest.raises(ConfigError, match="cpu alone"):
        pick_device("cuda")
    with pytest.raises(ConfigError, match="does not know"):
        pick_device("toaster")


def test_export_merges_parts_with_their_base_into_one_folder(roe, routed_run, tmp_path):
    """Guards the way from RoE parts to a folder that anyone can load."""
    base = routed_run.parent / "base"
    assert roe("convert", base, tmp_path / "parts", "--no-base-weights")[0] == 0
    code, out, _ = roe(
        "export", tmp_path / "parts", tmp_path / "merged", "--base", base, "--license", "apache-2.0", "--json"
    )
    assert code == 0
    assert json.loads(out) == {"model": str(tmp_path / "merged"), "pushed": None}
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "merged" / "processor_config.json").is_file()
    assert is_routed(from_pretrained(tmp_path / "merged"))
    card = (tmp_path / "merged" / CARD_NAME).read_text()
    assert "license: apache-2.0" in card
    assert "not evaluated yet" in card


def test_a_base_of_other_weights_is_told_by_its_fingerprint(roe, routed_run, tmp_path):
    """Guards RoE parts against a base that only looks like theirs."""
    base = routed_run.parent / "base"
    assert roe("convert", base, tmp_path / "parts", "--no-base-weights")[0] == 0
    torch.manual_seed(1)
    other = load_base("pocket", random_init=True)
    with pytest.raises(CheckpointError, match="fingerprint"):
        from_pretrained(tmp_path / "parts", base=other)


def test_an_evaluated_model_s_card_holds_its_scores_and_a_hand_written_one_is_left(roe, routed_run):
    assert roe("evaluate", routed_run, "--questions", "16", "--no-speed")[0] == 0
    card = routed_run / "model" / CARD_NAME
    assert "right answers, routed" in card.read_text()
    card.write_text("# Mine\n")
    assert is_hand_written(card)
    assert roe("evaluate", routed_run, "--questions", "16", "--no-speed")[0] == 0
    assert card.read_text() == "# Mine\n"


def test_scores_leave_the_card_with_the_bias_that_they_were_measured_with(roe, routed_run):
    """Guards a card against scores of another skip rate than the folder's."""
    card = routed_run / "model" / CARD_NAME
    card.unlink(missing_ok=True)
    assert roe("evaluate", routed_run, "--questions", "16", "--no-speed")[0] == 0
    assert "right answers, routed" in card.read_text()
    assert roe("calibrate", routed_run, "--skip-rate", "0.3", "--questions", "64")[0] == 0
    assert "not evaluated yet" in card.read_text()


def test_push_to_hub_uploads_the_whole_folder_with_its_card(routed_run, monkeypatch):
    """Guards publishing without a network: what would be uploaded is what save_pretrained writes."""
    import huggingface_hub

    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **settings):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, commit_message):
            sent.update({path.name: path.read_bytes() for path in folder_path.iterdir()})
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = from_pretrained(routed_run / "model")
    assert model.push_to_hub("someone/model", license_name="mit") == "https://hub/commit"
    assert {"roe.safetensors", "roe_config.json", "model.safetensors", CARD_NAME} <= sent.keys()
    assert b"license: mit" in sent[CARD_NAME]
