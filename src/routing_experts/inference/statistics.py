"""What an engine did, and whether skipping paid."""

from dataclasses import dataclass

NO_SKIPPING = 0.02  # of the layers: there is nothing to gain
PAYS = 0.25  # of what rows skip, spared in weights read: below this, moving rows about may cost as much as it saves


@dataclass
class EngineStatistics:
    """What an engine did.

    Attributes:
        num_layers: the model's.
        steps, row_steps: decoding steps, and rows summed over them.
        layers_read: layers that some row ran, summed over steps.
        layer_rows: rows that ran a layer, summed over layers and steps.
        prefills, prefilled_tokens: calls of the model, and tokens in them without padding.
        prefill_seconds: in those calls.
        decode_seconds: choosing who decodes, taking their keys and values into slots, and decoding.
        waiting_bytes: most bytes of keys and values that waited at once.
        slot_bytes: of the slots of those that decode, free ones among them.
    """

    num_layers: int
    steps: int = 0
    row_steps: int = 0
    layers_read: int = 0
    layer_rows: int = 0
    prefills: int = 0
    prefilled_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    waiting_bytes: int = 0
    slot_bytes: int = 0

    @property
    def skip_rate(self) -> float:
        """The share of their layers that rows skipped in decoding."""
        return 1 - self.layer_rows / (self.row_steps * self.num_layers) if self.row_steps else 0.0

    @property
    def reads_spared(self) -> float:
        """The share of layers whose weights a decoding step did not have to read."""
        return 1 - self.layers_read / (self.steps * self.num_layers) if self.steps else 0.0

    @property
    def note(self) -> str:
        """Says where skipping did not pay in decoding, and what helps; empty where it did."""
        if self.skip_rate < NO_SKIPPING or self.reads_spared >= PAYS * self.skip_rate:
            return ""
        return (
            f"Skipping hardly paid in decoding: rows skipped {self.skip_rate:.0%} of their layers, but only "
            f"{self.reads_spared:.0%} of the layers were skipped by all rows of a step, and one row is enough for a "
            "layer's weights to be read. Let more requests wait (max_waiting), or fewer share a step (max_rows)."
        )
