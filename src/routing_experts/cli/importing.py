"""``roe import``: a checkpoint in somebody else's layout as a folder of ours."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from routing_experts.cli.output import AsJson
from routing_experts.errors import ConfigError

VICUNA = "vicuna_v1"
_ADVANCED = "What the checkpoint leaves out"
Unpickle = Annotated[
    bool,
    typer.Option("--unpickle", help="Read .bin files too, the towers' as well: tensors alone, nothing in them is run."),
]


def import_checkpoint(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A folder or a hub name, such as liuhaotian/llava-v1.5-7b, with @ and a commit to pin it."),
    ],
    output: Annotated[Path, typer.Argument(help="Where the model is written.")],
    vision_tower: Annotated[
        str | None,
        typer.Option(help="The stock CLIP; by default the one that it names.", rich_help_panel=_ADVANCED),
    ] = None,
    slow_tower: Annotated[
        str | None,
        typer.Option(help="The stock ConvNeXt, for LLaVA-HR's first stage.", rich_help_panel=_ADVANCED),
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(help="The language model that a first stage was trained beside.", rich_help_panel=_ADVANCED),
    ] = None,
    unpickle: Unpickle = False,
    base: Annotated[
        str | None,
        typer.Option(help="For a checkpoint of RoE's own code: the model that it was trained from."),
    ] = None,
    target_skip_ratio: Annotated[
        float | None, typer.Option(help="With --base: what it was trained for; 0.3 by default.", show_default=False)
    ] = None,
    prompt_format: Annotated[
        str | None,
        typer.Option(help=f"With --base: `{VICUNA}`, the authors' and the default, or `chat_template`."),
    ] = None,
    routing_tokens: Annotated[
        tuple[str, str] | None,
        typer.Option(help="With --base: the names of image and text token, if they cannot be told."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Import LLaVA-1.5 or LLaVA-HR as their authors publish them, or what RoE's own code trained.

    Example: roe import liuhaotian/llava-v1.5-7b models/llava-1.5-7b --unpickle

    Example: roe import RoE/checkpoints/llava-v1.5-7b-roe routed-llava --base llava-hf/llava-1.5-7b-hf
    """
    from routing_experts.cli.output import print_json, start
    from routing_experts.models.published.sources import Sources

    say = start()
    sources = Sources(vision_tower, slow_tower, language_model, unpickle)
    _check_options(base, (target_skip_ratio, prompt_format, routing_tokens), sources != Sources())
    if base is None:
        _import_model(checkpoint, sources, output, say.progress.print)
    else:
        _import_routed(Path(checkpoint), output, base, target_skip_ratio, prompt_format, routing_tokens)
    if json:
        print_json({"model": str(output)}, say)
        return
    say.results.print(f"model: {output}")


def _check_options(base: str | None, of_routed: tuple[Any, ...], has_sources: bool) -> None:
    """Refuses options that would be ignored."""
    if base is None and set(of_routed) != {None}:
        raise ConfigError(
            "--target-skip-ratio, --prompt-format or --routing-tokens without --base: they are for what RoE's own code "
            "trained. Name the base too, or leave them out."
        )
    if base is not None and has_sources:
        raise ConfigError(
            "--base with --vision-tower, --slow-tower, --language-model or --unpickle: RoE's checkpoints are read onto "
            "their base, which has it all. Leave those out."
        )


def _import_model(checkpoint: str, sources: Any, output: Path, told: Callable[[str], object]) -> None:
    from routing_experts.data.templates import chat_template_of
    from routing_experts.models.published.reading import import_published
    from routing_experts.models.published.writing import check_place, write_model

    check_place(output)
    model, processor = import_published(checkpoint, sources, told)
    processor.chat_template = chat_template_of(processor, VICUNA)
    write_model(model, processor, output)


def _import_routed(
    checkpoint: Path,
    output: Path,
    base: str,
    target_skip_ratio: float | None,
    prompt_format: str | None,
    routing_tokens: tuple[str, str] | None,
) -> None:
    from dataclasses import replace

    from routing_experts.api import save_pretrained
    from routing_experts.config import RoEConfig
    from routing_experts.data.markers import find_markers
    from routing_experts.models.load import load_base, load_processor
    from routing_experts.models.published.roe import import_official

    ratio, layout = 0.3 if target_skip_ratio is None else target_skip_ratio, prompt_format or VICUNA
    config = replace(RoEConfig.preset("paper", target_skip_ratio=ratio), prompt_format=layout)
    processor = load_processor(base)
    markers = find_markers(processor, layout)
    save_pretrained(import_official(checkpoint, load_base(base), config, markers, routing_tokens), output, processor)
