"""lmms-eval's requests as records: which document, what is shown and asked, and how it is to be generated."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from routing_experts.data.records import IMAGE_PLACEHOLDER, Record, Turn
from routing_experts.data.videos import sample_frames
from routing_experts.errors import EvaluationError
from routing_experts.inference.prefill import record_of
from routing_experts.inference.requests import Request

logger = logging.getLogger(__name__)

NO_PICTURE = "(image)"  # a placeholder in a text that stands for no picture
MAX_NEW_TOKENS = 1024  # where a task does not say: lmms-eval's own models take so many
PASSED_ON = ("max_new_tokens", "num_beams", "top_p", "top_k", "repetition_penalty", "do_sample", "temperature")
UNASKED_END = "\n\n"  # lmms-eval ends answers so where a task names no end; its own models pass over it
OF_NO_CONCERN = ("until", "image_aspect_ratio", "use_cache", "max_gen_toks")
Documents = Mapping[str, Mapping[str, Sequence[Any]]]


@dataclass(frozen=True)
class Asked:
    """A request that can be read when its turn comes: pictures of a whole task would fill the memory.

    Attributes:
        id: task, split, document and, of several answers to choose from, which.
        generation: for ``model.generate``; empty where a likelihood is asked for.
        until: texts that end an answer.
        read: makes the record.
    """

    id: str
    generation: dict[str, Any]
    until: tuple[str, ...]
    read: Callable[[], Record]

    @property
    def can_be_kept(self) -> bool:
        """Whether another run would get the same answer."""
        return not self.generation.get("do_sample")


def by_messages(instance: Any, documents: Documents, max_frames: int) -> Asked:
    """A generation request of a chat task."""
    _, to_messages, generation, document, task, split = instance.args
    name = f"{task}/{split}/{document}"

    def read() -> Record:
        messages, visuals = _plain(to_messages(documents[task][split][document]), name, max_frames)
        return record_of(Request(messages=_placed(messages, len(visuals)), images=visuals, id=name))

    return Asked(name, *_generation(generation), read)


def by_context(instance: Any, documents: Documents, max_frames: int) -> Asked:
    """A generation request of a simple task: pictures, then a text."""
    context, generation, to_visual, document, task, split = instance.args
    name = f"{task}/{split}/{document}"

    def read() -> Record:
        shown = to_visual(documents[task][split][document])
        return _record(name, context, _pictures(shown, name, max_frames), "")

    return Asked(name, *_generation(generation), read)


def by_answer(instance: Any, documents: Documents, max_frames: int) -> Asked:
    """A request for the likelihood of an answer."""
    if len(instance.args) == 2:
        raise EvaluationError(
            f"task {instance.task_name} asks for the likelihood of an answer without a question (acc_mutual_info), "
            "which a dialogue model does not give. Use the task's other metrics."
        )
    context, target, to_visual, document, task, split = instance.args
    name = f"{task}/{split}/{document}/{instance.idx}"

    def read() -> Record:
        shown = documents[task][split][document]
        answer = target if isinstance(target, str) else str(target(shown))
        return _record(name, context, _pictures(to_visual(shown), name, max_frames), answer.strip())

    return Asked(name, {}, (), read)


def _record(name: str, context: str, pictures: Sequence[Any], answer: str) -> Record:
    """Pictures stand before the text, unless it says where for all of them."""
    question = context
    if context.count(IMAGE_PLACEHOLDER) != len(pictures):
        question = f"{IMAGE_PLACEHOLDER}\n" * len(pictures) + context.replace(IMAGE_PLACEHOLDER, NO_PICTURE)
    return Record(name, (Turn(question, answer),), tuple(pictures))


def _generation(asked: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What ``model.generate`` is told, and the texts that end an answer."""
    unknown = sorted(set(asked) - set(PASSED_ON) - set(OF_NO_CONCERN))
    if unknown:
        logger.warning("generation settings %s are not known here and are left out", ", ".join(unknown))
    settings = {name: asked[name] for name in PASSED_ON if asked.get(name) is not None}
    settings.setdefault("max_new_tokens", asked.get("max_gen_toks") or MAX_NEW_TOKENS)
    settings["do_sample"] = bool(settings.get("do_sample", settings.get("temperature", 0))) and (
        settings.get("temperature", 1) > 0
    )
    if not settings["do_sample"]:  # settings of draws would be warned of
        settings = {k: v for k, v in settings.items() if k not in ("temperature", "top_p", "top_k")}
    until = asked.get("until") or ()
    texts = (until,) if isinstance(until, str) else tuple(until)
    return settings, tuple(text for text in texts if text and text != UNASKED_END)


def _plain(messages: Any, name: str, max_frames: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages with nothing but texts and places of pictures, and the pictures in order."""
    pictures: list[Any] = []
    plain = []
    for message in messages:
        content = []
        for part in message["content"]:
            if part["type"] == "text":
                content.append({"type": "text", "text": part["text"]})
                continue
            shown = list(_frames(part, name, max_frames))
            pictures += shown
            content += [{"type": "image"}] * len(shown)
        plain.append({"role": message["role"], "content": content})
    return plain, pictures


def _placed(messages: list[dict[str, Any]], num_pictures: int) -> list[dict[str, Any]]:
    """Texts that name their pictures' places keep them, if they name all; else the word stands for nothing."""
    parts = [part for message in messages for part in message["content"]]
    texts = [part for part in parts if part["type"] == "text"]
    named = sum(part["text"].count(IMAGE_PLACEHOLDER) for part in texts)
    if named and named == num_pictures:
        return [m | {"content": [part for part in m["content"] if part["type"] == "text"]} for m in messages]
    for part in texts:
        part["text"] = part["text"].replace(IMAGE_PLACEHOLDER, NO_PICTURE)
    return messages


def _frames(part: Mapping[str, Any], name: str, max_frames: int) -> Iterator[Any]:
    if part["type"] == "image":
        yield part["url"] if isinstance(part["url"], Image.Image) else Path(part["url"])
    elif part["type"] == "video":
        yield from sample_frames(part["url"], max_frames, name)
    else:
        raise EvaluationError(f"sample {name} shows {part['type']}: pictures and videos can be shown, nothing else.")


def _pictures(shown: Any, name: str, max_frames: int) -> list[Any]:
    """What a simple task shows: pictures, or paths of pictures and videos."""
    pictures: list[Any] = []
    for one in shown or ():
        if isinstance(one, Image.Image):
            pictures.append(one)
        elif isinstance(one, str | Path) and Path(one).suffix.lower() in Image.registered_extensions():
            pictures.append(Path(one))
        else:
            pictures += sample_frames(one, max_frames, name)
    return pictures
