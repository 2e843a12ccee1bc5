"""Questions with their pictures, as pages show them."""

from dataclasses import dataclass
from pathlib import Path

from routing_experts.errors import ReportError
from routing_experts.records import GALLERY_NAME
from routing_experts.reports.gallery import MAX_SHOWN, GalleryItem, layers_in_words, load_gallery
from routing_experts.reports.page import data_uri

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Exhibit:
    """A gallery item as the page shows it."""

    item: GalleryItem
    picture: str | None
    answers: tuple[tuple[str, str, bool], ...]
    route: str


def exhibits_of(folder: Path, num_layers: int) -> list[Exhibit]:
    """What a folder's gallery shows; nothing if it has none.

    Raises:
        ReportError: if the gallery or a picture is damaged, lies elsewhere, or routes have other layers.
    """
    path = folder / GALLERY_NAME
    if not path.exists():
        return []
    exhibits = []
    for i, item in enumerate(load_gallery(path)[:MAX_SHOWN]):
        if len(item.route) != num_layers:
            raise ReportError(
                f"{path}: [{i}].route has {len(item.route)} cells: a route has one for each layer, and the results "
                f"beside it say num_layers={num_layers}. Write both files from the same run."
            )
        if len(item.names) != 2:
            raise ReportError(f"{path}: [{i}].names is {item.names}: it names two, who said dense and who routed.")
        said = zip(item.names, (item.dense, item.routed), strict=True)
        answers = tuple((name, text, item.is_right(text)) for name, text in said)
        picture = None if item.image is None else _picture(folder, item.image, f"{path}: [{i}].image")
        exhibits.append(Exhibit(item, picture, answers, layers_in_words(item.route)))
    return exhibits


def _picture(folder: Path, name: str, where: str) -> str:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ReportError(
            f"{where} is {name!r}: pictures become part of the page, so they must lie in the run's folder, or a "
            "report could carry any file away. Copy the picture there."
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ReportError(
            f"{where} is {name!r}, which cannot be read ({error.strerror}). Put the PNG there."
        ) from error
    if not content.startswith(PNG_SIGNATURE):
        raise ReportError(f"{where} is {name!r}, which is no PNG. Save the picture as PNG.")
    return data_uri(content)
