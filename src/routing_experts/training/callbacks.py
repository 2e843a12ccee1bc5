"""What happens beside the steps: the JSONL log, the progress bar, stage ends, and Ctrl-C."""

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from routing_experts.config import CONTROL_GATES
from routing_experts.records import LogLine, TrainingLog, seconds_left
from routing_experts.training.health import stuck_rate
from routing_experts.training.recipe import Recipe
from routing_experts.training.schedule import Stage
from routing_experts.training.trainer import LAYER_RATE

PACE_STEPS = 100  # the time left is told from at most so many of the latest steps
UNKNOWN = "-:--:--"


class JsonLog(TrainerCallback):
    """Writes ``log.jsonl`` from the main process.

    Args:
        journal: where lines go.
        recipe: of the run.
        stage: the name of the stage that is trained.
        clock: seconds that the run has taken so far.
        show: is given each line, too.
    """

    def __init__(
        self,
        journal: TrainingLog,
        recipe: Recipe,
        stage: str,
        clock: Callable[[], float],
        show: Callable[[LogLine], None],
    ) -> None:
        self.journal, self.recipe, self.stage, self.clock, self.show = journal, recipe, stage, clock, show

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line for each log of losses; the Trainer's closing summary is none."""
        if not state.is_world_process_zero or not logs or "total_loss" not in logs:
            return
        by_layer = [min(1.0, logs[name]) for name in sorted(logs) if name.startswith(LAYER_RATE)]
        line = LogLine(
            step=state.global_step,
            progress=min(1.0, state.global_step / self.recipe.training.steps),
            stage=self.stage,
            loss=logs["total_loss"],
            ce=logs["ce"],
            skip_rate=min(1.0, logs["skip_rate"]) if by_layer else None,
            target_skip_ratio=self.target(len(by_layer)) if by_layer else None,
            temperature=logs.get("temperature"),
            gate_bias=logs.get("gate_bias"),
            learning_rate=float(logs.get("learning_rate", 0.0)),
            layer_skip_rates=by_layer or None,
            seconds=self.clock(),
            tokens_per_second=logs.get("tokens_per_second"),
            distillation=logs.get("distillation"),
        )
        self.journal.append(line)
        self.show(line)

    def target(self, num_layers: int) -> float:
        """The target as a share of all decoder layers, like the rate beside it; the loss counts routed ones alone."""
        roe = self.recipe.roe
        return roe.target_skip_ratio * len(roe.layers_to_route(num_layers)) / num_layers


class ProgressBar(TrainerCallback):
    """One bar over the whole run, and below it what the log last said; where nothing can move, a plain line a log.

    Args:
        console: where; that of the main process alone is not quiet.
        steps: of the whole run.
        title: what stands in front until a stage has a name.
        clock: seconds, from whenever.
    """

    def __init__(self, console: Console, steps: int, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.steps, self.clock = console, steps, clock
        self.progress = _BarAndFigures(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("ETA {task.fields[left]}"),
            console=console,
        )
        self.task = self.progress.add_task(title, total=steps, left=UNKNOWN, figures="")
        self.marks: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS)

    @property
    def moves(self) -> bool:
        """Whether the console can draw over what it has drawn."""
        return self.console.is_interactive or self.console.is_jupyter

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Shows the bar; a resumed run's starts where it was. No stage's pace, nor an earlier run's, is another's."""
        self.marks.clear()
        self.progress.update(self.task, completed=state.global_step, left=UNKNOWN)
        if state.is_world_process_zero and self.moves:
            self.progress.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves it. The pace is counted from the end of the first step, whose warming up no other step repeats."""
        self.marks.append((state.global_step, self.clock()))
        left = seconds_left(self.marks, self.steps)
        left_words = UNKNOWN if left is None else str(timedelta(seconds=round(left)))
        self.progress.update(self.task, completed=state.global_step, left=left_words)

    def show(self, line: LogLine) -> None:
        """Says how it goes."""
        task = self.progress.tasks[self.task]
        self.progress.update(self.task, figures=figures_of(line))
        if not self.moves:
            where = f"{task.description}: step {line.step} of {self.steps}, ETA {task.fields['left']}"
            self.console.print(f"{where} · {figures_of(line)}", soft_wrap=True, markup=False, highlight=False)

    def name_stage(self, stage: str) -> None:
        """Puts the stage's name in front of the bar."""
        self.progress.update(self.task, description=stage.replace("_", " "))

    def close(self) -> None:
        """Leaves the last state on the screen, and gives the terminal back."""
        if self.moves:
            self.progress.stop()


class _BarAndFigures(Progress):
    """The bar has a line of its own: with the figures behind it, it would not fit into 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar's line, and the figures' once there are any."""
        yield from super().get_renderables()
        for task in self.tasks:
            if task.fields["figures"]:
                yield Text(task.fields["figures"], no_wrap=True, overflow="ellipsis")


def figures_of(line: LogLine) -> str:
    """Cross-entropy, skip rate and target as shares of all decoder layers, temperature if annealed, tokens a second."""
    parts = ["CE not finite" if line.ce is None or not math.isfinite(line.ce) else f"CE {line.ce:.3f}"]
    if line.skip_rate is not None and line.target_skip_ratio is not None:
        parts.append(f"skips {line.skip_rate:.1%} (target {line.target_skip_ratio:.1%})")
    if line.annealed_temperature is not None:
        parts.append(f"temperature {line.annealed_temperature:.2g}")
    if line.tokens_per_second is not None:
        parts.append(f"{line.tokens_per_second:,.0f} tokens/s")
    return " · ".join(parts)


class RateWatch(TrainerCallback):
    """Says at the end of a stage that asks the routers when they keep or skip everything.

    Args:
        console: where.
        recipe: of the run.
        stage: that is trained.
    """

    def __init__(self, console: Console, recipe: Recipe, stage: Stage) -> None:
        self.console, self.recipe, self.stage = console, recipe, stage
        self.rates: list[float] = []

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Notes each layer's rate."""
        named = logs or {}
        self.rates = [named[name] for name in sorted(named) if name.startswith(LAYER_RATE)] or self.rates

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Warns."""
        roe = self.recipe.roe
        if self.stage.gate != "learned" or roe.gate in CONTROL_GATES or not self.rates:
            return
        routed = roe.layers_to_route(len(self.rates))
        warning = stuck_rate(sum(self.rates[layer] for layer in routed) / len(routed), roe.target_skip_ratio)
        if warning and state.is_world_process_zero:
            self.console.print(warning, style="yellow", markup=False)


class HeldOut(TrainerCallback):
    """Says how held-out records are answered."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """One line, from the main process."""
        if state.is_world_process_zero:
            found = f"CE {metrics['eval_ce']:.3f} · skips {metrics['eval_skip_rate']:.1%}"
            self.console.print(f"step {state.global_step}, held out: {found}", markup=False)


class StopAt(TrainerCallback):
    """Ends a stage's trainer at the stage's last step, with a checkpoint to go on from."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Saves and stops once the step is reached."""
        if state.global_step >= self.step:
            control.should_training_stop = True
            control.should_save = True  # of the last stage too: its model has yet to be made and written
        return control


class InterruptGuard(TrainerCallback):
    """Ctrl-C ends training after the step in hand, with a checkpoint; a second one ends it at once.

    A context manager: the signal handler stands only while training runs, and only in the main thread.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._before: Any = None

    def __enter__(self) -> "InterruptGuard":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Saves and stops if any process was asked to: the others would wait for it in vain."""
        if dist.is_initialized():
            asked = torch.tensor(int(self.interrupted), device=args.device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            self.interrupted = bool(asked)
        if self.interrupted:
            control.should_training_stop = control.should_save = True
        return control
