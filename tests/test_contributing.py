"""CONTRIBUTING.md's layout and the source tree say the same, both ways."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "routing_experts"
LAYOUT = re.compile(r"<!-- layout:begin -->(.*)<!-- layout:end -->", re.DOTALL)
ENTRY = re.compile(r"^- `([\w/]+\.py)`: \S.*$")


def layout_lines() -> list[str]:
    found = LAYOUT.search((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert found, "CONTRIBUTING.md lost its layout:begin and layout:end markers"
    return [line for line in found.group(1).splitlines() if line.startswith("-")]


def listed() -> list[str]:
    entries = [ENTRY.match(line) for line in layout_lines()]
    return [entry.group(1) for entry in entries if entry]


def present() -> set[str]:
    paths = (path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
    return {path.as_posix() for path in paths if path.name != "__init__.py" or len(path.parts) == 1}


def test_every_line_names_a_file_and_says_what_it_is() -> None:
    wrong = [line for line in layout_lines() if not ENTRY.match(line)]
    assert not wrong, f"write '- `path/file.py`: what it holds' instead of {wrong}"


def test_no_file_is_listed_twice() -> None:
    names = listed()
    assert len(names) == len(set(names)), f"listed twice: {sorted(n for n in set(names) if names.count(n) > 1)}"


def test_every_file_is_listed() -> None:
    missing = sorted(present() - set(listed()))
    assert not missing, f"CONTRIBUTING.md's layout lacks {missing}: give each a line"


def test_every_listed_file_exists() -> None:
    gone = sorted(set(listed()) - present())
    assert not gone, f"CONTRIBUTING.md's layout lists {gone}, which src/routing_experts lacks: remove the lines"
