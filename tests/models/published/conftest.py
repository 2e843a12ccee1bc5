"""A good checkpoint to be spoiled."""

from types import SimpleNamespace
from typing import Any

import pytest

from published import (
    TINY,
    drawn,
    llava_settings,
    llava_shapes,
    write_checkpoint,
    write_clip,
    write_tokenizer,
)
from routing_experts.models.published import blueprint
from routing_experts.models.published.sources import Sources


@pytest.fixture
def place(tmp_path, monkeypatch) -> Any:
    """A good checkpoint of three shards, and a model that must not be built."""

    def never(self: Any, wanted: Any) -> Any:
        raise AssertionError("weights were used")

    monkeypatch.setattr(blueprint.Blueprint, "build", never)
    folder = write_checkpoint(tmp_path / "llava", drawn(llava_shapes(TINY, tower=False)), llava_settings(TINY), 3)
    write_tokenizer(folder)
    write_clip(tmp_path / "clip", TINY)
    return SimpleNamespace(folder=folder, root=tmp_path, sources=Sources(vision_tower=str(tmp_path / "clip")))
