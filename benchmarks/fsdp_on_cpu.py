"""``roe`` with FSDP2 on CPUs, where accelerate would train with DDP instead of what it was asked for.

Run by a launcher in place of ``roe``. Told that the processes have GPUs, accelerate takes its FSDP2 path; torch's
``fully_shard`` itself works on any mesh. If nothing was sharded after all, the run fails.
"""

from unittest.mock import Mock

import torch.distributed.fsdp
from accelerate.state import DistributedType, PartialState

from routing_experts.cli import main


def take_cpus_for_gpus() -> None:
    """From here on, processes that train on CPUs count as such with a GPU each."""
    begin = PartialState.__init__

    def begin_as_gpus(state: PartialState, *args: object, **kwargs: object) -> None:
        begin(state, *args, **kwargs)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_gpus


if __name__ == "__main__":
    take_cpus_for_gpus()
    torch.distributed.fsdp.fully_shard = fully_shard = Mock(wraps=torch.distributed.fsdp.fully_shard)
    try:
        main()
    finally:
        assert fully_shard.called, "FSDP2 was asked for, and nothing was sharded"
