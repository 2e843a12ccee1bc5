"""What the sources of a set are called: by the folder of a record's first picture."""

from collections.abc import Sequence

TEXT_ONLY = "text only"
DEPTH = 2  # folders of a path that name a source: a set with a folder a picture is still one
IN_MEMORY = "pictures in the table"
# LLaVA's mixture of 665,000 records keeps Visual Genome in two folders.
LAYOUT = (
    "coco/train2017",
    "gqa/images",
    "ocr_vqa/images",
    "textvqa/train_images",
    "vg/VG_100K",
    "vg/VG_100K_2",
)


def source_of(paths: Sequence[str | None]) -> str:
    """A record's source.

    Args:
        paths: of its pictures, relative to the image folder; None for one that a table holds itself.
    """
    if not paths:
        return TEXT_ONLY
    first = paths[0]
    if first is None:
        return IN_MEMORY
    folder = "/".join(first.split("/")[:-1][:DEPTH])
    return folder or "the image folder"
