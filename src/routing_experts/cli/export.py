"""``roe export``: a routed model in another form, for others to load or publish."""

from pathlib import Path
from typing import Annotated

import typer

from routing_experts.cli.common import refuse_beside
from routing_experts.cli.output import AsJson


def export(
    folder: Annotated[str, typer.Argument(help="A run's folder, a routed model's, or a hub name.")],
    output: Annotated[Path, typer.Argument(help="Where the model is written.")],
    base: Annotated[str | None, typer.Option(help="The base of a folder of RoE parts alone, or its name.")] = None,
    parts_only: Annotated[
        bool, typer.Option("--parts-only", help="Leave the base's weights out, for bases that were not tuned.")
    ] = False,
    static: Annotated[
        bool, typer.Option("--static", help="Drop the rarely kept layers for everyone; no router decides any more.")
    ] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="With --static: how many layers to drop.")] = None,
    data: Annotated[
        str | None, typer.Option(help="With --static: a file in LLaVA's JSON to choose by and ask; digits by default.")
    ] = None,
    images: Annotated[str | None, typer.Option(help="With --static: the folder of the file's pictures.")] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="With --static: how many are asked.")] = None,
    device: Annotated[str | None, typer.Option(help="With --static: cpu, cuda, cuda:1, mps; auto by default.")] = None,
    push: Annotated[str | None, typer.Option(help="Also upload it to the hub as OWNER/NAME.")] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="The model's license for its card, such as apache-2.0.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Write a routed model as one checkpoint with its base, or as RoE parts alone, or as a static one; publish it.

    Example: roe export runs/digits merged --license apache-2.0

    Example: roe export runs/digits static --static --layers 3
    """
    from routing_experts.api import save_pretrained
    from routing_experts.cli.common import evaluated_results, model_folder
    from routing_experts.cli.output import print_json, start
    from routing_experts.models.card import write_card
    from routing_experts.models.device import pick_device
    from routing_experts.models.hub import push_folder
    from routing_experts.models.load import from_pretrained, load_processor

    say = start()
    if not static:
        only = {"--layers": layers, "--data": data, "--images": images, "--questions": questions, "--device": device}
        refuse_beside("no --static", only)
    source = model_folder(folder)
    model = from_pretrained(source, base=base)
    processor = load_processor(source, base)
    if static:
        from routing_experts.cli.static import export_static

        refuse_beside("--static", {"--parts-only": parts_only})
        model = model.to(pick_device(device or "auto"))
        found = export_static(model, processor, output, layers, data, images, questions, say)
    else:
        save_pretrained(model, output, processor, base_weights=not parts_only)
        found = {}
    write_card(output, model.roe_config, None if static else evaluated_results(folder), license_name)
    address = push_folder(output, push) if push else None
    if json:
        print_json({"model": str(output), "pushed": address, **found}, say)
        return
    say.results.print(f"model: {output}" + (f"\npushed: {address}" if address else ""))
