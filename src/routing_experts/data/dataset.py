"""Records as a dataset that is encoded on the way, and what becomes of those that cannot be."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from routing_experts.data.encode import Encoded, Encoder
from routing_experts.data.faults import UNUSABLE, Fault
from routing_experts.data.token_cache import TokenCache
from routing_experts.errors import RecordError

PICTURE_CHARACTERS = 2000  # of text that takes as many tokens as a picture, where nothing is known of it: LLaVA's 576


class EncodedDataset(Dataset):
    """Encodes records on first use.

    Args:
        records: anything with ``[index]`` giving a ``Record``.
        size: how many of them there are.
        encoder: makes dialogues of them.
        keep: whether to keep what was encoded, so that epochs after the first cost nothing; False for sets that do not
            fit in memory.
        numbers: of the records in their source, for messages; their places here by default.
        tokens: of the same records, on disk; None to tokenise each when it is used.
        stand_ins: a record that cannot be used is replaced by the next that can, and the dialogue says so
            (``Encoded.faults``): what trains in its place depends on the data alone, on any number of processes. False
            to raise.
    """

    def __init__(
        self,
        records: Any,
        size: int,
        encoder: Encoder,
        keep: bool = True,
        stand_ins: bool = False,
        numbers: Sequence[int] | None = None,
        tokens: TokenCache | None = None,
    ) -> None:
        self.records, self.size, self.encoder = records, size, encoder
        self.keep, self.stand_ins, self.tokens = keep, stand_ins, tokens
        self.numbers = range(size) if numbers is None else numbers
        self._encoded: dict[int, Encoded] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Encoded:
        if index in self._encoded:
            return self._encoded[index]
        encoded = self._encode(index)
        if self.keep:
            self._encoded[index] = encoded
        return encoded

    def _encode(self, index: int) -> Encoded:
        faults: list[Fault] = []
        for ahead in range(self.size):
            place = (index + ahead) % self.size
            try:
                record = self.records[place]
                encoded = self.encoder(record) if self.tokens is None else self.tokens.encode(place, record)
                return replace(encoded, faults=tuple(faults)) if faults else encoded
            except UNUSABLE as error:
                if not self.stand_ins:
                    raise
                faults.append(Fault(self.numbers[place], str(error)))
        raise RecordError(f"none of the {self.size:,} records can be used; the first: {faults[0].problem}")

    def extent(self, index: int) -> tuple[bool, int]:
        """Whether a record has pictures, and its tokens where it is kept; else about its characters: nothing is opened.

        Of a record that cannot be read, (False, 0).
        """
        if self.keep:
            encoded = self[index]
            return bool(encoded.vision), len(encoded.input_ids)
        try:
            record = self.records[index]
        except UNUSABLE:
            return False, 0  # it is told of when it is used
        written = sum(len(turn.question) + len(turn.answer) for turn in record.turns)
        return bool(record.images), written + PICTURE_CHARACTERS * len(record.images)
