"""``roe calibrate``: the keep bias for a wanted skip rate, or the budget that gives every request's rate its bias."""

from pathlib import Path
from typing import Annotated

import typer

from routing_experts.cli.common import BatchSize, Device
from routing_experts.cli.output import AsJson


def calibrate(
    folder: Annotated[str, typer.Argument(help="A run's folder, or a routed model's.")],
    skip_rate: Annotated[
        float | None,
        typer.Option(help="The wanted share of all decoder layers, such as 0.25; without it, all rates are traced."),
    ] = None,
    data: Annotated[
        str, typer.Option(help="Training data: `digits` (training handwriting) or a file in LLaVA's JSON.")
    ] = "digits",
    heldout: Annotated[
        str | None, typer.Option(help="Other data to check the rate on; for digits, held-out handwriting by default.")
    ] = None,
    images: Annotated[str | None, typer.Option(help="The folder that the files' image paths start from.")] = None,
    questions: Annotated[int, typer.Option(min=16, help="How many to measure rates on.")] = 1000,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Set the keep bias for a wanted skip rate, or trace the budget from which requests choose their own.

    Rates are measured on training data and checked on held-out questions.

    Example: roe calibrate runs/digits --skip-rate 0.25
    """
    from routing_experts.cli.common import model_folder
    from routing_experts.cli.judge import budgeted, calibrated, meters
    from routing_experts.cli.output import print_json, start, write_json
    from routing_experts.models.device import pick_device
    from routing_experts.records import BUDGET_NAME, CALIBRATION_NAME
    from routing_experts.reports import calibration_line, print_budget

    say, source = start(), Path(model_folder(folder))
    checked_on = heldout or (data if data == "digits" else None)
    meter, check = meters(source, data, checked_on, images, questions, pick_device(device), batch_size)
    if skip_rate is None:
        traced = budgeted(source, meter, check, say.progress)
        if not json:
            print_budget(traced, say.results)
        record, name, about = traced.to_dict(), BUDGET_NAME, "budget"
    else:
        found = calibrated(source, skip_rate, meter, check, say.progress)
        if not json:
            say.results.print(calibration_line(found))
        record, name, about = found.to_dict(), CALIBRATION_NAME, "calibration"
    if json:
        print_json(record, say)
    write_json(record, source / name, say, about)
