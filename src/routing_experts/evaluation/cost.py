"""Counted cost: floating-point operations and bytes that a route asks of the decoder.

Counted from shapes, not measured: linear maps, attention's two products, weights and cache as they are read. Norms,
rotary embeddings, the vision tower and routing tokens are left out; they are small beside the rest, but for LLaVA-HR's
towers, which take a seventh of a 7B's prefill and a quarter of a 13B's.

Shapes: B rows, L decoder layers, T prompt tokens.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from routing_experts.models.convert import is_routed
from routing_experts.models.families import family_of

PARTS = ("skip_down", "skip_up", "router")  # what conversion adds to a decoder layer


@dataclass(frozen=True)
class Cost:
    """What a piece of work asks for.

    Attributes:
        flops: a multiplication and an addition count as two.
        bytes: of weights, keys and values that are read.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class DecoderSizes:
    """What costs are counted from.

    Attributes:
        layer, adapter, head: weights of the linear maps of one decoder layer, of one adapter, of the output head.
        query: heads times head size.
        key_value: elements of keys and values that a token leaves in a layer.
        element: bytes of one weight; keys and values have the same.
    """

    layer: int
    adapter: int
    head: int
    query: int
    key_value: int
    element: int

    def prefill(self, route_BL: Tensor, length: int) -> Cost:
        """Of a prompt of ``length`` tokens in every row, up to the first token's logits."""
        rows = len(route_BL)
        kept, skipped = self._layer_rows(route_BL)
        attention = 2 * length * length * self.query  # causal: half of all pairs, two products
        flops = kept * (2 * length * self.layer + attention) + skipped * 2 * length * self.adapter
        return Cost(flops + 2 * rows * self.head, self._weights(route_BL) * self.element)

    def decode(self, route_BL: Tensor, length: int, steps: int) -> Cost:
        """Of ``steps`` single-token steps behind a past of ``length`` tokens in every row."""
        rows = len(route_BL)
        kept, skipped = self._layer_rows(route_BL)
        seen = sum(length + step + 1 for step in range(steps))  # keys of one row in one layer, over all steps
        flops = steps * 2 * (kept * self.layer + skipped * self.adapter + rows * self.head)
        read = steps * self._weights(route_BL) + kept * seen * self.key_value
        return Cost(flops + 4 * kept * seen * self.query, read * self.element)

    def _weights(self, route_BL: Tensor) -> int:
        """Weights of one pass: a layer's are read if any row keeps it, an adapter's if any row skips."""
        return int(route_BL.any(0).sum()) * self.layer + int((~route_BL).any(0).sum()) * self.adapter + self.head

    @staticmethod
    def _layer_rows(route_BL: Tensor) -> tuple[int, int]:
        kept = int(route_BL.sum())
        return kept, route_BL.numel() - kept


def decoder_sizes(model: Any) -> DecoderSizes:
    """The sizes of a routed or dense model's decoder; layers are taken to be alike."""
    config = model.config.get_text_config(decoder=True)
    layer = family_of(model).decoder_layers(model)[-1]
    linear = {name: m.weight.numel() for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
    return DecoderSizes(
        layer=sum(size for name, size in linear.items() if name not in PARTS),
        adapter=sum(linear[name] for name in PARTS[:2]) if is_routed(model) else 0,
        head=config.vocab_size * config.hidden_size,
        query=config.num_attention_heads * head_size(config),
        key_value=2 * config.num_key_value_heads * head_size(config),
        element=next(model.parameters()).element_size(),
    )


def head_size(config: Any) -> int:
    """Width of one attention head of a decoder's config."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
