"""The processes that train together, as their launcher counts them."""

import os

import torch.distributed as dist

# What the backends say of a process that is gone; torch has no class of errors for it.
_LOST = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks, of all that train together."""
    return int(os.environ.get("RANK", "0")) == 0


def num_processes() -> int:
    """How many train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def lost_the_others(error: BaseException) -> bool:
    """Whether this process failed because it waited for another one that had ended."""
    return dist.is_initialized() and any(sign in str(error).lower() for sign in _LOST)
