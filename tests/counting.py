"""What ran of a decoder: the rows of every call of attention and MLP."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from routing_experts.models.families import family_of

Calls = dict[tuple[int, str, int], list[int]]


@contextlib.contextmanager
def counting(model: Any) -> Iterator[Calls]:
    """(layer, sublayer, query length) → rows of each call of attention or MLP, in order."""
    calls: Calls = defaultdict(list)
    handles = []

    def watch(layer: int, name: str, module: Any) -> None:
        def note(module: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            calls[layer, name, hidden.shape[1]].append(hidden.shape[0])

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))

    for index, layer in enumerate(family_of(model).decoder_layers(model)):
        watch(index, "attention", layer.self_attn)
        watch(index, "mlp", layer.mlp)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
