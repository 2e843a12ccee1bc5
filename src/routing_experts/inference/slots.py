"""Where requests that decode together keep their keys and values: a slot a kept row, in every layer apart.

Rows come and go while others go on. In each layer the rows that keep it stand in its first slots, so that attention
reads them as one slice, with nothing copied; a row that leaves is replaced by the last. The order of slots therefore
differs from layer to layer, and each layer knows which row of the batch stands where.

Shapes: B rows that decode, N ≤ B kept rows of a layer, H key and value heads, C capacity in tokens, E head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import proxy

import torch
from torch import Tensor

from routing_experts.errors import RouteError
from routing_experts.inference.graphs import Graphs
from routing_experts.models.attention import attention_form
from routing_experts.models.cache import RoutedCache, RoutedCacheLayer, tensor_bytes
from routing_experts.models.convert import ATTENTION

GROWTH = 256  # tokens by which slots grow at least


@dataclass
class Past:
    """One request's keys and values after its prefill.

    Attributes:
        length: its tokens.
        route: keep flags, a layer each.
        keys, values: [H, length, E] a layer; None where the route skips.
        shift: what a next token's position is beside its number; not 0 where pictures' tokens share positions.
    """

    length: int
    route: tuple[bool, ...]
    keys: list[Tensor | None]
    values: list[Tensor | None]
    shift: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return tensor_bytes((*self.keys, *self.values))


def pasts_of(cache: RoutedCache, lengths: Sequence[int], shifts: Sequence[int]) -> list[Past]:
    """A prefilled batch's cache, taken apart; left padding is left behind.

    Args:
        cache: of the prefill.
        lengths: real tokens of each row.
        shifts: see ``Past``.
    """
    routes = cache.route  # none where the model does not route: it ran all layers
    flags = [(True,) * len(cache.layers)] * len(lengths) if routes is None else [tuple(row) for row in routes.tolist()]
    pasts = []
    for row, length in enumerate(lengths):
        keys: list[Tensor | None] = []
        values: list[Tensor | None] = []
        for layer in cache.layers:
            kept = layer.keep is None or bool(layer.keep[row])
            slot = row if layer.keep is None else int(layer.keep[:row].sum())
            keys.append(layer.keys[slot, :, -length:].clone() if kept and layer.keys is not None else None)
            values.append(layer.values[slot, :, -length:].clone() if kept and layer.values is not None else None)
        pasts.append(Past(length, flags[row], keys, values, shifts[row]))
    return pasts


class SlotLayer(RoutedCacheLayer):
    """One layer's slots. What the routed layer asks of it is what it asks of every cache layer.

    Behind its row's past a slot holds zeros, not what memory or an earlier row left there: attention reads all slots as
    far as the longest row, a masked key counts 0 times its value, and 0 times NaN is NaN.

    Attributes:
        number: the layer's.
        rows: the batch row in each slot, on the host.
        kept_rows, skipped_rows: rows that run the layer, in slot order, and those that do not, on the device.
    """

    def __init__(self, cache: "SlotCache", number: int) -> None:
        self.cache: SlotCache = proxy(cache)  # what owns a slot's memory is freed with the engine, not some time after
        self.number = number
        self.rows: list[int] = []
        self._order = torch.zeros(cache.num_slots, dtype=torch.long, device=cache.device)
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        super().__init__(inner=None)

    def set_keep(self, keep: Tensor | None) -> None:
        """Slots come with routes of their own; there is nothing to decide."""
        assert keep is None, "routes are decided at prefill"
        self.refresh()

    def refresh(self) -> None:
        """Looks anew which rows stand where, after rows came or went."""
        batch, count = len(self.cache.lengths), len(self.rows)
        self.any_keep = bool(self.rows)
        self.all_keep = self.rows == list(range(batch))
        others = sorted(set(range(batch)) - set(self.rows))
        self._order[:batch] = torch.tensor(self.rows + others, dtype=torch.long)
        self.kept_rows, self.skipped_rows = self._order[:count], self._order[count:batch]
        self.slots = self.cache.numbers[:count]

    def step(self, function: Callable[..., Tensor], hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Runs a layer's decoding step, or replays it."""
        graphs = self.cache.graphs
        if graphs is None:
            return function(hidden, kwargs)

        def fixed(hidden: Tensor, mask: Tensor, *rotary: Tensor) -> Tensor:
            given = {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None}
            return function(hidden, kwargs | given)

        key = (self.number, len(self.rows), self.all_keep)  # the number of rows and the reach are in the shapes
        return graphs.call(key, fixed, hidden, kwargs["attention_mask"], *kwargs["position_embeddings"])

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """[N, H, C, E], all capacity."""
        return None if self._keys is None else self._keys[: len(self.rows)]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """[N, H, C, E], all capacity."""
        return None if self._values is None else self._values[: len(self.rows)]

    @property
    def num_bytes(self) -> int:
        """Bytes of its slots; none before a first row keeps the layer."""
        return tensor_bytes((self._keys, self._values))

    def admit(self, row: int, keys: Tensor | None, values: Tensor | None) -> None:
        """Puts a request into the next slot; None for one that skips the layer."""
        if keys is None or values is None:
            return
        if self._keys is None or self._values is None:
            room = (self.cache.num_slots, keys.shape[0], self.cache.capacity)
            self._keys, self._values = (states.new_zeros((*room, states.shape[2])) for states in (keys, values))
        slot, length = len(self.rows), keys.shape[1]
        for held, states in ((self._keys, keys), (self._values, values)):
            held[slot, :, :length] = states
            held[slot, :, length:] = 0  # see the class
        self.rows.append(row)

    def grow(self, capacity: int) -> None:
        """Moves to larger buffers."""
        if self._keys is None or self._values is None:
            return
        for name, old in (("_keys", self._keys), ("_values", self._values)):
            if old.shape[2] < capacity:  # an earlier growth may have ended half way, for want of memory
                new = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
                new[:, :, : old.shape[2]] = old
                setattr(self, name, new)

    def leave(self, row: int, last: int) -> None:
        """Takes a row out; the batch's last row takes its number, the last slot its slot."""
        if row in self.rows:
            assert self._keys is not None
            assert self._values is not None
            slot, end = self.rows.index(row), len(self.rows) - 1
            if slot != end:
                length = self.cache.lengths[self.rows[end]]
                gone = self.cache.lengths[row] + 1  # a step may be half done
                for held in (self._keys, self._values):
                    held[slot, :, :length] = held[end, :, :length]
                    held[slot, :, length:gone] = 0
                self.rows[slot] = self.rows[end]
            self.rows.pop()
        if last != row and last in self.rows:
            self.rows[self.rows.index(last)] = row

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes each row's new token behind its own past; gives the slots as far as the longest row reaches."""
        assert self._keys is not None
        assert self._values is not None
        where = self.cache.positions if self.all_keep else self.cache.positions[self.kept_rows]
        self._keys[self.slots, :, where] = key_states[:, :, 0]
        self._values[self.slots, :, where] = value_states[:, :, 0]
        count, reach = len(self.rows), self.cache.reach
        return self._keys[:count, :, :reach], self._values[:count, :, :reach]

    def skip(self, num_tokens: int) -> None:
        """The cache counts tokens, for all layers at once."""

    def get_seq_length(self) -> int:
        """The longest past."""
        return self.cache.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask must cover."""
        return self.cache.longest + query_length, 0

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether there is a past."""
        return self.cache.longest > 0

    @property
    def is_sliding(self) -> bool:
        """Never: sliding windows are refused when the engine is made."""
        return False


class SlotCache(RoutedCache):
    """The keys and values of all rows that decode together.

    Args:
        config: the model's.
        num_slots: rows at most.
        capacity: tokens a row at most.
        device: of keys and values.
        graphs: recordings of decoding steps, to replay; None runs every step anew. What a recording reads stays where
            it is: what stands in slots and in what order, and positions, are written in place.

    Raises:
        RouteError: if a layer has a sliding window, whose positions slots do not follow, or attention takes no mask.
    """

    def __init__(
        self, config: Any, num_slots: int, capacity: int, device: torch.device, graphs: Graphs | None = None
    ) -> None:
        super().__init__(config)
        if any(layer.is_sliding for layer in self.layers):
            raise RouteError(
                "a model with sliding windows in the engine: its slots keep whole pasts. Use model.generate for it."
            )
        self.attention: str = config.get_text_config(decoder=True)._attn_implementation
        if self.attention not in ATTENTION:
            raise RouteError(
                f"attention implementation {self.attention!r} in the engine: rows of different lengths need a mask, "
                "which it does not take. Load the model with attn_implementation='sdpa' (supported: "
                f"{', '.join(ATTENTION)})."
            )
        self.num_slots, self.capacity, self.device, self.graphs = num_slots, capacity, device, graphs
        self.lengths: list[int] = []
        self.shifts: list[int] = []
        self._positions, self._shifts = (torch.zeros(num_slots, dtype=torch.long, device=device) for _ in range(2))
        self.numbers = torch.arange(num_slots, device=device)
        self.longest = 0
        self.layers: list[SlotLayer] = [  # type: ignore[assignment]
            SlotLayer(self, number) for number in range(len(self.layers))
        ]
        self.refresh()

    @property
    def positions(self) -> Tensor:
        """Where each row's new token goes, [B]."""
        return self._positions[: len(self.lengths)]

    @property
    def rotary_positions(self) -> Tensor:
        """The position of each row's new token, [B]."""
        return self.positions + self._shifts[: len(self.lengths)]

    @property
    def reach(self) -> int:
        """Tokens a row that attention reads, the new one among them; for recordings one of few numbers."""
        longest = self.longest + 1
        return longest if self.graphs is None else min(self.capacity, -(-longest // GROWTH) * GROWTH)

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots, free ones among them."""
        return sum(layer.num_bytes for layer in self.layers)

    def reserve(self, capacity: int) -> None:
        """Makes room for rows of so many tokens; where memory ends, what was there stays right."""
        if capacity > self.capacity:
            larger = -(-capacity // GROWTH) * GROWTH
            if self.graphs is not None:
                self.graphs.clear()  # first: where memory ends half way, some layers have moved
            for layer in self.layers:
                layer.grow(larger)
            self.capacity = larger

    def admit(self, past: Past) -> None:
        """Adds a request as the next row, or, where memory ends, leaves all as it was. ``refresh`` after the last."""
        row = len(self.lengths)
        assert row < self.num_slots
        try:
            for layer, keys, values in zip(self.layers, past.keys, past.values, strict=True):
                layer.admit(row, keys, values)
        except torch.OutOfMemoryError:
            for layer in self.layers:
                layer.leave(row, row)
            raise
        self.lengths.append(past.length)
        self.shifts.append(past.shift)

    def leave(self, row: int) -> None:
        """Removes a row; the last row takes its number. ``refresh`` when all have left that leave."""
        last = len(self.lengths) - 1
        for layer in self.layers:
            layer.leave(row, last)
        for numbers in (self.lengths, self.shifts):
            numbers[row] = numbers[last]
            numbers.pop()

    def advance(self) -> None:
        """Counts the step that every row has taken."""
        self.lengths = [length + 1 for length in self.lengths]
        self.positions.add_(1)
        self.longest += 1

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """What each row's new token sees, [B, 1, 1, reach]; None where all rows see all.

        Boolean, or of the hidden states' ``dtype`` for eager attention, which adds it.
        """
        if self.graphs is None and len(set(self.lengths)) <= 1:
            return None
        seen = torch.arange(self.reach, device=self.device)
        return attention_form((seen <= self.positions[:, None])[:, None, None], dtype, self.attention == "eager")

    def refresh(self) -> None:
        """Looks anew which rows stand where, after rows came or went."""
        for held, numbers in ((self._positions, self.lengths), (self._shifts, self.shifts)):
            held[: len(numbers)] = torch.tensor(numbers, dtype=torch.long)
        self.longest = max(self.lengths, default=0)
        for layer in self.layers:
            layer.refresh()
