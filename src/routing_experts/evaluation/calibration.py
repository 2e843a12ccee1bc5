"""Calibration: the bias on keep logits at which a routed model skips the wanted share of its layers.

A bias in an early layer changes what later routers see, so the rate at a bias is measured by prefilling, not computed
from recorded logits. Questions come from training data; held-out ones then say how well the rate carries over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from routing_experts.config import CONTROL_GATES
from routing_experts.errors import ConfigError
from routing_experts.evaluation.questions import Question, records_of
from routing_experts.inference.generate import prompt_batches, to_model
from routing_experts.models.cache import RoutedCache
from routing_experts.models.options import RoutingOptions
from routing_experts.records import Calibration

CLOSE_ENOUGH = 0.002  # of the skip rate; a few questions' worth of one layer
TOO_FAR = 0.05  # beyond this, a bias is no answer to what was asked
WIDEST = 64.0  # a bias beyond which no trained logit decides
MAX_HALVINGS = 20


@dataclass(frozen=True)
class Found:
    """A bias and the share of all decoder layers skipped with it."""

    keep_bias: float
    skip_rate: float


class RateMeter:
    """Measures a model's skip rate on the same questions at any bias, by prefilling alone.

    Args:
        model: routed.
        processor: the model's.
        questions: at least one.
        batch_size: of the prefills.
    """

    def __init__(self, model: Any, processor: Any, questions: Sequence[Question], batch_size: int = 64) -> None:
        self.model = model
        asked_as = model.roe_config.prompt_format
        self.num_questions = len(questions)
        self._rates: dict[float, float] = {}
        self.batches = list(prompt_batches(processor, records_of(questions), batch_size, asked_as))

    @torch.inference_mode()
    def routes(self, keep_bias: float) -> Tensor:
        """Keep flags [N, L] of all questions."""
        return torch.cat([self._route(batch, RoutingOptions(keep_bias=keep_bias)) for batch in self.batches])

    def rate(self, keep_bias: float) -> float:
        """The mean share of all decoder layers that a question skips; measured once a bias."""
        if keep_bias not in self._rates:
            self._rates[keep_bias] = 1 - float(self.routes(keep_bias).double().mean())
        return self._rates[keep_bias]

    def _route(self, batch: dict[str, Tensor], options: RoutingOptions) -> Tensor:
        cache = RoutedCache(self.model.config, options)
        self.model(**to_model(batch, self.model), past_key_values=cache, use_cache=True, logits_to_keep=1)
        assert cache.route is not None
        return cache.route


def find_bias(meter: RateMeter, wanted: float) -> Found:
    """The bias whose rate is nearest to the wanted one, by bisection; a higher bias skips less.

    Args:
        meter: of the questions to calibrate on.
        wanted: share of all decoder layers.

    Raises:
        ConfigError: if no bias can give that rate, because too few layers are routed or routers do not decide.
    """
    config = meter.model.roe_config
    num_layers = meter.model.config.get_text_config(decoder=True).num_hidden_layers
    most = len(config.layers_to_route(num_layers)) / num_layers
    if config.gate in CONTROL_GATES:
        raise ConfigError(
            f"calibrating a model with gate {config.gate!r}: its routers do not decide. Calibrate a routed one."
        )
    if not 0 < wanted < most:
        raise ConfigError(
            f"skip rate {wanted}: {most:.0%} of this model's layers are routed, so a rate lies above 0 and below "
            f"{most:.3f}. Choose one in between."
        )

    def measure(bias: float) -> Found:
        return Found(bias, meter.rate(bias))

    skips_less, skips_more = _bracket(measure, wanted)
    best = min((skips_less, skips_more), key=lambda found: abs(found.skip_rate - wanted))
    for _ in range(MAX_HALVINGS):
        if abs(best.skip_rate - wanted) <= CLOSE_ENOUGH:
            break
        middle = measure((skips_less.keep_bias + skips_more.keep_bias) / 2)
        best = min((best, middle), key=lambda found: abs(found.skip_rate - wanted))
        if middle.skip_rate > wanted:
            skips_more = middle
        else:
            skips_less = middle
    if abs(best.skip_rate - wanted) > TOO_FAR:
        raise ConfigError(
            f"skip rate {wanted}: no bias gives it; the nearest is {best.skip_rate:.3f} at {best.keep_bias:+.3f}, "
            "since too many routers decide alike at once. Choose that rate, or train for the wanted one."
        )
    return best


def calibration(meter: RateMeter, heldout: RateMeter | None, wanted: float) -> Calibration:
    """Finds the bias for a wanted rate and says what it does, on held-out questions too if there are any.

    Raises:
        ConfigError: as ``find_bias`` does.
    """
    found = find_bias(meter, wanted)
    return Calibration(
        wanted=wanted,
        keep_bias=found.keep_bias,
        raw_skip_rate=meter.rate(0.0),
        skip_rate=found.skip_rate,
        heldout_raw_skip_rate=heldout.rate(0.0) if heldout else None,
        heldout_skip_rate=heldout.rate(found.keep_bias) if heldout else None,
        questions=meter.num_questions,
    )


def _bracket(measure: Callable[[float], Found], wanted: float) -> tuple[Found, Found]:
    """Two biases on either side of the wanted rate; the step from 0 doubles until it is passed."""
    start = measure(0.0)
    step = 0.25 if start.skip_rate > wanted else -0.25
    near = start
    while abs(step) <= WIDEST:
        far = measure(step)
        if (far.skip_rate > wanted) != (start.skip_rate > wanted):
            return (far, near) if step > 0 else (near, far)
        near, step = far, step * 2
    return (near, near)


def with_bias(model: Any, keep_bias: float) -> Any:
    """Puts the bias into the model's config, from where every later request takes it."""
    model.roe_config = replace(model.roe_config, keep_bias=keep_bias)
    return model
