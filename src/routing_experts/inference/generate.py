"""Batched generation that keeps each row's route.

Shapes: B requests, T prompt tokens, L decoder layers.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from routing_experts.data.collate import Collator
from routing_experts.data.encode import Encoder
from routing_experts.data.records import Record
from routing_experts.models.cache import RoutedCache
from routing_experts.models.convert import is_routed
from routing_experts.models.device import synchronize
from routing_experts.models.options import RoutingOptions, refuse_for_dense

NOT_FOR_GENERATE = ("labels", "segment_ids", "example_keys")


@dataclass(frozen=True)
class Answer:
    """What a request got.

    Attributes:
        id: the record's.
        text: without special tokens.
        route: keep flags of the L layers; all true for a model that does not route.
        num_tokens: that were generated, the closing one included.
        steps: of the batch that it was in; its longest answer's tokens.
        seconds_to_first: from the batch's start to its first tokens.
        decode_seconds: from there to the batch's end.
    """

    id: str
    text: str
    route: tuple[bool, ...]
    num_tokens: int = 0
    steps: int = 0
    seconds_to_first: float = 0.0
    decode_seconds: float = 0.0

    @property
    def skip_rate(self) -> float:
        """The share of all decoder layers that were skipped."""
        return 1 - sum(self.route) / len(self.route)


def longest_prompt(model: Any) -> int:
    """The positions that a model knows, in tokens."""
    return int(model.config.get_text_config(decoder=True).max_position_embeddings)


def prompt_batches(
    model: Any, processor: Any, records: Sequence[Record], batch_size: int, prompt_format: str = "chat_template"
) -> Iterator[dict[str, Tensor]]:
    """Left-padded prompts for ``model.generate``, in order; one of more tokens than the model knows is an error."""
    encoder = Encoder(processor, prompt_format, longest_prompt(model))
    collate = Collator(processor.tokenizer.pad_token_id or 0, padding_side="left")
    for start in range(0, len(records), batch_size):
        batch = collate([encoder(record) for record in records[start : start + batch_size]])
        yield {name: tensor for name, tensor in batch.items() if name not in NOT_FOR_GENERATE}


def to_model(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A batch on the model's device, pictures in its precision."""
    moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
    if "pixel_values" in moved:
        moved["pixel_values"] = moved["pixel_values"].to(model.dtype)
    return moved


@dataclass(frozen=True)
class BatchAnswers:
    """What a batch of B prompts got.

    Attributes:
        texts: without special tokens.
        routes: keep flags [B, L], on the host; all true for a model that does not route.
        num_tokens: that each generated, the closing one included.
        steps: the longest answer's tokens.
        seconds_to_first, decode_seconds: until the first tokens, and from there to the last.
    """

    texts: list[str]
    routes: Tensor
    num_tokens: list[int]
    steps: int
    seconds_to_first: float
    decode_seconds: float


class _FirstTokens(LogitsProcessor):
    """Notes when the first tokens' logits are there, and changes nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.at = device, 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.at:
            synchronize(self.device)
            self.at = time.perf_counter()
        return scores


@torch.inference_mode()
def answer_batch(
    model: Any, processor: Any, batch: dict[str, Tensor], options: RoutingOptions | None = None, **generation: Any
) -> BatchAnswers:
    """Generates one batch.

    Args:
        model: routed or not.
        processor: decodes.
        batch: of ``prompt_batches``.
        options: of a routed model.
        **generation: for ``model.generate``.

    Raises:
        RouteError: for options that do not fit the model or the batch.
    """
    batch = to_model(batch, model)
    first = _FirstTokens(model.device)
    settings = {"do_sample": False, "logits_processor": LogitsProcessorList([first])} | generation
    synchronize(model.device)
    started = time.perf_counter()
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    route = torch.ones(len(batch["input_ids"]), num_layers, dtype=torch.bool)
    if is_routed(model):
        cache = RoutedCache(model.config, options)
        ids = model.generate(**batch, past_key_values=cache, **settings)
        assert cache.route is not None
        route = cache.route
    else:
        refuse_for_dense(options)
        ids = model.generate(**batch, **settings)
    synchronize(model.device)
    ended = time.perf_counter()
    new_BT = ids[:, batch["input_ids"].shape[1] :].cpu()
    texts = processor.tokenizer.batch_decode(new_BT, skip_special_tokens=True)
    return BatchAnswers(
        [text.strip() for text in texts],
        route,
        _lengths(new_BT, model.generation_config.eos_token_id, processor.tokenizer.pad_token_id),
        new_BT.shape[1],
        first.at - started,
        ended - first.at,
    )


def _lengths(new_BT: Tensor, closing: int | list[int] | None, padding: int | None) -> list[int]:
    """Of each row's tokens, up to the closing one; behind it, or behind a text that ends an answer, is padding."""
    ends_BT = torch.isin(new_BT, torch.tensor([] if closing is None else closing, dtype=torch.long))
    before_BT = ends_BT.cumsum(1) - ends_BT.long() == 0
    if padding is not None:
        is_padding_BT = (new_BT == padding) & ~ends_BT
        before_BT &= (~is_padding_BT).flip(1).cumsum(1).flip(1) > 0
    return before_BT.sum(1).tolist()


def answer(
    model: Any,
    processor: Any,
    records: Sequence[Record],
    batch_size: int = 64,
    options: RoutingOptions | None = None,
    routes: Tensor | None = None,
    prompt_format: str = "chat_template",
    **generation: Any,
) -> Iterator[Answer]:
    """Answers each record's last question, which its last turn leaves unanswered.

    Args:
        model, processor: what answers; routed or not.
        records: N of them.
        batch_size: requests a batch.
        options: of a routed model.
        routes: keep flags [N, L] that records follow instead of the routers.
        prompt_format: ``chat_template`` or ``vicuna_v1``.
        **generation: for ``model.generate``.

    Yields:
        An answer a record, in order.

    Raises:
        RouteError: for options or routes that do not fit the model or each other.
    """
    done, given = 0, options or RoutingOptions()
    for batch in prompt_batches(model, processor, records, batch_size, prompt_format):
        if routes is not None:
            given = replace(given, route=routes[done : done + batch_size])
        got = answer_batch(model, processor, batch, given, **generation)
        for text, route, count in zip(got.texts, got.routes.tolist(), got.num_tokens, strict=True):
            times = (got.seconds_to_first, got.decode_seconds)
            yield Answer(records[done].id, text, tuple(route), count, got.steps, *times)
            done += 1
