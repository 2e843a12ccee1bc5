"""``roe convert`` and ``roe families``: a base model's folder made routed, untrained; and which models can be."""

from pathlib import Path
from typing import Annotated, Any

import typer

from routing_experts.cli.output import AsJson


def convert(
    model: Annotated[str, typer.Argument(help="The base model: a folder, a hub name, or `pocket`.")],
    output: Annotated[Path, typer.Argument(help="Where the routed model is written.")],
    target_skip_ratio: Annotated[float, typer.Option(help="The share of layers that training asks to skip.")] = 0.3,
    preset: Annotated[str, typer.Option(help="`default`, or `paper`.")] = "default",
    base_weights: Annotated[bool, typer.Option(help="Write the base's weights, too.")] = True,
    json: AsJson = False,
) -> None:
    """Convert a base model, without training.

    Example: roe convert llava-hf/llava-1.5-7b-hf routed-llava --target-skip-ratio 0.3
    """
    from routing_experts.api import convert as convert_model
    from routing_experts.api import save_pretrained
    from routing_experts.cli.output import print_json, start
    from routing_experts.config import RoEConfig
    from routing_experts.models.load import load_base, load_processor

    say = start()
    config = RoEConfig.preset(preset, target_skip_ratio=target_skip_ratio)
    processor = load_processor(model)
    routed = convert_model(load_base(model), config, processor)
    save_pretrained(routed, output, processor, base_weights)
    if json:
        print_json({"model": str(output), "routed_layers": routed.roe_config.layers_to_route(_num_layers(routed))}, say)
        return
    say.results.print(f"model: {output}")


def _num_layers(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def families(json: AsJson = False) -> None:
    """List the model families that can be routed.

    Example: roe families
    """
    from rich.table import Table

    from routing_experts.cli.output import print_json, start
    from routing_experts.models.families import known_families

    say = start()
    if json:
        print_json({name: family.description for name, family in known_families().items()}, say)
        return
    table = Table("model type", "what it is", box=None)
    for family in known_families().values():
        table.add_row(family.model_type, family.description)
    say.results.print(table)
