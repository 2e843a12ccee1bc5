"""Teaches the small LLaVA-HR's ConvNeXt to tell digits apart, so that it begins as published ones do: able to see.

Those were taught on photographs; this one is on the task's own handwriting, of the training split. It begins with
single digits and goes on to whole pictures, where each place of its last map names the digit of the cell that it lies
in. Shapes: B pictures, S pixels a side, C channels of the last map, h × h its places, d × d the digits of a picture.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
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
        steps, batch_size, learning_rate: of its training; the rate is the highest of one cycle.
        columns: and rows of digits in a picture.
        cell: pixels that each digit's cell is wide and high; a multiple of ``SLOW_STRIDE``.
    """

    steps: int
    batch_size: int
    learning_rate: float
    columns: int
    cell: int


LESSONS = (Lesson(500, 128, 2e-3, columns=1, cell=SLOW_STRIDE), Lesson(1000, 32, 2e-3, columns=2, cell=64))


def teach_sight(tower: Any, lessons: tuple[Lesson, ...] = LESSONS, blur: int = 1, seed: int = 0) -> float:
    """Trains a ConvNeXt to name the digit that each place of its last map shows.

    Args:
        tower: a ``SlowTower``; its weights are drawn anew, wide enough for its few channels.
        lessons: one after the other, each with an optimiser of its own.
        blur: how many times smaller pictures are made, and then as large again.
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
        rights = teach(tower, head, lesson, draw, blur)
    return float(np.mean(rights[-max(1, len(rights) // 10) :]))


def teach(tower: Any, head: nn.Module, lesson: Lesson, draw: np.random.Generator, blur: int = 1) -> list[float]:
    """Teaches one lesson.

    Args:
        tower: gives [B, C, h, h] of [B, 3, S, S].
        head: gives ten scores of C channels.
        lesson: what is taught.
        draw: draws pictures.
        blur: as in ``teach_sight``.

    Returns:
        The share of places that were right, a number a step.
    """
    parameters, rate = [*tower.parameters(), *head.parameters()], lesson.learning_rate
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, lesson.steps, pct_start=WARMUP_SHARE)
    rights = []
    for _ in range(lesson.steps):
        pixels_B3SS, digits_Bdd = _pictures(lesson, draw, blur)
        map_BChh = tower(pixels_B3SS)
        times = map_BChh.shape[-1] // lesson.columns
        digits_Bhh = digits_Bdd.repeat_interleave(times, 1).repeat_interleave(times, 2)
        scores_BhhK = head(map_BChh.permute(0, 2, 3, 1))
        optimizer.zero_grad()
        cross_entropy(scores_BhhK.flatten(0, 2), digits_Bhh.flatten()).backward()
        optimizer.step()
        schedule.step()
        rights.append(float((scores_BhhK.argmax(-1) == digits_Bhh).float().mean()))
    return rights


def _widen(tower: Any) -> None:
    """Draws weights by their fan-in: the usual 0.02 is made for hundreds of channels, and passes little on with few."""
    for name, parameter in tower.named_parameters():
        if name.endswith("layer_scale_parameter"):
            nn.init.ones_(parameter)
        elif parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")


def _pictures(lesson: Lesson, draw: np.random.Generator, blur: int) -> tuple[Tensor, Tensor]:
    """[B, 3, S, S] from -1 to 1 and the digits in them, [B, d, d]."""
    side, size = lesson.columns, lesson.columns * lesson.cell
    digits_Bdd = draw.integers(0, DIGITS, (lesson.batch_size, side, side))
    drawn = [draw_picture(digits_dd.ravel(), side, "train", draw, lesson.cell) for digits_dd in digits_Bdd]
    if blur > 1:
        small = [picture.resize((size // blur, size // blur), Image.Resampling.BICUBIC) for picture in drawn]
        drawn = [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in small]
    pixels_BSS3 = torch.from_numpy(np.stack([np.asarray(picture) for picture in drawn]))
    return pixels_BSS3.permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(digits_Bdd)
