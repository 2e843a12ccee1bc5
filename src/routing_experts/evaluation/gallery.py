"""A few questions with their pictures, both answers and the route: what the report shows of a run."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from routing_experts.data.images import load_image
from routing_experts.evaluation.questions import Question
from routing_experts.evaluation.scoring import Evaluation
from routing_experts.records import GALLERY_NAME, save_json

SHOWN = 12


def write_gallery(folder: Path, questions: list[Question], dense: Evaluation, routed: Evaluation) -> None:
    """Writes ``gallery.json`` and its pictures: each task's first questions, right or wrong as they come."""
    by_task: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        by_task.setdefault(question.task, []).append(index)
    chosen: list[int] = []
    for round_ in range(SHOWN):
        chosen += [rows[round_] for _, rows in sorted(by_task.items()) if round_ < len(rows)]
    some = chosen[:SHOWN]
    first, second = (Evaluation([e.questions[i] for i in some], [e.answers[i] for i in some]) for e in (dense, routed))
    save_gallery(folder, [questions[index] for index in some], first, second)


def save_gallery(
    folder: Path,
    questions: Sequence[Question],
    dense: Evaluation,
    routed: Evaluation,
    *,
    names: tuple[str, str] = ("dense", "routed"),
) -> None:
    """Writes ``gallery.json`` and its pictures, of all the questions that are given; ``names`` says who answered."""
    pictures = folder / "gallery"
    pictures.mkdir(exist_ok=True)
    items = []
    for index, question in enumerate(questions):
        images = question.record.images
        name = f"gallery/{index:02d}.png" if images else None
        if name:
            _thumbnail(load_image(images[0], question.record.id)).save(folder / name)
        items.append(
            {
                "image": name,
                "question": question.record.turns[-1].question.replace("<image>\n", ""),
                "answer": question.answer,
                "dense": dense.answers[index].text,
                "routed": routed.answers[index].text,
                "route": list(routed.answers[index].route),
                "names": list(names),
            }
        )
    save_json(folder / GALLERY_NAME, items)


def _thumbnail(image: Image.Image) -> Image.Image:
    copy = image.copy()
    copy.thumbnail((320, 320))
    return copy
