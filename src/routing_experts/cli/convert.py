"""``roe convert`` and ``roe families``: a base model's folder made routed, untrained; and which models can be."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    model: Annotated[str, typer.Argument(help="The base model: a folder, a hub name, or `pocket`.")],
    output: Annotated[Path, typer.Argument(help="Where the routed model is written.")],
    target_skip_ratio: Annotated[float, typer.Option(help="The share of layers that training asks to skip.")] = 0.3,
    preset: Annotated[str, typer.Option(help="`default`, or `paper`.")] = "default",
    base_weights: Annotated[bool, typer.Option(help="Write the base's weights, too.")] = True,
) -> None:
    """Convert a base model, without training.

    Example: roe convert llava-hf/llava-1.5-7b-hf routed-llava --target-skip-ratio 0.3
    """
    from rich.console import Console

    from routing_experts.api import convert as convert_model
    from routing_experts.api import save_pretrained
    from routing_experts.cli.common import quiet_libraries
    from routing_experts.config import RoEConfig
    from routing_experts.models.load import load_base, load_processor

    quiet_libraries()
    config = RoEConfig.preset(preset, target_skip_ratio=target_skip_ratio)
    processor = load_processor(model)
    routed = convert_model(load_base(model), config, processor)
    save_pretrained(routed, output, processor, base_weights)
    Console().print(f"model: {output}")


def families() -> None:
    """List the model families that can be routed.

    Example: roe families
    """
    from rich.console import Console
    from rich.table import Table

    from routing_experts.models.families import known_families

    table = Table("model type", "what it is", box=None)
    for family in known_families().values():
        table.add_row(family.model_type, family.description)
    Console().print(table)
