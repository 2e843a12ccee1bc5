"""``roe export``: a routed model in another form, for others to load or publish."""

from pathlib import Path
from typing import Annotated

import typer

from routing_experts.cli.output import AsJson


def export(
    folder: Annotated[str, typer.Argument(help="A run's folder, a routed model's, or a hub name.")],
    output: Annotated[Path, typer.Argument(help="Where the model is written.")],
    base: Annotated[
        str | None, typer.Option(help="The base of a folder that holds RoE parts alone: its name or folder.")
    ] = None,
    parts_only: Annotated[
        bool, typer.Option("--parts-only", help="Leave the base's weights out, for bases that were not tuned.")
    ] = False,
    push: Annotated[str | None, typer.Option(help="Also upload it to the hub as OWNER/NAME.")] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="The model's license for its card, such as apache-2.0.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Write a routed model as one checkpoint with its base, or as RoE parts alone; publish it.

    Example: roe export runs/digits merged --license apache-2.0
    """
    from routing_experts.api import save_pretrained
    from routing_experts.cli.common import evaluated_results, model_folder
    from routing_experts.cli.output import print_json, start
    from routing_experts.models.card import write_card
    from routing_experts.models.hub import push_folder
    from routing_experts.models.load import from_pretrained, load_processor

    say = start()
    source = model_folder(folder)
    model = from_pretrained(source, base=base)
    has_processor = (Path(source) / "processor_config.json").is_file()
    processor = load_processor(source if has_processor or base is None else base)
    save_pretrained(model, output, processor, base_weights=not parts_only)
    write_card(output, model.roe_config, evaluated_results(folder), license_name)
    address = push_folder(output, push) if push else None
    if json:
        print_json({"model": str(output), "pushed": address}, say)
        return
    say.results.print(f"model: {output}" + (f"\npushed: {address}" if address else ""))
