"""What the engine is asked and what it gives: requests, sampling, and answers with how they came about."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from routing_experts.data.encode import Encoded
from routing_experts.errors import RequestError
from routing_experts.models.options import RoutingOptions


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token.
        top_p: the smallest set of tokens whose probabilities reach it is drawn from.
        seed: of this request's draws, whatever else runs beside it.
        stop: texts that end an answer; they are not part of it.
        ignore_eos: go on behind an end of answer, for timings.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens={self.max_new_tokens}: an answer has at least one token. Raise it.")
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature={self.temperature}: a number of 0 or more. 0 is greedy.")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p={self.top_p}: a probability above 0, 1 at most. Set it within the range.")
        if isinstance(self.stop, str) or not all(self.stop):
            raise RequestError(f"stop={self.stop!r}: a tuple of texts, none empty: each would end the answer at once.")


@dataclass(frozen=True)
class Request:
    """One thing to answer.

    Attributes:
        messages: a dialogue in transformers' chat form, whose last message is the user's; a plain question; or a
            dialogue that is encoded already.
        images: for the dialogue's placeholders, in order: pictures or paths.
        sampling: how tokens are chosen.
        routing: how the route is chosen; the model's own way for None.
        id: comes back with the answer.
    """

    messages: str | Encoded | Sequence[Any]
    images: Sequence[Any] = ()
    sampling: Sampling = field(default_factory=Sampling)
    routing: RoutingOptions | None = None
    id: str = ""


@dataclass(frozen=True)
class Completion:
    """What a request got.

    Attributes:
        id: the request's.
        text: without special tokens; empty where ``error`` says why there is none.
        token_ids: that were generated.
        route: keep flags, a layer each.
        finish: "stop", "length" or "error".
        error: what was wrong with this request alone.
        seconds_to_first: from submission to the first token.
        seconds: from submission to the last.
    """

    id: str
    text: str
    token_ids: tuple[int, ...] = ()
    route: tuple[bool, ...] = ()
    finish: str = "length"
    error: str | None = None
    seconds_to_first: float = 0.0
    seconds: float = 0.0

    @property
    def skip_rate(self) -> float:
        """The share of all decoder layers that were skipped."""
        return 1 - sum(self.route) / len(self.route) if self.route else 0.0


def choose(logits_V: Tensor, best: tuple[float, int], sampling: Sampling, generator: torch.Generator) -> int:
    """The next token of one request.

    Args:
        logits_V: of all tokens.
        best: the largest of them, and whose it is.
        sampling: the request's.
        generator: the request's own.

    Raises:
        RequestError: if logits are not finite.
    """
    highest, likeliest = float(best[0]), int(best[1])
    if not math.isfinite(highest):
        raise RequestError(
            f"the model's largest logit is {highest}: this request's numbers overflowed, and no token can be chosen. "
            "Load the model in bfloat16 or float32 instead of float16, and check its weights."
        )
    if sampling.temperature == 0:
        return likeliest
    # From the largest down: divided by a temperature near 0, logits themselves would exceed every float.
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    probabilities_V = torch.softmax((logits_V.float() - highest) / temperature, dim=-1)
    if sampling.top_p < 1:
        sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
        before_V = sorted_V.cumsum(0) - sorted_V
        sorted_V = sorted_V.masked_fill(before_V >= sampling.top_p, 0)
        probabilities_V = torch.zeros_like(probabilities_V).scatter(0, order_V, sorted_V)
    return int(torch.multinomial(probabilities_V.cpu(), 1, generator=generator))
