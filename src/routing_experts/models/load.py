"""Loading: base models with their processors, and routed models from their folders."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from routing_experts.config import CONFIG_NAME, RoEConfig
from routing_experts.errors import CheckpointError, MissingExtraError
from routing_experts.models.checkpoint import WEIGHTS_NAME, check_base, check_no_pickle, fingerprint, load_parts
from routing_experts.models.convert import base_model_of, convert
from routing_experts.models.families import family_of, known_families
from routing_experts.models.static import strip
from routing_experts.optional import need

VIDEO_PACKAGES = ("torchvision", "num2words")
POCKET = Path(__file__).parent.parent / "pocket"


def resolve(name_or_path: str | Path) -> str:
    """``pocket`` is the model that ships with the package; anything else is a folder or a hub name."""
    return str(POCKET) if str(name_or_path) == "pocket" and not Path("pocket").is_dir() else str(name_or_path)


def load_processor(name_or_path: str | Path, base: str | Path | None = None) -> Any:
    """The processor of a model, with the PIL image backend: its pixels are the same wherever it runs.

    Args:
        name_or_path: the model's folder or name.
        base: whose processor is taken where a folder of parts alone brings none.

    Raises:
        CheckpointError: if there is none.
        MissingExtraError: if it needs a package that is not installed, as those of families that take videos do.
    """
    source = resolve(name_or_path)
    if base is not None and not (Path(source) / "processor_config.json").is_file():
        source = resolve(base)
    try:
        from transformers import AutoImageProcessor, AutoProcessor

        processor = AutoProcessor.from_pretrained(source)
        if hasattr(processor, "image_processor"):  # asked for whole, a PIL backend would be wanted of videos too
            processor.image_processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    except (ImportError, OSError, ValueError) as error:
        lacking = [name for name in VIDEO_PACKAGES if name in str(error).lower() and find_spec(name) is None]
        if lacking:
            raise MissingExtraError(
                f"{source}: its processor, which could take videos as well, needs {' and '.join(lacking)}. Install "
                f"{'it' if len(lacking) == 1 else 'them'}; torchvision in the build that goes with your torch."
            ) from error
        if isinstance(error, ImportError):
            raise CheckpointError(
                f"{source}: its processor cannot be imported ({error}). Install what is missing; a torchvision that is "
                "there has to go with your torch."
            ) from error
        raise CheckpointError(
            f"{source} has no processor that can be loaded ({error}). Save the base model's processor there."
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_token_id"):
        raise CheckpointError(
            f"{source} has a {type(processor).__name__}, no processor for text and pictures, which dialogues are "
            "laid out by. Use a multimodal model, or route a text model in Python with convert()."
        )
    return processor


def check_processor(model: Any, processor: Any) -> None:
    """Holds a processor to the model that it comes with.

    Raises:
        CheckpointError: if it writes tokens that the model does not know, or another one for pictures.
    """
    images, known = family_of(model).image_token_ids(model.config), model.get_input_embeddings().num_embeddings
    if images and processor.image_token_id not in images:
        raise CheckpointError(
            f"a {type(processor).__name__} that writes token {processor.image_token_id} for pictures, with a model "
            f"that reads them at {', '.join(map(str, images))}: it is another model's. Load the model's own processor."
        )
    if len(processor.tokenizer) > known:
        raise CheckpointError(
            f"a {type(processor).__name__} of {len(processor.tokenizer)} tokens, with a model of {known}: it is "
            "another model's. Load the model's own processor."
        )


def load_base(name_or_path: str | Path, random_init: bool = False, **kwargs: Any) -> Any:
    """A base model of whatever class its configuration names.

    Args:
        name_or_path: ``pocket``, a folder, or a hub name.
        random_init: fresh weights of that configuration.
        **kwargs: for ``from_pretrained`` (``dtype``, ``device_map`` …); random weights heed ``dtype`` alone.

    Raises:
        CheckpointError: if there are no safetensors weights, or they cannot be read.
    """
    source = resolve(name_or_path)
    model_class, config = _class_of(source)
    if random_init:
        return _named(model_class(config).to(kwargs.get("dtype")), name_or_path)
    if Path(source).is_dir() and not any(Path(source).glob("*.safetensors.index.json")):
        check_no_pickle(Path(source), "model.safetensors")
    try:
        loaded = model_class.from_pretrained(source, **(kwargs | {"use_safetensors": True}))
        return _named(loaded.eval(), name_or_path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{source} cannot be loaded ({error}): a file may be missing, cut short, or a renamed pickle "
            "(model.safetensors or one of its parts). Restore the weights; pickles are never loaded."
        ) from error


def load_outline(name_or_path: str | Path) -> Any:
    """A base model on the meta device: names and shapes of its configuration, no weights.

    Raises:
        CheckpointError: if there is no such model.
    """
    model_class, config = _class_of(resolve(name_or_path))
    with torch.device("meta"):
        return _named(model_class(config), name_or_path)


def _class_of(source: str) -> tuple[Any, Any]:
    """The class that a model's configuration names, transformers' or our own, and the configuration."""
    import transformers

    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise CheckpointError(
            f"{source} has no config.json, so it is no model's folder. Give a model's folder or hub name."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} is no model that can be loaded: {error}") from error
    family = known_families().get(config.model_type)
    own = family.own_models().get(family.auto_class, {}) if family is not None else {}
    if family is not None and type(config) in own:
        return family.own_class(own[type(config)]), config
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    if model_class is None:
        raise CheckpointError(
            f"{source}: its configuration names the class {config.architectures}, which transformers "
            f"{transformers.__version__} lacks. Use a model of a family that transformers has."
        )
    return model_class, config


def from_pretrained(folder: str | Path, base: Any = None, **kwargs: Any) -> Any:
    """A routed model from a folder (or hub name) that ``save_pretrained`` or ``roe train`` wrote.

    Args:
        folder: holds ``roe_config.json`` and ``roe.safetensors``, and the base's weights or not.
        base: the base model for RoE parts alone, loaded or by name; the one that the config names by default.
        **kwargs: for the base's ``from_pretrained``.

    Raises:
        CheckpointError: if the folder is incomplete, of a newer format, or of another base model.
        MissingExtraError: for a quantised base without bitsandbytes.
    """
    path = _local(folder)
    config = RoEConfig.load(path)
    has_base = (path / "config.json").is_file()
    if base is None and not has_base and not (config.base and config.base.name_or_path):
        raise CheckpointError(
            f"{path} holds RoE parts alone and does not say whose: their base had no name. "
            "Pass base=..., the model or its name."
        )
    if "quantization_config" in kwargs and "BitsAndBytes" in type(kwargs["quantization_config"]).__name__:
        need("bitsandbytes", "quant", "4-bit and 8-bit loading")
    own_base = base is None and has_base
    if base is None or isinstance(base, str | Path):
        named = config.base.name_or_path if config.base else ""
        with _unheard(config.stripped):  # that the dropped layers' weights are not there is as it should be
            base = load_base(base or (path if has_base else named), **kwargs)
    check_base(config, base_model_of(base), "" if own_base else fingerprint(base), path)
    model = convert(base, config)
    model.roe_config.base = config.base
    if config.stripped:
        strip(model)
    load_parts(model, path)
    return model.eval()


@contextmanager
def _unheard(quiet: bool) -> Iterator[None]:
    """Keeps transformers' warnings back."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    if quiet:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _named(model: Any, name_or_path: str | Path) -> Any:
    """A model remembers the name it was asked for by, which still resolves on another machine."""
    model.name_or_path = str(name_or_path)
    return model


def is_routed_folder(name_or_path: str | Path) -> bool:
    """Whether a folder holds a routed model (or what an interrupted save left of one), or a hub name stands for one."""
    if not isinstance(name_or_path, str | os.PathLike):
        return False  # transformers allows None beside a state dict
    name = str(name_or_path)
    if Path(name).exists() or name.count("/") != 1 or name.startswith((".", "/")):
        return any((Path(name) / part).is_file() for part in (CONFIG_NAME, WEIGHTS_NAME))
    from transformers.utils import cached_file

    quiet = {f"_raise_exceptions_for_{case}": False for case in ("gated_repo", "missing_entries", "connection_errors")}
    return cached_file(name, CONFIG_NAME, **quiet) is not None


def is_static_folder(name_or_path: str | Path) -> bool:
    """Whether a folder here holds a static model: layers are gone, and nothing decides."""
    path = Path(name_or_path)
    return (path / CONFIG_NAME).is_file() and RoEConfig.load(path).stripped


def _local(folder: str | Path) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(folder)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{folder} is neither a folder here nor a model on the hub that can be reached ({type(error).__name__}). "
            "Give the folder that `roe train` wrote, or check the name and the connection."
        ) from error
