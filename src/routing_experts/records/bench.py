"""A benchmark's record: raw timings of dense, routed and twin, with what was counted beside them."""

from dataclasses import dataclass
from typing import Any, Literal, Self

from routing_experts.records.entry import Count, Entry, Positive, RecordFile, Seconds, Share
from routing_experts.records.results import refuse_untimed

BENCH_NAME = "bench.json"


@dataclass(frozen=True)
class Counted(Entry):
    """Counted from shapes for one side, and what it held.

    Attributes:
        flops: a multiplication and an addition count as two.
        bytes: of weights, keys and values that are read.
        cache_bytes: of keys and values behind the prompt; added up over the tensors that hold them. An engine's slots
            have room for the answers, too.
    """

    flops: float
    bytes: float
    cache_bytes: Count


@dataclass(frozen=True)
class Served(Entry):
    """How requests of different routes shared decoding steps.

    Attributes:
        requests: how many there were.
        waiting: how many of them may be prefilled and wait.
        steps: decoding steps in all.
        layers_read: layers whose weights a step reads, on average.
        layer_rows: rows that run a layer, summed over layers, a step on average.
        weight_cap: dense layers read over these, in all: the gain if reading weights were all that costs.
        row_cap: dense rows in layers over these, in all: the gain if rows were all that costs.
        waiting_bytes: most bytes of keys and values that waited.
        first_token_requests: how many were submitted at once and prefilled for real, to time first tokens; None
            where that was not run.
        first_token_seconds: from their submission to a request's first token: median and 95th percentile.
        dense_first_token_seconds: the dense model's, with as many waiting.
    """

    requests: Positive
    waiting: Positive
    steps: Positive
    layers_read: float
    layer_rows: float
    weight_cap: float
    row_cap: float
    waiting_bytes: Count
    first_token_requests: Positive | None = None
    first_token_seconds: list[Seconds] | None = None
    dense_first_token_seconds: list[Seconds] | None = None


@dataclass(frozen=True)
class BenchCase(Entry):
    """Repeated timings of one piece of work, all sides in turn.

    Attributes:
        name: what was done.
        phase: "prefill" to the first token's logits, "decode" behind it, "generate" both; "engine" both through the
            engine, whose dense side is the dense model's own ``generate``.
        batch: rows; at most, where requests come and go.
        skip_rate: share of the decoder layers that a row skips, on average.
        mixed: whether rows took different routes.
        tokens: of the prompt for a prefill, else new ones, a row.
        twin_seconds: of the model whose skipped layers are physically replaced; None where rows differ.
        dense, routed: counted cost; None where requests come and go.
        peak_bytes: most memory that was held on an accelerator; None on a CPU.
        served: how steps were shared; None for a fixed batch.
    """

    name: str
    phase: Literal["prefill", "decode", "generate", "engine"]
    batch: Positive
    skip_rate: Share
    mixed: bool
    tokens: Positive
    dense_seconds: list[Seconds]
    routed_seconds: list[Seconds]
    twin_seconds: list[Seconds] | None
    dense: Counted | None = None
    routed: Counted | None = None
    peak_bytes: Count | None = None
    served: Served | None = None


@dataclass(frozen=True)
class BenchRecord(RecordFile):
    """All cases of one run.

    Attributes:
        name: of the preset.
        model: its decoder's shape, prompt and new tokens.
    """

    name: str
    model: dict[str, Any]
    cases: list[BenchCase]
    environment: dict[str, Any]
    seconds_total: Seconds

    @classmethod
    def _checked(cls, values: Any) -> Self:
        record = super()._checked(values)
        refuse_untimed(record.cases, "cases")
        return record
