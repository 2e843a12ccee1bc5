"""The optimiser's state whole, by parameter name: what any engine on any number of processes can go on from.

DeepSpeed and FSDP keep it in pieces that fit one choice of trained parameters and one number of processes. A stage's
end changes the first, a resumed run may change the second. It is written and read parameter by parameter, so that
nobody holds all of it.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from routing_experts.errors import CheckpointError

FILES = "optimizer-*.safetensors"
FILE_BYTES = 2 * 2**30  # no more than that is held at once
STEP, MASTER = "step", "master"
MOMENTS = ("exp_avg", "exp_avg_sq")

State = Mapping[str, Tensor]
Stored = Callable[[str], State]  # a parameter's state by its name; empty if it has none


class Engine(Protocol):
    """What runs the optimiser. All processes call its methods alike, parameter by parameter."""

    model: nn.Module

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter, in the precision in which the optimiser updates it."""

    def read(self, parameter: nn.Parameter) -> State:
        """Its whole state: step count, moments, and the weights themselves where the model computes in less."""

    def write(self, stored: Stored) -> None:
        """Puts every trained parameter's state in place; those without one begin anew."""


class PlainEngine:
    """One process, DDP, or FSDP2, whose parameters are tensors on a mesh: every parameter has a state of its own.

    Args:
        model: unwrapped.
        optimizer: AdamW over its parameters.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self._state = model, unwrapped(optimizer).state
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves the root's whole, which optimiser state is not known by

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """See ``Engine``."""
        return _whole(parameter.detach())

    def read(self, parameter: nn.Parameter) -> State:
        """See ``Engine``."""
        return {name: _whole(value) for name, value in self._state.get(parameter, {}).items()}

    def write(self, stored: Stored) -> None:
        """See ``Engine``."""
        for name, parameter in self.model.named_parameters():
            state = stored(name)
            if state:
                moments = {moment: _laid_out(state[moment], parameter) for moment in MOMENTS}
                self._state[parameter] = {STEP: state[STEP].clone(), **moments}


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _laid_out(value: Tensor, parameter: nn.Parameter) -> Tensor:
    value = value.to(parameter.device, copy=True)  # what is read stays in its file, which would be held open
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


# Where ZeRO's optimisers keep parameters by group, and the flat partitions of them: stage 3; stages 1 and 2.
_PARTITIONS = (("fp16_groups", "fp32_partitioned_groups_flat"), ("bit16_groups", "single_partition_of_fp32_groups"))


class ZeroEngine:
    """DeepSpeed's ZeRO: the parameters of a group lie behind one another in flat partitions, one step count for all.

    Args:
        model: whose parameters the engine has partitioned.
        optimizer: the engine's, around AdamW.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self._zero = model, unwrapped(optimizer)
        self._adam = self._zero.optimizer
        names = next(names for names in _PARTITIONS if all(hasattr(self._zero, name) for name in names))
        self._flats = list(zip(*(getattr(self._zero, name) for name in names), strict=True))

    def weight(self, parameter: nn.Parameter) -> Tensor:
        """See ``Engine``."""
        from deepspeed import zero
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter.requires_grad:
            found: Tensor = safe_get_full_fp32_param(parameter)
            return found
        with zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def read(self, parameter: nn.Parameter) -> State:
        """See ``Engine``."""
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = next((flat for group, flat in self._flats if any(parameter is one for one in group)), None)
        if flat is None or not self._adam.state.get(flat):
            return {}
        state = {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
        if parameter.dtype != torch.float32:
            state[MASTER] = self.weight(parameter)
        return state | {STEP: torch.as_tensor(self._adam.state[flat][STEP], dtype=torch.float32)}

    def write(self, stored: Stored) -> None:
        """See ``Engine``."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group, flat in self._flats:
            steps = (stored(names[id(parameter)]).get(STEP, torch.tensor(0.0)) for parameter in group)
            self._adam.state[flat] = {STEP: max(steps).clone(), **{name: torch.zeros_like(flat) for name in MOMENTS}}
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2 look once where moments are
            self._zero._lazy_init_hp_params_optimizer_state()
        for group, _ in self._flats:
            for parameter in group:
                self._put(parameter, stored(names[id(parameter)]))

    def _put(self, parameter: Any, state: State) -> None:
        from deepspeed import utils

        for name in (MASTER, *MOMENTS):
            if name not in state:
                continue
            if hasattr(parameter, "ds_id"):  # the whole one may be set only where processes divide it evenly
                piece = _piece(state[name], parameter.ds_tensor.numel())
                if name == MASTER:
                    utils.safe_set_local_fp32_param(parameter, piece)
                else:
                    utils.safe_set_local_optimizer_state(parameter, piece, name)
            elif name == MASTER:
                utils.safe_set_full_fp32_param(parameter, state[name])
            else:
                utils.safe_set_full_optimizer_state(parameter, state[name], name)


def _piece(value: Tensor, size: int) -> Tensor:
    """This process's part of a parameter that is cut into parts of equal size, the last one filled up with zeros."""
    own = value.flatten()[size * torch.distributed.get_rank() :][:size]
    return torch.cat([own, own.new_zeros(size - len(own))])


def engine_of(model: nn.Module, optimizer: Any) -> Engine:
    """What runs a trainer's optimiser."""
    inner = unwrapped(optimizer)
    is_zero = any(all(hasattr(inner, name) for name in names) for names in _PARTITIONS)
    return ZeroEngine(model, optimizer) if is_zero else PlainEngine(model, optimizer)


def unwrapped(optimizer: Any) -> Any:
    """An optimiser without accelerate's wrapper."""
    from accelerate.optimizer import AcceleratedOptimizer

    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def whole_weights(engine: Engine, keep: bool, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The model's state dict on the host, in the optimiser's precision where that is higher.

    Args:
        engine: of all processes.
        keep: whether this one wants it; the others help, and get nothing.
        wanted: by name, the same on all processes.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in engine.model.named_parameters():
        if wanted(name):
            value = engine.weight(parameter)
            if keep:
                weights[name] = value.to("cpu", copy=True)
    persistent = engine.model.state_dict() if keep else {}
    buffers = {name: value for name, value in engine.model.named_buffers() if name in persistent and wanted(name)}
    return weights | {name: value.to("cpu") for name, value in buffers.items() if keep}


def save_state(engine: Engine, folder: Path, writes: bool) -> None:
    """Writes the state of all parameters that have one.

    Args:
        engine: of all processes.
        folder: the checkpoint's.
        writes: whether this process writes; the others help.
    """
    held: dict[str, Tensor] = {}
    count = 0
    for name, parameter in engine.model.named_parameters():
        for part, value in engine.read(parameter).items():
            if writes:
                held[f"{name}/{part}"] = value.detach().to("cpu", copy=True).contiguous()
        if sum(value.nbytes for value in held.values()) >= FILE_BYTES:
            count = _write(held, folder, count)
    if held:
        _write(held, folder, count)


def _write(held: dict[str, Tensor], folder: Path, count: int) -> int:
    save_file(held, folder / FILES.replace("*", f"{count:05d}"), metadata={"format": "pt"})
    held.clear()
    return count + 1


def load_state(engine: Engine, folder: Path) -> None:
    """Puts what ``save_state`` wrote in place.

    Raises:
        CheckpointError: if there is no file, or one cannot be read.
    """
    places: dict[str, dict[str, Path]] = {}
    for path, key in _keys(folder):
        name, _, part = key.rpartition("/")
        places.setdefault(name, {})[part] = path
    if not places:
        raise CheckpointError(
            f"{folder} holds no {FILES}: another version wrote it, and its optimiser's state would be lost. Go on with "
            "that version, or begin anew (--restart)."
        )

    def stored(name: str) -> State:
        found = {}
        for part, path in places.get(name, {}).items():
            with safe_open(path, framework="pt") as file:
                found[part] = file.get_tensor(f"{name}/{part}")
        return found

    engine.write(stored)


def _keys(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.glob(FILES)):
        try:
            with safe_open(path, framework="pt") as file:
                yield from ((path, key) for key in file.keys())  # noqa: SIM118 (safe_open is no dict)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a readable safetensors file ({error}): it may be cut short. Remove its checkpoint; the "
                "run goes on from the one before."
            ) from error
