"""Checkpoints: the RoE parts in ``roe.safetensors`` beside ``roe_config.json``, with or without the base's weights.

Everything is written to a temporary folder first and renamed into place; ``roe_config.json`` comes last, so that a
folder that has it is complete. Only safetensors are ever read.
"""

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from routing_experts.config import CONFIG_NAME, BaseModel, RoEConfig
from routing_experts.errors import CheckpointError
from routing_experts.models.card import CARD_NAME, is_hand_written, write_card
from routing_experts.models.staging import staged

WEIGHTS_NAME = "roe.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_ROE_PARTS = ("skip_down", "skip_up", "router", "routing_tokens")
_BASE_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_SAMPLES = 64  # values of each parameter that the fingerprint reads


def is_roe_key(name: str) -> bool:
    """Whether a state-dict key belongs to an adapter, a router or the routing tokens."""
    return any(part in _ROE_PARTS for part in name.split("."))


def fingerprint(model: Any, parts: bool = False) -> str:
    """A hash of some values of every base parameter, rounded to bfloat16: the same for a model and its bf16 copy.

    It tells fine-tuned bases from one another, which shapes do not; norms alone would not, since LoRA leaves them.
    A quantised model's weights are nobody else's, and an outline has none: an empty fingerprint compares with nothing.
    With ``parts`` those that routing added count as well.
    """
    parameters = list(model.parameters())
    if all(p.is_meta for p in parameters) or any(not p.dtype.is_floating_point for p in parameters):
        return ""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parts or not is_roe_key(name):
            sample = some_values(parameter).to("cpu", torch.bfloat16)
            digest.update(sample.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def some_values(parameter: Tensor) -> Tensor:
    """Values from all over a parameter, few enough to hash."""
    values = parameter.detach().flatten()
    return values[:: max(1, len(values) // _SAMPLES)]


def save_routed(
    model: Any,
    folder: str | Path,
    base_weights: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Writes a routed model's folder.

    Args:
        model: a converted model.
        folder: made if it is not there; older weights and files of the same names are replaced, others left alone.
        base_weights: also write the base's configuration and weights; without them the folder holds the RoE parts
            alone and is loaded onto the base that it names.
        state_dict: gathered weights, where the model's own are sharded.
        **kwargs: for the base's ``save_pretrained``.

    Raises:
        CheckpointError: for RoE parts alone when the base was tuned since conversion: they would not fit the original;
            or when the folder holds a base model, onto which they would be loaded.
    """
    folder = Path(folder)
    state = model.state_dict() if state_dict is None else state_dict
    config: RoEConfig = model.roe_config
    if state_dict is None:
        config = _with_fingerprint(model, config, base_weights)
    if not base_weights and (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds a base model: RoE parts saved beside it with base_weights=False would be loaded onto its "
            "weights. Give another folder."
        )
    with staged(folder) as staging:
        if base_weights:
            base_state = {name: tensor for name, tensor in state.items() if not is_roe_key(name)}
            _base_class(model).save_pretrained(model, staging, state_dict=base_state, **kwargs)
        save_parts(model, staging, state)
        config.save(staging)
        if not is_hand_written(folder / CARD_NAME):
            write_card(staging, config)
        folder.mkdir(exist_ok=True)
        (folder / CONFIG_NAME).unlink(missing_ok=True)  # a folder being replaced is not complete until it is back
        written = sorted(staging.iterdir(), key=lambda path: path.name == CONFIG_NAME)
        for path in written[:-1]:
            os.replace(path, folder / path.name)
        for path in _base_weight_files(folder):  # of an older save in other shards; readers might prefer them
            if path.name not in {new.name for new in written}:
                path.unlink()
        os.replace(written[-1], folder / CONFIG_NAME)


def _base_class(model: Any) -> Any:
    """What the model was before conversion; FSDP2 may have put a class of its own on top of the routed one."""
    return next(kind.__base__ for kind in type(model).__mro__ if "is_routing_experts_model" in vars(kind))


def _base_weight_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("model*") if _BASE_WEIGHTS.fullmatch(path.name)]


def save_parts(model: Any, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Writes ``roe.safetensors`` alone."""
    state = model.state_dict() if state_dict is None else state_dict
    roe = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items() if is_roe_key(name)}
    save_file(roe, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def load_parts(model: Any, folder: Path) -> None:
    """Reads ``roe.safetensors`` into a converted model, in the model's own precision.

    Raises:
        CheckpointError: if the file is missing, no safetensors, or its tensors are not exactly the model's RoE parts.
    """
    path = folder / WEIGHTS_NAME
    check_no_pickle(folder, WEIGHTS_NAME)
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}): it may be cut short, or a renamed pickle. "
            "Restore it from the training run's folder; pickles are never loaded."
        ) from error
    own = {name: tensor for name, tensor in model.state_dict().items() if is_roe_key(name)}
    missing, extra = sorted(set(own) - set(stored)), sorted(set(stored) - set(own))
    common = [name for name in own if name in stored]
    wrong = [f"{n} {list(stored[n].shape)} for {list(own[n].shape)}" for n in common if stored[n].shape != own[n].shape]
    if missing or extra or wrong:
        raise CheckpointError(
            f"{path} does not hold this model's RoE parts: missing {missing[:4]}, unexpected {extra[:4]}, "
            f"of another shape {wrong[:4]}. It belongs to another base model or config: load it onto the base that "
            f"{CONFIG_NAME} names."
        )
    model.load_state_dict(stored, strict=False)


def check_base(config: RoEConfig, found: BaseModel, found_fingerprint: str, folder: Path) -> None:
    """Raises ``CheckpointError`` unless the RoE parts were trained for this base model."""
    made_for = config.base
    if made_for is None:
        return
    for name in ("model_type", "hidden_size", "num_layers", "vocab_size"):
        want, have = getattr(made_for, name), getattr(found, name)
        if want != have:
            raise CheckpointError(
                f"{folder} was made for a base model with {name}={want!r}, this one has {have!r}: adapters and routers "
                f"fit only the base they were trained with. Load it onto {made_for.name_or_path or 'that base'}."
            )
    if made_for.fingerprint and found_fingerprint and made_for.fingerprint != found_fingerprint:
        raise CheckpointError(
            f"{folder} was made for a base model with fingerprint {made_for.fingerprint}, this one has "
            f"{found_fingerprint}: it has the same shape but other weights (perhaps another fine-tune). Load it onto "
            f"{made_for.name_or_path or 'the base it was trained with'}."
        )


def check_no_pickle(folder: Path, expected: str) -> None:
    """Raises ``CheckpointError`` if ``expected`` is missing; names a pickle lying in its place."""
    if (folder / expected).is_file():
        return
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds {', '.join(pickles)} but no {expected}: pickles can run code when opened and are never "
            "loaded. Convert the weights to safetensors where you trust them."
        )
    raise CheckpointError(
        f"{folder} has no {expected}: the checkpoint is incomplete. Restore it from the training run."
    )


def _with_fingerprint(model: Any, config: RoEConfig, base_weights: bool) -> RoEConfig:
    assert config.base is not None
    now = fingerprint(model)
    if not base_weights and config.base.fingerprint and now != config.base.fingerprint:
        raise CheckpointError(
            "base_weights=False, but the base's weights changed since conversion: the RoE parts alone would not fit "
            "the original base. Save with base_weights=True."
        )
    if config.base.fingerprint:
        return config  # of the base that the config names, whatever tuning did to this copy of it
    return replace(config, base=replace(config.base, fingerprint=now))
