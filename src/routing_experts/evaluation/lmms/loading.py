"""Which model lmms-eval asks, and what tells its answers from those of any other."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from routing_experts.errors import EvaluationError
from routing_experts.models.checkpoint import fingerprint, some_values
from routing_experts.models.convert import is_routed
from routing_experts.models.load import check_processor, from_pretrained, is_routed_folder, load_base, load_processor
from routing_experts.models.options import RoutingOptions, bias_rows, settle


def load_model(pretrained: str, dense: bool, base: str | None, dtype: str, options: RoutingOptions) -> tuple[Any, Any]:
    """The model and its processor.

    Raises:
        EvaluationError: if the folder is not routed and nobody said so.
    """
    run = Path(pretrained) / "model"
    source = str(run) if run.is_dir() else pretrained
    kwargs = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    if is_routed_folder(source):
        if dense:
            raise EvaluationError(
                f"{pretrained} is routed, but dense=True was given: to run all of its layers give skip_ratio=0, or the "
                "folder of the model that it was made from."
            )
        model = from_pretrained(source, base=base, **kwargs)
    else:
        if not dense:
            raise EvaluationError(
                f"{pretrained} has no RoE parts: it would run all its layers for every sample. Give the folder of a "
                "routed model, or dense=True to measure a model without routes."
            )
        if options != RoutingOptions():
            raise EvaluationError(
                "skip_ratio or keep_bias with dense=True: a dense model has no routers. Leave it out."
            )
        model = load_base(source, **kwargs)
    processor = load_processor(source, base)
    check_processor(model, processor)
    return model, processor


def prompt_format_of(model: Any, wanted: str | None) -> str:
    """How a model is asked.

    Raises:
        EvaluationError: if a routed model is to be asked otherwise than it was trained.
    """
    if not is_routed(model):
        return wanted or "chat_template"
    own: str = model.roe_config.prompt_format
    if wanted not in (None, own):
        raise EvaluationError(f"prompt_format={wanted!r}: the model was trained on {own}. Leave it out.")
    return own


def identity(model: Any, processor: Any, options: RoutingOptions) -> dict[str, Any]:
    """Plain values that say who answers: weights, routes, what makes pictures and texts into tokens, and versions.

    Raises:
        RouteError: if the model cannot do what the options ask.
    """
    return {
        "model": fingerprint(model, parts=True) or _quantised(model),
        "keep_bias": _settled_bias(model, options),
        "dtype": str(model.dtype),
        "processor": _hash(json.dumps(processor.to_dict(), sort_keys=True, default=str)),
        "tokenizer": _hash(json.dumps(sorted(processor.tokenizer.get_vocab().items()))),
        "template": _hash(str(getattr(processor, "chat_template", ""))),
        "generation": _hash(model.generation_config.to_json_string(ignore_metadata=True)),
        **{name: version(name) for name in ("routing-experts", "transformers")},
    }


def _settled_bias(model: Any, options: RoutingOptions) -> float | str | None:
    """What the options come to for a model, which refuses here and not at some sample what it cannot do."""
    if not is_routed(model):
        return None
    settled = settle(options, model.roe_config, model.config.get_text_config(decoder=True).num_hidden_layers)
    return "a fixed route" if settled.keep_bias is None else repr(bias_rows(settled.keep_bias, 1).item())


def _quantised(model: Any) -> str:
    """A hash of packed weights, which have no values of their own to compare with other precisions."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        packed = some_values(parameter).cpu().contiguous().view(torch.uint8)
        digest.update(name.encode() + packed.numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
