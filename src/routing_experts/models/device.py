"""Which device a model runs on: the accelerator that torch sees (CUDA, MPS …), or the CPU."""

import torch

from routing_experts.errors import ConfigError


def pick_device(name: str = "auto") -> torch.device:
    """A device by name; ``auto`` is the accelerator if there is one.

    Raises:
        ConfigError: if torch does not know the name, or has no such device here.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r}: torch does not know it. Give auto, cpu, cuda, cuda:1 or mps.") from error
    if device.type != "cpu" and (found is None or device.type != found.type):
        here = f"{found.type} and cpu" if found else "cpu alone"
        raise ConfigError(f"device {name!r}: this machine has {here}. Give one of them, or auto.")
    return device


def synchronize(device: torch.device) -> None:
    """Waits until a device has done what it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
