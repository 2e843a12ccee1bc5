"""Requests to prompts, and prompts through the model: each row's first logits, route, keys and values.

Shapes: B prompts, T tokens of the longest, L layers, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from routing_experts.data.collate import Collator
from routing_experts.data.encode import TOKEN_TYPES, Encoded, Encoder
from routing_experts.data.records import IMAGE_PLACEHOLDER, Record, Turn
from routing_experts.errors import RequestError
from routing_experts.inference.generate import NOT_FOR_GENERATE, to_model
from routing_experts.inference.requests import Request
from routing_experts.inference.slots import Past, pasts_of
from routing_experts.models.cache import RoutedCache
from routing_experts.models.convert import is_routed
from routing_experts.models.families import family_of
from routing_experts.models.options import RoutingOptions, bias_rows, refuse_for_dense, route_rows, settle


@dataclass(frozen=True)
class Prompt:
    """A request that is ready to be prefilled; its options are settled (``models.options``)."""

    encoded: Encoded
    routing: RoutingOptions

    @property
    def length(self) -> int:
        """Its tokens."""
        return len(self.encoded.input_ids)


def record_of(request: Request) -> Record:
    """A request's dialogue, which is not encoded yet, as a record whose last question is unanswered.

    Raises:
        RequestError: if roles do not alternate from user to user, or a part is neither text nor picture.
    """
    assert not isinstance(request.messages, Encoded)
    if isinstance(request.messages, str):
        missing = max(0, len(request.images) - request.messages.count(IMAGE_PLACEHOLDER))
        return Record(request.id, (Turn(f"{IMAGE_PLACEHOLDER}\n" * missing + request.messages, ""),), request.images)
    system = ""
    questions: list[str] = []
    answers: list[str] = []
    messages: Sequence[Any] = request.messages
    for message in messages:
        if not isinstance(message, Mapping):
            raise RequestError(f"request {request.id}: a message {message!r}. Give mappings of role and content.")
        role, text = message.get("role"), _text_of(message.get("content"), request.id)
        if role == "system" and not questions:
            system = text
        elif role == "user" and len(questions) == len(answers):
            questions.append(text)
        elif role == "assistant" and len(questions) == len(answers) + 1:
            answers.append(text)
        else:
            raise RequestError(
                f"request {request.id}: a message of role {role!r} after {len(questions)} questions and {len(answers)} "
                "answers. User and assistant take turns, after a system message if there is one."
            )
    if len(questions) != len(answers) + 1:
        raise RequestError(f"request {request.id}: the dialogue ends without a question. End it with a user's message.")
    turns = tuple(Turn(question, answer) for question, answer in zip(questions, [*answers, ""], strict=True))
    return Record(request.id, turns, request.images, system)


def _text_of(content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for part in content if isinstance(content, Sequence) else (content,):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
            raise RequestError(
                f"request {name}: a message part {part!r}. Give a text, or parts such as "
                '{"type": "text", "text": "…"} and {"type": "image"}.'
            )
        parts.append(IMAGE_PLACEHOLDER + "\n" if kind == "image" else part["text"])
    return "".join(parts)


class Prefiller:
    """Runs prompts through a model.

    Args:
        model: routed or not.
        processor: the model's; None where only encoded prompts come.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        asked_as = model.roe_config.prompt_format if is_routed(model) else "chat_template"
        config = model.config.get_text_config(decoder=True)
        self.max_length: int = config.max_position_embeddings
        self.num_layers: int = config.num_hidden_layers
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self.routed_layers = model.roe_config.layers_to_route(self.num_layers) if is_routed(model) else ()
        pad = processor.tokenizer.pad_token_id if processor is not None else config.pad_token_id
        self._collate = Collator(pad or 0, padding_side="left")
        self._encode = Encoder(processor, asked_as, self.max_length) if processor is not None else None

    def prompt(self, request: Request) -> Prompt:
        """A request made ready.

        Raises:
            RoutingExpertsError: if it cannot be: a broken picture, too many tokens, a route that does not fit.
        """
        if isinstance(request.messages, Encoded):
            encoded = request.messages
        elif self._encode is None:
            raise RequestError(f"request {request.id}: the engine has no processor to read it with. Give it one.")
        else:
            encoded = self._encode(record_of(request))
        length, new = len(encoded.input_ids), request.sampling.max_new_tokens
        if not length or not 0 <= int(encoded.input_ids.min()) <= int(encoded.input_ids.max()) < self.vocabulary:
            raise RequestError(
                f"request {request.id}: {length} token ids, but a prompt has one at least and the model knows 0 to "
                f"{self.vocabulary - 1}. Encode it with the model's own processor."
            )
        if request.sampling.stop and self._encode is None:
            raise RequestError(
                f"request {request.id}: stop texts for an engine without a processor: it reads no text. Give the "
                "engine the model's processor, or leave them out."
            )
        if length + new > self.max_length:
            raise RequestError(
                f"request {request.id}: a prompt of {length} tokens and {new} new ones, but the model knows "
                f"{self.max_length} positions. Shorten it, or ask for less."
            )
        return Prompt(encoded, self._settled(request.routing or RoutingOptions()))

    def _settled(self, asked: RoutingOptions) -> RoutingOptions:
        """One row's options, settled and checked, so that a wrong one fails alone and right ones share a prefill."""
        if not is_routed(self.model):
            refuse_for_dense(asked)
            return asked
        settled = settle(asked, self.model.roe_config, self.num_layers)
        if settled.route is not None:
            return replace(settled, route=route_rows(settled.route, 1, self.num_layers, self.routed_layers)[0])
        assert settled.keep_bias is not None
        return replace(settled, keep_bias=bias_rows(settled.keep_bias, 1).item())

    @torch.inference_mode()
    def run(self, prompts: Sequence[Prompt]) -> tuple[Tensor, list[Past]]:
        """Logits [B, V] behind each prompt, and its past."""
        batch = self._collate([prompt.encoded for prompt in prompts])
        batch = to_model({name: t for name, t in batch.items() if name not in NOT_FOR_GENERATE}, self.model)
        cache = RoutedCache(self.model.config, together([prompt.routing for prompt in prompts]))
        positions, shifts = self._positions(batch)
        output = self.model(**batch, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1], pasts_of(cache, [prompt.length for prompt in prompts], shifts)

    def _positions(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
        """Positions [B, T], or [3, B, T] on a grid, and each row's ``Past.shift``.

        Decoding counts on from the real tokens, so padding must not count here either.
        """
        mask = batch["attention_mask"]
        if not family_of(self.model).uses_mrope:
            return (mask.cumsum(1) - 1).clamp_min(0), [0] * len(mask)
        types = batch.get(TOKEN_TYPES, torch.zeros_like(mask))
        positions, shift_B1 = self.model.base_model.get_rope_index(
            batch["input_ids"], types, image_grid_thw=batch.get("image_grid_thw"), attention_mask=mask
        )
        return positions, shift_B1[:, 0].tolist()


def together(options: Sequence[RoutingOptions]) -> RoutingOptions:
    """The settled options of single requests as those of a batch; ``compatible`` ones only."""
    first = options[0]
    routes = [option.route for option in options if option.route is not None]
    if routes:
        return RoutingOptions(route=torch.stack(routes), layout=first.layout)
    if first.keep_bias is None:  # of a model that does not route
        return first
    biases = [float(option.keep_bias) for option in options if option.keep_bias is not None]
    return RoutingOptions(keep_bias=torch.tensor(biases, dtype=torch.float64), layout=first.layout)


def compatible(first: RoutingOptions, second: RoutingOptions) -> bool:
    """Whether two requests' settled options fit one call: both forced, or both decided, under whatever budget."""
    return (first.route is None) == (second.route is None) and first.layout == second.layout
