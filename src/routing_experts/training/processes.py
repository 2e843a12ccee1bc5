"""The processes that train together, as their launcher counts them."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from routing_experts.errors import TrainingError

T = TypeVar("T")

# What NCCL says where a process failed by itself; its other errors, which have a class, come of a process that is gone.
_OWN = ("ncclUnhandledCudaError", "ncclInvalidUsage", "ncclInvalidArgument")
# What gloo says of one that is gone.
_LOST = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe")


def is_main_process() -> bool:
    """Whether this process is the one that writes and speaks, of all that train together."""
    return int(os.environ.get("RANK", "0")) == 0


def num_processes() -> int:
    """How many train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Whether a launcher started this process, be it the only one."""
    return "LOCAL_RANK" in os.environ


def on_main(act: Callable[[], T]) -> T:
    """What the main process finds, for all: they must not each look at a folder that another machine writes.

    Raises:
        TrainingError: on the others, with the main process's words: whoever ends first takes the rest along. The main
            process raises its own error.
    """
    found: list[Any] = [None, None]
    failure: Exception | None = None
    if is_main_process():
        try:
            found = [act(), None]
        except Exception as error:
            found, failure = [None, str(error)], error
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    if failure is not None:
        raise failure
    value, why = found
    if why is not None:
        raise TrainingError(f"process {os.environ.get('RANK', '0')} ends with the first one, which says: {why}")
    return value


def lost_the_others(error: BaseException) -> bool:
    """Whether this process failed because it waited for another one that had ended."""
    if isinstance(error, dist.DistError):
        return not any(sign in str(error) for sign in _OWN)
    return dist.is_initialized() and any(sign in str(error).lower() for sign in _LOST)
