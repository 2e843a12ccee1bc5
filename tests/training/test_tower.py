"""Towers are tuned where the checkpoint says so: LLaVA-HR's are, CLIP's beside LLaVA-1.5 is not."""

import json

import pytest
import torch
from runs import quiet_run, recipe, settings, weights

from routing_experts.errors import TrainingError
from routing_experts.models.families import family_of
from routing_experts.models.load import load_base
from routing_experts.pocket import build_hr
from routing_experts.training.memory import LiveBytes, estimate
from routing_experts.training.parameters import group_of
from routing_experts.training.recipe import NAMED_STAGES, recipe_from_dict
from routing_experts.training.tower import TOWER, heed_tower


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hr")
    build_hr.main(folder)
    return folder


def with_freezing(base, folder, freeze):
    """The same base with another word on its tower."""
    model = load_base(base)
    model.config.vision_config.freeze_vision = freeze
    model.save_pretrained(folder)
    build_hr.build_processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("freeze", [False, True], ids=["tuned", "frozen"])
def test_a_run_changes_the_tower_if_the_checkpoint_says_so(base, tmp_path, freeze):
    """Guards training end to end: adapter warm-up leaves the tower alone, instruction tuning heeds the checkpoint."""
    source = with_freezing(base, tmp_path / "base", freeze)
    told = settings(tmp_path / "run", steps=8) | {"model": str(source), "random_init": False}
    told["data"] = {"source": "digits", "records": 32, "digits": {"cell": build_hr.CELL, "text_share": 0.2}}
    before = weights(load_base(source))
    trained = quiet_run(recipe_from_dict(told))
    after = weights(trained.model)
    changed = {group_of(name) for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"decoder", "projector"} | ({"vision"} if not freeze else set())
    vision = [name for name in before if group_of(name) == "vision"]
    if not freeze:
        assert [name for name in vision if torch.equal(before[name], after[name])] == []
    config = json.loads((trained.folder / "config.json").read_text())
    assert config["model_type"] == "llava_hr"
    assert config["vision_config"]["freeze_vision"] is freeze


def test_stages_that_a_recipe_writes_out_stay(base, tmp_path):
    """Guards the recipe's own word, and that no other family's tower is touched."""
    config = load_base(base).config
    for name, stages in NAMED_STAGES.items():
        named = recipe_from_dict(settings(tmp_path / "run") | {"stages": name})
        heeded = heed_tower(named, config)
        for stage, heard in zip(stages, heeded.stages, strict=True):
            assert ("vision" in heard.trains) == ("projector" in stage.trains)
            assert set(heard.trains) - {"vision"} == set(stage.trains) - {"vision"}
    own = [{"name": "only", "until": 1.0, "trains": ["decoder", "projector"], "gate": "none"}]
    written = recipe_from_dict(settings(tmp_path / "run") | {"stages": own})
    assert heed_tower(written, config) is written
    pocket = load_base("pocket")
    assert not family_of(pocket).tunes_tower(pocket.config)
    assert heed_tower(recipe(tmp_path / "run"), pocket.config) == recipe(tmp_path / "run")


def test_the_estimate_counts_the_tower(base, tmp_path):
    """Guards ``--estimate``: what instruction tuning trains is what it counts, and what the tower holds meanwhile."""
    told = settings(tmp_path / "run") | {"model": str(base)}
    tuned, frozen = (
        {
            row.stage: row
            for row in estimate(recipe_from_dict(told | {"model": str(source)}), tokens=64)
            if row.method == "full"
        }
        for source in (base, with_freezing(base, tmp_path / "frozen", True))
    )
    model = load_base(base)
    tower = sum(p.numel() for name, p in model.named_parameters() if group_of(name) == "vision")
    assert tuned["instruction_tuning"].trained - frozen["instruction_tuning"].trained == tower
    assert tuned["adapter_warmup"].trained == frozen["adapter_warmup"].trained
    held = tuned["instruction_tuning"].activations - frozen["instruction_tuning"].activations
    side = model.config.vision_config.input_image_size
    pixels = torch.zeros(recipe_from_dict(told).training.batch_size, 3, side, side)
    with LiveBytes(model.parameters()) as live:
        features = model.train().model.vision_tower(pixels).last_hidden_state
        now = live.now
    assert features.requires_grad
    assert 0.8 * now < held < 1.5 * now
    assert tuned["adapter_warmup"].activations == frozen["adapter_warmup"].activations


def test_recomputing_the_towers_gives_the_same_gradients_for_less_memory(base):
    """Guards gradient checkpointing of the ConvNeXt, which holds most of what the tower holds."""
    model = load_base(base).train()
    tower, side = model.model.vision_tower, model.config.vision_config.input_image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    found, held = [], []
    for recomputes in (False, True):
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with LiveBytes(model.parameters()) as live:
            loss = tower(pixels).last_hidden_state.square().mean()
            held.append(live.now)
        loss.backward()
        found.append({name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(value, found[1][name], atol=1e-7) for name, value in found[0].items())
    assert held[1] < 0.6 * held[0]


def test_a_tower_that_is_another_s_to_tune_is_no_continuation(base, tmp_path):
    """Guards run.json: a checkpoint whose word on its tower changed belongs to another run."""
    source = with_freezing(base, tmp_path / "base", False)
    told = settings(tmp_path / "run", steps=4, save_steps=2) | {"model": str(source), "random_init": False}
    quiet_run(recipe_from_dict(told))
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["facts"]
    assert facts[TOWER] is True
    (tmp_path / "run" / "model" / "roe_config.json").unlink()
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(state | {"finished": False}))
    with_freezing(base, source, True)
    with pytest.raises(TrainingError, match=TOWER):
        quiet_run(recipe_from_dict(told))


def test_families_of_one_s_own_train_as_before(base, tmp_path):
    """Guards models whose type nobody registered: dense training does not need to know them."""
    config = load_base(base).config
    config.model_type = "nobody's"
    named = recipe_from_dict(settings(tmp_path / "run") | {"stages": "dense"})
    assert heed_tower(named, config) is named
