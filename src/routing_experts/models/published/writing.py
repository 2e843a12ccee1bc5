"""An imported model's folder, whole or not at all."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from routing_experts.errors import CheckpointError
from routing_experts.models.staging import staged


def check_place(output: Path) -> Path:
    """Holds the place to be free, and such that something can be put there.

    Returns:
        The place, links followed.

    Raises:
        CheckpointError: if something is there, or nothing can be.
    """
    place = output.resolve()
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise CheckpointError(f"{output} is there already, and an import replaces nothing. Give another folder.")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=place.parent, prefix="."):  # beside those of another import into the same place
            pass
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written ({error.strerror}). Give a folder that can.") from error
    return place


def write_model(model: Any, processor: Any, output: Path) -> None:
    """Writes model and processor to a temporary name beside, then renames.

    Raises:
        CheckpointError: if something is there, or the disk is full.
    """
    place = check_place(output)
    with staged(place) as staging:
        model.save_pretrained(staging)
        processor.save_pretrained(staging)
        os.replace(staging, place)
