"""Studies: what each arm is trained as, and which plans are refused."""

from pathlib import Path

import pytest

from routing_experts.errors import ConfigError
from routing_experts.studies.outcome import settings_of
from routing_experts.studies.plan import STUDIES, Study, load_study
from routing_experts.training.recipe import load_recipe, recipe_values
from routing_experts.training.settings import build

PLAN = {
    "recipe": "digits",
    "rates": [0.25, 0.3333],
    "seeds": [0, 1],
    "set": {"training.steps": 12},
    "arms": {
        "routed": {},
        "static": {"control": "most_skipped"},
        "least": {"control": "least_important", "rates": [0.25]},
        "random": {"control": "random"},
        "dense": {"control": "dense"},
        "soft": {"set": {"roe.gate": "softmax"}},
        "exit": {"control": "early_exit"},
        "pruned": {"control": "pruning", "of": "dense"},
    },
}


def plan(**changes) -> Study:
    return build(Study, PLAN | changes, "")


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_makes_recipes(path: Path):
    study = load_study(path.stem)
    for name, arm in study.arms.items():
        if arm.control == "pruning":  # nothing is trained for it
            continue
        for rate in study.rates_of(arm):
            study.arm_recipe(name, rate, 0, Path("x"), 12, layers=[5, 6, 7])


def test_arms_differ_in_what_they_are_and_in_nothing_else():
    """Guards equal cost: data, steps, stages and learning rates are those of the recipe for every arm."""
    study = plan(margin=0.05)
    shared = recipe_values(load_recipe("digits", {"training.steps": 12, "training.seed": 1}))
    for name in set(study.arms) - {"pruned"}:
        recipe = study.arm_recipe(name, 0.25, 1, Path("x"), 12, layers=[7, 5, 6])
        values = recipe_values(recipe)
        assert values["data"] == shared["data"]
        assert values["training"] == shared["training"]
        assert (values["stages"] == shared["stages"]) == (name != "dense")
    target = 0.25 * 12 / 11
    assert study.arm_recipe("routed", 0.25, 0, Path("x"), 12).roe.target_skip_ratio == pytest.approx(target + 0.05)
    drawn = study.arm_recipe("random", 0.25, 0, Path("x"), 12).roe
    assert (drawn.gate, drawn.target_skip_ratio) == ("random", pytest.approx(target))
    fixed = study.arm_recipe("static", 0.25, 0, Path("x"), 12, layers=[7, 5, 6]).roe
    assert (fixed.gate, fixed.routed_layers) == ("static", (5, 6, 7))
    assert study.arm_recipe("soft", 0.25, 0, Path("x"), 12).roe.gate == "softmax"


def test_a_target_s_margin_ends_where_targets_do():
    """The rate of a study's last half layer can be asked for; what lies beyond is refused."""
    study = plan(margin=0.05, rates=[0.25, 0.4583, 0.5])
    assert study.arm_recipe("routed", 0.4583, 0, Path("x"), 12).roe.target_skip_ratio == 0.5
    with pytest.raises(ConfigError, match="cannot skip more"):
        study.arm_recipe("routed", 0.5, 0, Path("x"), 12)


def test_a_dense_arm_has_no_rate_and_others_may_have_fewer():
    study = plan()
    assert study.rates_of(study.arms["dense"]) == (0.0,)
    assert study.rates_of(study.arms["least"]) == (0.25,)
    assert study.rates_of(study.arms["routed"]) == (0.25, 0.3333)


def test_fixed_layers_may_have_rates_of_their_own_and_look_at_the_nearest():
    study = plan(rates=[0.1, 0.3], arms={"routed": {}, "s": {"control": "most_skipped", "rates": [0.0833, 0.2, 0.25]}})
    arm = study.arms["s"]
    assert [study.source_rate(arm, rate) for rate in study.rates_of(arm)] == [0.1, 0.3, 0.3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "best"}, "reference 'best' is no arm"),
        ({"arms": {"routed": {"control": "clever"}}}, "control 'clever'"),
        ({"arms": {"routed": {}, "s": {"control": "most_skipped", "of": "r"}}}, "takes its layers from 'r'"),
        (
            {"arms": {"routed": {}, "s": {"control": "most_skipped", "of": "d"}, "d": {"control": "dense"}}},
            "no routed arm",
        ),
        ({"arms": {"routed": {}, "p": {"control": "pruning"}}}, "takes its model from 'routed', which is no dense arm"),
        ({"reference": "dense"}, "reference 'dense' is a control"),
        ({"arms": {"routed": {"rates": [0.5]}}}, r"rates \[0.5\] that the study lacks"),
        (
            {"arms": {"routed": {}, "x": {"claim": "nice"}}},
            "claim 'nice': it must be one of worse, as_good, or left out",
        ),
        ({"armss": {}}, "Did you mean arms"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(**changes)


def test_an_unknown_study_is_told_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean digits"):
        load_study("digit")


def test_a_run_s_settings_tell_a_step_s_records_whatever_its_batches():
    """Guards records of one study over versions and machines: how a step is divided tells no arms apart."""
    whole, divided, other = (
        settings_of(load_recipe("digits", changes))
        for changes in (
            {"training.batch_size": 64, "training.accumulation": 1},
            {"training.batch_size": 8, "training.accumulation": 8},
            {"training.batch_size": 32, "training.accumulation": 1},
        )
    )
    assert whole == divided
    assert not {"training.batch_size", "training.accumulation"} & whole.keys()
    assert other == whole | {"training.records_a_step": 32}
