"""Folders that are written beside their place and renamed into it once they are whole."""

import glob
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from routing_experts.errors import CheckpointError

_STAGING = ".partial"


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder``; what is left in it at the end goes, and so does what killed writes left.

    Raises:
        CheckpointError: if weights cannot be written: the disk may be full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.????????{_STAGING}"):
        shutil.rmtree(left, ignore_errors=True)
    staging = folder.parent / f".{folder.name}.{secrets.token_hex(4)}{_STAGING}"
    staging.mkdir()  # with the rights that anything else gets here; ``mkdtemp`` would keep others out
    try:
        yield staging
    except SafetensorError as error:  # safetensors wraps the system's errors
        raise CheckpointError(
            f"{folder} could not be written ({error}). What was there before stays, if it was whole; make room, or "
            "choose another folder."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
