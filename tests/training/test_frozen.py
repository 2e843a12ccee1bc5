"""Contract 9: in each stage exactly the stated parameters train; the others are untouched in every respect."""

from itertools import pairwise

import pytest
import torch
from runs import quiet_run, recipe, settings

from routing_experts.training.parameters import freeze_all_but, group_of, optimizer_groups
from routing_experts.training.recipe import recipe_from_dict
from routing_experts.training.schedule import PARAMETER_GROUPS, THREE_STAGES
from tiny import route_everywhere, tiny_llava


def test_each_stage_trains_its_groups_alone(watched, tmp_path):
    """Guards frozen weights bitwise, and against gradients and optimiser state that would cost memory."""
    quiet_run(recipe(tmp_path, steps=9))
    pages = watched()
    assert [page.stage for page in pages] == [stage.name for stage in THREE_STAGES]
    for stage, page in zip(THREE_STAGES, pages, strict=True):
        stated = {name for name in page.before if group_of(name) in stage.trains}
        changed = {name for name, tensor in page.before.items() if not torch.equal(tensor, page.after[name])}
        assert {group_of(name) for name in stated} == set(stage.trains)
        assert changed == stated
        assert page.with_gradient == stated
        assert page.with_state == stated
    for earlier, later in pairwise(pages):
        assert all(torch.equal(tensor, later.before[name]) for name, tensor in earlier.after.items())


def test_a_stage_may_release_a_group_again(watched, tmp_path):
    """Guards stage lists of one's own: what trained before is frozen again, whatever state it carries."""
    stages = [
        {"name": "first", "until": 0.5, "trains": ["adapters", "projector"], "gate": "random"},
        {"name": "second", "until": 1.0, "trains": ["routers"], "gate": "learned"},
    ]
    quiet_run(recipe_from_dict(settings(tmp_path, steps=4) | {"stages": stages}))
    page = watched()[1]
    changed = {group_of(name) for name, tensor in page.before.items() if not torch.equal(tensor, page.after[name])}
    assert changed == {"routers"}
    assert {group_of(name) for name in page.with_gradient} == {"routers"}


@pytest.mark.parametrize("groups", [("adapters",), ("routers", "vision"), PARAMETER_GROUPS])
def test_freezing_sets_exactly_the_groups(groups):
    """Guards the function itself, and its counts."""
    model = route_everywhere(tiny_llava())
    counts = freeze_all_but(model, groups)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert {group_of(name) for name, _ in trained} == set(groups)
    assert sum(counts.values()) == sum(p.numel() for _, p in trained)
    assert {group for group, count in counts.items() if count} == set(groups)


def test_optimizer_groups_hold_every_parameter_once():
    """Guards rates and decay: RoE's parts and the base's apart, vectors undecayed, in an order that never changes."""
    model = route_everywhere(tiny_llava())
    groups = optimizer_groups(model.named_parameters(), roe_lr=1.0, base_lr=2.0, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(names.values())
    for group in groups:
        for parameter in group["params"]:
            is_roe = group_of(names[id(parameter)]) in ("adapters", "routers")
            assert group["lr"] == (1.0 if is_roe else 2.0)
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)
