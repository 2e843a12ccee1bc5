"""The digits in the layout of LLaVA's mixture of 665,000 records: one file, pictures in its six folders.

Shares of sources and of records without pictures are the mixture's, and so is what is odd in it: OCR-VQA's covers are
called ``.jpg`` whatever they are.
"""

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from routing_experts.data.digits import DigitsTask
from routing_experts.data.writing import RecordWriter, to_layout
from routing_experts.errors import ConfigError

FILE = "llava_v1_5_mix.json"
# Records of LLaVA's mixture with a picture, in thousands, by folder (LLaVA-1.5's data page); forty have none. Visual
# Genome lies in two folders.
THOUSANDS = {
    "coco/train2017": 364,
    "gqa/images": 72,
    "ocr_vqa/images": 80,
    "textvqa/train_images": 22,
    "vg/VG_100K": 51,
    "vg/VG_100K_2": 35,
}
TEXT_SHARE = 40 / (40 + sum(THOUSANDS.values()))
COVERS = ("PNG", "GIF", "JPEG")  # what OCR-VQA's covers are in truth


def export_digits(
    folder: Path, records: int, digits: DigitsTask, advance: Callable[[int], object] = lambda count: None
) -> Path:
    """Writes so many digits records and their pictures; returns the file.

    Args:
        folder: of the file and of the image folders.
        records: how many.
        digits: the task that they are drawn from.
        advance: told of each.

    Raises:
        ConfigError: if a set is there already.
    """
    path = folder / FILE
    if path.exists():
        raise ConfigError(f"{path} is there already: its pictures would be mixed with others. Give another folder.")
    with RecordWriter(path) as writer:
        for index in range(records):
            record = digits[index]
            names = [_save(picture, index, folder) for picture in record.images if isinstance(picture, Image.Image)]
            writer.add(to_layout(record, names))
            advance(1)
    return path


def _save(picture: Image.Image, index: int, folder: Path) -> str:
    """Writes a picture into one of the folders; its name below them."""
    name = f"{folder_of(index)}/{index:012d}.jpg"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = COVERS[index % len(COVERS)] if name.startswith("ocr_vqa/") else "JPEG"
    exact = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    picture.save(path, kind, **exact)
    return name


def folder_of(index: int) -> str:
    """Which folder a record's picture goes into: shares are met over any few hundred records in a row."""
    total = sum(THOUSANDS.values())
    place = index * 389 % total  # coprime to the total, so that all of them come before any comes again
    for folder, share in THOUSANDS.items():
        if place < share:
            return folder
        place -= share
    raise AssertionError(index)
