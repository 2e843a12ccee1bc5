"""The recipes for real models, each on a tiny random model of its family, with pictures in LLaVA's layout.

Only what belongs to the machine and the data is changed; gates, stages, schedules and low-rank updates are as shipped.
"""

import json
from pathlib import Path

import pytest
from PIL import Image
from runs import quiet_run

from routing_experts.data.records import Record, Turn
from routing_experts.inference.generate import answer
from routing_experts.models.convert import is_routed
from routing_experts.models.load import from_pretrained, load_processor
from routing_experts.pocket import build_hr
from routing_experts.training import run
from routing_experts.training.parameters import group_of
from routing_experts.training.recipe import SHIPPED, load_recipe
from tiny_families import FAMILIES
from tiny_processors import PROCESSORS

FAMILY_OF = {
    "llava-1.5-7b": "llava",
    "llava-1.5-7b-lora": "llava",
    "llava-hr-7b": "llava_hr",
    "qwen2.5-vl-7b": "qwen2_5_vl",
    "smolvlm": "smolvlm",
}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES = ((40, 30), (16, 60), (24, 24), (33, 70))


@pytest.fixture
def data(tmp_path):
    """A file of six dialogues: pictures of several sizes, two in one dialogue, none in another."""
    folder = tmp_path / "images" / "coco"
    folder.mkdir(parents=True)
    for number, size in enumerate(SIZES):
        Image.new("RGB", size, (200 - 40 * number, 30 * number, 90)).save(folder / f"{number}.png")
    turn = ({"from": "human", "value": "And now?"}, {"from": "gpt", "value": "No."})
    dialogues = []
    for number in range(6):
        images = [f"coco/{number % 4}.png"] * (2 if number == 1 else 1)
        question = "<image>\n" * len(images) + "What is it?"
        told = [{"from": "human", "value": question}, {"from": "gpt", "value": "A kite."}, *turn * (number % 2)]
        dialogues.append({"id": str(number), "image": images, "conversations": told})
    dialogues[4] = {"id": "4", "conversations": list(turn)}
    (tmp_path / "data.json").write_text(json.dumps(dialogues))
    return {"data.source": str(tmp_path / "data.json"), "data.images": str(tmp_path / "images"), "data.records": 6}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Where a family's recipe starts from: the pocket model, or a folder and the processor that goes with it."""

    def make(family):
        if family == "llava":
            return {"model": "pocket", "random_init": True}, load_processor("pocket")
        if family == "llava_hr":
            build_hr.main(tmp_path / "base")
            return {"model": str(tmp_path / "base"), "random_init": True}, load_processor(tmp_path / "base")
        processor = PROCESSORS[family](monkeypatch)
        vocabulary = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 1024}
        model = FAMILIES[family](image=processor.image_token_id, **vocabulary)
        model.save_pretrained(tmp_path / "base")
        monkeypatch.setattr(run, "load_processor", lambda name: processor)
        return {"model": str(tmp_path / "base")}, processor

    return make


def test_every_recipe_for_a_real_model_is_here():
    """Guards the list above: a recipe that brings no data of its own is tried on its model's family."""
    named = {path.stem for path in SHIPPED.glob("*.yaml") if load_recipe(path).data.source != "digits"}
    assert named == set(FAMILY_OF)


@pytest.mark.parametrize("name", FAMILY_OF)
def test_a_shipped_recipe_trains_through_its_stages(name, data, start, watched, tmp_path):
    """Guards each of them end to end: a step a stage with gradients where the stage says, and a model that answers."""
    if "lora" in name:
        pytest.importorskip("peft")
    model, processor = start(FAMILY_OF[name])
    machine = {
        "training.steps": 3,
        "training.batch_size": 3,
        "training.records_a_step": 6,
        "training.precision": "fp32",
    }
    machine |= {"training.sharding": None, "output": str(tmp_path / "run")}
    recipe = load_recipe(name, model | data | machine)
    assert recipe.training.gradient_checkpointing
    quiet_run(recipe)
    assert [page.stage for page in watched()] == [stage.name for stage in recipe.stages]
    for page, stage in zip(watched(), recipe.stages, strict=True):
        expected = set(stage.trains) - ({"projector"} if recipe.lora else set())
        expected |= {"vision"} if FAMILY_OF[name] == "llava_hr" and "projector" in expected else set()
        assert {group_of(parameter) for parameter in page.with_gradient} == expected
    loaded = from_pretrained(tmp_path / "run" / "model")
    assert is_routed(loaded)
    assert loaded.roe_config.markers is not None
    asked = [
        Record("picture", (Turn("<image>\nWhat is it?", ""),), (Image.new("RGB", (30, 20)),)),
        Record("text", (Turn("And now?", ""),)),
    ]
    found = list(answer(loaded, processor, asked, prompt_format=recipe.data.prompt_format, max_new_tokens=2))
    assert [one.id for one in found] == ["picture", "text"]


@pytest.mark.parametrize("path", sorted(BENCHMARKS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_benchmarks_recipes_are_recipes(path):
    """Guards runs of hours against a setting that is no longer one."""
    assert load_recipe(str(path)).training.steps > 0
