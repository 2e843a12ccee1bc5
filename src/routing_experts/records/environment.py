"""The machine, versions and commit that a record belongs to."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

REPORTED_PACKAGES = ("routing-experts", "torch", "transformers")


def environment() -> dict[str, Any]:
    """Where and when a run took place; ``commit`` is the source tree's if there is one, "-dirty" if it was changed."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        **{name: next((d.version for d in distributions(name=name)), None) for name in REPORTED_PACKAGES},
        "commit": _source_commit(),
    }


def origin() -> dict[str, Any]:
    """Date, commit and processor: what parts of a record keep that were made at different times."""
    made = environment()
    return {name: made[name] for name in ("date", "commit", "cpu")}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = cpuinfo.is_file() and re.search(
        r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE
    )
    if named:
        return named[1].strip()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _source_commit() -> str | None:
    root = Path(__file__).resolve().parents[3]
    # Installed into an environment that lies in somebody's repository, git would answer with that repository's commit.
    if not (root / ".git").exists():
        return None
    return _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
