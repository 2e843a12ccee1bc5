"""What training reports between two logs: means over batches and processes, and tokens by second."""

import time
from typing import Any

from torch import Tensor

TOKENS = "tokens"


class LossWindow:
    """Sums of this process since the last log, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._batches = 0
        self._began = time.monotonic()

    def __bool__(self) -> bool:
        return self._batches > 0

    def add(self, parts: dict[str, Tensor]) -> None:
        """Takes in one batch: means of its examples by name, and its number of tokens."""
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._batches += 1

    def drain(self, accelerator: Any) -> dict[str, Any]:
        """The means over all processes, each of which saw as many batches, and ``tokens_per_second`` of all together.

        Empties the window; it waits for the device.
        """
        sums, batches = self._sums, self._batches
        num_tokens = int(accelerator.reduce(sums.pop(TOKENS), reduction="sum"))
        seconds = time.monotonic() - self._began
        self.clear()
        means = {name: value / batches for name, value in accelerator.reduce(sums, reduction="mean").items()}
        return means | {"tokens_per_second": num_tokens / max(seconds, 1e-9)}

    def clear(self) -> None:
        """Begins anew."""
        self._sums, self._batches, self._began = {}, 0, time.monotonic()
