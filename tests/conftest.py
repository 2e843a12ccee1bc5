"""Fixtures that many tests share; the models and prompts themselves are built in ``tiny.py``."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tiny import tiny_llama, tiny_llava


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on many threads; and a test that sets a seed leaves no trace."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(before)


@pytest.fixture(params=["llava", "llama"])
def build(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Builds a tiny base model of each kind; keywords: seed, dtype, attention."""
    return {"llava": tiny_llava, "llama": tiny_llama}[request.param]
