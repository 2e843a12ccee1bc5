"""The optimiser's state by parameter name, without a launcher: what is written is what is read."""

import pytest
import torch
from torch import nn

from routing_experts.errors import CheckpointError, ConfigError
from routing_experts.training import state
from routing_experts.training.sharding import engine_arguments, engine_file, is_sharded
from routing_experts.training.state import PlainEngine, load_state, save_state, whole_weights


def stepped(seed: int = 0) -> PlainEngine:
    """Three linear maps, of which the last has never been trained, after three steps of AdamW."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model[:2](torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
    return PlainEngine(model, optimizer)


@pytest.mark.parametrize("file_bytes", [1, 2**30])
def test_what_is_written_is_read(file_bytes, tmp_path, monkeypatch):
    """Guards every moment and count, in one file and in many, and who has none."""
    monkeypatch.setattr(state, "FILE_BYTES", file_bytes)
    engine = stepped()
    save_state(engine, tmp_path, writes=True)
    assert len(list(tmp_path.glob(state.FILES))) == (1 if file_bytes > 1 else 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    other = PlainEngine(model, torch.optim.AdamW(model.parameters()))
    load_state(other, tmp_path)
    for mine, theirs in zip(engine.model.parameters(), other.model.parameters(), strict=True):
        expected, found = engine.read(mine), other.read(theirs)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not engine.read(engine.model[2].weight)  # type: ignore[index]
    assert engine.read(engine.model[0].weight)["step"] == 3  # type: ignore[index]


def test_who_does_not_write_writes_nothing(tmp_path):
    """Guards processes that help to gather: one writes for all."""
    engine = stepped()
    save_state(engine, tmp_path, writes=False)
    assert not list(tmp_path.iterdir())
    assert whole_weights(engine, keep=False) == {}


def test_weights_are_whole_and_their_own(tmp_path):
    """Guards what is saved against steps that follow."""
    engine = stepped()
    weights = whole_weights(engine, keep=True)
    assert weights.keys() == engine.model.state_dict().keys()
    with torch.no_grad():
        engine.model[0].weight.zero_()  # type: ignore[index, operator]
    assert weights["0.weight"].any()


def test_state_that_is_not_there_or_cut_is_named(tmp_path):
    """Guards a run against going on without its moments."""
    engine = stepped()
    with pytest.raises(CheckpointError, match=r"no optimizer-\*\.safetensors: another version"):
        load_state(engine, tmp_path)
    save_state(engine, tmp_path, writes=True)
    (file,) = tmp_path.glob(state.FILES)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="cut short"):
        load_state(engine, tmp_path)


def test_engines_by_name(tmp_path, monkeypatch):
    """Guards names, files of one's own, and messages for what is neither."""
    for name in ("zero2", "zero3", "zero3_offload", "fsdp2"):
        assert engine_file(name)[0].is_file()
        assert is_sharded(name)
    assert engine_arguments(None) == {}
    assert engine_arguments("zero3")["deepspeed"].endswith("zero3.json")
    assert engine_arguments("fsdp2")["fsdp_config"]["version"] == 2
    own = tmp_path / "own.json"
    own.write_text("{}")
    assert engine_arguments(str(own)) == {"deepspeed": str(own)}
    with pytest.raises(ConfigError, match=r"training.sharding='zero4'.*fsdp2, zero2, zero3, zero3_offload"):
        engine_file("zero4")
    own.write_text("[]")
    with pytest.raises(ConfigError, match="holds list"):
        engine_file(str(own))
    assert not is_sharded(None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert is_sharded(None)
