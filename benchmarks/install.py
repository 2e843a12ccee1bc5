"""A stranger's install: the wheel into an empty virtual environment, then ``roe quickstart`` in an empty folder, timed.

``python benchmarks/install.py --json RECORD`` uses the Python that runs it; downloads are part of the time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from routing_experts.records import environment, save_json

ROOT = Path(__file__).parents[1]


def timed(*command: str | Path, folder: Path) -> float:
    """Seconds that a command takes; it must succeed."""
    started = time.monotonic()
    subprocess.run([str(part) for part in command], cwd=folder, check=True)
    return time.monotonic() - started


def main() -> None:
    """Builds, installs, runs, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/install.json")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        timed(sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", folder, ROOT, folder=folder)
        (wheel,) = folder.glob("*.whl")
        pip = folder / "env" / "bin" / "pip"
        constraints = ROOT / "constraints.txt"
        seconds_install = timed(sys.executable, "-m", "venv", "env", folder=folder)
        seconds_install += timed(pip, "install", "-q", "--no-cache-dir", "-c", constraints, wheel, folder=folder)
        empty = folder / "empty"
        empty.mkdir()
        seconds_quickstart = timed(folder / "env" / "bin" / "roe", "quickstart", folder=empty)
        results = json.loads((empty / "runs" / "quickstart" / "results.json").read_text(encoding="utf-8"))
        record = {
            "wheel": wheel.name,
            "wheel_bytes": wheel.stat().st_size,
            "seconds_install": seconds_install,
            "seconds_quickstart": seconds_quickstart,
            "routed": {key: results["routed"][key] for key in ("accuracy", "skip_rate")},
            "dense": results["dense"],
            "environment": environment(),
        }
    save_json(asked.json, record)


if __name__ == "__main__":
    main()
