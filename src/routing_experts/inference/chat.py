"""A chat: one dialogue whose turns are routed one by one, with a cache that lasts from turn to turn where it can.

Each turn has a route of its own, and may need a layer that earlier turns skipped. Two policies:

- ``prefill``: the whole dialogue is prefilled again under the new turn's route, as the authors do. A turn gets exactly
  what ``model.generate`` gives for the whole dialogue.
- ``project``: layers that a turn skips store keys and values all the same (``models.dialogue``), so that only the new
  turn's tokens run. Earlier tokens keep the states that their own turns' routes gave them.

Where every turn has the same route by design (a base model, a forced route, a bias without end, the control ``static``)
earlier keys and values are what a second prefill would give: they are kept under either policy.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from routing_experts.data.collate import Collator, unseen_pictures
from routing_experts.data.encode import Encoded, Encoder
from routing_experts.data.images import load_image
from routing_experts.data.prompts import message_content
from routing_experts.data.records import IMAGE_PLACEHOLDER, Record, Turn
from routing_experts.errors import RequestError
from routing_experts.inference.generate import NOT_FOR_GENERATE, to_model
from routing_experts.models.cache import RoutedCache, cache_bytes
from routing_experts.models.convert import is_routed
from routing_experts.models.dialogue import DialogueCache
from routing_experts.models.families import known_families
from routing_experts.models.options import RoutingOptions, refuse_for_dense, settle

POLICIES = ("prefill", "project")
ONE_ANSWER = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "use_cache": True}


@dataclass(frozen=True)
class Reply:
    """What a turn got.

    Attributes:
        text: without special tokens.
        route: keep flags of the L layers; all true for a model that does not route.
        prefilled_tokens: that ran before the first new one.
        reused_tokens: whose keys and values were there from earlier turns.
        new_tokens: that were generated, an end of answer included.
        seconds: from question to answer, reading pictures and laying out the prompt included.
        cache_bytes: of keys and values when the answer was complete.
    """

    text: str
    route: tuple[bool, ...]
    prefilled_tokens: int
    reused_tokens: int
    new_tokens: int
    seconds: float
    cache_bytes: int

    @property
    def skip_rate(self) -> float:
        """The share of all decoder layers that were skipped."""
        return 1 - sum(self.route) / len(self.route)


@dataclass(frozen=True)
class _Past:
    """What earlier turns left behind: a cache, the ids that it holds, and the shapes of the pictures among them."""

    cache: Any
    ids: Tensor
    vision: dict[str, torch.Size]


class ChatSession:
    """One dialogue with a model.

    Args:
        model: routed or not.
        processor: the model's.
        policy: ``prefill`` or ``project``; see this file's beginning.
        routing: how routes are chosen, for all turns; the model's own way for None.
        system: a system prompt.

    Raises:
        RequestError: if the policy is unknown.
        RouteError: for routing options of a model that is not routed.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        policy: str = "prefill",
        routing: RoutingOptions | None = None,
        system: str = "",
    ) -> None:
        if policy not in POLICIES:
            raise RequestError(f"policy {policy!r}: the policies are {', '.join(POLICIES)}. Name one of them.")
        self.model, self.processor, self.policy, self.system = model, processor, policy, system
        self.routing = routing or RoutingOptions()
        if not is_routed(model):
            refuse_for_dense(self.routing)
        text_config = model.config.get_text_config(decoder=True)
        self.max_length: int = text_config.max_position_embeddings
        prompt_format = model.roe_config.prompt_format if is_routed(model) else "chat_template"
        self._encode = Encoder(processor, prompt_format, self.max_length)
        self._turns: tuple[Turn, ...] = ()
        self._pictures: tuple[Image.Image, ...] = ()
        self._past: _Past | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The dialogue so far, in the form that ``processor.apply_chat_template`` takes."""
        told: list[dict[str, Any]] = []
        if self.system:
            told.append({"role": "system", "content": [{"type": "text", "text": self.system}]})
        for turn in self._turns:
            told.append({"role": "user", "content": message_content(turn.question)})
            told.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        return told

    @torch.inference_mode()
    def ask(
        self, text: str, images: Sequence[Path | Image.Image] = (), max_new_tokens: int = 64, **generation: Any
    ) -> Reply:
        """Asks the next question.

        A question that gets an empty answer is not kept: prompts cannot hold a turn without an answer. Nor is one that
        raises.

        Args:
            text: the question; ``<image>`` says where in it a picture belongs, otherwise pictures come first.
            images: this turn's pictures, paths or pictures.
            max_new_tokens: the longest answer.
            **generation: for ``model.generate``: how tokens are chosen (greedily by default), a ``streamer``.

        Raises:
            RequestError: if the dialogue has outgrown the model's positions, or several answers are asked for.
            RecordError: if a picture cannot be read, or has no place in the text.
        """
        started = time.perf_counter()
        _refuse_several(generation)
        turns, pictures = self._with_question(text, images)
        encoded = self._encoded(turns, pictures, max_new_tokens)
        past = self._past_for(encoded)
        self._past = None  # whatever happens from here on, this cache is no longer what the turns so far left behind
        cache = past.cache if past else self._new_cache()
        if past and isinstance(cache, DialogueCache):
            cache.open_turn(encoded.input_ids[None])
        held = len(past.ids) if past else 0
        ids = self._generate(encoded, cache, past.vision if past else {}, max_new_tokens, generation)
        num_prompt, num_held = len(encoded.input_ids), cache.get_seq_length()
        answer = self.processor.tokenizer.decode(ids[num_prompt:], skip_special_tokens=True).strip()
        reply = Reply(
            text=answer,
            route=self._route(cache),
            prefilled_tokens=num_prompt - held,
            reused_tokens=held,
            new_tokens=len(ids) - num_prompt,
            seconds=time.perf_counter() - started,
            cache_bytes=cache_bytes(cache),
        )
        if answer:
            self._turns, self._pictures = (*turns[:-1], Turn(turns[-1].question, answer)), pictures
            if self._keeps_cache():
                shapes = {name: tensor.shape for name, tensor in encoded.vision.items()}
                self._past = _Past(cache, ids[:num_held], shapes)
        return reply

    def _with_question(
        self, text: str, images: Sequence[Path | Image.Image]
    ) -> tuple[tuple[Turn, ...], tuple[Image.Image, ...]]:
        name = f"turn {len(self._turns) + 1}"
        new = tuple(load_image(image, name) for image in images)
        missing = max(0, len(new) - text.count(IMAGE_PLACEHOLDER))
        return (*self._turns, Turn(f"{IMAGE_PLACEHOLDER}\n" * missing + text, "")), (*self._pictures, *new)

    def _encoded(self, turns: tuple[Turn, ...], pictures: tuple[Image.Image, ...], max_new_tokens: int) -> Encoded:
        encoded = self._encode(Record(f"turn {len(turns)}", turns, pictures, self.system))
        if len(encoded.input_ids) + max_new_tokens > self.max_length:
            raise RequestError(
                f"turn {len(turns)}: a dialogue of {len(encoded.input_ids)} tokens and {max_new_tokens} new ones, but "
                f"the model knows {self.max_length} positions. Begin a new session, or ask for shorter answers."
            )
        return encoded

    def _past_for(self, encoded: Encoded) -> _Past | None:
        """What earlier turns left, if the dialogue's ids still begin with it.

        They may not: a template may rewrite what came before, and an answer's text need not give the ids again that it
        was decoded from. Then the whole dialogue is prefilled.
        """
        past = self._past
        if past is None or len(encoded.input_ids) <= len(past.ids):
            return None
        return past if torch.equal(encoded.input_ids[: len(past.ids)], past.ids) else None

    def _new_cache(self) -> Any:
        if not is_routed(self.model):
            return DynamicCache(config=self.model.config.get_text_config(decoder=True))
        follows_project = self._keeps_cache() and not self._one_route()
        return (DialogueCache if follows_project else RoutedCache)(self.model.config, self.routing)

    def _keeps_cache(self) -> bool:
        """Not under M-RoPE: transformers finds its positions for whole dialogues, and notes them on the model."""
        family = known_families().get(self.model.config.model_type)
        if family is not None and family.uses_mrope:
            return False
        pools = is_routed(self.model) and self.model.roe_config.router_input == "pooled"  # no cache holds its context
        return (self.policy == "project" and not pools) or self._one_route()

    def _one_route(self) -> bool:
        """Whether every turn has the same route, whatever it asks."""
        if not is_routed(self.model):
            return True
        config = self.model.config.get_text_config(decoder=True)
        settled = settle(self.routing, self.model.roe_config, config.num_hidden_layers)
        return settled.route is not None or bool(torch.as_tensor(settled.keep_bias).isinf().all())

    def _generate(
        self, encoded: Encoded, cache: Any, seen: dict[str, torch.Size], max_new_tokens: int, generation: dict[str, Any]
    ) -> Tensor:
        """Ids of prompt and answer [T], on the host. Pictures that the cache has seen stay away."""
        batch = Collator(0)([replace(encoded, vision=unseen_pictures(encoded.vision, seen))])
        batch = to_model({name: t for name, t in batch.items() if name not in NOT_FOR_GENERATE}, self.model)
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens} | generation | ONE_ANSWER
        return self.model.generate(**batch, past_key_values=cache, **settings)[0].cpu()

    def _route(self, cache: Any) -> tuple[bool, ...]:
        if isinstance(cache, RoutedCache):
            assert cache.route is not None
            return tuple(cache.route[0].tolist())
        return (True,) * int(self.model.config.get_text_config(decoder=True).num_hidden_layers)


def _refuse_several(generation: dict[str, Any]) -> None:
    several = {name: generation[name] for name, one in ONE_ANSWER.items() if generation.get(name, one) != one}
    if several:
        raise RequestError(
            f"{', '.join(f'{name}={value!r}' for name, value in several.items())} in a chat: a turn has one answer, "
            "whose keys and values the next turn goes on from. Leave it out, or use model.generate."
        )
