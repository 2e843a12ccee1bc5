"""The engine: many requests, each with a route of its own, prefilled and decoded together.

A request is prefilled, which decides its route and gives its first token; then it waits, with its keys and values,
until it decodes beside others of like routes (``schedule``). What a request gets does not depend on who else is there.
"""

import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from routing_experts.errors import RequestError, RoutingExpertsError
from routing_experts.inference.graphs import CudaCapture, Graphs
from routing_experts.inference.prefill import Prefiller, Prompt, compatible
from routing_experts.inference.requests import Completion, Request, choose
from routing_experts.inference.schedule import StepCost, mask_of, pick
from routing_experts.inference.slots import Past, SlotCache
from routing_experts.inference.statistics import EngineStatistics
from routing_experts.models.convert import is_routed


@dataclass(frozen=True)
class EngineSettings:
    """Bounds of an engine.

    Attributes:
        max_rows: that decode together.
        max_waiting: requests that are prefilled and wait; more of them find better company and hold more memory.
        max_prefill_tokens: of one prefill call, padding included; one prompt is always taken.
        capacity: tokens that a slot has room for at first; it grows.
        cost: of a decoding step, which decides who joins.
        capture: whether routed layers' decoding steps are recorded as CUDA graphs and replayed.
    """

    max_rows: int = 16
    max_waiting: int = 64
    max_prefill_tokens: int = 4096
    capacity: int = 1024
    cost: StepCost = field(default_factory=StepCost)
    capture: bool = False

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_waiting", "max_prefill_tokens", "capacity"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name}={getattr(self, name)}: it is a count of at least 1. Raise it.")


@dataclass(frozen=True)
class Token:
    """A piece of an answer, as soon as there is one."""

    index: int
    token_id: int


@dataclass
class _Active:
    """A request on its way."""

    index: int
    request: Request
    submitted: float
    tokens: list[int] = field(default_factory=list)
    route: tuple[bool, ...] = ()
    mask: int = 0
    passed_over: float = 0.0
    first: float = 0.0
    past: Past | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)


class Engine:
    """Answers requests.

    Args:
        model: routed; its device and precision are the engine's.
        processor: the model's.
        settings: bounds.
        prefiller: what runs the prompts; ``Prefiller(model, processor)`` for None.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        settings: EngineSettings | None = None,
        prefiller: Prefiller | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.settings = settings or EngineSettings()
        self._prefiller = prefiller or Prefiller(model, processor)
        self.statistics = EngineStatistics(self._prefiller.num_layers)
        graphs = None
        if self.settings.capture:
            if not is_routed(model):
                raise RequestError("capture=True for a model that is not routed: routed layers record their steps.")
            graphs = Graphs(partial(CudaCapture, model.device))
        self._slots = SlotCache(model.config, self.settings.max_rows, self.settings.capacity, model.device, graphs)
        self._queue: deque[tuple[_Active, Prompt]] = deque()
        self._waiting: list[_Active] = []
        self._rows: list[_Active] = []
        self._events: list[Token | tuple[int, Completion]] = []
        self._submitted = 0
        eos = model.generation_config.eos_token_id
        self._eos = set(eos if isinstance(eos, list) else [eos]) - {None}

    def submit(self, request: Request) -> int:
        """Takes a request; returns its number. One that cannot be answered is completed with its error."""
        index, self._submitted = self._submitted, self._submitted + 1
        active = _Active(index, request, time.perf_counter())
        try:
            active.generator.manual_seed(request.sampling.seed)
            self._queue.append((active, self._prefiller.prompt(request)))
        except Exception as error:  # whatever a request holds that cannot be read, the others go on
            self._fail(active, error)
        return index

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self._queue or self._waiting or self._rows)

    @property
    def _room(self) -> int:
        """How many more may be queued: what can be prefilled until all wait that may, and never less than a batch."""
        free = self.settings.max_waiting - len(self._waiting)
        return max(self.settings.max_rows, free) - len(self._queue)

    def step(self) -> None:
        """One prefill if there is room, then one decoding step of the rows that share a batch."""
        if self._queue and len(self._waiting) < self.settings.max_waiting:
            self._prefill()
        filling = self._queue and not self._rows and len(self._waiting) < self.settings.max_waiting
        if not filling:
            started = time.perf_counter()
            self._admit()
            if self._rows:
                self._decode()
            self.statistics.decode_seconds += time.perf_counter() - started

    def events(self, numbers: Collection[int]) -> list[Token | tuple[int, Completion]]:
        """Takes out what happened to some requests since it was last asked, in order; others' events stay."""
        found = [event for event in self._events if _number(event) in numbers]
        self._events = [event for event in self._events if _number(event) not in numbers]
        return found

    def cancel(self, numbers: Collection[int]) -> None:
        """Gives requests up wherever they are, events included; those that are done already are done."""
        self._queue = deque(one for one in self._queue if one[0].index not in numbers)
        self._waiting = [active for active in self._waiting if active.index not in numbers]
        self._leave([row for row, active in enumerate(self._rows) if active.index in numbers])
        self.events(numbers)

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """All answers, in the order of the requests.

        Raises:
            RequestError: for no requests.
        """
        found = dict(event for event in self.stream(requests) if isinstance(event, tuple))
        if not found:
            raise RequestError("no requests: there is nothing to answer. Give at least one.")
        return [found[number] for number in sorted(found)]

    def stream(self, requests: Iterable[Request]) -> Iterator[Token | tuple[int, Completion]]:
        """Tokens as they come, and each request's completion at its end; requests are taken as there is room.

        Their clocks start when they are taken. A stream that is closed before its end gives its requests up.
        """
        source = iter(requests)
        pending: set[int] = set()
        open_ = True
        try:
            while open_ or pending:
                while open_ and self._room > 0:
                    taken = list(islice(source, 1))
                    open_ = bool(taken)
                    pending.update(map(self.submit, taken))
                self.step()
                for event in self.events(pending):
                    if isinstance(event, tuple):
                        pending.discard(event[0])
                    yield event
        finally:
            self.cancel(pending)

    def _prefill(self) -> None:
        """Prefills the next requests that fit into one call."""
        group = [self._queue.popleft()]
        room = self.settings.max_waiting - len(self._waiting)
        while self._queue and len(group) < room:
            prompt = self._queue[0][1]
            longest = max(prompt.length, *(other.length for _, other in group))
            fits = longest * (len(group) + 1) <= self.settings.max_prefill_tokens
            if not fits or not compatible(group[0][1].routing, prompt.routing):
                break
            group.append(self._queue.popleft())
        started = time.perf_counter()
        self._prefill_group(group)
        self.statistics.prefill_seconds += time.perf_counter() - started

    def _prefill_group(self, group: list[tuple[_Active, Prompt]]) -> None:
        answered = self._try_prefill(group)
        if isinstance(answered, Exception):  # no handler here: a caught error would hold the failed call's tensors
            if len(group) == 1:
                self._fail(group[0][0], answered)
                return
            middle = len(group) // 2  # half a batch may still fit, and halves find whose fault it is
            self._prefill_group(group[:middle])
            self._prefill_group(group[middle:])
            return
        logits, pasts = answered
        self.statistics.prefills += 1
        self.statistics.prefilled_tokens += sum(prompt.length for _, prompt in group)
        for (active, _), past, logits_V in zip(group, pasts, logits, strict=True):
            active.past, active.route, active.mask = past, past.route, mask_of(past.route)
            if not self._advance(active, logits_V, logits_V.max(-1)):
                self._waiting.append(active)
        held = sum(active.past.num_bytes for active in self._waiting if active.past is not None)
        self.statistics.waiting_bytes = max(self.statistics.waiting_bytes, held)

    def _try_prefill(self, group: list[tuple[_Active, Prompt]]) -> tuple[Tensor, list[Past]] | Exception:
        """What the prefill gives, or why it failed: for want of memory, or a prompt that the model cannot take."""
        try:
            return self._prefiller.run([prompt for _, prompt in group])
        except torch.OutOfMemoryError as error:
            return _out_of_memory(error, f"a prefill of {sum(prompt.length for _, prompt in group)} tokens")
        except (ValueError, IndexError, RuntimeError) as error:
            return error.with_traceback(None)

    def _admit(self) -> None:
        free = self.settings.max_rows - len(self._rows)
        chosen = pick(
            [active.mask for active in self._rows],
            [active.mask for active in self._waiting],
            [active.passed_over for active in self._waiting],
            free,
            self.settings.cost,
        )
        if chosen:
            for place, active in enumerate(self._waiting):
                in_front = sum(index > place for index in chosen)
                active.passed_over += in_front / self.settings.max_rows if self._rows else 1
        for index in chosen:
            self._join(self._waiting[index])
        if chosen:
            self._slots.refresh()
            self.statistics.slot_bytes = max(self.statistics.slot_bytes, self._slots.num_bytes)
        self._waiting = [active for index, active in enumerate(self._waiting) if index not in chosen]

    def _join(self, active: _Active) -> None:
        past, active.past = active.past, None
        assert past is not None
        try:
            self._slots.reserve(past.length + active.request.sampling.max_new_tokens)
            self._slots.admit(past)
        except torch.OutOfMemoryError as error:
            self._fail(active, _out_of_memory(error, f"decoding of {len(self._rows) + 1} rows"))
            return
        self._rows.append(active)

    def _decode(self) -> None:
        failed: RequestError | None = None
        try:
            logits_BV = self._step_logits()
        except torch.OutOfMemoryError as error:
            failed = _out_of_memory(error, f"decoding of {len(self._rows)} rows")
        if failed is not None:  # nobody has advanced: the others can take the step again
            self._fail(self._rows[-1], failed)
            self._leave([len(self._rows) - 1])
            return
        self._slots.advance()
        self._count()
        best = zip(*(part.tolist() for part in logits_BV.max(-1)), strict=True)  # for all rows one trip to the host
        rows = zip(self._rows, logits_BV, best, strict=True)
        self._leave([row for row, (active, *seen) in enumerate(rows) if self._advance(active, *seen)])

    def _leave(self, rows: Sequence[int]) -> None:
        """Takes rows out, in rising order; each one's place goes to the last."""
        for row in reversed(rows):
            self._slots.leave(row)
            self._rows[row] = self._rows[-1]
            self._rows.pop()
        if rows:
            self._slots.refresh()

    @torch.inference_mode()
    def _step_logits(self) -> Tensor:
        """Logits [B, V] behind each row's last token."""
        slots = self._slots
        return self.model(
            input_ids=torch.tensor([[active.tokens[-1]] for active in self._rows], device=slots.device),
            attention_mask=slots.mask(self.model.dtype),
            position_ids=slots.rotary_positions[:, None],
            past_key_values=slots,
            use_cache=True,
        ).logits[:, -1]

    def _advance(self, active: _Active, logits_V: Tensor, best: tuple[float, int]) -> bool:
        """Gives a request its next token, which may end it; says whether it is at its end."""
        try:
            token = choose(logits_V, best, active.request.sampling, active.generator)
        except RequestError as error:
            self._fail(active, error)
            return True
        if not active.tokens:
            active.first = time.perf_counter() - active.submitted
        active.tokens.append(token)
        self._events.append(Token(active.index, token))
        return self._finish(active)

    def _finish(self, active: _Active) -> bool:
        """Completes a request that is at its end; says whether it was."""
        sampling, tokens = active.request.sampling, active.tokens
        ended = not sampling.ignore_eos and tokens[-1] in self._eos
        text = self._text(tokens) if sampling.stop or ended or len(tokens) >= sampling.max_new_tokens else ""
        cut = min((text.find(stop) for stop in sampling.stop if stop in text), default=-1)
        if cut < 0 and not ended and len(tokens) < sampling.max_new_tokens:
            return False
        self._events.append(
            (
                active.index,
                Completion(
                    id=active.request.id,
                    text=(text if cut < 0 else text[:cut]).strip(),
                    token_ids=tuple(tokens),
                    route=active.route,
                    finish="stop" if ended or cut >= 0 else "length",
                    seconds_to_first=active.first,
                    seconds=time.perf_counter() - active.submitted,
                ),
            )
        )
        return True

    def _text(self, tokens: list[int]) -> str:
        if self.processor is None:
            return ""
        return str(self.processor.tokenizer.decode(tokens, skip_special_tokens=True))

    def _fail(self, active: _Active, error: Exception) -> None:
        text = str(error) if isinstance(error, RoutingExpertsError) else f"{type(error).__name__}: {error}"
        self._events.append((active.index, Completion(active.request.id, "", finish="error", error=text)))

    def _count(self) -> None:
        kept = [len(layer.rows) for layer in self._slots.layers]
        self.statistics.steps += 1
        self.statistics.row_steps += len(self._rows)
        self.statistics.layers_read += sum(count > 0 for count in kept)
        self.statistics.layer_rows += sum(kept)


def _number(event: Token | tuple[int, Completion]) -> int:
    return event.index if isinstance(event, Token) else event[0]


def _out_of_memory(error: Exception, work: str) -> RequestError:
    return RequestError(
        f"out of memory in {work} ({error}). Lower the engine's max_rows, max_waiting or max_prefill_tokens, or "
        "shorten the prompt."
    )
