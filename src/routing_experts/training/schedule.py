"""Stages, temperature, gate bias and learning rate: pure functions of progress through the one run.

Progress is the share of optimiser steps done, from 0 to 1. Source: Wu et al. (ICLR 2025), section on training; the
constants were read off the authors' released code.
"""

import math
from dataclasses import dataclass, replace

from routing_experts.errors import ConfigError

PARAMETER_GROUPS = ("adapters", "routers", "decoder", "projector", "vision")
STAGE_GATES = ("none", "random", "learned")
LR_SCHEDULES = ("cosine", "constant_then_linear")


@dataclass(frozen=True)
class Stage:
    """A part of the run: which parameters train, and where the routes come from.

    Attributes:
        name: as logged.
        until: the progress at which it ends; it begins where the one before ended.
        trains: parameter groups with gradients and optimiser state; all others have neither.
        gate: "none" runs the base model unrouted; "random" draws one-hot routes; "learned" asks the routers.
        biased: whether the decaying keep bias is added to the routers' logits.
    """

    name: str
    until: float
    trains: tuple[str, ...]
    gate: str
    biased: bool = False

    def __post_init__(self) -> None:
        unknown = [group for group in self.trains if group not in PARAMETER_GROUPS]
        if unknown or not self.trains:
            raise ConfigError(
                f"stage {self.name!r} trains {list(self.trains)}: it needs at least one of "
                f"{', '.join(PARAMETER_GROUPS)}. Correct the list."
            )
        if self.gate not in STAGE_GATES:
            raise ConfigError(
                f"stage {self.name!r} has gate {self.gate!r}: it must be one of {', '.join(STAGE_GATES)}."
            )
        if not 0 < self.until <= 1:
            raise ConfigError(
                f"stage {self.name!r} lasts until {self.until}: a share of the run lies above 0, up to 1."
            )


THREE_STAGES = (
    Stage("adapter_warmup", 0.3, ("adapters",), "random"),
    Stage("router_warmup", 0.5, ("adapters", "routers"), "learned", biased=True),
    Stage("instruction_tuning", 1.0, ("adapters", "routers", "decoder", "projector"), "learned"),
)
# A small base adapts best when most of the run trains it: the shipped digits recipes use these shares.
SHORT_WARMUP = tuple(replace(stage, until=until) for stage, until in zip(THREE_STAGES, (0.2, 0.35, 1.0), strict=True))
DENSE_STAGE = (Stage("dense_tuning", 1.0, ("decoder", "projector"), "none"),)
PRETRAINING_STAGE = (Stage("pretraining", 1.0, ("decoder", "projector", "vision"), "none"),)


def stage_at(stages: tuple[Stage, ...], progress: float) -> Stage:
    """The stage that a step belongs to which begins at ``progress``."""
    return next((stage for stage in stages if progress < stage.until - 1e-9), stages[-1])


def check_stages(stages: tuple[Stage, ...]) -> None:
    """Raises ``ConfigError`` unless the stages follow one another and fill the run."""
    ends = [stage.until for stage in stages]
    if not ends or ends != sorted(set(ends)) or ends[-1] != 1.0:
        raise ConfigError(
            f"stages end at {ends}: each must end after the one before, and the last at 1.0, so that they fill the "
            "run. Correct their `until`."
        )


@dataclass(frozen=True)
class Annealing:
    """Temperature τ and keep bias of the gate by progress.

    τ starts at ``temperature`` and is multiplied by ``temperature_decay`` at every tick (``every`` of the run) from
    ``start`` on, down to ``temperature_floor``; the bias starts at b = 1 − √(2ρ) and is multiplied by ``bias_decay``.
    The defaults suit hard gates, whose τ stays 1; the paper's soft gate starts at 10 and decays by 0.95.
    """

    temperature: float = 1.0
    temperature_decay: float = 1.0
    temperature_floor: float = 1e-3
    bias_decay: float = 0.85
    start: float = 0.3
    every: float = 0.005

    def __post_init__(self) -> None:
        if min(self.temperature, self.temperature_floor, self.every) <= 0:
            raise ConfigError(
                f"annealing temperature={self.temperature}, temperature_floor={self.temperature_floor}, "
                f"every={self.every}: all three divide or are divided by, so they must be positive."
            )

    def _ticks(self, progress: float) -> int:
        return max(0, math.floor((progress - self.start) / self.every + 1e-9))

    def temperature_at(self, progress: float) -> float:
        """τ at a progress from 0 to 1."""
        return max(self.temperature_floor, self.temperature * self.temperature_decay ** self._ticks(progress))

    def bias_at(self, progress: float, target_skip_ratio: float) -> float:
        """What is added to keep logits while a stage is ``biased``."""
        return warmup_bias(target_skip_ratio) * self.bias_decay ** self._ticks(progress)


PAPER_ANNEALING = Annealing(temperature=10.0, temperature_decay=0.95)


def warmup_bias(target_skip_ratio: float) -> float:
    """b = 1 − √(2ρ): with u ~ U[0,1]² and b added to the keep draw, P(skip draw is larger) = ρ, for ρ up to ½."""
    return 1 - math.sqrt(2 * target_skip_ratio)


def lr_factor(schedule: str, warmup_share: float, progress: float) -> float:
    """The learning rate's factor: linear warm-up, then a cosine, or half constant and half linear decay to zero."""
    if progress < warmup_share:
        return progress / warmup_share
    done = (progress - warmup_share) / max(1e-9, 1 - warmup_share)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    assert schedule == "constant_then_linear"
    return min(1.0, 2 * (1 - min(1.0, done)))
