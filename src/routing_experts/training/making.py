"""The model that a recipe trains: made before its first step, merged after its last."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from routing_experts.data.markers import find_markers
from routing_experts.errors import CheckpointError
from routing_experts.models.checkpoint import is_roe_key, load_parts
from routing_experts.models.convert import convert, is_routed, retarget
from routing_experts.models.load import from_pretrained, is_routed_folder, load_base, load_outline
from routing_experts.training.lora import base_of, decoder_linears, is_lora_key, load_updates, with_lora
from routing_experts.training.recipe import Recipe
from routing_experts.training.state import FILES as OPTIMIZER_FILES


def make_model(recipe: Recipe, processor: Any) -> Any:
    """Loaded, converted, with LoRA's updates; seeded anew each time."""
    unset_hf_deepspeed_config()  # while a trainer's is in force, ZeRO-3 cuts weights up before they can be read
    set_seed(recipe.training.seed)
    model = _load(recipe)
    roe = replace(recipe.roe, prompt_format=recipe.data.prompt_format)
    if recipe.is_routed and is_routed(model):
        retarget(model, roe)
    elif recipe.is_routed:
        convert(model, roe, find_markers(processor, recipe.data.prompt_format), seed=recipe.training.seed)
    for name, parameter in model.named_parameters():
        if is_roe_key(name):
            parameter.data = parameter.data.float()  # 32 bits for what trains, whatever the base is kept in
    return model if recipe.lora is None else with_lora(model, recipe.lora)


def made_of(recipe: Recipe, processor: Any, state: Mapping[str, Tensor], wanted: Callable[[str], bool] = bool) -> Any:
    """The recipe's model with weights that were trained; weights that are tied come under one name.

    Args:
        recipe: of the run.
        processor: the base's.
        state: the weights, by parameter name.
        wanted: whether a parameter must be among them; all by default.
    """
    model = make_model(recipe, processor)
    lacking = {name for name, _ in model.named_parameters() if wanted(name)} - state.keys()
    assert not lacking, lacking
    report = model.load_state_dict(state, strict=False)
    assert not report.unexpected_keys, report.unexpected_keys
    return model


def merged(recipe: Recipe, processor: Any, trained: Mapping[str, Tensor]) -> Any:
    """What LoRA trained, worked into the base's own weights: loaded anew in 32 bits, neither quantised nor shared out.

    Args:
        recipe: of the run.
        processor: the base's.
        trained: LoRA's updates and the RoE parts, by name.
    """
    whole = replace(recipe, quantization=None, training=replace(recipe.training, precision="fp32"))
    return made_of(whole, processor, trained, is_trained_beside).merge_and_unload()


def save_whole(model: Any, recipe: Recipe, folder: Path) -> None:
    """Writes a trained model, in the precision that it was trained from: a base that LoRA left in 16 bits stays so.

    The RoE parts are kept in 32 bits all the same; in memory all are of one precision then, so that it answers.
    """
    if recipe.lora is None or recipe.training.precision == "fp32":
        model.save_pretrained(folder)
        return
    parts = {name: value.clone() for name, value in model.state_dict().items() if is_roe_key(name)}
    model.to(torch.bfloat16)
    model.save_pretrained(folder, state_dict=model.state_dict() | parts)


def is_trained_beside(name: str) -> bool:
    """Whether a parameter trains beside a base that LoRA leaves frozen."""
    return is_lora_key(name) or is_roe_key(name)


def _load(recipe: Recipe) -> Any:
    """The recipe's model in the precision that training keeps its weights in; a routed folder keeps its routers."""
    half = recipe.lora is not None and recipe.training.precision == "bf16"  # the frozen base needs no master weights
    dtype = torch.bfloat16 if half else torch.float32
    settings: dict[str, Any] = {"dtype": dtype}
    if recipe.quantization is not None:
        settings["quantization_config"] = quantization_config(recipe, dtype)
    if recipe.is_routed and not recipe.random_init and is_routed_folder(recipe.model):
        return from_pretrained(recipe.model, **settings)
    return load_base(recipe.model, recipe.random_init, **settings)


def quantization_config(recipe: Recipe, dtype: torch.dtype) -> Any:
    """bitsandbytes' settings: 8 bits, or NF4 with quantised scales (Dettmers et al., 2023), of the decoder's layers.

    Args:
        recipe: whose base is quantised.
        dtype: that layers compute in.
    """
    from transformers import BitsAndBytesConfig

    outline = load_outline(recipe.model)
    linear = {name for name, module in outline.named_modules() if isinstance(module, torch.nn.Linear)}
    others = sorted(linear - set(decoder_linears(outline)))
    if recipe.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=others)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=others,
    )


def saved_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's, one at a time: the model's or LoRA's updates, and the RoE parts."""
    for path in sorted(folder.glob("*.safetensors")):
        if not path.match(OPTIMIZER_FILES):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                    yield name, file.get_tensor(name)


def load_weights(model: Any, folder: Path) -> None:
    """Puts a checkpoint's weights into a whole model: the base's through transformers' own loading, and the RoE parts.

    The Trainer would match saved names against the model's as they are, and skip what transformers renames. Of a base
    that LoRA tunes there are the updates alone.

    Raises:
        CheckpointError: if the checkpoint lacks a parameter of the model.
    """
    base = base_of(model)
    if base is not model:
        load_updates(model, folder)
    else:
        # ZeRO's checkpoints hold 32 bits under a configuration that names the 16 that it computed in.
        report = model.load_state_dict(load_base(folder, dtype=torch.float32).state_dict(), strict=False)
        missing = [name for name in report.missing_keys if not is_roe_key(name)]
        if missing or report.unexpected_keys:
            raise CheckpointError(
                f"{folder} does not hold this model: missing {missing[:4]}, unexpected {report.unexpected_keys[:4]}. "
                "It belongs to another recipe: give that one, or another output."
            )
    if is_routed(base):
        load_parts(base, folder)
