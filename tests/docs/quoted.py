"""What pages quote, and the records that they quote from."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def record_of(name: str) -> dict[str, Any]:
    """A committed record, which was made on a clean commit."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert not record["environment"]["commit"].endswith("-dirty")
    return record


def page_of(name: str) -> str:
    """A page's text, its lines joined."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def block_of(page: str, name: str) -> str:
    """What stands between a name's markers in a page, without the blank lines around it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.split(f"<!-- {name}:begin -->\n")[1].split(f"<!-- {name}:end -->")[0].strip()
