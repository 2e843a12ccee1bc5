"""Recipes: what ships is sound, and a mistake in one is found before anything is loaded, naming the setting."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from routing_experts.cli.train import parse_settings
from routing_experts.errors import ConfigError, MissingExtraError
from routing_experts.training import checks, run
from routing_experts.training.recipe import (
    SHIPPED,
    LoraSettings,
    Recipe,
    TrainingSettings,
    load_recipe,
    recipe_from_dict,
)
from routing_experts.training.run import stage_end
from routing_experts.training.schedule import DENSE_STAGE, THREE_STAGES

GOOD: dict[str, Any] = {
    "model": "pocket",
    "output": "runs/x",
    "data": {"source": "digits", "records": 32},
    "training": {"steps": 10},
}
SHIPPED_NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    return path


def test_some_recipes_ship():
    """Guards the test below against an empty list."""
    assert {"quickstart", "pocket"} <= set(SHIPPED_NAMES)


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_every_shipped_recipe_is_sound(name):
    """Guards what users start from: it parses by name, and every stage gets a step."""
    recipe = load_recipe(name)
    ends = [stage_end(recipe, stage) for stage in recipe.stages]
    assert ends == sorted(set(ends))
    assert ends[0] > 0


def test_defaults_are_the_three_stages():
    """Guards the shortest recipe."""
    recipe = recipe_from_dict(GOOD)
    assert recipe.stages == THREE_STAGES
    assert recipe.is_routed
    assert recipe.lora is None


def test_values_reach_their_settings():
    """Guards every section, lists as tuples, and the preset that own settings are laid over."""
    recipe = recipe_from_dict(
        GOOD
        | {
            "roe": {"preset": "paper", "routed_layers": [1, 2], "target_skip_ratio": 0.2},
            "annealing": {"temperature": 10, "temperature_decay": 0.95},
            "lora": {"rank": 4, "targets": ["q_proj"]},
            "data": {"records": 8, "digits": {"tasks": ["sum"], "max_turns": 1}},
        }
    )
    assert (recipe.roe.gate, recipe.roe.routed_layers, recipe.roe.target_skip_ratio) == ("softmax", (1, 2), 0.2)
    assert recipe.annealing.temperature == 10.0
    assert recipe.lora == LoraSettings(rank=4, targets=("q_proj",))
    assert recipe.data.digits.tasks == ("sum",)


def test_stages_by_name_and_by_list():
    """Guards both ways to write them."""
    assert recipe_from_dict(GOOD | {"stages": "dense"}).stages == DENSE_STAGE
    listed = [{"name": "only", "until": 1, "trains": ["routers"], "gate": "learned", "biased": True}]
    (stage,) = recipe_from_dict(GOOD | {"stages": listed}).stages
    assert (stage.trains, stage.until, stage.biased) == (("routers",), 1.0, True)


@pytest.mark.parametrize("text", ["4e-4", "4.0e-4", "0.0004", "4E-4"])
def test_numbers_that_yaml_reads_as_text_are_numbers(text, tmp_path):
    """Guards ``4e-4``, which YAML 1.1 takes for a text because it has no point."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: pocket\noutput: x\ndata: {{records: 8}}\ntraining: {{learning_rate: {text}}}\n")
    assert load_recipe(path).training.learning_rate == 4e-4
    assert load_recipe(path, parse_settings([f"training.weight_decay={text}"])).training.weight_decay == 4e-4
    assert load_recipe(path, {"roe.sparsity_loss_coef": text}).roe.sparsity_loss_coef == 4e-4


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("training.learning_rate", "fast", "a number"),
        ("training.learning_rate", True, "a number"),
        ("training.learning_rate", [1e-3], "a number"),
        ("training.learning_rate", "nan", "a finite number"),
        ("training.steps", "many", "a whole number"),
        ("training.steps", 2.5, "a whole number"),
        ("training.steps", None, "a whole number"),
        ("training.seed", False, "a whole number"),
        ("training.gradient_checkpointing", "no thanks", "true or false"),
        ("training.gradient_checkpointing", 1, "true or false"),
        ("training.precision", 16, "a text"),
        ("training.sharding", {"zero": 3}, "a text"),
        ("training", "fast", "expected settings"),
        ("training", [1], "expected settings"),
        ("data.records", "all", "a whole number"),
        ("data.digits", 4, "expected settings"),
        ("data.digits.tasks", "sum", "a list"),
        ("data.digits.tasks", [1], "a text"),
        ("data.digits.text_share", "half", "a number"),
        ("roe", "paper", "expected settings"),
        ("roe.routed_layers", 3, "a list"),
        ("roe.routed_layers", ["one"], "a whole number"),
        ("roe.target_skip_ratio", "third", "a number"),
        ("roe.preset", 1, "preset"),
        ("lora", 8, "expected settings"),
        ("lora.rank", "low", "a whole number"),
        ("annealing.every", "often", "a number"),
        ("stages", 3, "stages"),
        ("stages", [3], "expected settings"),
        ("model", 7, "a text"),
        ("output", None, "a text"),
        ("random_init", "maybe", "true or false"),
    ],
)
def test_values_of_a_wrong_kind_are_refused(setting, value, expected, tmp_path):
    """Guards every kind of field: the message names the file and the setting, and says what it takes."""
    with pytest.raises(ConfigError, match=expected) as raised:
        load_recipe(written(tmp_path), {setting: value})
    assert "recipe.yaml" in str(raised.value)
    assert setting.split(".")[-1] in str(raised.value)


@pytest.mark.parametrize(
    "setting",
    ["stepps", "training.stepps", "data.sources", "data.digits.digit", "roe.skip", "lora.r", "annealing.tau"],
)
def test_unknown_settings_are_refused(setting, tmp_path):
    """Guards against a slip that would be ignored: the message names it and lists what there is."""
    with pytest.raises(ConfigError, match="unknown settings") as raised:
        load_recipe(written(tmp_path), {setting: 1})
    assert setting.split(".")[-1] in str(raised.value)


@pytest.mark.parametrize("setting", ["model.name", "training.steps.more", "stages.0.until", ".steps", "training."])
def test_paths_that_lead_through_a_value_are_refused(setting, tmp_path):
    """Guards ``--set``: what has no parts cannot be given one."""
    with pytest.raises(ConfigError):
        load_recipe(written(tmp_path, stages="three"), {setting: 1})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stages": "four"}, "named ones are three, .*pretraining"),
        ({"stages": []}, "fill the run"),
        ({"stages": [{"name": "a", "until": 0.5, "trains": ["adapters"], "gate": "random"}]}, "fill the run"),
        ({"stages": [{"name": "a", "until": 1.0}]}, "gate, trains|trains, gate"),
        ({"data": {"source": "digits"}}, "data.records is missing"),
        ({"data": {"records": 8, "prompt_format": "chatml"}}, "prompt_format='chatml'.*chat_template, vicuna_v1"),
        ({"data": {"records": 0}}, "data.records"),
        ({"data": {"records": -4}}, "data.records"),
        ({"data": {"records": 8, "max_length": 0}}, "data.max_length"),
        ({"data": {"records": 8, "digits": {"split": "test"}}}, "split 'test'"),
        ({"training": {"steps": 0}}, "training.steps=0"),
        ({"training": {"batch_size": -1}}, "training.batch_size=-1"),
        ({"training": {"lr_schedule": "linear"}}, "training.lr_schedule='linear'"),
        ({"training": {"precision": "fp8"}}, "training.precision='fp8'"),
        ({"training": {"warmup_share": 1.0}}, "training.warmup_share=1.0"),
        ({"training": {"save_steps": 0}}, "training.save_steps=0"),
        ({"training": {"learning_rate": -1e-3}}, "training.learning_rate=-0.001"),
        ({"roe": {"preset": "best"}}, "preset 'best'"),
        ({"roe": {"gate": "soft"}}, "gate='soft'"),
        ({"lora": {"rank": 0}}, "lora.rank=0"),
        ({"lora": {"alpha": 0}}, "lora.alpha=0"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout=1.0"),
        ({"lora": {"targets": []}}, "lora.targets is empty"),
        ({"training": {"eval_steps": 0}}, "training.eval_steps=0"),
        ({"training": {"eval_steps": 5}, "data": {"records": 8, "held_out": 8}}, "none would be left"),
        ({"training": {"distill_coef": -1}}, "training.distill_coef=-1"),
        ({"roe": {"prompt_format": "vicuna_v1"}}, "Set data.prompt_format instead"),
        ({"roe": {"keep_bias": 1.0}}, "the library fills it in"),
        ({"roe": {"routed_layers": [5], "num_unrouted_layers": 2}}, "Give one"),
        ({"data": {"records": 8, "images": "pictures"}}, "draws its own pictures"),
    ],
)
def test_settings_that_contradict_or_leave_their_range_are_refused(changes, expected, tmp_path):
    """Guards a run of hours against a mistake that shows at its end."""
    with pytest.raises(ConfigError, match=expected):
        load_recipe(written(tmp_path, **changes))


@pytest.mark.parametrize("name", ["model", "output"])
def test_missing_settings_are_named(name, tmp_path):
    """Guards the two that have no default."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in GOOD.items() if key != name}))
    with pytest.raises(ConfigError, match=f"{name}.*missing"):
        load_recipe(path)


def test_a_missing_file_is_refused(tmp_path):
    """Guards a slip in the name: the message lists what ships."""
    for name in (tmp_path / "none.yaml", "quickstarrt", "quickstart-1.5", tmp_path):
        with pytest.raises(ConfigError, match="quickstart"):
            load_recipe(name)


@pytest.mark.parametrize("content", [b"model: [", b"a: b: c", b"\xff\xfe\x00", b"", b"- 1\n", b"just words", b"7"])
def test_what_is_no_recipe_is_refused(content, tmp_path):
    """Guards against torn and foreign files."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        load_recipe(path)


@pytest.mark.parametrize("pair", ["training.steps", "=3", "training.steps: 3", "a=[1"])
def test_set_needs_a_name_and_a_value(pair):
    """Guards ``--set``."""
    with pytest.raises(ConfigError, match="--set"):
        parse_settings([pair])


def test_a_recipe_made_in_python_is_checked_too():
    """Guards users of the Python interface: the same rules, wherever the values come from."""
    with pytest.raises(ConfigError, match=r"data\.records"):
        Recipe(model="pocket", output="x")


def test_where_curves_go_is_checked_before_anything_is_loaded(tmp_path, monkeypatch):
    """Guards hours of training: a reporter that is not known, or not installed, is named first."""
    with pytest.raises(ConfigError, match=r"report_to=\['excel'\].*wandb"):
        TrainingSettings(report_to=("tensorboard", "excel"))
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == "wandb" else name)
    of = load_recipe("digits", {"training.report_to": ["wandb"], "output": str(tmp_path / "run")})
    with pytest.raises(MissingExtraError, match="pip install wandb"):
        run.train(of)
    assert not (tmp_path / "run").exists()


def test_dialogues_of_a_step_say_how_many_batches_a_process_sums(tmp_path, monkeypatch):
    """Guards recipes that any number of processes trains alike, and the message where one cannot."""
    of = TrainingSettings(batch_size=4, records_a_step=96)
    assert [of.accumulation_on(processes) for processes in (1, 2, 3, 8)] == [24, 12, 8, 3]
    assert TrainingSettings(accumulation=3).accumulation_on(5) == 3
    with pytest.raises(ConfigError, match="Give one of them"):
        TrainingSettings(records_a_step=96, accumulation=2)
    monkeypatch.setattr(checks, "num_processes", lambda: 5)
    told = r"records_a_step=96 on 5 processes of batch_size=4: they take 20.*Start 1, 2, 3, 4, 6, 8, 12, 24 processes"
    with pytest.raises(ConfigError, match=told):
        run.train(load_recipe(written(tmp_path, output=str(tmp_path / "run"), training=asdict(of))))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "missing", "told"),
    [
        ({"training": {"steps": 10, "sharding": "zero3_offload"}}, "deepspeed", r"routing-experts\[deepspeed\]"),
        ({"lora": {}}, "peft", r"routing-experts\[lora\]"),
        ({"lora": {}, "quantization": "4bit"}, "bitsandbytes", r"routing-experts\[quant\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missing_extra_is_told_before_anything_is_loaded(changes, missing, told, tmp_path, monkeypatch):
    """Guards minutes of loading: the message says which pip command mends it."""
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(run, "make_model", lambda *loads: pytest.fail("a model was loaded"))
    with pytest.raises(MissingExtraError, match=told):
        run.train(load_recipe(written(tmp_path, output=str(tmp_path / "run"), **changes)))
    assert not (tmp_path / "run").exists()
