"""Teaches the small LLaVA-HR's ConvNeXt to tell digits apart, so that it begins as published ones do: able to see.

Without it the language model's loss alone would have to teach it, which takes longer than all the rest. It learns on
single digits first and then on whole pictures, where each place of its last map names the digit of the cell that it
lies in; whole pictures alone teach it nothing in the same time. Shapes: B pictures, S pixels a side, C channels of the
last map, h × h its places, d × d the digits of a picture.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from routing_experts.data.digits import draw_picture
from routing_experts.models.llava_hr.configuration import SLOW_STRIDE

WARMUP_SHARE, WEIGHT_DECAY = 0.1, 0.01
DIGITS = 10


@dataclass(frozen=True)
class Lesson:
    """A part of the teaching.

    Attributes:
        steps, batch_size, learning_rate: of its training.
        columns: and rows of digits in a picture.
        cell: pixels that each digit's cell is wide and high; a multiple of ``SLOW_STRIDE``.
    """

    steps: int
    batch_size: int
    learning_rate: float
    columns: int
    cell: int


LESSONS = (Lesson(500, 128, 2e-3, columns=1, cell=SLOW_STRIDE), Lesson(1000, 32, 2e-3, columns=2, cell=64))


def teach_sight(tower: Any, lessons: tuple[Lesson, ...] = LESSONS, seed: int = 0) -> float:
    """Trains a ConvNeXt to name the digit that each place of its last map shows.

    Args:
        tower: a ``SlowTower``; its weights are drawn anew, wide enough for its few channels.
        lessons: one after the other, each with an optimiser of its own.
        seed: of weights and pictures.

    Returns:
        The share of places that named their digit rightly in the last tenth of the last lesson, before it was trained
        on them.
    """
    draw, rights = np.random.default_rng(seed), [0.0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _widen(tower)
        head = nn.Linear(tower.encoder.stages[-1].layers[-1].layer_scale_parameter.numel(), DIGITS)
    for lesson in lessons:
        rights = _teach(tower, head, lesson, draw)
    return float(np.mean(rights[-max(1, len(rights) // 10) :]))


def _teach(tower: Any, head: nn.Linear, lesson: Lesson, draw: np.random.Generator) -> list[float]:
    """One lesson; how many places were right, by step."""
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *head.parameters()], lesson.learning_rate, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lesson.learning_rate, lesson.steps, pct_start=WARMUP_SHARE
    )
    rights = []
    for _ in range(lesson.steps):
        pixels_B3SS, digits_Bdd = _pictures(lesson, draw)
        map_BChh = tower(pixels_B3SS)
        scores = head(map_BChh.permute(0, 2, 3, 1)).flatten(0, 2)
        wanted = by_place(digits_Bdd, map_BChh.shape[-1]).flatten()
        optimizer.zero_grad()
        cross_entropy(scores, wanted).backward()
        optimizer.step()
        schedule.step()
        rights.append(float((scores.argmax(-1) == wanted).float().mean()))
    return rights


def by_place(digits_Bdd: Tensor, side: int) -> Tensor:
    """The digit of the cell that each of ``side`` × ``side`` places lies in; [B, h, h]."""
    times = side // digits_Bdd.shape[-1]
    return digits_Bdd.repeat_interleave(times, 1).repeat_interleave(times, 2)


def _widen(tower: Any) -> None:
    """Draws weights by their fan-in: the usual 0.02 is made for hundreds of channels, and passes little on with few."""
    for name, parameter in tower.named_parameters():
        if name.endswith("layer_scale_parameter"):
            nn.init.ones_(parameter)
        elif parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")


def _pictures(lesson: Lesson, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """[B, 3, S, S] from -1 to 1 and the digits in them, [B, d, d]."""
    side = lesson.columns
    digits_Bdd = draw.integers(0, DIGITS, (lesson.batch_size, side, side))
    drawn = [np.asarray(draw_picture(digits.ravel(), side, "train", draw, lesson.cell)) for digits in digits_Bdd]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(digits_Bdd)
