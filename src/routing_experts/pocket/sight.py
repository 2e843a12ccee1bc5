"""Teaches the small LLaVA-HR's ConvNeXt to tell digits apart, so that it begins as published ones do: able to see.

Without it the language model's loss alone would have to teach it, which takes longer than all the rest. Shapes: B
pictures, S pixels a side, C channels.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from routing_experts.data.digits import draw_picture
from routing_experts.models.llava_hr.configuration import SLOW_STRIDE

STEPS, BATCH, LEARNING_RATE, WARMUP_SHARE = 1500, 128, 2e-3, 0.1
DIGITS = 10


def teach_sight(tower: Any, steps: int = STEPS, seed: int = 0) -> float:
    """Trains a ConvNeXt on pictures of one digit each, as large as one place of its last map.

    Args:
        tower: a ``SlowTower``; its weights are drawn anew, wide enough for its few channels.
        steps: of the training.
        seed: of weights and pictures.

    Returns:
        The share of the last tenth of the pictures that it named rightly, before it was trained on them.
    """
    draw, rights = np.random.default_rng(seed), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _widen(tower)
        head = nn.Linear(tower.encoder.stages[-1].layers[-1].layer_scale_parameter.numel(), DIGITS)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=WARMUP_SHARE)
    for _ in range(steps):
        pixels_B3SS, digits_B = _pictures(draw)
        scores = head(tower(pixels_B3SS)[:, :, 0, 0])
        optimizer.zero_grad()
        cross_entropy(scores, digits_B).backward()
        optimizer.step()
        schedule.step()
        rights.append(float((scores.argmax(-1) == digits_B).float().mean()))
    return float(np.mean(rights[-max(1, steps // 10) :]))


def _widen(tower: Any) -> None:
    """Draws weights by their fan-in: the usual 0.02 is made for hundreds of channels, and passes little on with few."""
    for name, parameter in tower.named_parameters():
        if name.endswith("layer_scale_parameter"):
            nn.init.ones_(parameter)
        elif parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")


def _pictures(draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """[B, 3, S, S] from -1 to 1 and the digits in them, [B]."""
    digits_B = draw.integers(0, DIGITS, BATCH)
    drawn = [np.asarray(draw_picture(np.array([digit]), 1, "train", draw, SLOW_STRIDE)) for digit in digits_B]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(digits_B)
