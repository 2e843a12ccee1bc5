"""The command line as its user has it, and a run to point it at."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from routing_experts import api
from routing_experts.cli import main
from routing_experts.config import RoEConfig
from routing_experts.models.load import load_base, load_processor

Said = tuple[int, str, str]


@pytest.fixture
def roe(monkeypatch, capsys) -> Callable[..., Said]:
    """Runs a command line; gives its exit code, what it said, and what it complained of."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["roe", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture(scope="module")
def routed_run(tmp_path_factory) -> Path:
    """A run's folder whose model has random weights, and routers that tell questions apart."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    base, processor = load_base("pocket", random_init=True), load_processor("pocket")
    base.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model = api.convert(load_base(folder / "base"), RoEConfig(routing_token_std=1.0), processor)
    for name, parameter in model.named_parameters():
        if "router." in name:
            torch.nn.init.normal_(parameter, std=2.0)
    api.save_pretrained(model, folder / "run" / "model", processor)
    return folder / "run"
