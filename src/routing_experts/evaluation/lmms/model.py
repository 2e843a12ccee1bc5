"""The model that lmms-eval asks: batches of prompts through a routed (or, to compare, a dense) model."""

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm
from transformers import StoppingCriteriaList, StopStringCriteria

from routing_experts.data.images import whole_pictures
from routing_experts.data.records import Record
from routing_experts.errors import EvaluationError, RoutingExpertsError
from routing_experts.evaluation.likelihood import likelihoods
from routing_experts.evaluation.lmms.kept import SampleLog, key_of
from routing_experts.evaluation.lmms.samples import Asked, by_answer, by_context, by_messages
from routing_experts.inference.generate import answer
from routing_experts.models.checkpoint import fingerprint
from routing_experts.models.convert import is_routed
from routing_experts.models.device import pick_device
from routing_experts.models.load import check_processor, from_pretrained, is_routed_folder, load_base, load_processor
from routing_experts.models.options import RoutingOptions, bias_rows, settle
from routing_experts.records import as_bits

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")


@contextmanager
def failing_commands() -> Iterator[None]:
    """Under lmms-eval's command, which logs any exception and ends as if all were well, ends the process itself."""
    try:
        yield
    except RoutingExpertsError as error:
        command = Path(sys.argv[0])
        if command.name == "lmms-eval" or command.parts[-2:] == ("lmms_eval", "__main__.py"):
            sys.exit(f"error: {error}")
        raise


@dataclass
class RoutedCounts(TokenCounts):
    """What a sample cost, where lmms-eval logs its counts of tokens.

    Attributes:
        route: a character a decoder layer, 1 where it ran.
        skip_rate: the share of all decoder layers that was skipped.
        seconds_to_first, decode_seconds: of the batch that the sample was in, until its first tokens and from there.
        batch_size: of that batch.
        steps: the tokens of its longest answer, which its decoding time belongs to.
    """

    route: str = ""
    skip_rate: float = 0.0
    seconds_to_first: float | None = None
    decode_seconds: float | None = None
    batch_size: int = 1
    steps: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it that there is: a likelihood has no first token."""
        own = ("route", "skip_rate", "seconds_to_first", "decode_seconds", "batch_size", "steps")
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
        if dtype not in DTYPES:
            raise EvaluationError(f"dtype={dtype!r}: it must be one of {', '.join(DTYPES)}.")
        self.batch_size, self.max_frames = int(batch_size), int(max_frames)
        self.options = RoutingOptions(skip_ratio=skip_ratio, keep_bias=keep_bias)
        self.accelerator = Accelerator(cpu=str(device) == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        several = self._world_size > 1
        self.device = self.accelerator.device if several else pick_device(device or "auto")
        self.model, self.processor = _load(pretrained, dense, base, dtype, self.options)
        self.model.to(self.device).eval()
        self.prompt_format = _prompt_format(self.model, prompt_format)
        self._stopping: dict[tuple[str, ...], StoppingCriteriaList] = {}
        asked_as = {
            "model": fingerprint(self.model, parts=True),
            "keep_bias": _settled_bias(self.model, self.options),
            "dtype": str(self.model.dtype),
            "prompt_format": self.prompt_format,
            "template": _hash(str(getattr(self.processor, "chat_template", ""))),
            "max_frames": self.max_frames,
        }
        self.log = SampleLog(None if log is None else Path(log), asked_as, self._rank)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers, each with its route and times.

        Raises:
            EvaluationError: naming the sample that could not be answered; those before it are kept.
        """
        read = by_context if self.is_simple else by_messages
        with failing_commands():
            lines = self._lines(
                [read(request, self.task_dict, self.max_frames) for request in requests], self._generate
            )
            self._refuse_silence(lines)
        return [GenerationResult(line["text"], _counts(line)) for line in lines]

    def _refuse_silence(self, lines: Sequence[dict[str, Any]]) -> None:
        """Single empty answers are answers; nothing else is a model that was asked wrongly."""
        empty = [line["id"] for line in lines if not line["text"]]
        if empty and len(empty) == len(lines):
            raise EvaluationError(
                f"all {len(empty)} answers are empty, {empty[0]}'s among them: the model closes its answer at once. "
                "Ask it as it was trained (its prompt format), and check its processor's chat template."
            )
        if empty:
            logger.warning("%s of %s answers are empty: %s …", len(empty), len(lines), ", ".join(empty[:3]))

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
        raise EvaluationError(
            f"task {requests[0].task_name} asks in several rounds, which is not supported here. Leave it out."
        )

    def _lines(self, asked: Sequence[Asked], work: Any) -> list[dict[str, Any]]:
        """A finished sample for each request, in order; what the log has is not asked again."""
        found: dict[int, dict[str, Any]] = {}
        bar = tqdm(total=len(asked), disable=self._rank != 0, desc="asking")
        for places in _batches(asked, self.batch_size):
            todo: list[int] = []
            records: dict[int, Record] = {}
            keys: dict[int, str] = {}
            for place in places:
                records[place], keys[place] = _read(asked[place], self.log.is_kept)
                if (kept := self.log.get(asked[place], keys[place])) is not None:
                    found[place] = kept
                else:
                    todo.append(place)
            lines = self._try(work, asked[places[0]], [records[place] for place in todo]) if todo else []
            for place, line in zip(todo, lines, strict=True):
                found[place] = {"id": asked[place].id, "key": keys[place], **line}
                self.log.add(found[place])
            bar.update(len(places))
        bar.close()
        return [found[place] for place in range(len(asked))]

    def _try(self, work: Any, asked: Asked, records: Sequence[Record]) -> list[dict[str, Any]]:
        """A batch's lines; if it fails, its samples are asked alone to find which one does."""
        try:
            return list(work(asked, records))
        except torch.OutOfMemoryError as error:
            raise EvaluationError(
                f"out of memory with samples {records[0].id} to {records[-1].id} ({error}). Lower batch_size: finished "
                "samples are kept if log=… names a folder."
            ) from error
        except (RoutingExpertsError, RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            if "CUDA error" in str(error):  # nothing runs after it, so nobody can tell whose it is
                raise EvaluationError(
                    f"samples {records[0].id} to {records[-1].id} could not be answered: {error}"
                ) from error
            if len(records) == 1:
                raise EvaluationError(f"sample {records[0].id} could not be answered: {error}") from error
        for record in records:
            self._try(work, asked, [record])
        raise EvaluationError(
            f"samples {records[0].id} to {records[-1].id} could not be answered together, though each can alone. Lower "
            "batch_size."
        )

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


def _settled_bias(model: Any, options: RoutingOptions) -> float | str | None:
    """What the options come to for a model, which refuses here and not at some sample what it cannot do."""
    if not is_routed(model):
        return None
    settled = settle(options, model.roe_config, model.config.get_text_config(decoder=True).num_hidden_layers)
    return "a fixed route" if settled.keep_bias is None else repr(bias_rows(settled.keep_bias, 1).item())


def _prompt_format(model: Any, wanted: str | None) -> str:
    if not is_routed(model):
        return wanted or "chat_template"
    own: str = model.roe_config.prompt_format
    if wanted not in (None, own):
        raise EvaluationError(f"prompt_format={wanted!r}: the model was trained on {own}. Leave it out.")
    return own


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class SimpleModel(ChatModel):
    """The same for tasks that hand over a text and pictures; the only way to compare likelihoods (--force_simple)."""

    is_simple = True


def _load(pretrained: str, dense: bool, base: str | None, dtype: str, options: RoutingOptions) -> tuple[Any, Any]:
    """The model and its processor.

    Raises:
        EvaluationError: if the folder is not routed and nobody said so.
    """
    run = Path(pretrained) / "model"
    source = str(run) if run.is_dir() else pretrained
    kwargs = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    if is_routed_folder(source):
        if dense:
            raise EvaluationError(
                f"{pretrained} is routed, but dense=True was given: to run all of its layers give skip_ratio=0, or the "
                "folder of the model that it was made from."
            )
        model = from_pretrained(source, base=base, **kwargs)
    else:
        if not dense:
            raise EvaluationError(
                f"{pretrained} has no RoE parts: it would run all its layers for every sample. Give the folder of a "
                "routed model, or dense=True to measure a model without routes."
            )
        if options != RoutingOptions():
            raise EvaluationError(
                "skip_ratio or keep_bias with dense=True: a dense model has no routers. Leave it out."
            )
        model = load_base(source, **kwargs)
    processor = load_processor(source, base)
    check_processor(model, processor)
    return model, processor


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
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, SyntaxError) as error:
        raise EvaluationError(
            f"sample {asked.id} cannot be read ({type(error).__name__}: {error}): its task's data may be damaged, or "
            "of another version than the task expects. Mend the data; finished samples are kept."
        ) from error


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
        **{name: line[name] for name in ("route", "skip_rate", "batch_size")},
    )
