"""Captured decoding: a layer's step is recorded once as a CUDA graph and replayed from then on with one launch.

A decoding step of a few rows is short, and a GPU waits for Python to launch its kernels. A graph holds addresses and
whatever Python decided when it was recorded, so what changes from step to step must stand in memory that stays where
it is (the slots and their bookkeeping do; the other inputs are copied), and what Python decides must be in the key.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from routing_experts.errors import RequestError

Replay = Callable[[], Tensor]
Capture = Callable[[Callable[..., Tensor], Sequence[Tensor]], Replay]
# Of a 32-layer model: one for each of 16 numbers of rows that keep a layer in full steps of 16 rows, at four reaches.
# Steps of fewer rows, in which some came or went, need others, and push out the least recently used.
MOST_GRAPHS = 2048


class Graphs:
    """Recorded calls by key; the least recently used give way.

    Args:
        new_capture: makes what records a function's call on given tensors; what that returns runs the call anew on
            their present values. Called again after ``clear``.
        most: graphs that are kept.
    """

    def __init__(self, new_capture: Callable[[], Capture], most: int = MOST_GRAPHS) -> None:
        self._new_capture, self._capture, self._most = new_capture, new_capture(), most
        self._graphs: OrderedDict[Hashable, Replay] = OrderedDict()
        self._inputs: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def call(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """What ``function`` gives, in memory that the next call may overwrite: recordings share what they work in.

        Args:
            key: of the recording: all that ``function`` does differently from call to call but for what it reads
                in tensors. Shapes of inputs are part of it anyway.
            function: reads its inputs, and other tensors that stay where they are.
            inputs: are copied to where the recording reads them. All but the first are taken for unchanged where
                they are the objects that they were at the last call.
        """
        held = [self._hold(place, given) for place, given in enumerate(inputs)]
        key = (key, *(tensor.shape for tensor in held))
        replay = self._graphs.pop(key, None)
        if replay is None:
            replay = self._capture(function, held)
            if len(self._graphs) >= self._most:
                self._graphs.popitem(last=False)
        self._graphs[key] = replay
        return replay()

    def clear(self) -> None:
        """Forgets all recordings, and the memory they worked in: what they read has moved."""
        self._graphs.clear()
        self._inputs.clear()
        self._capture = self._new_capture()

    def _hold(self, place: int, given: Tensor) -> Tensor:
        """The tensor at a fixed address for inputs of this shape, with the values given."""
        name = (place, given.shape, given.dtype)
        held, source = self._inputs.get(name, (None, None))
        if held is None:
            held = torch.empty_like(given, memory_format=torch.contiguous_format)
        if source is not given or place == 0:  # every layer of a step is given the same rotary tables and mask
            held.copy_(given)
            self._inputs[name] = (held, given)
        return held


class CudaCapture:
    """Records CUDA graphs, which share one pool of memory: they run one after the other.

    Args:
        device: of the model.

    Raises:
        RequestError: if it is no CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise RequestError(
                f"captured decoding on {device.type}: only CUDA devices record graphs. Set capture=False; on a CPU "
                "launching is no bottleneck."
            )
        self.device = device
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Replay:
        """Records ``function(*inputs)``; nothing has run on return but one call to warm up."""
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # libraries set themselves up at a first call, which no graph holds
                function(*inputs)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):  # waits for all streams first
                output = function(*inputs)

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay
