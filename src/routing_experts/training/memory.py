"""What a stage needs of a device's memory, counted before anything is loaded.

Weights, gradients and optimiser state follow from names and shapes. Activations are counted by running one batch
through forward and backward on tensors without data, and adding up what is alive at a time. Soft gates are counted,
which compute and keep both paths of every layer: hard ones need less. A frozen vision
tower's activations are left out: its layers hold nothing for the backward pass. Those of a tuned one are counted where
its family says how large a picture is, a picture a dialogue.
"""

import weakref
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from routing_experts.errors import ConfigError
from routing_experts.models.context import RoutingContext
from routing_experts.models.convert import convert
from routing_experts.models.families import family_of
from routing_experts.models.load import load_outline
from routing_experts.nn.gates import GateSettings
from routing_experts.training.lora import base_of, decoder_linears, is_lora_key, with_lora
from routing_experts.training.making import is_trained_beside
from routing_experts.training.parameters import freeze_all_but
from routing_experts.training.recipe import QUANTIZATIONS, LoraSettings, Recipe
from routing_experts.training.schedule import Stage
from routing_experts.training.sharding import FSDP, engine_file
from routing_experts.training.tower import heed_tower

PACKED_BITS = {"8bit": 8.0, "4bit": 4.127}  # NF4 with scales in eight bits, a block of 64 each, and theirs
GIB = 2**30
WHOLE, HALF = 4, 2  # bytes a number in 32 and in 16 bits
MOMENTS = 2
GATHERED_LAYERS = 2  # FSDP's: the one at work, and the next one, fetched ahead
LIVE_NUMBERS = 10**9  # DeepSpeed's stage3_max_live_parameters
BUCKETS = 2  # of hidden size squared numbers each, as recipes/engines asks for: one fills while the other is sent
STEP_SCRATCH = 1  # numbers a trained parameter that AdamW on a GPU holds beside its state during the step


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one device at a stage's peak.

    Attributes:
        method: how the base is tuned: ``full``, ``lora``, ``lora 8bit``, ``lora 4bit``.
        stage: name.
        trained: parameters that train.
        weights: of the model; whole layers that are gathered for a moment, where processes share them out, included.
        gradients: of what trains.
        optimizer: moments, and 32-bit weights where the model computes with others.
        activations: all else that a step holds at once.
    """

    method: str
    stage: str
    trained: int
    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """Bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def methods_of(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe's own way of tuning the base, and the others, by name."""
    if find_spec("peft") is None:
        return {own_method(recipe): recipe}
    lora = recipe.lora or LoraSettings()
    ways = {
        "full": replace(recipe, lora=None, quantization=None),
        "lora": replace(recipe, lora=lora, quantization=None),
    }
    if recipe.training.sharding is None:
        ways |= {
            f"lora {bits}": replace(recipe, lora=lora, random_init=False, quantization=bits) for bits in QUANTIZATIONS
        }
    return ways


def own_method(recipe: Recipe) -> str:
    """Which of ``methods_of`` the recipe is."""
    name = "full" if recipe.lora is None else "lora"
    return f"{name} {recipe.quantization}" if recipe.quantization else name


def estimate(recipe: Recipe, processes: int = 1, tokens: int | None = None) -> Iterator[StageMemory]:
    """Every stage's memory by every method.

    Args:
        recipe: its model's configuration is read, not its weights.
        processes: that share out what ``training.sharding`` says.
        tokens: of a dialogue, pictures included; the data's ``max_length`` by default.

    Raises:
        ConfigError: for a DeepSpeed file, whose settings are not looked up, or if the processes do not divide a step.
        CheckpointError: if there is no such model.
    """
    sharding = recipe.training.sharding
    if sharding is not None:
        engine_file(sharding)
    if sharding not in (None, "zero2", "zero3", "zero3_offload", FSDP):
        raise ConfigError(
            f"training.sharding={sharding!r}: memory is counted for zero2, zero3, zero3_offload and fsdp2. Estimate "
            "with the one of them that your file is like."
        )
    accumulates = recipe.training.accumulation_on(processes) > 1
    length = tokens or recipe.data.max_length
    outlines: dict[bool, Any] = {}
    counted: dict[tuple[bool, str], float] = {}
    for method, way in methods_of(recipe).items():
        tunes_low_rank = way.lora is not None  # packed weights are unpacked to compute with: the same activations
        if tunes_low_rank not in outlines:
            outlines[tunes_low_rank] = _outline(way)
        model = outlines[tunes_low_rank]
        for stage in heed_tower(recipe, model.config).stages:
            freeze_all_but(model, stage.trains, lora=tunes_low_rank)
            kept = _kept(method, way, stage, model, processes)
            key = (tunes_low_rank, stage.name)
            if key not in counted:
                counted[key] = _activation_bytes(deepcopy(model), way, stage, length, accumulates)
            yield replace(kept, activations=max(kept.activations, counted[key]))


def _kept(method: str, recipe: Recipe, stage: Stage, model: Any, processes: int) -> StageMemory:
    """All but what a step holds for a moment; of that, the optimiser's scratch."""
    sharding = recipe.training.sharding
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = _weight_bytes(model, recipe)
    bytes_a_number = HALF if recipe.training.precision == "bf16" else WHOLE
    scratch = trained * WHOLE * STEP_SCRATCH
    if sharding is None:
        gradients = trained * WHOLE * (2 if processes > 1 else 1)  # DDP has them once more, in buckets
        return StageMemory(method, stage.name, trained, weights, gradients, trained * WHOLE * MOMENTS, scratch)
    layer = max(sum(p.numel() for p in layer.parameters()) for layer in _layers(model)) * bytes_a_number
    if sharding == FSDP:
        state = (trained * WHOLE / processes, trained * WHOLE * MOMENTS / processes, scratch / processes)
        return StageMemory(method, stage.name, trained, weights / processes + GATHERED_LAYERS * layer, *state)
    # DeepSpeed keeps 32-bit copies of what trains beside the moments, and buckets that gradients pass through.
    offloads = sharding == "zero3_offload"  # the host holds shards, gradients' among them, and updates them
    shared = 0.0 if offloads else 1 / processes
    buckets = BUCKETS * model.config.get_text_config(decoder=True).hidden_size ** 2 * bytes_a_number
    if sharding != "zero2":
        whole = sum(p.numel() for p in model.parameters()) * bytes_a_number
        weights = weights * shared + max(layer, min(LIVE_NUMBERS * bytes_a_number, whole))
    gradients = trained * bytes_a_number * shared + buckets
    optimizer = trained * WHOLE * (MOMENTS + 1) * shared
    return StageMemory(method, stage.name, trained, weights, gradients, optimizer, scratch * shared)


def _outline(recipe: Recipe) -> Any:
    """The model as the recipe would make it, on the meta device, in the precision that it is kept in."""
    model = load_outline(recipe.model)
    half, engine = recipe.training.precision == "bf16", recipe.training.sharding
    casts_all = half and engine not in (None, FSDP)  # DeepSpeed does, whatever trains
    with torch.device("meta"):
        if recipe.is_routed:
            convert(model, recipe.roe)
        model.to(torch.bfloat16 if casts_all or (half and recipe.lora is not None) else torch.float32)
        if recipe.lora is not None:
            model = with_lora(model, recipe.lora)
    for name, parameter in model.named_parameters():
        if is_trained_beside(name):
            parameter.data = parameter.data.to(torch.bfloat16 if casts_all else torch.float32)
    return model


def _layers(model: Any) -> nn.ModuleList:
    base = base_of(model)
    return family_of(base).decoder_layers(base)


def _weight_bytes(model: nn.Module, recipe: Recipe) -> float:
    """Of the whole model; the decoder's linear layers packed where the recipe quantises them."""
    total = _bytes_of(model)
    if recipe.quantization is None:
        return total
    bits = PACKED_BITS[recipe.quantization]
    base = base_of(model)
    for name in decoder_linears(base):
        if not is_lora_key(name):
            weight = base.get_parameter(f"{name}.weight")
            total += weight.numel() * bits / 8 - weight.nbytes
    return total


def _bytes_of(module: nn.Module) -> float:
    return float(sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers())))


def _activation_bytes(model: Any, recipe: Recipe, stage: Stage, length: int, accumulates: bool) -> float:
    """What forward and backward of one batch hold at once beside weights and all gradients."""
    settings = recipe.training
    model.train()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    half = settings.precision == "bf16"
    autocast = half and settings.sharding is None
    if half and settings.sharding == FSDP:
        model.to(torch.bfloat16)  # units are gathered in what they compute with
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model = model.to_empty(device="cpu")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ids = torch.zeros(settings.batch_size, length, dtype=torch.int64)
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            for parameter in trained if accumulates else ():
                parameter.grad = torch.zeros_like(parameter)
            _loss(model, ids, stage, settings.distill_coef > 0, autocast).backward()
    # Without accumulation gradients come as activations go.
    return max(0.0, float(live.peak - sum(parameter.nbytes for parameter in trained)))


def _loss(model: Any, ids: Tensor, stage: Stage, distils: bool, autocast: bool) -> Tensor:
    """The objective's largest parts, for dialogues of one turn: soft gates, and cross-entropy over the second half."""
    answers = ids.shape[1] // 2
    tower = _tower_part(model, len(ids), stage)  # held while the decoder runs
    context = None if stage.gate == "none" else _soft_context(model, ids)
    logits = _logits(model, ids, autocast, **({} if context is None else {"routing": context}))
    scored = logits[:, -answers:].float()
    loss = tower + nn.functional.cross_entropy(scored.flatten(0, 1), ids[:, -answers:].flatten())
    if context is None:
        return loss
    loss = loss + torch.stack([weights[..., 1].mean() for weights in context.weights.values()]).mean()
    if distils:
        with torch.no_grad():
            dense = _logits(model, ids, autocast, routing=_soft_context(model, ids))
        routed, wanted = (part.log_softmax(-1) for part in (scored, dense[:, -answers:].float()))
        loss = loss + nn.functional.kl_div(routed, wanted, reduction="none", log_target=True).sum(-1).mean()
    return loss


def _tower_part(model: Any, pictures: int, stage: Stage) -> Tensor:
    """Of a tuned tower that sees a picture a dialogue, where its family says how large one is."""
    base = base_of(model)
    shape = family_of(base).picture_shape
    if shape is None or "vision" not in stage.trains:
        return torch.zeros(())
    features = base.get_image_features(pixel_values=torch.zeros(pictures, *shape(base.config))).pooler_output
    return torch.stack([feature.float().mean() for feature in features]).mean()


def _logits(model: Any, ids: Tensor, autocast: bool, **routing: Any) -> Tensor:
    """Of all tokens; accelerate turns what autocast gives to 32 bits."""
    base = base_of(model)
    logits: Tensor = base(inputs_embeds=base.get_input_embeddings()(ids), use_cache=False, **routing).logits
    return logits.float() if autocast else logits


def _soft_context(model: Any, ids: Tensor) -> RoutingContext:
    """Of one turn a dialogue; nothing in it is looked at on the host."""
    batch, length = ids.shape
    visible = torch.ones(batch, 2, length + 2, dtype=torch.bool)
    turns = torch.ones(batch, length, dtype=torch.int64)
    first = torch.zeros(batch, dtype=torch.int64)
    base = base_of(model)
    return RoutingContext(
        visible,
        turns,
        torch.ones(batch, 1, dtype=torch.bool),
        first,
        gate=GateSettings("softmax"),
        layout=base.roe_config.layout,
        same_calls=True,
    )


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as something holds them.

    Args:
        others: tensors that are not counted.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, others: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in others)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.count(value)
        return out

    def count(self, tensor: Tensor) -> None:
        """Takes a tensor in, unless its storage is known."""
        storage: Any = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
