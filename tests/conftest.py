"""Fixtures that many tests share; the models and prompts themselves are built in ``tiny.py``."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

# Tiny tensors are slower on many threads, in the processes that tests start as well. Before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from tiny import tiny_llama, tiny_llava

settings.register_profile("suite", deadline=None)  # other processes' work is no fault of an example's
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def own_draws() -> Iterator[None]:
    """A test that sets a seed leaves no trace."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture(params=["llava", "llama"])
def build(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Builds a tiny base model of each kind; keywords: seed, dtype, attention."""
    return {"llava": tiny_llava, "llama": tiny_llama}[request.param]
