"""What tests of bad checkpoints share: how one is spoiled, and what is said of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from routing_experts.errors import CheckpointError
from routing_experts.models.published.reading import import_published
from routing_experts.models.published.sources import Sources


def refusal(folder: Path | str, sources: Sources) -> str:
    with pytest.raises(CheckpointError) as told:
        import_published(folder, sources)
    return str(told.value)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not ...}))


def rewrite(folder: Path, change: Any, shard: int = 1) -> None:
    """Changes one shard's tensors, and the index with it."""
    path = folder / f"model-{shard:05d}-of-00003.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    kept = {name: file for name, file in told["weight_map"].items() if file != path.name}
    index.write_text(json.dumps({"weight_map": kept | dict.fromkeys(tensors, path.name)}))
