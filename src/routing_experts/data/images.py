"""Reading pictures, with errors that name the record."""

from pathlib import Path

from PIL import Image

from routing_experts.errors import RecordError


def load_image(image: Path | Image.Image, record_id: str) -> Image.Image:
    """Reads a picture completely, as RGB.

    Raises:
        RecordError: if the file is missing, is no picture, or is cut short.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except FileNotFoundError as error:
        raise RecordError(
            f"record {record_id}: picture {image} is not there. Put it in place, or correct the record's image field "
            "or the image folder of the recipe."
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RecordError(
            f"record {record_id}: picture {image} cannot be read ({error}); it may be cut short or no picture at all. "
            "Replace the file, or leave the record out."
        ) from error
