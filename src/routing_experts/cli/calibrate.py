"""``roe calibrate``: the gate bias at which a model skips a wanted share of its layers."""

from pathlib import Path
from typing import Annotated

import typer

from routing_experts.cli.common import Device
from routing_experts.cli.output import AsJson


def calibrate(
    folder: Annotated[str, typer.Argument(help="A run's folder, or a routed model's.")],
    skip_rate: Annotated[float, typer.Option(help="The wanted share of all decoder layers, such as 0.25.")],
    data: Annotated[
        str, typer.Option(help="Training data: `digits` (training handwriting) or a file in LLaVA's JSON.")
    ] = "digits",
    heldout: Annotated[
        str | None, typer.Option(help="Other data to check the rate on; for digits, held-out handwriting by default.")
    ] = None,
    images: Annotated[str | None, typer.Option(help="The folder that the files' image paths start from.")] = None,
    questions: Annotated[int, typer.Option(min=16, help="How many to measure rates on.")] = 1000,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Set the bias on keep logits, measured on training data, and report rates before and after.

    Example: roe calibrate runs/digits --skip-rate 0.25
    """
    from routing_experts.cli.common import model_folder
    from routing_experts.cli.judge import calibrated
    from routing_experts.cli.output import print_json, start, write_json
    from routing_experts.models.device import pick_device
    from routing_experts.records import CALIBRATION_NAME
    from routing_experts.reports import calibration_line

    say, source = start(), Path(model_folder(folder))
    found = calibrated(
        source,
        skip_rate,
        data,
        heldout or (data if data == "digits" else None),
        images,
        questions,
        say.progress,
        pick_device(device),
    )
    if json:
        print_json(found.to_dict(), say)
    else:
        say.results.print(calibration_line(found))
    write_json(found.to_dict(), source / CALIBRATION_NAME, say, "calibration")
