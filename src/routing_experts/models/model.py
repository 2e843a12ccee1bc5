"""The routed model: the base model's own class, subclassed on the fly, whose calls carry a routing context."""

import functools
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from routing_experts.config import RoEConfig
from routing_experts.errors import RouteError
from routing_experts.models.cache import RoutedCache
from routing_experts.models.checkpoint import save_routed
from routing_experts.models.context import RoutingContext
from routing_experts.models.dialogue import DialogueCache, start_rotary
from routing_experts.models.disguise import disguise
from routing_experts.models.families import family_of
from routing_experts.models.hub import push
from routing_experts.models.options import RoutingOptions, bias_rows, route_of_bias, route_rows, settle
from routing_experts.models.spans import only_last_question, open_history, segments_from_ids

_REFUSED_IN_GENERATE = {
    "assistant_model": "assisted decoding would have to undo routing decisions",
    "prompt_lookup_num_tokens": "assisted decoding would have to undo routing decisions",
    "assistant_early_exit": "assisted decoding would have to undo routing decisions",
    "use_mtp": "assisted decoding would have to undo routing decisions",
    "prefill_chunk_size": "a route is decided from the whole prompt, which chunked prefill does not show at once",
    "cache_implementation": "static, quantised and offloaded caches hold every row of every layer",
}


@functools.cache
def routed_model_class(base: type) -> type:
    """The routed subclass of a model's class; it keeps the base's names and signatures."""
    base_forward, base_generate = base.forward, base.generate  # type: ignore[attr-defined]
    forward_names = list(inspect.signature(base_forward).parameters)[1:]
    generate_names = list(inspect.signature(base_generate).parameters)[1:]

    @functools.wraps(base_forward)  # Trainer and generate look at the signature
    def forward(
        self: Any, *args: Any, routing: RoutingContext | None = None, routing_options: Any = None, **kwargs: Any
    ) -> Any:
        kwargs |= dict(zip(forward_names, args, strict=False))
        if routing is None:
            routing = _context_of_call(self, kwargs, routing_options)
        if routing is None:
            return base_forward(self, **kwargs)
        if routing.carries_tokens and 0 not in routing.tokens:
            routing.start(self.routing_tokens)
        return base_forward(self, routing=routing, **kwargs)

    @functools.wraps(base_generate)
    def generate(self: Any, *args: Any, routing_options: RoutingOptions | None = None, **kwargs: Any) -> Any:
        kwargs |= dict(zip(generate_names, args, strict=False))
        _check_generate(self, kwargs, routing_options)
        if _asked_of_generate(self, kwargs, "use_cache") is not False and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = RoutedCache(self.config, routing_options)
        return base_generate(self, **kwargs)

    def save_pretrained(self: Any, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes the RoE parts beside the base's weights; ``base_weights=False`` writes the RoE parts alone."""
        save_routed(self, save_directory, **kwargs)

    def push_to_hub(self: Any, repo_id: str, **kwargs: Any) -> str:
        """Uploads what ``save_pretrained`` writes, with its card; see ``models.hub.push``."""
        return push(self, repo_id, **kwargs)

    body = {"forward": forward, "generate": generate, "save_pretrained": save_pretrained, "push_to_hub": push_to_hub}
    return disguise(base, body | {"is_routing_experts_model": True})


def routing_context(
    model: Any,
    segment_ids_BT: Tensor,
    options: RoutingOptions | None = None,
    **training: Any,
) -> RoutingContext:
    """The context of one forward, for segment ids that the caller knows.

    Args:
        model: a converted model.
        segment_ids_BT: as in ``models.spans``; for a hard decision the last question's routing token decides.
        options: of a hard decision.
        **training: ``gate`` and ``keys_B`` while training; ``past`` and ``rotary`` for a new turn of a dialogue.
    """
    config: RoEConfig = model.roe_config
    options = options or RoutingOptions()
    batch_size = len(segment_ids_BT)
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    routed = config.layers_to_route(num_layers)
    route, settings = options.route, dict(training)
    if "gate" not in training:
        settled = settle(options, config, num_layers)
        route = settled.route
        if settled.keep_bias is not None:
            settings["keep_bias"] = bias_rows(settled.keep_bias, batch_size)
            route = route_of_bias(settings["keep_bias"], num_layers, routed)
        narrow = open_history if config.text_span == "history" else only_last_question
        segment_ids_BT = narrow(segment_ids_BT)
    return RoutingContext.from_segments(
        segment_ids_BT,
        route_BL=None if route is None else route_rows(route, batch_size, num_layers, routed),
        layout=options.layout or config.layout,
        last_routed=routed[-1],
        pooled=config.router_input == "pooled",
        **settings,
    )


def _context_of_call(model: Any, kwargs: dict[str, Any], options: Any) -> RoutingContext | None:
    """The context of a call that brings none: a prefill decides hard, a decoding step follows its cache."""
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        if not isinstance(cache, RoutedCache):
            raise RouteError(
                f"past_key_values of type {type(cache).__name__} with a past: a routed model's cache knows which "
                "layers each row skips. Start from RoutedCache(model.config)."
            )
        return _context_of_turn(model, kwargs, cache) if isinstance(cache, DialogueCache) else None
    input_ids = kwargs.get("input_ids")
    if input_ids is None:
        raise RouteError(
            "a call without input_ids: the context and question that routing reads are found from token ids. Pass "
            "input_ids, or a ready `routing=routing_context(model, segment_ids)` beside inputs_embeds."
        )
    if isinstance(cache, RoutedCache):
        options = options or cache.options
    elif cache is not None:
        raise RouteError(
            f"past_key_values of type {type(cache).__name__}: a routed model needs its own cache, since skipped layers "
            "hold nothing. Pass RoutedCache(model.config), or leave it out."
        )
    elif not model.training:
        use_cache = kwargs.get("use_cache")
        if model.config.get_text_config(decoder=True).use_cache if use_cache is None else use_cache:
            kwargs["past_key_values"] = RoutedCache(model.config, options)
    mask = kwargs.get("attention_mask")
    two_d = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    return routing_context(model, _segments(model, input_ids, two_d), options)


def _context_of_turn(model: Any, kwargs: dict[str, Any], cache: DialogueCache) -> RoutingContext | None:
    """A turn that was announced decides anew, over what the cache holds; any other call follows."""
    brought = kwargs.get("input_ids")
    ids = cache.take_turn((kwargs["inputs_embeds"] if brought is None else brought).shape[1])
    if ids is None:
        return None
    if model.roe_config.router_input == "pooled":
        raise RouteError(
            "a new turn on a cache, of a model with router_input='pooled': its routers read the context's states, "
            "which no cache holds. Prefill the whole dialogue again."
        )
    segments = _segments(model, ids.to(model.device), None)
    past = cache.get_seq_length()
    return routing_context(model, segments, cache.options, past=past, rotary=start_rotary(model))


def _segments(model: Any, input_ids: Tensor, mask: Tensor | None) -> Tensor:
    image_token_ids = family_of(model).image_token_ids(model.config)
    return segments_from_ids(input_ids, mask, image_token_ids, model.roe_config.markers)


def _check_generate(model: Any, kwargs: dict[str, Any], options: RoutingOptions | None) -> None:
    for name, reason in _REFUSED_IN_GENERATE.items():
        value = _asked_of_generate(model, kwargs, name)
        if value is not None and value is not False:
            raise RouteError(f"generate({name}={value!r}) is not supported by routed models: {reason}. Leave it out.")
    uses_cache = _asked_of_generate(model, kwargs, "use_cache") is not False
    if not uses_cache and model.roe_config.markers is None:
        raise RouteError(
            "generate(use_cache=False) on a model whose config has no turn markers: without them generated tokens "
            "would count as part of the question and change the route. Convert with processor=..., or use the cache."
        )
    if options is not None and (kwargs.get("past_key_values") is not None or not uses_cache):
        raise RouteError(
            "generate(routing_options=...) together with past_key_values or use_cache=False: the options live on the "
            "cache that generate makes. Pass past_key_values=RoutedCache(model.config, options) instead."
        )


def _asked_of_generate(model: Any, kwargs: dict[str, Any], name: str) -> Any:
    """A generation setting as generate will see it: a keyword, else the given config's, else the model's own."""
    places = (kwargs.get("generation_config"), model.generation_config)
    found = [kwargs.get(name), *(getattr(place, name, None) for place in places)]
    return next((value for value in found if value is not None), None)


def set_model_class(model: nn.Module) -> None:
    """Swaps the routed class in."""
    base: Any = type(model)
    model.__class__ = routed_model_class(base)


def initial_routing_tokens(hidden_size: int, std: float) -> Tensor:
    """The two learned embeddings, image side and text side, [2, D]."""
    return torch.randn(2, hidden_size) * std
