"""A good checkpoint to be spoiled."""

from types import SimpleNamespace
from typing import Any

import pytest

from published import (
    HR_SETTINGS,
    HR_SPREAD,
    TINY,
    drawn,
    llava_hr_settings,
    llava_hr_shapes,
    llava_settings,
    llava_shapes,
    write_checkpoint,
    write_clip,
    write_tokenizer,
)
from routing_experts.models.published import blueprint
from routing_experts.models.published.reading import import_published
from routing_experts.models.published.sources import Sources
from routing_experts.models.published.writing import write_model


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


@pytest.fixture(scope="session")
def published_hr(tmp_path_factory) -> Any:
    """A LLaVA-HR as its authors publish it, imported and written; nobody may change it."""
    root = tmp_path_factory.mktemp("hr")
    tensors = drawn(llava_hr_shapes(TINY), spread=HR_SPREAD)
    folder = write_checkpoint(root / "hr", tensors, llava_hr_settings(TINY, **HR_SETTINGS))
    write_tokenizer(folder)
    write_clip(root / "clip", TINY)
    sources = Sources(vision_tower=str(root / "clip"))
    model, processor = import_published(folder, sources)
    write_model(model, processor, root / "imported")
    t = {name: value.double() for name, value in tensors.items()}
    return SimpleNamespace(
        root=root,
        folder=folder,
        sources=sources,
        tensors=tensors,
        t=t,
        model=model,
        processor=processor,
        loaded=root / "imported",
    )
