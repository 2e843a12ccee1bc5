"""Which layout a folder is in, and the model that it becomes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from routing_experts.errors import CheckpointError
from routing_experts.models.published.blueprint import Blueprint, described_by, shapes_of
from routing_experts.models.published.llava import check_settings, llava_blueprint
from routing_experts.models.published.llava_hr import is_llava_hr, llava_hr_blueprint
from routing_experts.models.published.processor import (
    check_packages,
    grow_vocabulary,
    make_processor,
    read_tokenizer,
)
from routing_experts.models.published.renames import left_out
from routing_experts.models.published.sources import Sources, read_config

Layout = Callable[[Mapping[str, Any], Path, Sources], Blueprint]


def import_published(
    name_or_path: str | Path, sources: Sources, say: Callable[[str], object] = lambda text: None
) -> tuple[Any, Any]:
    """Reads a published checkpoint.

    Args:
        name_or_path: a folder or a hub name.
        sources: what it leaves out.
        say: told what is left out of its files, and why.

    Returns:
        The model, in the precision of its files, and its processor, which has no chat template yet.

    Raises:
        CheckpointError: if it is of no layout that is read, or its names, shapes, sizes or vocabulary do not come out
            even.
    """
    texts = sources.texts(name_or_path)  # what is refused for its settings is refused before it is downloaded
    raw = read_config(texts)
    layout = layout_of(raw, texts)
    check_settings(raw, texts)
    check_packages(texts)
    folder = sources.folder(name_or_path)
    raw = read_config(folder)  # of the weights, should it have changed on the hub meanwhile
    blueprint = layout(raw, folder, sources)
    _check_depth(blueprint, folder)
    with described_by(folder):
        wanted = shapes_of(blueprint.model_class, blueprint.config)
    blueprint.places(wanted)  # before any weight is read, and before the tokenizer is asked for
    for reason, count in left_out(blueprint.parts).items():
        say(f"{count} tensors left out: {reason}")
    tokenizer = read_tokenizer(_with_tokenizer(folder, sources), int(raw["vocab_size"]))
    model = blueprint.build(wanted)
    grow_vocabulary(model, tokenizer)
    model.name_or_path = str(name_or_path)
    return model, make_processor(tokenizer, blueprint.pictures)


def _check_depth(blueprint: Blueprint, folder: Path) -> None:
    """Refuses more decoder layers than there are tensors before memory is taken for an outline of them."""
    layers = blueprint.config.get_text_config(decoder=True).num_hidden_layers
    tensors = sum(len(part.tensors.shapes) for part in blueprint.parts)
    if not isinstance(layers, int) or layers > tensors:
        raise CheckpointError(
            f"{folder}/config.json says {layers} layers, and all of its files hold {tensors} tensors. Restore the "
            "checkpoint's own configuration, or download it whole."
        )


def layout_of(raw: Mapping[str, Any], folder: Path) -> Layout:
    """What reads the layout of a checkpoint with this configuration.

    LLaVA's code and LLaVA-HR's call their models ``llava`` too, as transformers calls its own: fields tell them apart.

    Raises:
        CheckpointError: if it is transformers' own layout, or none that is read.
    """
    if is_llava_hr(raw):
        return llava_hr_blueprint
    if "text_config" in raw or "vision_config" in raw:
        raise CheckpointError(
            f"{folder} is in transformers' own layout ({raw.get('model_type')}): there is nothing to import. Use it as "
            "it is."
        )
    if "llm_cfg" in raw:
        raise CheckpointError(f"{folder} is a VILA-1.5 (llm_cfg), whose layout is not read yet.")
    if "moe" in raw or str(raw.get("model_type", "")).startswith("moe_llava"):
        raise CheckpointError(f"{folder} is a MoE-LLaVA (moe), whose layout is not read yet.")
    if "mm_vision_tower" in raw:
        return llava_blueprint
    raise CheckpointError(
        f"{folder}: a configuration of model type {raw.get('model_type')!r} without mm_vision_tower is no LLaVA's in "
        "its original layout. LLaVA-1.5 and LLaVA-HR are read; name the base (--base) for a checkpoint of RoE's code."
    )


def _with_tokenizer(folder: Path, sources: Sources) -> Path:
    """The folder whose tokenizer it is: a first stage's is the language model's."""
    own = any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    return folder if own or sources.language_model is None else sources.folder(sources.language_model)
