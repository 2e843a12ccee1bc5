"""Captured decoding: what is recorded once stays right while rows come, go and grow.

CUDA is not needed: a tape records as a CUDA graph does, operations on the tensors that were there, with whatever Python
decided once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from routing_experts.data.encode import Encoded
from routing_experts.errors import RequestError
from routing_experts.inference import slots
from routing_experts.inference.engine import Engine, EngineSettings
from routing_experts.inference.graphs import Graphs
from routing_experts.inference.requests import Request, Sampling
from routing_experts.inference.slots import SlotCache
from routing_experts.models.options import RoutingOptions
from routing_experts.nn.losses import IGNORED
from tiny import NUM_LAYERS, prompt, route_everywhere, tiny_llama


class Tape(TorchDispatchMode):
    """Writes down every operation on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        self.calls.append((function, args, given, function(*args, **given)))
        return self.calls[-1][-1]


def recorded(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    """A recording of one call, in place of CUDA's."""
    with Tape() as tape:
        output = function(*inputs)

    def replay() -> Tensor:
        now: dict[int, Any] = {}  # what a tensor of the recording has become
        for operation, args, kwargs, recorded in tape.calls:
            args, kwargs = tree_map(lambda leaf: now.get(id(leaf), leaf), (args, kwargs))
            result = operation(*args, **kwargs)
            leaves = zip(tree_leaves(recorded), tree_leaves(result), strict=True)
            now.update((id(old), new) for old, new in leaves if isinstance(old, Tensor))
        return now[id(output)]

    return replay


@pytest.fixture(scope="module")
def llama():
    model = route_everywhere(tiny_llama(dtype=torch.float64), num_unrouted_layers=0)
    model.generation_config.eos_token_id = None
    return model


def captured(model: object, bounds: EngineSettings, most: int) -> Engine:
    engine = Engine(model, None, bounds)
    own = engine._slots
    engine._slots = SlotCache(model.config, own.num_slots, own.capacity, own.device, Graphs(lambda: recorded, most))  # type: ignore[attr-defined]
    return engine


def request(seed: int, words: int, count: int, flags: list[bool]) -> Request:
    ids_T = torch.tensor(prompt(seed, images=0, words=words).ids)
    encoded = Encoded("", ids_T, torch.full_like(ids_T, IGNORED), torch.ones_like(ids_T))
    return Request(encoded, sampling=Sampling(count), routing=RoutingOptions(route=torch.tensor(flags)))


ROUTES = st.lists(st.booleans(), min_size=NUM_LAYERS, max_size=NUM_LAYERS)
ASKED = st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9), st.integers(1, 7), ROUTES), min_size=1, max_size=7)


@given(ASKED, st.integers(1, 4), st.sampled_from([1, 3, 999]), st.sampled_from([4, 256]))
@settings(max_examples=12)
def test_replayed_steps_are_the_steps(llama, asked, max_rows, most, growth):
    """Guards the key and what stays in place: another route, number of rows, reach or capacity replays no old step."""
    bounds = EngineSettings(max_rows=max_rows, capacity=8)
    built = [request(*one) for one in asked]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "GROWTH", growth)
        engine = captured(llama, bounds, most)
        expected = Engine(llama, None, bounds).generate(built)
        assert [one.token_ids for one in engine.generate(built)] == [one.token_ids for one in expected]
        assert [one.token_ids for one in engine.generate(built[::-1])] == [one.token_ids for one in expected[::-1]]


def test_slots_that_grew_half_way_are_recorded_anew(llama, monkeypatch):
    """Guards recordings against memory that ends while slots grow: layers before that have moved."""
    engine = captured(llama, EngineSettings(max_rows=2, capacity=8), 999)
    monkeypatch.setattr(slots, "GROWTH", 16)
    first, large, third = ([seed, words, 6, [True] * NUM_LAYERS] for seed, words in ((0, 3), (1, 20), (2, 4)))
    engine.generate([request(*first)])
    grow = engine._slots.layers[3].grow

    def fail(capacity: int) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine._slots.layers[3], "grow", fail)
    got = engine.generate([request(*first), request(*large), request(*third)])
    monkeypatch.setattr(engine._slots.layers[3], "grow", grow)
    expected = Engine(llama).generate([request(*first), request(*third)])
    assert "out of memory" in str(got[1].error)
    assert [got[n].token_ids for n in (0, 2)] == [one.token_ids for one in expected]


@pytest.mark.parametrize("kept_by", [((1, 2), (3, 4, 5)), ((1,), (0, 1)), ((1,), (3,)), ((), (1, 2))])
def test_company_of_another_make_up_is_recorded_anew(llama, kept_by):
    """Guards the key: a layer that one, none or all rows keep, in order or not, in steps of as many rows."""
    bounds = EngineSettings(max_rows=3, capacity=8)
    engine = captured(llama, bounds, 999)
    for keepers in kept_by:
        # Request 0 is done first, and the last takes its row: who kept a layer may now stand there in another order.
        built = [request(n, 3 + n, 3 if n == 0 else 6, [True, n in keepers, True, True, n > 0]) for n in range(6)]
        expected = Engine(llama, None, bounds).generate(built)
        assert [one.token_ids for one in engine.generate(built)] == [one.token_ids for one in expected]


def test_a_step_is_recorded_once(llama):
    """Guards the gain: the same work again records nothing; slots that moved are recorded anew; old ones give way."""
    engine = captured(llama, EngineSettings(max_rows=2, capacity=64), 999)
    graphs = engine._slots.graphs
    assert graphs is not None
    built = [request(seed, 3, 5, [True, False, True, True, False]) for seed in range(2)]
    engine.generate(built)
    known = len(graphs)
    assert known >= NUM_LAYERS
    engine.generate(built)
    assert len(graphs) == known
    engine._slots.reserve(65)
    assert len(graphs) == 0
    few = captured(llama, EngineSettings(max_rows=2, capacity=64), 3)
    few.generate(built)
    assert few._slots.graphs is not None
    assert len(few._slots.graphs) == 3


def test_graphs_need_cuda(llama):
    """Guards the message."""
    with pytest.raises(RequestError, match="captured decoding on cpu: only CUDA"):
        Engine(llama, None, EngineSettings(capture=True))
