"""The part of ``roe export`` that makes a static model and says how it does."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from routing_experts.api import save_pretrained
from routing_experts.cli.common import progress_bar
from routing_experts.cli.output import Output
from routing_experts.data.digits import DIGITS
from routing_experts.errors import ConfigError
from routing_experts.evaluation.bench.models import real_sides, shared_copy
from routing_experts.evaluation.calibration import RateMeter
from routing_experts.evaluation.questions import BATCH_SIZE, Question, digits_questions, load_questions
from routing_experts.evaluation.static import rarely_kept, static_rows
from routing_experts.models.static import make_static
from routing_experts.records import STATIC_NAME, StaticExport, environment
from routing_experts.reports import print_static

CHOSEN_ON, CHOICE_SEED = 1000, 3
ASKED, ASKED_SEED = 2000, 2000


def export_static(
    model: Any,
    processor: Any,
    output: Path,
    count: int | None,
    data: str | None,
    images: str | None,
    questions: int | None,
    say: Output,
) -> dict[str, Any]:
    """Writes the static model and ``static.json``, and prints its row; ``model`` becomes the static one.

    Args:
        model: routed, on its device.
        processor: the model's.
        output: where it goes.
        count: layers to drop; those that most questions skip, for None.
        data: what is asked; a half, drawn, chooses layers, the other is asked. Digits draw both anew.
        images: the folder of the file's pictures.
        questions: how many are asked.
        say: where it is told.

    Returns:
        The record, as plain values.
    """
    choosing, asking = _questions(data, images, questions)
    with say.progress.status("measuring which layers are kept …"):
        keep_NL = RateMeter(model, processor, choosing).routes(model.roe_config.keep_bias)
    rates = [1 - share for share in keep_NL.double().mean(0).tolist()]
    dropped = rarely_kept(rates, model.roe_config.layers_to_route(len(rates)), count)
    sides = {"dense": real_sides(model).dense, "routed": shared_copy(model), "static": make_static(model, dropped)}
    save_pretrained(model, output, processor)
    with progress_bar(say.progress, "asking", len(sides) * len(asking)) as advance:
        rows, difference = static_rows(sides, processor, asking, BATCH_SIZE, advance)
    record = StaticExport(
        dropped=dropped,
        layer_skip_rates=rates,
        chosen_on=len(choosing),
        questions=len(asking),
        rows=rows,
        difference=difference.mean,
        low=difference.low,
        high=difference.high,
        environment=environment(),
    )
    record.save(output / STATIC_NAME)
    print_static(record, say.results)
    return record.to_dict()


def _questions(data: str | None, images: str | None, count: int | None) -> tuple[list[Question], list[Question]]:
    """Those that layers are chosen by, and those that are asked."""
    if data in (None, DIGITS):
        return (
            digits_questions(CHOSEN_ON, CHOICE_SEED, split="train"),
            digits_questions(count or ASKED, ASKED_SEED),
        )
    everything = load_questions(str(data), images, None, 0)
    if len(everything) < 2:
        raise ConfigError(
            f"{data} has {len(everything)} questions: layers are chosen by one half of them, and the other is asked. "
            "Give more."
        )
    choosing, asking = drawn_halves(everything)
    return choosing, asking[: count or len(asking)]


def drawn_halves(everything: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """Two disjoint halves, the same at each call: files may be sorted, and then no first half stands for the second."""
    drawn = random.Random(CHOICE_SEED).sample(everything, len(everything))
    half = len(drawn) // 2
    return drawn[:half], drawn[half:]
