"""Towers that are tuned with the base: a matter of the checkpoint, unless the recipe writes its stages out."""

from dataclasses import replace
from typing import Any

from routing_experts.models.families import known_families
from routing_experts.training.recipe import NAMED_STAGES, Recipe

TOWER = "tuned tower"  # a fact of a run


def heed_tower(recipe: Recipe, config: Any) -> Recipe:
    """The recipe with its tower trained wherever its projector is, if the model's checkpoint says that it trains.

    Args:
        recipe: stages that are none of the named ones stay as they are.
        config: of the base model.
    """
    family = known_families().get(config.model_type)
    if family is None or recipe.stages not in NAMED_STAGES.values() or not family.tunes_tower(config):
        return recipe
    stages = tuple(
        replace(stage, trains=(*stage.trains, "vision"))
        if "projector" in stage.trains and "vision" not in stage.trains
        else stage
        for stage in recipe.stages
    )
    return replace(recipe, stages=stages)
