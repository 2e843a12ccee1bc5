"""``roe import``: a checkpoint of the authors' code as a folder of ours."""

from pathlib import Path
from typing import Annotated

import typer

from routing_experts.cli.output import AsJson


def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="The folder that the authors' training wrote (safetensors).")],
    output: Annotated[Path, typer.Argument(help="Where the routed model is written.")],
    base: Annotated[str, typer.Option(help="The model that it was trained from: a folder or a hub name.")],
    target_skip_ratio: Annotated[float, typer.Option(help="What it was trained for.")] = 0.3,
    prompt_format: Annotated[str, typer.Option(help="`vicuna_v1`, the authors', or `chat_template`.")] = "vicuna_v1",
    routing_tokens: Annotated[
        tuple[str, str] | None, typer.Option(help="The names of image and text token, if they cannot be told.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Import a checkpoint that was trained with the authors' code.

    Example: roe import RoE/checkpoints/llava-v1.5-7b-roe routed-llava --base llava-hf/llava-1.5-7b-hf
    """
    from dataclasses import replace

    from routing_experts.api import save_pretrained
    from routing_experts.cli.output import print_json, start
    from routing_experts.config import RoEConfig
    from routing_experts.data.markers import find_markers
    from routing_experts.models.load import load_base, load_processor
    from routing_experts.models.official import import_official

    say = start()
    config = RoEConfig.preset("paper", target_skip_ratio=target_skip_ratio)
    processor = load_processor(base)
    markers = find_markers(processor, prompt_format)
    config = replace(config, prompt_format=prompt_format)
    model = import_official(checkpoint, load_base(base), config, markers, routing_tokens)
    save_pretrained(model, output, processor)
    if json:
        print_json({"model": str(output)}, say)
        return
    say.results.print(f"model: {output}")
