"""What a run shows while it trains: tokens a second, the time left, and lines where no bar can move."""

import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from runs import log, quiet_run, recipe, settings

from routing_experts.data.collate import Collator
from routing_experts.models.load import load_processor
from routing_experts.records import LogLine
from routing_experts.training import window
from routing_experts.training.callbacks import ProgressBar, figures_of
from routing_experts.training.datasets import build_datasets
from routing_experts.training.recipe import recipe_from_dict
from routing_experts.training.run import train

LINE = LogLine(30, 0.5, "router_warmup", 1.3, 1.25, 0.251, 0.27, 1.0, 0.1, 1e-3, [0.2, 0.302], 12.0, 12345.6)


@pytest.fixture
def ticking(monkeypatch) -> None:
    """The trainer's clock goes on by two seconds whenever it is asked: two between one log and the next."""
    ticks = count(100, 2)
    monkeypatch.setattr(window, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


@pytest.mark.parametrize(
    ("stages", "training", "steps_a_line"),
    [
        ("three", {"batch_size": 8}, [1, 1, 1, 1]),
        ("three", {"batch_size": 4, "accumulation": 2}, [1, 1, 1, 1]),
        ("three", {"logging_steps": 2}, [1, 2]),  # the first stage ends at step 1, before it logs
        ("dense", {"logging_steps": 2}, [2, 2]),
    ],
)
def test_tokens_a_second_are_the_batches_own(stages, training, steps_a_line, ticking, tmp_path):
    """Guards the count against padding, accumulation and logging: eight records, all of them in every step."""
    plain = settings(tmp_path, steps=4, report_to=[], **training) | {"stages": stages}
    of = recipe_from_dict(plain | {"data": {"source": "digits", "records": 8}})
    dialogues = [build_datasets(of, load_processor("pocket"))[0][i] for i in range(8)]
    num_tokens = sum(len(dialogue.input_ids) for dialogue in dialogues)
    assert Collator(0)(dialogues)["input_ids"].numel() > num_tokens  # there is padding to leave out
    quiet_run(of)
    assert [line.tokens_per_second for line in log(tmp_path)] == [steps * num_tokens / 2 for steps in steps_a_line]


def test_curves_have_tokens_a_second(tmp_path):
    """Guards TensorBoard's part: the figure of the log, under the Trainer's own prefix."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    quiet_run(recipe(tmp_path, steps=3, report_to=["tensorboard"]))
    curves: list[Any] = []
    for file in sorted((tmp_path / "tensorboard").rglob("events.out.tfevents.*")):
        events = accumulator(str(file)).Reload()
        if "train/tokens_per_second" in events.Tags()["scalars"]:
            curves += events.Scalars("train/tokens_per_second")
    found = {point.step: point.value for point in curves}
    assert found == {line.step: pytest.approx(line.tokens_per_second) for line in log(tmp_path)}


def steps_of(bar: ProgressBar, first: int, last: int) -> Iterator[Any]:
    """What the Trainer tells a bar of steps ``first`` to ``last``; gives its state before each."""
    state = SimpleNamespace(global_step=first - 1, is_world_process_zero=True)
    nothing: Any = None
    bar.on_train_begin(nothing, state, nothing)
    for step in range(first, last + 1):
        yield state
        state.global_step = step
        bar.on_step_end(nothing, state, nothing)


def bar_of(console: Console, seconds_a_step: float = 2.0) -> ProgressBar:
    ticks = count()
    return ProgressBar(console, 1000, "mine", clock=lambda: next(ticks) * seconds_a_step)


@pytest.mark.parametrize(("seconds", "left"), [(2.0, "0:16:36"), (90.0, "12:27:00")])
def test_a_resumed_run_s_time_left_counts_its_own_steps(seconds, left):
    """Guards the ETA of a run that goes on at step 500, and of steps that take more than rich's window of 30 s."""
    bar = bar_of(Console(file=io.StringIO()), seconds)
    for _ in steps_of(bar, 501, 502):
        assert bar.progress.tasks[0].fields["left"] == "-:--:--"
    assert bar.progress.tasks[0].completed == 502
    assert bar.progress.tasks[0].fields["left"] == left


def test_a_stage_has_a_pace_of_its_own():
    """Guards the ETA after a stage's end, where what trains changes and engines are built anew."""
    ticks = iter([0, 50, 100, 1000, 1002, 1004])
    bar = ProgressBar(Console(file=io.StringIO()), 1000, "mine", clock=lambda: next(ticks))
    for _ in steps_of(bar, 1, 3):
        pass
    assert bar.progress.tasks[0].fields["left"] == "13:50:50"  # 997 steps of 50 s
    for _ in steps_of(bar, 4, 6):
        pass
    assert bar.progress.tasks[0].fields["left"] == "0:33:08"  # 994 steps of 2 s


def test_a_pipe_gets_one_plain_line_a_log():
    """Guards CI logs: no bar, no control codes, nothing between two logs or at the end."""
    said = io.StringIO()
    bar = bar_of(Console(file=said, width=40))
    bar.name_stage("router_warmup")
    for _ in steps_of(bar, 1, 30):
        assert said.getvalue() == ""
    bar.show(LINE)
    bar.close()
    assert said.getvalue() == (
        "router warmup: step 30 of 1000, ETA 0:32:20 · CE 1.250 · skips 25.1% (target 27.0%) · 12,346 tokens/s\n"
    )


def test_a_terminal_of_80_columns_shows_everything():
    """Guards the bar: stage, share, time left, and below it the figures, none of them cut off."""
    said = io.StringIO()
    bar = bar_of(Console(file=said, force_terminal=True, width=80, color_system=None))
    bar.name_stage("instruction_tuning")
    for _ in steps_of(bar, 1, 500):
        pass
    bar.show(replace(LINE, temperature=0.0531, stage="instruction_tuning"))
    bar.close()
    last = said.getvalue().split("instruction tuning")[-1]
    assert "50% ETA 0:16:40" in last
    assert "CE 1.250 · skips 25.1% (target 27.0%) · temperature 0.053 · 12,346 tokens/s" in last


def test_processes_beside_the_main_one_show_nothing():
    said = io.StringIO()
    bar = bar_of(Console(file=said, quiet=True, force_terminal=True))
    for _ in steps_of(bar, 1, 3):
        pass
    bar.show(LINE)
    bar.close()
    assert said.getvalue() == ""


def test_what_a_line_lacks_is_not_shown():
    """Guards dense stages, hard gates, older logs and losses that are no numbers."""
    assert "temperature" not in figures_of(LINE)
    assert "temperature 9.5" in figures_of(replace(LINE, temperature=9.5))
    bare = replace(LINE, skip_rate=None, target_skip_ratio=None, temperature=None, tokens_per_second=None)
    assert figures_of(bare) == "CE 1.250"
    assert figures_of(replace(bare, ce=float("nan"))) == "CE not finite"
    assert figures_of(replace(bare, ce=None)) == "CE not finite"


def test_a_piped_run_says_one_line_a_log(tmp_path):
    """Guards a whole run's output where no bar can move."""
    said = io.StringIO()
    train(recipe(tmp_path, steps=4), Console(file=said, width=200))
    spoken = [line for line in said.getvalue().splitlines() if "tokens/s" in line]
    assert len(spoken) == len(log(tmp_path)) == 4
    assert all(f"step {line.step} of 4" in words for line, words in zip(log(tmp_path), spoken, strict=True))
