"""The model that lmms-eval asks: batches of prompts through a routed (or, to compare, a dense) model."""

import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm
from transformers import StoppingCriteriaList, StopStringCriteria

from routing_experts.data.images import whole_pictures
from routing_experts.data.records import Record
from routing_experts.errors import EvaluationError, RoutingExpertsError
from routing_experts.evaluation.likelihood import likelihoods
from routing_experts.evaluation.lmms.kept import SampleLog, key_of
from routing_experts.evaluation.lmms.loading import identity, load_model, prompt_format_of
from routing_experts.evaluation.lmms.samples import Asked, by_answer, by_context, by_messages
from routing_experts.inference.generate import answer
from routing_experts.models.device import pick_device
from routing_experts.models.options import RoutingOptions
from routing_experts.records import as_bits

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
SILENT = 4  # empty answers of a task and nothing else: fewer may be chance
TIMES = ("seconds_to_first", "decode_seconds", "steps")


@contextmanager
def failing_commands() -> Iterator[None]:
    """Under lmms-eval's command, which logs any exception and ends as if all were well, ends the process itself.

    A launcher then ends the other processes, which would wait for this one.
    """
    try:
        yield
    except Exception as error:
        command = Path(sys.argv[0])
        if command.name != "lmms-eval" and command.parts[-2:] != ("lmms_eval", "__main__.py"):
            raise
        if not isinstance(error, RoutingExpertsError):  # nobody's mistake but ours, or a wrong argument
            traceback.print_exc()
        sys.exit(f"error: {error}")


@dataclass
class RoutedCounts(TokenCounts):
    """What a sample cost, where lmms-eval logs its counts of tokens.

    Attributes:
        route: a character a decoder layer, 1 where it ran.
        skip_rate: the share of all decoder layers that was skipped.
        seconds_to_first, decode_seconds: of the batch that the sample was in, until its first tokens and from there.
        batch_size: of that batch.
        asked_at: the samples that the run asked at a time: its last batch may be smaller.
        steps: the tokens of its longest answer, which its decoding time belongs to.
    """

    route: str = ""
    skip_rate: float = 0.0
    seconds_to_first: float | None = None
    decode_seconds: float | None = None
    batch_size: int = 1
    asked_at: int = 1
    steps: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it that there is: a likelihood has no first token."""
        own = ("route", "skip_rate", "seconds_to_first", "decode_seconds", "batch_size", "asked_at", "steps")
        told = {name: getattr(self, name) for name in own}
        return super().to_dict() | {name: value for name, value in told.items() if value is not None}


class ChatModel(lmms):
    """A model folder behind lmms-eval's interface; tasks hand over chat messages.

    Args:
        pretrained: a run's or a model's folder, a hub name, or ``pocket``.
        batch_size: samples asked at a time.
        device: where lmms-eval was not started on several processes; ``auto`` for the accelerator.
        dtype: of the weights: ``auto`` (as they were saved), ``float32``, ``bfloat16`` or ``float16``.
        skip_ratio: the share of layers to skip, within the model's budget; 0 runs all layers.
        keep_bias: added to keep logits, instead of the model's own.
        dense: take a folder that is not routed, to compare with.
        base: the base of a folder that holds RoE parts alone.
        log: a folder for finished samples, which another run of the same command does not ask again.
        max_frames: pictures that a video is shown as.
        prompt_format: of a model that is not routed; a routed one is asked as it was trained.
        max_batch_size: lmms-eval's; a batch is as large as ``batch_size`` says.
    """

    is_simple = False

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "ChatModel":
        """lmms-eval's way to make a model from its command line."""
        with failing_commands():
            return super().create_from_arg_string(arg_string, additional_config)

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        skip_ratio: float | None = None,
        keep_bias: float | None = None,
        dense: bool = False,
        base: str | None = None,
        log: str | None = None,
        max_frames: int = 8,
        prompt_format: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise EvaluationError(f"batch_size={batch_size!r}: a count of at least 1. Found sizes are not offered.")
        if not str(max_frames).isdigit() or int(max_frames) < 1:
            raise EvaluationError(f"max_frames={max_frames!r}: a video is shown as at least 1 picture.")
        if dtype not in DTYPES:
            raise EvaluationError(f"dtype={dtype!r}: it must be one of {', '.join(DTYPES)}.")
        self.batch_size, self.max_frames = int(batch_size), int(max_frames)
        self.options = RoutingOptions(skip_ratio=skip_ratio, keep_bias=keep_bias)
        # lmms-eval's command has made one already, which no other may contradict.
        self.accelerator = Accelerator(cpu=str(device) == "cpu" and not is_initialized())
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        several = self._world_size > 1
        self.device = self.accelerator.device if several else pick_device(device or "auto")
        self.model, self.processor = load_model(pretrained, dense, base, dtype, self.options)
        self.model.to(self.device).eval()
        self.prompt_format = prompt_format_of(self.model, prompt_format)
        self._stopping: dict[tuple[str, ...], StoppingCriteriaList] = {}
        asked_as = identity(self.model, self.processor, self.options) | {
            "prompt_format": self.prompt_format,
            "max_frames": self.max_frames,
        }
        self.log = SampleLog(None if log is None else Path(log), asked_as, self._rank)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers, each with its route and times.

        Raises:
            EvaluationError: naming the sample that could not be answered; those before it are kept, if a log is.
        """
        read = by_context if self.is_simple else by_messages
        with failing_commands():
            lines = self._lines(
                [read(request, self.task_dict, self.max_frames) for request in requests], self._generate
            )
            self._refuse_silence(lines)
        return [GenerationResult(line["text"], _counts(line)) for line in lines]

    def _refuse_silence(self, lines: Sequence[dict[str, Any]]) -> None:
        """Single empty answers are answers; a task of nothing else is a model that was asked wrongly."""
        by_task: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            by_task.setdefault(line["id"].split("/")[0], []).append(line)
        for task, its in by_task.items():
            empty = [line["id"] for line in its if not line["text"]]
            if len(empty) == len(its) >= SILENT:
                raise EvaluationError(
                    f"all {len(empty)} answers to {task} are empty, {empty[0]}'s among them: the model closes its "
                    "answer at once. Ask it as it was trained (its prompt format), and check its processor's chat "
                    "template."
                )
            if empty:
                logger.warning("%s of %s answers are empty: %s …", len(empty), len(its), ", ".join(empty[:3]))

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """The mean loss of an answer's tokens (lmms-eval takes the lowest), and whether it is the likeliest.

        Wrapped as a generation's result: of a bare pair lmms-eval 0.7.3 makes a text that its scorers cannot read.
        """
        with failing_commands():
            lines = self._lines([by_answer(one, self.task_dict, self.max_frames) for one in requests], self._score)
        return [GenerationResult((line["loss"], line["is_greedy"]), _counts(line)) for line in lines]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered.

        Raises:
            EvaluationError: always.
        """
        with failing_commands():
            raise EvaluationError(
                f"task {requests[0].task_name} asks in several rounds, which is not supported here. Leave it out."
            )

    def _lines(self, asked: Sequence[Asked], work: Any) -> list[dict[str, Any]]:
        """A finished sample for each request, in order; what the log has is not asked again."""
        found: dict[int, dict[str, Any]] = {}
        bar = tqdm(total=len(asked), disable=self._rank != 0, desc="asking")
        now = {"asked_at": self.batch_size, "device": self.device.type}
        for places in _batches(asked, self.batch_size):
            todo, broken = self._read(asked, places, now, found)
            records = [record for _, record, _ in todo]
            lines = self._answered(work, asked[places[0]], records) if todo else iter(())
            for (place, _, key), line in zip(todo, lines, strict=True):
                found[place] = {"id": asked[place].id, "key": key, **now, **line}
                self.log.add(found[place])
            if broken is not None:
                raise broken
            bar.update(len(places))
        bar.close()
        return [found[place] for place in range(len(asked))]

    def _read(
        self, asked: Sequence[Asked], places: Sequence[int], now: dict[str, Any], found: dict[int, dict[str, Any]]
    ) -> tuple[list[tuple[int, Record, str]], EvaluationError | None]:
        """Which of a batch's samples have to be asked, with their keys, up to one that cannot be read.

        What the log has goes into ``found``, its times only where it was asked as it would be now.
        """
        todo: list[tuple[int, Record, str]] = []
        for place in places:
            try:
                record, key = _read(asked[place], self.log.is_kept)
            except EvaluationError as error:
                return todo, error
            kept = self.log.get(asked[place], key)
            if kept is None:
                todo.append((place, record, key))
            elif now.items() <= kept.items():
                found[place] = kept
            else:
                found[place] = {name: value for name, value in kept.items() if name not in TIMES}
        return todo, None

    def _answered(self, work: Any, asked: Asked, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
        """A batch's lines; if it fails, its samples are asked alone, as they come, to find which one does."""
        ids = f"samples {records[0].id} to {records[-1].id}"
        try:
            yield from list(work(asked, records))
        except torch.OutOfMemoryError as error:
            raise EvaluationError(
                f"out of memory with {ids} ({error}). Lower batch_size: finished samples are kept if log=… names a "
                "folder."
            ) from error
        except Exception as error:  # told by the sample's name, whatever it is
            if "CUDA error" in str(error):  # nothing runs after it, so nobody can tell whose it is
                raise EvaluationError(f"{ids} could not be answered: {error}") from error
            if len(records) == 1:
                raise EvaluationError(f"sample {records[0].id} could not be answered: {_told(error)}") from error
            for record in records:
                yield from self._answered(work, asked, [record])
            raise EvaluationError(
                f"{ids} could not be answered together ({_told(error)}), though each can alone. Lower batch_size."
            ) from error

    def _generate(self, asked: Asked, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
        settings = dict(asked.generation)
        if asked.until:
            settings["stopping_criteria"] = self._ends(asked.until)
        given = answer(
            self.model, self.processor, records, len(records), self.options, None, self.prompt_format, **settings
        )
        for one in given:
            yield {
                "text": _cut(one.text, asked.until),
                "tokens": one.num_tokens,
                "steps": one.steps,
                "seconds_to_first": one.seconds_to_first,
                "decode_seconds": one.decode_seconds,
                **_route(one.route, len(records)),
            }

    def _ends(self, until: tuple[str, ...]) -> StoppingCriteriaList:
        """What ends answers at those texts; made once, since it reads the whole vocabulary."""
        if until not in self._stopping:
            self._stopping[until] = StoppingCriteriaList([StopStringCriteria(self.processor.tokenizer, list(until))])
        return self._stopping[until]

    def _score(self, asked: Asked, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
        scored = likelihoods(self.model, self.processor, records, len(records), self.options, self.prompt_format)
        for one in scored:
            yield {"loss": one.loss, "is_greedy": one.is_greedy, **_route(one.route, len(records))}


class SimpleModel(ChatModel):
    """The same for tasks that hand over a text and pictures; the only way to compare likelihoods (--force_simple)."""

    is_simple = True


def _batches(asked: Sequence[Asked], size: int) -> Iterator[list[int]]:
    """Places of requests that are generated alike, in their order."""
    groups: dict[str, list[int]] = {}
    for place, one in enumerate(asked):
        groups.setdefault(repr((sorted(one.generation.items()), one.until)), []).append(place)
    for places in groups.values():
        for start in range(0, len(places), size):
            yield places[start : start + size]


def _read(asked: Asked, is_kept: bool) -> tuple[Record, str]:
    """A sample as a record, and the hash of it where one is wanted."""
    try:
        with whole_pictures():
            record = replace(asked.read(), id=asked.id)
        return record, key_of(record, asked) if is_kept else ""
    except RoutingExpertsError as error:
        raise EvaluationError(f"sample {asked.id} cannot be read: {error}") from error
    except Exception as error:  # a task's code, its data or a decoder of pictures: told by the sample's name
        raise EvaluationError(
            f"sample {asked.id} cannot be read ({type(error).__name__}: {error}): its task's data may be damaged, or "
            "of another version than the task expects. Mend the data; finished samples are kept."
        ) from error


def _told(error: Exception) -> str:
    """Our own messages as they are, others with their kind: some say nothing without it."""
    return str(error) if isinstance(error, RoutingExpertsError) else f"{type(error).__name__}: {error}"


def _cut(text: str, until: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in until if stop in text]
    return (text[: min(ends)] if ends else text).strip()


def _route(route: Sequence[bool], batch_size: int) -> dict[str, Any]:
    return {
        "route": as_bits(route),
        "skip_rate": 1 - sum(route) / len(route),
        "batch_size": batch_size,
    }


def _counts(line: dict[str, Any]) -> RoutedCounts:
    return RoutedCounts(
        output_tokens=line.get("tokens"),
        seconds_to_first=line.get("seconds_to_first"),
        decode_seconds=line.get("decode_seconds"),
        steps=line.get("steps"),
        asked_at=line.get("asked_at", line["batch_size"]),  # older logs do not say
        **{name: line[name] for name in ("route", "skip_rate", "batch_size")},
    )
