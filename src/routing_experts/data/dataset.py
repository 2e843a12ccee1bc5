"""Records as a dataset that is encoded on the way, and what becomes of those that cannot be."""

from dataclasses import replace
from random import Random
from typing import Any

from torch.utils.data import Dataset

from routing_experts.data.encode import Encoded, Encoder
from routing_experts.data.faults import UNUSABLE, Fault
from routing_experts.data.token_cache import TokenCache
from routing_experts.errors import RecordError

PICTURE_CHARACTERS = 2000  # of text that takes as many tokens as a picture, where nothing is known of it: LLaVA's 576
NOTHING = (False, 0)  # the extent of what cannot be read: it is told of when it is used
TRIES = 100  # records that may stand in for one: so many faulty ones in a row are no accident


class EncodedDataset(Dataset):
    """Encodes records on first use.

    Args:
        records: anything with ``[index]`` giving a ``Record``.
        size: how many of them there are.
        encoder: makes dialogues of them.
        keep: whether to keep what was encoded, so that epochs after the first cost nothing; False for sets that do not
            fit in memory.
        stand_ins: another record, drawn by its number, stands in for one that cannot be used, and the dialogue says so
            (``Encoded.faults``): what trains in its place depends on the data alone, on any number of processes. False
            to raise.
        first: the number of the first record.
        tokens: of the same records, on disk; None to tokenise each when it is used.
    """

    def __init__(
        self,
        records: Any,
        size: int,
        encoder: Encoder,
        keep: bool = True,
        stand_ins: bool = False,
        first: int = 0,
        tokens: TokenCache | None = None,
    ) -> None:
        self.records, self.size, self.encoder = records, size, encoder
        self.keep, self.stand_ins, self.first, self.tokens = keep, stand_ins, first, tokens
        self._encoded: dict[int, Encoded] = {}
        self._unusable: dict[int, Fault] = {}
        self._extents: dict[int, tuple[bool, int]] = {}

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
        """The record of an index, or the first that can be used of those that are drawn for it."""
        faults: list[Fault] = []
        draw, place = Random(index), index
        for _ in range(TRIES):
            if place not in self._unusable:
                try:
                    encoded = self._at(place)
                    return replace(encoded, faults=tuple(faults)) if faults else encoded
                except UNUSABLE as error:
                    if not self.stand_ins:
                        raise
                    self._unusable[place] = Fault(self.first + place, str(error))
            # Told of each time: a batch that was read ahead at a stage's end is thrown away with what it told.
            faults.append(self._unusable[place])
            place = draw.randrange(self.size)
        raise RecordError(
            f"record {self.first + index} cannot be used, nor can any of {TRIES - 1} that were drawn to stand in for "
            "it: something is wrong with the set or its image folder as a whole. See `roe data check`."
        )

    def _at(self, place: int) -> Encoded:
        number = self.first + place
        record = self.records[number]
        return self.encoder(record) if self.tokens is None else self.tokens.encode(number, record)

    def extent(self, index: int, exact: bool = False) -> tuple[bool, int]:
        """Whether a record has pictures, and something that grows with its tokens.

        Args:
            index: of the record.
            exact: its own tokens, the same whatever is kept and whoever stands in; counted once, without decoding
                pictures. Otherwise what is known for nothing: the tokens of what is kept, or about its characters.
        """
        if exact:
            if index not in self._extents:
                self._extents[index] = self._counted(index)
            return self._extents[index]
        if self.keep:
            encoded = self[index]
            return bool(encoded.vision), len(encoded.input_ids)
        try:
            record = self.records[self.first + index]
        except UNUSABLE:
            return NOTHING
        written = sum(len(turn.question) + len(turn.answer) for turn in record.turns)
        return bool(record.images), written + PICTURE_CHARACTERS * len(record.images)

    def _counted(self, index: int) -> tuple[bool, int]:
        try:
            record = self.records[self.first + index]
            known = None if self.tokens is None else self.tokens.length(self.first + index, record)
            return bool(record.images), known or len(self.encoder.without_pixels(record).input_ids)
        except UNUSABLE:
            return NOTHING
