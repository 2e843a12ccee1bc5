"""The engine on a CUDA device: ``make test-gpu``."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from routing_experts.data.encode import Encoded
from routing_experts.inference.engine import Engine, EngineSettings
from routing_experts.inference.requests import Request, Sampling
from routing_experts.models.cache import RoutedCache
from routing_experts.nn.losses import IGNORED
from tiny import prompt, route_everywhere, tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def routed(dtype: torch.dtype) -> Any:
    model = route_everywhere(tiny_llama(dtype=dtype), num_unrouted_layers=0).to("cuda")
    model.generation_config.eos_token_id = None
    return model


def asked(count: int) -> list[tuple[list[int], int]]:
    return [(prompt(seed, images=0, words=1 + seed % 7).ids, 3 + seed % 5) for seed in range(count)]


def requests(prompts: list[tuple[list[int], int]]) -> list[Request]:
    found = []
    for ids, count in prompts:
        ids_T = torch.tensor(ids)
        encoded = Encoded("", ids_T, torch.full_like(ids_T, IGNORED), torch.ones_like(ids_T))
        found.append(Request(encoded, sampling=Sampling(count)))
    return found


def test_each_request_gets_what_it_gets_alone_on_cuda():
    """Contract 3 on CUDA, in float64: tokens and routes."""
    model = routed(torch.float64)
    prompts = asked(24)
    got = Engine(model, None, EngineSettings(max_rows=5, max_waiting=9, capacity=8)).generate(requests(prompts))
    for (ids, count), one in zip(prompts, got, strict=True):
        cache = RoutedCache(model.config)
        alone = model.generate(
            torch.tensor([ids], device="cuda"), past_key_values=cache, do_sample=False, max_new_tokens=count
        )
        assert one.error is None
        assert cache.route is not None
        assert list(one.token_ids) == alone[0, len(ids) :].tolist()
        assert one.route == tuple(cache.route[0].tolist())


def test_bfloat16_answers_everything():
    """Guards precision of masks, positions and buffers: every request is answered at its length."""
    prompts = asked(12)
    got = Engine(routed(torch.bfloat16), None, EngineSettings(max_rows=4)).generate(requests(prompts))
    assert [len(one.token_ids) for one in got] == [count for _, count in prompts]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_replayed_graphs_give_what_running_the_layers_gives(dtype: torch.dtype):
    """Guards capture on a card: the same tokens and routes, in float64, while rows come and go and slots grow.

    In bfloat16 a reach that is rounded up may choose another kernel, so there each answer has its length.
    """
    model, prompts = routed(dtype), asked(24)
    bounds = EngineSettings(max_rows=5, max_waiting=9, capacity=8)
    plain = Engine(model, None, bounds).generate(requests(prompts))
    captured = Engine(model, None, replace(bounds, capture=True)).generate(requests(prompts))
    assert [len(one.token_ids) for one in captured] == [count for _, count in prompts]
    if dtype == torch.float64:
        assert [one.token_ids for one in captured] == [one.token_ids for one in plain]
        assert [one.route for one in captured] == [one.route for one in plain]


def test_an_engine_that_captures_may_be_used_again():
    """Guards recordings against what a finished batch leaves behind: the second batch finds the first one's graphs."""
    model, prompts = routed(torch.float64), asked(16)
    engine = Engine(model, None, EngineSettings(max_rows=4, capture=True))
    first = [one.token_ids for one in engine.generate(requests(prompts))]
    assert [one.token_ids for one in engine.generate(requests(prompts))] == first
