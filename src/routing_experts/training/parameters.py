"""Which parameter belongs to which group, and freezing all but a stage's groups."""

from collections.abc import Collection, Iterable

from torch import nn

from routing_experts.training.schedule import PARAMETER_GROUPS

ROE_GROUPS = ("adapters", "routers")


def group_of(name: str) -> str:
    """The group of a parameter by its qualified name; what is no adapter, router, tower or projector is decoder.

    peft's updates of the base (``lora_``) belong to the decoder's group.
    """
    parts = name.split(".")
    if "skip_down" in parts or "skip_up" in parts:
        return "adapters"
    if "router" in parts or "routing_tokens" in parts:
        return "routers"
    # The projector first: some families keep it inside the tower (``visual.merger``).
    if any("projector" in part or "merger" in part or part == "connector" for part in parts):
        return "projector"
    if any(part.startswith(("vision_tower", "vision_model", "visual")) for part in parts):
        return "vision"
    return "decoder"


def freeze_all_but(model: nn.Module, groups: Collection[str], lora: bool = False) -> dict[str, int]:
    """Sets ``requires_grad`` by group; with ``lora`` the base's own weights stay frozen and its updates train.

    Returns:
        The number of trained parameters by group.
    """
    counts = dict.fromkeys(PARAMETER_GROUPS, 0)
    for name, parameter in model.named_parameters():
        group = group_of(name)
        is_base_weight = group not in ROE_GROUPS and "lora_" not in name
        trains = group in groups and not (lora and is_base_weight)
        parameter.requires_grad_(trains)
        if trains:
            counts[group] += getattr(parameter, "ds_numel", parameter.numel())
    return counts


def optimizer_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], roe_lr: float, base_lr: float, weight_decay: float
) -> list[dict]:
    """AdamW's groups in a fixed order: each parameter group with and without weight decay.

    Vectors (norms, biases) are not decayed. Every parameter is listed, trained now or not: those without gradients
    get neither updates nor state, and a later stage can join them without a new optimiser. Parameters of one AdamW
    group are trained in the same stages, since ZeRO counts the steps of all of them together.
    """
    buckets: dict[tuple[str, bool], list[nn.Parameter]] = {(g, d): [] for g in PARAMETER_GROUPS for d in (True, False)}
    for name, parameter in named_parameters:
        decays = len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # ZeRO-3 shows flat pieces
        buckets[group_of(name), decays].append(parameter)
    return [
        {"params": params, "lr": roe_lr if group in ROE_GROUPS else base_lr, "weight_decay": weight_decay * decays}
        for (group, decays), params in buckets.items()
        if params
    ]
