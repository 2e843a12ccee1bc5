"""What a run's folder is guarded against: other recipes, second runs, full disks, folders that cannot be written."""

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from runs import quiet_run, recipe, settings, weights
from safetensors import SafetensorError

from routing_experts.config import RoEConfig
from routing_experts.errors import CheckpointError, ConfigError, RoutingExpertsError, TrainingError
from routing_experts.evaluation.calibration import with_bias, with_budget
from routing_experts.models import checkpoint as checkpoint_module
from routing_experts.models.load import from_pretrained
from routing_experts.training import folder as folder_module
from routing_experts.training import trainer
from routing_experts.training.folder import (
    CONTENTS,
    RunFolder,
    keep_newest,
    last_complete,
    mark_complete,
    remove_incomplete,
)
from routing_experts.training.recipe import recipe_from_dict, recipe_values

HOLD = """
import sys
from routing_experts.training.folder import RunFolder
with RunFolder(sys.argv[1]).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, where this process may mount one."""
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting a file system needs privileges")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def checkpoint(folder: Path, step: int, whole: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x")
    if whole:
        mark_complete(path, {"mean_skip_rate": None})
    return path


def test_only_whole_checkpoints_count_and_the_newest_by_step_is_last(tmp_path):
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10)
    torn = checkpoint(tmp_path, 11, whole=False)
    assert last_complete(tmp_path) == tmp_path / "checkpoint-10"
    remove_incomplete(tmp_path)
    assert not torn.exists()
    assert last_complete(tmp_path / "nowhere") is None


def test_the_limit_keeps_the_newest(tmp_path):
    for step in (2, 10, 9):
        checkpoint(tmp_path, step)
    keep_newest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


@pytest.mark.parametrize("limit", [1, 3])
def test_a_run_keeps_as_many_checkpoints_as_it_was_told(limit, tmp_path):
    quiet_run(recipe(tmp_path, steps=6, save_steps=1, save_total_limit=limit))
    assert len(list((tmp_path / "checkpoints").iterdir())) == limit


def test_a_second_run_in_a_folder_is_refused_while_the_first_holds_it(tmp_path):
    """Guards against two runs that overwrite each other; the lock dies with its process."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(TrainingError, match="another process trains there"):
            quiet_run(recipe(tmp_path))
    finally:
        holder.kill()
        holder.wait()
    assert quiet_run(recipe(tmp_path)).folder.is_dir()


def test_another_recipe_s_run_is_refused_by_its_settings(tmp_path):
    """Guards `--resume` with changed settings: the differing one is named, and nothing is lost."""
    quiet_run(recipe(tmp_path))
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(TrainingError, match=r"training.learning_rate: 0.001 there, 0.002 asked for"):
        quiet_run(recipe(tmp_path, learning_rate=2e-3))
    assert (tmp_path / "run.json").read_bytes() == before
    assert quiet_run(recipe(tmp_path, learning_rate=2e-3), restart=True).folder.is_dir()
    assert json.loads((tmp_path / "run.json").read_text())["recipe"]["training"]["learning_rate"] == 2e-3


def test_what_the_recipe_does_not_say_is_held_to_as_well(tmp_path):
    """Guards going on with an edited data file or other batches, which would train something else."""
    data = tmp_path / "data.json"
    answers = [f'{{"id": "{n}", "conversations": [{{"from": "human", "value": "Add 1 and {n}."}}, ' for n in range(8)]
    data.write_text("[" + ",".join(a + '{"from": "gpt", "value": "2"}]}' for a in answers) + "]")
    of = recipe_from_dict(settings(tmp_path / "run") | {"data": {"source": str(data)}})
    quiet_run(of)
    assert set(json.loads((tmp_path / "run" / "run.json").read_text())["facts"]) == {
        "base",
        "contents of data.source",
        "records_a_step",
        "tuned tower",
    }
    data.write_text(data.read_text().replace('"2"', '"3"'))
    assert quiet_run(of).folder.is_dir()  # finished: nothing would be trained on it
    noted = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(noted | {"finished": False}))
    with pytest.raises(TrainingError, match=rf"another run: {CONTENTS}: '\w+' there, '\w+' asked for"):
        quiet_run(of)
    quiet_run(of, accept=True)
    noted = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [change["change"].split(":")[0] for change in noted["changes"]] == [CONTENTS]
    quiet_run(of)  # it is this run's now
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(TrainingError, match="records_a_step: 8 there, 16 asked for"):
        folder.check_facts({"records_a_step": 16})
    with pytest.raises(TrainingError, match="base: "):
        folder.check_facts({"base": "another"})


def test_a_run_that_never_began_claims_nothing(tmp_path):
    """Guards second tries: a recipe or data file that failed at once may be mended and run in the same folder."""
    data = tmp_path / "data.json"
    data.write_text("[]")
    of = recipe_from_dict(settings(tmp_path / "run") | {"data": {"source": str(data)}})
    with pytest.raises(RoutingExpertsError):
        quiet_run(of)
    assert quiet_run(recipe(tmp_path / "run")).folder.is_dir()


def test_a_run_of_another_format_is_refused(tmp_path):
    quiet_run(recipe(tmp_path))
    noted = json.loads((tmp_path / "run.json").read_text())
    assert noted.pop("format") == 1
    del noted["facts"]  # as earlier versions wrote it
    (tmp_path / "run.json").write_text(json.dumps(noted))
    assert quiet_run(recipe(tmp_path)).folder.is_dir()
    (tmp_path / "run.json").write_text(json.dumps(noted | {"format": 2}))
    with pytest.raises(TrainingError, match="format 2, this library reads 1") as told:
        quiet_run(recipe(tmp_path))
    assert "does not say which recipe" not in str(told.value)


def test_a_model_inside_the_output_is_refused_before_anything_is_removed(tmp_path):
    """Guards the model that a run starts from against the run's own --restart."""
    quiet_run(recipe(tmp_path / "run"))
    inside = replace(recipe(tmp_path / "run"), model=str(tmp_path / "run" / "model"), random_init=False)
    with pytest.raises(ConfigError, match="lies inside output"):
        quiet_run(inside, restart=True)
    assert from_pretrained(tmp_path / "run" / "model") is not None


def test_training_on_from_a_routed_model(tmp_path):
    """Guards another run's recipe against the settings that the folder brings: layers must fit, calibration goes."""
    first = quiet_run(recipe(tmp_path / "first"))
    with_budget(with_bias(first.model, 3.0), ((0.0, 4.0), (0.1, 2.0))).save_pretrained(first.folder)
    on = replace(recipe(tmp_path / "on"), model=str(first.folder), random_init=False)
    on = replace(on, roe=replace(on.roe, target_skip_ratio=0.4))
    config = quiet_run(on).model.roe_config
    assert (config.keep_bias, config.budget, config.target_skip_ratio) == (0.0, (), 0.4)
    assert config.markers == first.model.roe_config.markers
    paper = replace(on, output=str(tmp_path / "paper"), roe=RoEConfig.preset("paper"))
    with pytest.raises(ConfigError, match="routed layers: the model was made with"):
        quiet_run(paper)


def test_a_full_disk_at_the_last_save_keeps_the_checkpoint(tmp_path, monkeypatch):
    """Guards a finished training whose model finds no room: one message, and the same command writes it."""
    of = recipe(tmp_path / "run", steps=6, save_steps=1)
    real = checkpoint_module.save_file

    def full(tensors, path, **kwargs):
        if "checkpoint" not in str(path.parent.name):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", full)
        with pytest.raises(
            TrainingError,
            match=r"model could not be written \(I/O.*No space left.*checkpoint-\d is whole.*same command",
        ):
            quiet_run(of)
    assert quiet_run(of).folder.is_dir()
    stage = {"name": "all", "until": 1.0, "trains": ["adapters", "routers", "decoder"], "gate": "learned"}
    alone = recipe_from_dict(settings(tmp_path / "alone") | {"stages": [stage]})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", full)
        with pytest.raises(TrainingError, match=r"No space left.*checkpoint-3 is whole.*same command"):
            quiet_run(alone)  # one stage, and nothing saved on the way: its end is
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", full)
        with pytest.raises(CheckpointError, match="could not be written"):
            from_pretrained(tmp_path / "run" / "model").save_pretrained(tmp_path / "copy")
    assert not list(tmp_path.glob(".copy.*"))


def test_restarting_deletes_nothing_that_no_run_made(tmp_path):
    """Guards other people's folders of the same names; a clearing that was cut short can be repeated."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(TrainingError, match=r"has model/ but no run\.json that says"):
        quiet_run(recipe(tmp_path), restart=True)
    with pytest.raises(TrainingError, match=r"has model/ but no run\.json that says"):
        quiet_run(recipe(tmp_path))
    assert (tmp_path / "model" / "mine.txt").exists()
    quiet_run(recipe(tmp_path / "run"))
    (tmp_path / "run" / "run.json").write_text("cut")
    assert quiet_run(recipe(tmp_path / "run"), restart=True).folder.is_dir()


def test_a_change_that_would_make_another_run_is_never_accepted(tmp_path):
    """Guards ``--accept-changes``: it is for records and rates alone, and for runs that are not finished."""
    quiet_run(recipe(tmp_path))
    with pytest.raises(TrainingError, match="learning_rate"):
        quiet_run(recipe(tmp_path, learning_rate=2e-3), accept=True)
    noted = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(noted | {"finished": False}))
    with pytest.raises(TrainingError, match=r"training\.seed: 0 there, 7 asked for.*\(--restart\)\.$"):
        quiet_run(recipe(tmp_path, seed=7), accept=True)


def test_restarting_takes_back_what_was_measured(tmp_path):
    """Guards reports: scores of a run that was thrown away must not pass for the new one's."""
    quiet_run(recipe(tmp_path))
    (tmp_path / "results.json").write_text("{}")
    quiet_run(recipe(tmp_path), restart=True)
    assert not (tmp_path / "results.json").exists()


def test_what_a_killed_restart_left_is_nobody_s(tmp_path, monkeypatch):
    """Guards the next run, and reports: neither scores nor curves nor weights of the one that was thrown away stay."""
    quiet_run(recipe(tmp_path))
    (tmp_path / "results.json").write_text("{}")
    folder = RunFolder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(folder_module.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quiet_run(recipe(tmp_path), restart=True)
    assert folder.recipe is None
    assert not folder.is_finished
    other = recipe(tmp_path, learning_rate=2e-3)
    folder.check_recipe(recipe_values(other))
    old = set((tmp_path / "tensorboard").iterdir())
    assert quiet_run(other).folder.is_dir()
    assert not (tmp_path / "results.json").exists()
    assert not old & set((tmp_path / "tensorboard").iterdir())


def test_a_change_that_is_refused_is_not_noted(tmp_path):
    """Guards the folder's note: a rate that might be accepted beside a fact that never is."""
    quiet_run(recipe(tmp_path))
    noted = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(noted | {"finished": False}))
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(TrainingError, match=r"records_a_step: 8 there, 16 asked for; training\.learning_rate"):
        quiet_run(recipe(tmp_path, learning_rate=2e-3, batch_size=16), accept=True)
    assert (tmp_path / "run.json").read_bytes() == before


def test_settings_that_change_no_weight_may_differ(tmp_path):
    first = recipe(tmp_path / "a")
    quiet_run(first)
    (tmp_path / "a").rename(tmp_path / "b")
    divided = replace(first.training, save_steps=1, batch_size=4, accumulation=2)
    moved = replace(first, output=str(tmp_path / "b"), training=divided)
    assert quiet_run(moved).folder == tmp_path / "b" / "model"


def test_a_damaged_note_of_the_recipe_is_named(tmp_path):
    quiet_run(recipe(tmp_path))
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(TrainingError, match=r"run.json does not say which recipe"):
        quiet_run(recipe(tmp_path))
    (tmp_path / "run.json").unlink()
    with pytest.raises(TrainingError, match=r"has checkpoints/, tensorboard/, model/ but no run\.json"):
        quiet_run(recipe(tmp_path))


def test_a_full_disk_loses_nothing_that_was_whole(tmp_path, monkeypatch):
    """Guards a save that fails half way: its folder goes, the one before stays, and the run goes on from it."""
    whole = quiet_run(recipe(tmp_path / "whole", steps=6))
    real = trainer.RoETrainer._save_optimizer_and_scheduler

    def fails(self, output_dir):
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, output_dir)

    cut = recipe(tmp_path / "cut", steps=6, save_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.RoETrainer, "_save_optimizer_and_scheduler", fails)
        with pytest.raises(TrainingError, match=r"No space left.*checkpoint-3 is whole and stays.*same command"):
            quiet_run(cut)
    assert last_complete(RunFolder(cut.output).checkpoints) == tmp_path / "cut" / "checkpoints" / "checkpoint-3"
    assert not (tmp_path / "cut" / "checkpoints" / "checkpoint-4").exists()
    resumed = weights(quiet_run(cut).model)
    assert all(value.equal(resumed[name]) for name, value in weights(whole.model).items())


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    """The same on a small file system, through the command line."""
    with small_disk(tmp_path / "disk", "30m") as disk:
        of = recipe(disk / "run", steps=6, save_steps=1)
        with pytest.raises(TrainingError, match="could not be written"):
            quiet_run(of)
        whole = last_complete(RunFolder(of.output).checkpoints)
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        assert quiet_run(of).folder.is_dir()
        assert from_pretrained(disk / "run" / "model") is not None
        assert whole is None or int(whole.name.split("-")[1]) < 6


@pytest.mark.slow
def test_a_place_that_is_really_read_only(tmp_path):
    """Guards training and evaluation on a mounted archive: one line each, and the scores go where they were sent."""
    with small_disk(tmp_path / "disk", "200m") as disk:
        quiet_run(recipe(disk / "run"))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        roe = [sys.executable, "-W", "ignore", "-c", "from routing_experts.cli import main; main()"]
        new = subprocess.run([*roe, "train", "digits", "--output", str(disk / "new")], capture_output=True, text=True)
        assert new.returncode == 1
        assert "Traceback" not in new.stderr
        assert "cannot be written to" in " ".join(new.stderr.split())
        scores = tmp_path / "scores.json"
        asked = [*roe, "evaluate", str(disk / "run"), "--questions", "16", "--no-speed", "--json", str(scores)]
        done = subprocess.run(asked, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(scores.read_text())["questions"] == 16


def test_a_folder_that_cannot_be_made_is_an_error_of_one_line(tmp_path):
    """Guards the command line: a path through a file, as a read-only place, is named without a traceback."""
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-W", "ignore", "-c", "from routing_experts.cli import main; main()", "train", "digits"]
    ran = subprocess.run([*command, "--output", str(tmp_path / "file" / "run")], capture_output=True, text=True)
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert "Part of the path is a file" in ran.stderr


def test_a_setting_that_came_later_and_says_what_was_always_done_is_no_change(tmp_path):
    """Guards runs of the version before: a new setting at its old meaning must not keep them from going on."""
    plain = recipe_values(recipe(tmp_path))
    older = json.loads(json.dumps(plain))
    del older["roe"]["router_input"]
    folder = RunFolder(tmp_path / "run")
    folder.begin(older)
    checkpoint(folder.checkpoints, 1)
    mark_complete(folder.checkpoints / "checkpoint-1", {"step": 1})
    folder.begin(plain)
    plain["roe"]["router_input"] = "pooled"
    with pytest.raises(TrainingError, match="router_input: None there, 'pooled' asked for"):
        folder.begin(plain)
