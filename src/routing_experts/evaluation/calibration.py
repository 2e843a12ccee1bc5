"""Calibration: the bias on keep logits at which a routed model skips the wanted share of its layers.

Either one bias for one rate, or a budget: the whole curve from bias to rate, from which a request takes its own.

A bias in an early layer changes what later routers see, so the rate at a bias is measured by prefilling, not computed
from recorded logits. Questions come from training data; held-out ones then say how well the rate carries over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from routing_experts.config import BUDGET_GAP, CONTROL_GATES, RoEConfig
from routing_experts.errors import ConfigError, RouteError
from routing_experts.evaluation.questions import BATCH_SIZE, Question, records_of
from routing_experts.inference.generate import prompt_batches, to_model
from routing_experts.models.cache import RoutedCache
from routing_experts.models.options import RoutingOptions
from routing_experts.records import BudgetCheck, BudgetRecord, Calibration

CLOSE_ENOUGH = 0.002  # of the skip rate; a few questions' worth of one layer
TOO_FAR = 0.05  # beyond this, a bias is no answer to what was asked
WIDEST = 64.0  # a bias beyond which no trained logit decides
MAX_HALVINGS = 20
MOST = 0.5  # where a budget ends: warm-up's random routes skip no more, so adapters never trained beyond
NARROWEST = 0.001  # biases nearer than this are one: the rate jumps between them
CHECKED_EVERY = 0.05  # of the skip rate, when a budget is held against other questions


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

    def __init__(self, model: Any, processor: Any, questions: Sequence[Question], batch_size: int = BATCH_SIZE) -> None:
        self.model = model
        asked_as = model.roe_config.prompt_format
        self.num_questions = len(questions)
        self._rates: dict[float, float] = {}
        self.batches = list(prompt_batches(model, processor, records_of(questions), batch_size, asked_as))

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


def find_bias(meter: RateMeter, wanted: float, tolerance: float = TOO_FAR) -> Found:
    """The bias whose rate is nearest to the wanted one, by bisection; a higher bias skips less.

    Args:
        meter: of the questions to calibrate on.
        wanted: share of all decoder layers.
        tolerance: how far the rate may be off.

    Raises:
        ConfigError: if no bias can give that rate, because too few layers are routed or routers do not decide.
    """
    config = meter.model.roe_config
    num_layers = meter.model.config.get_text_config(decoder=True).num_hidden_layers
    most = len(config.layers_to_route(num_layers)) / num_layers
    _refuse_controls(config)
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
    if abs(best.skip_rate - wanted) > tolerance:
        raise ConfigError(
            f"skip rate {wanted}: no bias gives it; the nearest is {best.skip_rate:.3f} at {best.keep_bias:+.3f}, "
            "since too many routers decide alike at once. Choose that rate, or train for the wanted one."
        )
    return best


def calibration(meter: RateMeter, heldout: RateMeter | None, wanted: float, tolerance: float = TOO_FAR) -> Calibration:
    """Finds the bias for a wanted rate and says what it does, on held-out questions too if there are any.

    Raises:
        ConfigError: as ``find_bias`` does.
    """
    found = find_bias(meter, wanted, tolerance)
    return Calibration(
        wanted=wanted,
        keep_bias=found.keep_bias,
        raw_skip_rate=meter.rate(0.0),
        skip_rate=found.skip_rate,
        heldout_raw_skip_rate=heldout.rate(0.0) if heldout else None,
        heldout_skip_rate=heldout.rate(found.keep_bias) if heldout else None,
        questions=meter.num_questions,
    )


def trace_budget(meter: RateMeter) -> tuple[tuple[float, float], ...]:
    """The curve from keep bias to skip rate, as ``RoEConfig.budget`` holds it.

    It begins at a bias that skips next to nothing and ends where ``MOST`` of all layers are skipped, or all routed
    ones. Biases are halved between until no two rates are further than ``BUDGET_GAP`` apart, or the biases are one.

    Raises:
        ConfigError: if routers do not decide.
    """
    _refuse_controls(meter.model.roe_config)
    biases = [0.0]
    while meter.rate(biases[-1]) > 0 and biases[-1] < WIDEST:
        biases.append(max(1.0, 2 * biases[-1]))
    biases.reverse()
    while meter.rate(biases[-1]) < MOST and biases[-1] > -WIDEST:
        biases.append(min(-1.0, 2 * biases[-1]))
    intervals = list(pairwise(biases))
    while intervals:
        higher, lower = intervals.pop()
        gap = meter.rate(lower) - meter.rate(higher)
        if gap > BUDGET_GAP and higher - lower > NARROWEST and meter.rate(higher) < MOST:
            middle = (higher + lower) / 2
            biases.append(middle)
            intervals += [(higher, middle), (middle, lower)]
    return _rising([Found(bias, meter.rate(bias)) for bias in sorted(biases, reverse=True)])


def _rising(curve: Sequence[Found]) -> tuple[tuple[float, float], ...]:
    """Pairs (rate, bias) up to ``MOST``: of equal rates the lowest bias, and none that skips less than a higher one."""
    pairs: list[tuple[float, float]] = []
    for found in curve:
        if pairs and pairs[-1][0] >= MOST:
            break
        if pairs and found.skip_rate == pairs[-1][0]:
            pairs.pop()
        if not pairs or found.skip_rate > pairs[-1][0]:
            pairs.append((found.skip_rate, found.keep_bias))
    return tuple(pairs)


def wanted_ratios(config: RoEConfig, every: float = CHECKED_EVERY) -> list[float]:
    """Round skip ratios from 0 to the end of the budget."""
    most = config.budget[-1][0] if config.budget else 0.0
    return [round(every * step, 6) for step in range(int(most / every + 1e-9) + 1)]


def check_budget(config: RoEConfig, meter: RateMeter, heldout: RateMeter | None) -> BudgetRecord:
    """What ratios of the budget give, on the questions that it was traced on and on held-out ones."""
    checks = []
    for wanted in wanted_ratios(config)[1:]:
        try:
            bias = config.keep_bias_for(wanted)
        except RouteError:  # within a jump; a ratio that nobody can have is a finding, too
            checks.append(BudgetCheck(wanted=wanted, keep_bias=None, skip_rate=None, heldout_skip_rate=None))
            continue
        held = heldout.rate(bias) if heldout else None
        checks.append(BudgetCheck(wanted=wanted, keep_bias=bias, skip_rate=meter.rate(bias), heldout_skip_rate=held))
    return BudgetRecord(
        pairs=[list(pair) for pair in config.budget],
        checks=checks,
        questions=meter.num_questions,
        heldout_questions=heldout.num_questions if heldout else None,
    )


def _refuse_controls(config: RoEConfig) -> None:
    if config.gate in CONTROL_GATES:
        raise ConfigError(
            f"calibrating a model with gate {config.gate!r}: its routers do not decide. Calibrate a routed one."
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


def with_budget(model: Any, budget: tuple[tuple[float, float], ...]) -> Any:
    """Puts the budget into the model's config, from where requests with a skip ratio take their bias."""
    model.roe_config = replace(model.roe_config, budget=budget)
    return model
