"""What a release promises: one version everywhere, a changelog entry for it, and a wheel that holds what it needs."""

import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from site import getsitepackages

import pytest

import routing_experts

ROOT = Path(__file__).parents[1]


def test_one_version_everywhere():
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated is not None
    assert stated[1] == routing_experts.__version__
    assert f"## {stated[1]}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_installed_version_is_the_source_s():
    assert version("routing-experts") == routing_experts.__version__


@pytest.mark.slow
def test_a_wheel_installed_in_an_empty_environment_runs_in_an_empty_folder(tmp_path, monkeypatch):
    """Guards a stranger's install: pocket model, recipes, studies and templates are in the wheel."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # a stranger has no source tree there
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "pocket/model.safetensors",
        "pocket/processor_config.json",
        "recipes/quickstart.yaml",
        "recipes/studies/digits.yaml",
        "reports/page.html.jinja",
        "reports/report.css",
        "py.typed",
    ):
        assert f"routing_experts/{name}" in held, name
    assert not [name for name in held if "test" in name or name.endswith((".bin", ".pt"))]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python, roe = tmp_path / "env" / "bin" / "python", tmp_path / "env" / "bin" / "roe"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(getsitepackages()))  # this environment's, not downloaded again
    empty = tmp_path / "empty"
    empty.mkdir()
    said = subprocess.run(
        [roe, "generate", "pocket", "--prompt", "Add 3 and 4."], cwd=empty, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("7"), said.stdout
    few = ["--set", "training.steps=3", "--set", "training.batch_size=8"]
    said = subprocess.run([roe, "train", "quickstart", *few], cwd=empty, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert (empty / "runs" / "quickstart" / "model" / "roe.safetensors").is_file()
    where = subprocess.run(
        [python, "-c", "import routing_experts; print(routing_experts.__file__)"], cwd=empty, capture_output=True
    )
    assert str(site).encode() in where.stdout
