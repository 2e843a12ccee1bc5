"""``roe generate``: one question to a model, with the route that it took."""

from pathlib import Path
from typing import Annotated

import typer

from routing_experts.cli.common import Device
from routing_experts.cli.output import AsJson


def generate(
    folder: Annotated[str, typer.Argument(help="A run's folder, a model's folder, a hub name, or `pocket`.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[list[Path] | None, typer.Option(help="A picture; repeat for several, in order.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    skip_ratio: Annotated[
        float | None, typer.Option(help="The share of layers to skip, on average, after `roe calibrate`; 0 for none.")
    ] = None,
    keep_bias: Annotated[float | None, typer.Option(help="Added to keep logits: higher skips less.")] = None,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Answer a question about a picture, or without one.

    Example: roe generate runs/quickstart --image cat.jpg --prompt "What is the animal doing?"
    """
    from routing_experts.cli.common import model_folder
    from routing_experts.cli.output import print_json, start
    from routing_experts.data.records import IMAGE_PLACEHOLDER, Record, Turn
    from routing_experts.inference.generate import answer
    from routing_experts.models.device import pick_device
    from routing_experts.models.load import from_pretrained, is_routed_folder, load_base, load_processor
    from routing_experts.models.options import RoutingOptions

    say = start()
    source = model_folder(folder)
    model = (from_pretrained(source) if is_routed_folder(source) else load_base(source)).to(pick_device(device))
    images = tuple(image or ())
    question = f"{IMAGE_PLACEHOLDER}\n" * len(images) + prompt
    record = Record("your question", (Turn(question, ""),), images)
    options = RoutingOptions(keep_bias=keep_bias, skip_ratio=skip_ratio)
    prompt_format = model.roe_config.prompt_format if is_routed_folder(source) else "chat_template"
    answers = answer(
        model,
        load_processor(source),
        [record],
        options=options,
        prompt_format=prompt_format,
        max_new_tokens=max_new_tokens,
    )
    given = next(iter(answers))
    if json:
        print_json({"answer": given.text, "route": given.route, "skip_rate": given.skip_rate}, say)
        return
    strip = "".join("■" if keep else "·" for keep in given.route)
    say.results.print(given.text, markup=False)
    say.results.print(f"[dim]{strip}  {given.route.count(False)} of {len(given.route)} layers skipped[/]")
