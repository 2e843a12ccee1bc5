"""The one record type that everything downstream reads: a dialogue, with the pictures it is about."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

IMAGE_PLACEHOLDER = "<image>"
Picture = Path | Image.Image | bytes


@dataclass(frozen=True)
class Turn:
    """One question and its answer; each ``<image>`` in the question stands for the record's next picture."""

    question: str
    answer: str
    task: str = ""


@dataclass(frozen=True)
class Record:
    """A dialogue of one or more turns.

    ``images`` holds paths, pictures, or the bytes of picture files, in the order of their placeholders.
    """

    id: str
    turns: tuple[Turn, ...]
    images: Sequence[Picture] = ()
    system: str = ""
