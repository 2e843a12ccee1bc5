"""Control gates: fixed and random routes in training, and what their models do when asked."""

import pytest
import torch
from runs import log, quiet_run, settings
from transformers import set_seed

from routing_experts.data.digits import DigitsTask
from routing_experts.errors import ConfigError, RouteError
from routing_experts.evaluation.questions import digits_questions, records_of
from routing_experts.inference.generate import answer_batch, prompt_batches
from routing_experts.models.load import from_pretrained, load_base, load_processor
from routing_experts.models.options import RoutingOptions
from routing_experts.training.recipe import recipe_from_dict


def control(folder, steps=3, **roe):
    return recipe_from_dict(settings(folder, steps) | {"roe": {"adapter_init": "xavier"} | roe})


@pytest.fixture
def batch():
    return next(prompt_batches(load_base("pocket"), load_processor("pocket"), records_of(digits_questions(4, 0)), 4))


def test_a_static_model_skips_its_layers_for_everyone_trained_and_asked(tmp_path, batch):
    """Guards the strongest rival: in every stage, and from the saved folder without further options."""
    trained = quiet_run(control(tmp_path, gate="static", routed_layers=[3, 7]))
    expected = [float(layer in (3, 7)) for layer in range(12)]
    assert [line.layer_skip_rates for line in log(tmp_path)] == [expected] * 3
    loaded = from_pretrained(trained.folder)
    route = answer_batch(loaded, trained.processor, batch, max_new_tokens=1).routes
    assert (~route).float().mean(0).tolist() == expected
    all_kept = RoutingOptions(keep_bias=float("inf"))
    kept = answer_batch(loaded, trained.processor, batch, all_kept, max_new_tokens=1).routes
    assert bool(kept.all())


def test_a_static_model_s_skipped_layers_do_not_train_and_the_others_do(tmp_path):
    """Guards the shortcut: a path that nobody takes is not computed, so its layer keeps its weights."""
    recipe = control(tmp_path, steps=6, gate="static", routed_layers=[3])  # the last step has no learning rate
    set_seed(recipe.training.seed)
    before = load_base("pocket", random_init=True).get_decoder().layers
    after = quiet_run(recipe).model.get_decoder().layers
    assert torch.equal(before[3].mlp.up_proj.weight, after[3].mlp.up_proj.weight)
    assert not torch.equal(before[5].mlp.up_proj.weight, after[5].mlp.up_proj.weight)


def test_a_random_model_draws_in_every_stage_and_must_be_given_routes(tmp_path, batch):
    trained = quiet_run(control(tmp_path, gate="random", target_skip_ratio=0.5))
    for line in log(tmp_path):
        assert line.skip_rate == pytest.approx(0.5 * 11 / 12, abs=0.15)
        assert len(set(line.layer_skip_rates)) > 3
    with pytest.raises(RouteError, match="routers were never trained"):
        answer_batch(trained.model, trained.processor, batch, max_new_tokens=1)
    route = torch.ones(12, dtype=torch.bool)
    route[4] = False
    forced = RoutingOptions(route=route)
    taken = answer_batch(trained.model, trained.processor, batch, forced, max_new_tokens=1).routes
    assert taken.tolist() == [route.tolist()] * 4


def test_static_without_layers_is_contradictory(tmp_path):
    with pytest.raises(ConfigError, match="must be named"):
        control(tmp_path, gate="static")


def test_digits_of_controls_are_the_training_split(tmp_path):
    assert control(tmp_path, gate="random").data.digits == DigitsTask(split="train")
