"""``roe generate``: questions to a model, with the routes that they took."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from routing_experts.cli.common import Device
from routing_experts.cli.output import AsJson, Output, print_json


def generate(
    folder: Annotated[str, typer.Argument(help="A run's folder, a model's folder, a hub name, or `pocket`.")],
    prompt: Annotated[list[str], typer.Option(help="The question; repeat to ask several, each by itself.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture of every question; repeat for several, in order.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    skip_ratio: Annotated[
        float | None, typer.Option(help="The share of layers to skip, on average, after `roe calibrate`; 0 for none.")
    ] = None,
    keep_bias: Annotated[float | None, typer.Option(help="Added to keep logits: higher skips less.")] = None,
    routes: Annotated[
        Path | None, typer.Option(help="Recorded routes to follow; the questions' ids are 1, 2, … in order.")
    ] = None,
    record_routes: Annotated[Path | None, typer.Option(help="Where the routes go, a JSON object a line.")] = None,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Answer questions about pictures, or without one. JSON is an object, or a list for several questions.

    Example: roe generate runs/quickstart --image cat.jpg --prompt "What is the animal doing?"
    """
    from routing_experts.cli.common import model_folder
    from routing_experts.cli.output import start
    from routing_experts.errors import RouteError
    from routing_experts.inference.generate import answer
    from routing_experts.inference.routes import read_routes, recorded, routes_for, write_routes
    from routing_experts.models.convert import is_routed
    from routing_experts.models.device import pick_device
    from routing_experts.models.load import from_pretrained, is_routed_folder, load_base, load_processor
    from routing_experts.models.options import RoutingOptions

    say = start()
    source = model_folder(folder)
    model = (from_pretrained(source) if is_routed_folder(source) else load_base(source)).to(pick_device(device))
    if (routes or record_routes) and not is_routed(model):
        raise RouteError(f"{folder} is not routed: it has no routes to follow or record. Leave them out.")
    records = _records(prompt, tuple(image or ()))
    answers = list(
        answer(
            model,
            load_processor(source),
            records,
            options=RoutingOptions(keep_bias=keep_bias, skip_ratio=skip_ratio),
            routes=routes_for(model, read_routes(routes), [record.id for record in records]) if routes else None,
            prompt_format=model.roe_config.prompt_format if is_routed(model) else "chat_template",
            max_new_tokens=max_new_tokens,
        )
    )
    if record_routes is not None:
        write_routes(record_routes, recorded(model, answers))
        say.progress.print(f"routes: {record_routes}")
    _show(answers, say, json)


def _records(prompts: Sequence[str], images: tuple[Path, ...]) -> list[Any]:
    """Each question with the pictures, as a record of its own; their ids are 1, 2, …"""
    from routing_experts.data.records import IMAGE_PLACEHOLDER, Record, Turn

    pictures = f"{IMAGE_PLACEHOLDER}\n" * len(images)
    return [Record(str(n), (Turn(pictures + prompt, ""),), images) for n, prompt in enumerate(prompts, start=1)]


def _show(answers: Sequence[Any], say: Output, json: bool) -> None:
    if json:
        found = [{"answer": given.text, "route": given.route, "skip_rate": given.skip_rate} for given in answers]
        print_json(found if len(found) > 1 else found[0], say)
        return
    for given in answers:
        strip = "".join("■" if keep else "·" for keep in given.route)
        say.results.print(given.text, markup=False)
        say.results.print(f"[dim]{strip}  {given.route.count(False)} of {len(given.route)} layers skipped[/]")
