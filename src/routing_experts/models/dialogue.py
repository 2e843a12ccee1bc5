"""A cache that outlives its route: one dialogue whose turns are routed anew.

A turn may keep a layer that an earlier turn skipped, and then needs that layer's keys and values of all earlier tokens.
Here a layer that is skipped still stores them, computed by its own norm and projections from what enters it. So every
layer holds every token: a new turn runs its own tokens alone, but no memory is saved.

Shapes: T tokens of the whole dialogue.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from routing_experts.errors import RouteError
from routing_experts.models.cache import RoutedCache, RoutedCacheLayer
from routing_experts.models.options import RoutingOptions


class _Stored(BaseException):
    """Ends a layer's call once its keys and values are stored; never leaves this file."""


class _StoreAndStop:
    """Stands in for the cache inside one layer's call: stores the keys and values, then ends the call."""

    def __init__(self, cache: RoutedCache) -> None:
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        """Attention is not computed."""
        self.cache.update(keys, values, layer_idx, *args, **kwargs)
        raise _Stored


class DialogueCacheLayer(RoutedCacheLayer):
    """One layer's keys and values of all tokens, whichever turns ran it."""

    stores_skipped = True

    def set_keep(self, keep: Tensor | None) -> None:
        """Fixes whether this turn runs the layer."""
        if keep is not None and len(keep) != 1:
            raise RouteError(
                f"a dialogue cache in a batch of {len(keep)} rows: it holds one dialogue, whose turns have one route "
                "each. Give every dialogue a cache of its own, and generate without beams or several sequences."
            )
        super().set_keep(keep)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: there is one row."""
        raise RouteError(
            f"a dialogue cache asked for rows {indices.tolist()}: it holds one dialogue. Generate without beams or "
            "several sequences."
        )


class DialogueCache(RoutedCache):
    """Keys and values of one dialogue, without padding, over turns of different routes.

    The first prefill decides as with any routed cache, and decoding follows. ``open_turn`` lets the next call decide
    again, by routing tokens that see the context's keys as they are held here.

    Args:
        config: the model's.
        options: how routes are chosen; may be replaced between turns.

    Raises:
        RouteError: if a layer has a sliding window, which forgets the context that later turns are routed by.
    """

    def __init__(self, config: Any, options: RoutingOptions | None = None) -> None:
        super().__init__(config, options)
        if any(layer.is_sliding for layer in self.layers):
            raise RouteError(
                "a dialogue cache for a model with sliding windows: they forget the context that later turns are "
                "routed by. Prefill the whole dialogue again at each turn."
            )
        self.layers = [DialogueCacheLayer(layer.inner) for layer in self.layers]
        self._opened: Tensor | None = None

    def open_turn(self, input_ids: Tensor) -> None:
        """Announces a turn: the next call of the model decides a route for it and stores its tokens.

        Args:
            input_ids: of the whole dialogue [1, T], the new turn's question at its end; the tokens that the cache
                holds come first.

        Raises:
            RouteError: if the cache is empty (a first prefill needs no announcement) or the ids bring nothing new.
        """
        held = self.get_seq_length()
        if input_ids.shape[0] != 1 or not 0 < held < input_ids.shape[1]:
            raise RouteError(
                f"open_turn with ids of shape {list(input_ids.shape)} on a cache of {held} tokens: a new turn needs "
                "[1, T] ids of the whole dialogue, some of them held and some new. Prefill a first turn without it."
            )
        self._opened = input_ids

    def take_turn(self, num_new: int) -> Tensor | None:
        """The dialogue's ids [1, T] if a turn was announced, once; None for a decoding step.

        Raises:
            RouteError: if the call brings more or fewer tokens than were announced.
        """
        opened, self._opened = self._opened, None
        if opened is not None and opened.shape[1] != self.get_seq_length() + num_new:
            raise RouteError(
                f"a call of {num_new} tokens behind {self.get_seq_length()}, but the turn was opened with "
                f"{opened.shape[1]} ids: the whole turn has to be prefilled at once. Pass all of its new tokens."
            )
        return opened


def store_keys(layer: Any, run: Any, hidden: Tensor, cache: RoutedCache, **kwargs: Any) -> None:
    """Stores a skipped layer's keys and values of ``hidden`` [1, T, D].

    The layer's own code computes them, up to the point where it hands them to the cache: family differences in norms,
    projections and rotary embeddings come along, and so do queries, which nobody needs.
    """
    before = cache.layers[layer.self_attn.layer_idx].get_seq_length()
    with contextlib.suppress(_Stored):
        run(layer, hidden, past_key_values=_StoreAndStop(cache), **kwargs)
    assert cache.layers[layer.self_attn.layer_idx].get_seq_length() == before + hidden.shape[1]


def start_rotary(model: Any) -> tuple[Tensor, Tensor]:
    """cos and sin of position 0 [1, 1, head size]: where a dialogue's first token, now in the past, stood."""
    tokens = model.routing_tokens[None]
    positions = torch.zeros(1, 1, dtype=torch.long, device=tokens.device)
    cos, sin = model.get_decoder().rotary_emb(tokens, position_ids=positions)
    return cos, sin
