"""``roe chat``: a dialogue with a model, a question a line, with the route that each turn took."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from routing_experts.cli.common import Device
from routing_experts.cli.output import AsJson

PICTURE = "/image "


def chat(
    folder: Annotated[str, typer.Argument(help="A run's folder, a model's folder, a hub name, or `pocket`.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture for the first question; repeat for several, in order.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="prefill (each turn runs the whole dialogue) or project (its own tokens alone).")
    ] = "prefill",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    keep_bias: Annotated[float | None, typer.Option(help="Added to keep logits: higher skips less.")] = None,
    device: Device = "auto",
    json: AsJson = False,
) -> None:
    """Talk about a picture: a question a line, from the terminal or piped in.

    A line `/image FILE` adds a picture to the next question; the end of the input (Ctrl-D) ends the dialogue. With
    --json, each turn is one line of JSON.

    Example: roe chat runs/quickstart --image cat.jpg --policy project
    """
    from routing_experts.cli.common import model_folder
    from routing_experts.cli.output import print_json, start
    from routing_experts.errors import RoutingExpertsError
    from routing_experts.inference.chat import ChatSession
    from routing_experts.models.device import pick_device
    from routing_experts.models.load import from_pretrained, is_routed_folder, load_base, load_processor
    from routing_experts.models.options import RoutingOptions

    say = start()
    source = model_folder(folder)
    model = (from_pretrained(source) if is_routed_folder(source) else load_base(source)).to(pick_device(device))
    session = ChatSession(model, load_processor(source), policy, RoutingOptions(keep_bias=keep_bias))
    pictures = list(image or ())
    for line in _lines():
        if line.startswith(PICTURE):
            pictures.append(Path(line.removeprefix(PICTURE).strip()))
            continue
        try:
            reply = session.ask(line, pictures, max_new_tokens)
        except RoutingExpertsError as error:
            if not sys.stdin.isatty():
                raise
            typer.echo(f"error: {error}", err=True)  # a mistyped path need not end a dialogue
            pictures = []
            continue
        pictures = []
        if json:
            told = asdict(reply)
            shown = {"question": line, "answer": told.pop("text"), **told, "skip_rate": reply.skip_rate}
            print_json(shown, say, indent=None)
            continue
        strip = "".join("■" if keep else "·" for keep in reply.route)
        say.results.print(reply.text or "(no answer; the question is taken back)", markup=False)
        say.results.print(
            f"[dim]{strip}  {reply.route.count(False)} of {len(reply.route)} layers skipped, {reply.prefilled_tokens} "
            f"tokens run, {reply.reused_tokens} kept from before[/]"
        )


def _lines() -> Iterator[str]:
    """What the user says up to the end of the input, without blank lines and surrounding space."""
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
