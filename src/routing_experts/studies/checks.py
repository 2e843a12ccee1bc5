"""What of a study's plan cannot be run or compared, said before its first run rather than after hours."""

import math
from collections.abc import Sequence

from routing_experts.errors import ConfigError
from routing_experts.evaluation.pruning import share_for
from routing_experts.studies.compare import ROUNDING
from routing_experts.studies.contest import Contest
from routing_experts.studies.plan import STATIC_CONTROLS


def check_plan(contest: Contest) -> None:
    """Looks at every control of a study.

    Raises:
        ConfigError: for rates that whole layers cannot meet or be compared at, and for more than pictures have tokens.
    """
    study = contest.study
    for name, arm in study.arms.items():
        rates = study.rates_of(arm)
        if arm.control in STATIC_CONTROLS:
            most = contest.num_layers if arm.control == "early_exit" else len(contest.routable)
            check_whole_layers(name, rates, study.rates, contest.num_layers, most)
        if arm.control == "pruning":
            for rate in rates:
                share_for(rate, contest.image_shares, contest.num_layers)


def check_whole_layers(name: str, rates: Sequence[float], wanted: Sequence[float], num_layers: int, most: int) -> None:
    """Looks at one control that drops whole layers.

    Args:
        name: the arm's.
        rates: its own.
        wanted: the study's, at which arms are compared.
        num_layers: L.
        most: how many layers can be dropped.
    """
    counts = {rate: round(rate * num_layers) for rate in rates}
    for rate, count in counts.items():
        if not 0 < count <= most:
            what = "less than half a layer" if count == 0 else f"{count} layers, and {most} can be dropped"
            raise ConfigError(f"arm {name}: rate {rate} of {num_layers} layers is {what}. Name another.")
    low, high = (pick(counts.values()) / num_layers for pick in (min, max))
    met = [rate for rate in wanted if low - ROUNDING <= rate <= high + ROUNDING]
    missed = [rate for rate in wanted if rate in counts and rate not in met]
    if missed or not met:
        first = (missed or list(wanted))[0] * num_layers
        both = sorted({max(1, math.floor(first + ROUNDING)), math.ceil(first - ROUNDING)})
        raise ConfigError(
            f"arm {name} drops {low:.1%} to {high:.1%} of {num_layers} layers, whole ones, and cannot be compared at "
            f"{', '.join(f'{rate:.1%}' for rate in missed or wanted)}. Give it rates of its own that meet or enclose "
            f"those, such as {', '.join(f'{count / num_layers:.4f}' for count in both)}."
        )
