"""An imported model's folder, whole or not at all."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from routing_experts.errors import CheckpointError


def check_place(output: Path) -> None:
    """Holds the place to be free.

    Raises:
        CheckpointError: if something is there.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise CheckpointError(f"{output} is there already, and an import replaces nothing. Give another folder.")


def write_model(model: Any, processor: Any, output: Path) -> None:
    """Writes model and processor to a temporary name beside, then renames.

    Raises:
        CheckpointError: if something is there.
    """
    check_place(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(".partial", f".{output.name}.", output.parent))
    try:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        staging.chmod(0o755)
        os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
