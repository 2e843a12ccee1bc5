"""What README and the pages in docs/ say is true: Python runs, YAML is valid, commands, settings and links exist."""

import re
import shlex
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from routing_experts.config import RoEConfig
from routing_experts.data.digits import DigitsTask
from routing_experts.pocket import build_hr
from routing_experts.studies.plan import Study
from routing_experts.training.recipe import DataSettings, LoraSettings, Recipe, TrainingSettings, recipe_from_dict
from routing_experts.training.schedule import Annealing, Stage
from routing_experts.training.settings import build

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "src" / "routing_experts" / "recipes"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
TABLE_OF: dict[str, tuple[type, set[str]]] = {  # heading in docs/recipes.md → its dataclass, and fields no recipe sets
    "A recipe": (Recipe, set()),
    "roe": (RoEConfig, {"markers", "base", "stripped", "format_version"}),
    "stages": (Stage, set()),
    "annealing": (Annealing, set()),
    "data": (DataSettings, set()),
    "data.digits": (DigitsTask, set()),
    "training": (TrainingSettings, set()),
    "lora": (LoraSettings, set()),
}
GIVEN = {"families.md": ("models/llava-hr-stage-1",)}  # folders of a small LLaVA-HR that a page's code begins with
every_page = pytest.mark.parametrize("page", PAGES, ids=[path.name for path in PAGES])


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands(page: Path) -> list[list[str]]:
    """Each command of the bash blocks as words, from `roe` or `make` on; others are left alone."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|\|\||;|\|", line):
                words = shlex.split(command.removeprefix("$ "), comments=True)
                while words and re.fullmatch(r"\w+=.*", words[0]):  # settings of the environment
                    words = words[1:]
                if words and Path(words[0]).name in ("roe", "make"):
                    found.append([Path(words[0]).name, *words[1:]])
    return found


@cache
def verbs() -> dict[str, Any]:
    from routing_experts.cli.app import app

    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def check_roe(words: list[str]) -> None:
    """Raises unless the verb, its options and a shipped recipe that it names exist."""
    shown = f"`roe {' '.join(words)}`"
    if words[0].startswith("-"):
        return
    assert words[0] in verbs(), f"{shown}: roe has {', '.join(sorted(verbs()))}"
    command, inner = verbs()[words[0]], words[1:]
    while hasattr(command, "commands"):
        assert inner[:1], f"{shown}: it has {', '.join(command.commands)}"
        assert inner[0] in command.commands, f"{shown}: it has {', '.join(command.commands)}"
        command, inner = command.commands[inner[0]], inner[1:]
    options = {name for p in command.params for name in (*p.opts, *p.secondary_opts) if name.startswith("-")}
    unknown = [w for w in words[1:] if w.startswith("-") and w.split("=")[0] not in options | {"--help"}]
    assert not unknown, f"{shown}: no option {unknown}, only {sorted(options)}"
    if words[0] == "train" and len(words) > 1 and not words[1].endswith(".yaml"):
        assert (RECIPES / f"{words[1]}.yaml").is_file(), f"{shown}: no recipe of this name ships with the package"


def makefile_targets() -> set[str]:
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    return {target for line in lines if (rule := re.match(r"([a-z][\w -]*):(?!=)", line)) for target in rule[1].split()}


@every_page
def test_commands_exist(page: Path) -> None:
    for tool, *words in commands(page):
        if tool == "make":
            named = {word for word in words if "=" not in word and not word.startswith("-")}
            unknown = sorted(named - makefile_targets())
            assert not unknown, f"make has no target {unknown}, only {sorted(makefile_targets())}"
        elif words:
            check_roe(words)


@every_page
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in GIVEN.get(page.name, ()):
        build_hr.main(Path(folder))
    namespace: dict[str, Any] = {"__name__": page.stem}
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{page.name}, python block {number}", "exec"), namespace)


@every_page
def test_yaml_blocks_are_recipes_or_studies(page: Path) -> None:
    """Blocks may leave out what a recipe needs; what they do set must be right."""
    for code in blocks(page, "yaml"):
        if "arms" in (study := yaml.safe_load(code)):
            build(Study, study, "")
            continue
        recipe_from_dict({"model": "pocket", "output": "runs/page", "data": {"records": 1}} | yaml.safe_load(code))


@every_page
def test_links_inside_the_project_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:", "#")):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name} links to {target}, which is not there"


def test_readme_has_its_fixed_parts() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    begin, end = text.find("<!-- results:begin -->"), text.find("<!-- results:end -->")
    assert 0 <= begin < end, "README.md lost the markers that the results table is written between"
    assert blocks(ROOT / "README.md", "python"), "README.md shows no Python"
    assert ["make", "quickstart"] in commands(ROOT / "README.md")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_described(path: Path) -> None:
    assert f"`{path.stem}`" in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def settings_table(heading: str) -> dict[str, str]:
    """Setting → the text of its default's cell, from the section's table."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    section = re.search(rf"^##+ `?{re.escape(heading)}`?\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"docs/recipes.md has no section {heading}"
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", section[1], re.MULTILINE))


@pytest.mark.parametrize("heading", TABLE_OF)
def test_settings_tables_are_complete(heading: str) -> None:
    kind, set_elsewhere = TABLE_OF[heading]
    settings = {f.name: f for f in fields(kind) if f.name not in set_elsewhere}
    table = settings_table(heading)
    assert set(table) == set(settings), f"docs/recipes.md, {heading}: differs in {sorted(set(table) ^ set(settings))}"
    for name, cell in table.items():
        assert_default(settings[name], cell)


def assert_default(setting: Field, cell: str) -> None:
    """A default in backquotes is read as YAML, as a recipe's would be; without them it is a word for the reader."""
    if setting.default is MISSING:
        assert not cell.startswith("`"), f"{setting.name} has no plain default, but the page says {cell}"
    elif cell.startswith("`"):
        said = yaml.safe_load(cell.strip("`"))
        default = list(setting.default) if isinstance(setting.default, tuple) else setting.default
        assert said == default, f"{setting.name}: the page says {said!r}, the default is {default!r}"
