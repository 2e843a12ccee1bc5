"""Which layout a folder is in, and the model that it becomes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from routing_experts.errors import CheckpointError, RoutingExpertsError
from routing_experts.models.llava_hr.published import is_llava_hr, llava_hr_blueprint
from routing_experts.models.published.blueprint import Blueprint, shapes_of
from routing_experts.models.published.llava import llava_blueprint
from routing_experts.models.published.processor import grow_vocabulary, make_processor, read_tokenizer
from routing_experts.models.published.sources import Sources, read_config

_UNBUILDABLE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError)
Drawer = Callable[[Mapping[str, Any], Path, Sources], Blueprint]


def import_published(name_or_path: str | Path, sources: Sources) -> tuple[Any, Any]:
    """Reads a published checkpoint.

    Args:
        name_or_path: a folder or a hub name.
        sources: what it leaves out.

    Returns:
        The model, in the precision of its files, and its processor, which has no chat template yet.

    Raises:
        CheckpointError: if it is of no layout that is read, or its names, shapes, sizes or vocabulary do not come out
            even.
    """
    folder = sources.folder(name_or_path)
    raw = read_config(folder)
    with _told_as(folder):
        blueprint = drawer_of(raw, folder)(raw, folder, sources)
        wanted = shapes_of(blueprint.model_class, blueprint.config)
    blueprint.account(wanted)  # before any weight is read, and before the tokenizer is asked for
    tokenizer = read_tokenizer(_with_tokenizer(folder, sources), int(raw["vocab_size"]))
    model = blueprint.build(wanted)
    grow_vocabulary(model, tokenizer)
    model.name_or_path = str(name_or_path)
    return model, make_processor(tokenizer, blueprint.pictures)


@contextmanager
def _told_as(folder: Path) -> Iterator[None]:
    """Blames what transformers cannot make a model of on the configuration that it is read from."""
    try:
        yield
    except RoutingExpertsError:
        raise
    except (*_UNBUILDABLE, StrictDataclassError) as error:
        raise CheckpointError(
            f"{folder}/config.json describes no model that can be built ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Restore the checkpoint's own configuration."
        ) from error


def drawer_of(raw: Mapping[str, Any], folder: Path) -> Drawer:
    """What draws the blueprint of a checkpoint with this configuration.

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
