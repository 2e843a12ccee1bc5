"""Batches: encoded dialogues padded to one length, with their pictures as the model's family takes them.

Most families take the pictures of all dialogues as one list: [pictures, …], or [patches, …] and a grid a picture.
Processors that give a ``pixel_attention_mask`` (Idefics and its kin) lay them out by dialogue, [B, pictures, …], and
their models leave out pictures of zeros alone.

Shapes: B dialogues, T tokens of the longest.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from routing_experts.data.encode import BY_DIALOGUE, TOKEN_TYPES, Encoded
from routing_experts.models.spans import PADDING
from routing_experts.nn.losses import IGNORED

FAULTS = "faults"


class Collator:
    """Pads to the longest dialogue of the batch.

    Args:
        pad_token_id: fills ``input_ids``; no loss or attention falls on it.
        padding_side: ``right`` for training, ``left`` for generation.
        stand_in: what a batch without pictures gets as padding (``Encoder.stand_in``): of processes that train
            together, all have to call the vision tower, or none.
    """

    def __init__(self, pad_token_id: int, padding_side: str = "right", stand_in: Encoded | None = None) -> None:
        assert padding_side in ("left", "right")
        assert stand_in is None or padding_side == "right"
        self.pad_token_id, self.padding_side, self.stand_in = pad_token_id, padding_side, stand_in

    def __call__(self, dialogues: Sequence[Encoded]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask``, ``labels``, ``segment_ids`` [B, T], ``example_keys`` [B], pictures.

        ``mm_token_type_ids`` [B, T] too where the family takes them. ``faults``, a list, where dialogues stand in for
        records that cannot be used.
        """
        found = [fault for dialogue in dialogues for fault in dialogue.faults]
        faults = {FAULTS: found} if found else {}
        if self.stand_in is not None and not any(dialogue.vision for dialogue in dialogues):
            dialogues = _with_stand_in(dialogues, self.stand_in)
        longest = max(len(dialogue.input_ids) for dialogue in dialogues)
        batch = {
            "input_ids": self._pad([d.input_ids for d in dialogues], longest, self.pad_token_id),
            "attention_mask": self._pad([(d.segment_ids != PADDING).long() for d in dialogues], longest, 0),
            "labels": self._pad([d.labels for d in dialogues], longest, IGNORED),
            "segment_ids": self._pad([d.segment_ids for d in dialogues], longest, PADDING),
        }
        if any(d.token_types is not None for d in dialogues):
            batch[TOKEN_TYPES] = self._pad([_token_types(d) for d in dialogues], longest, 0)
        batch["example_keys"] = torch.tensor([example_key(d.id) for d in dialogues])
        return batch | _pictures([d.vision for d in dialogues]) | faults

    def _pad(self, rows: list[Tensor], length: int, value: int) -> Tensor:
        padded = torch.full((len(rows), length), value, dtype=torch.long)
        for row, tensor in enumerate(rows):
            if self.padding_side == "right":
                padded[row, : len(tensor)] = tensor
            else:
                padded[row, length - len(tensor) :] = tensor
        return padded


def _with_stand_in(dialogues: Sequence[Encoded], stand_in: Encoded) -> list[Encoded]:
    """The shortest dialogue gets the picture behind it."""
    shortest = min(range(len(dialogues)), key=lambda row: len(dialogues[row].input_ids))
    behind = dialogues[shortest]
    pairs: dict[str, Any] = {
        name: torch.cat([getattr(behind, name), getattr(stand_in, name)])
        for name in ("input_ids", "labels", "segment_ids")
    }
    types = None if stand_in.token_types is None else torch.cat([_token_types(behind), stand_in.token_types])
    longer = Encoded(behind.id, **pairs, vision=stand_in.vision, token_types=types)
    return [longer if row == shortest else dialogue for row, dialogue in enumerate(dialogues)]


def _token_types(dialogue: Encoded) -> Tensor:
    return torch.zeros_like(dialogue.input_ids) if dialogue.token_types is None else dialogue.token_types


def _pictures(visions: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The pictures' tensors of all dialogues, of which some may have none."""
    names = sorted({name for vision in visions for name in vision})
    if BY_DIALOGUE not in names:
        return {name: torch.cat([vision[name] for vision in visions if name in vision]) for name in names}
    return {name: _by_dialogue([vision.get(name) for vision in visions]) for name in names}


def unseen_pictures(vision: Mapping[str, Tensor], seen: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The pictures of a dialogue without those of its beginning.

    Args:
        vision: ``Encoded.vision`` of the dialogue.
        seen: the shapes that it had in the beginning.
    """
    axis = 1 if BY_DIALOGUE in vision else 0
    new = {}
    for name, tensor in vision.items():
        first = seen[name][axis] if name in seen else 0
        new[name] = tensor.narrow(axis, first, tensor.shape[axis] - first)
    return {name: tensor for name, tensor in new.items() if tensor.shape[axis]}


def _by_dialogue(parts: Sequence[Tensor | None]) -> Tensor:
    """[B, most pictures, …] from [1, pictures, …] a dialogue; zeros fill rows, and pictures that are smaller."""
    given = [part for part in parts if part is not None]
    sizes = torch.tensor([part.shape[1:] for part in given]).amax(0).tolist()
    batch = given[0].new_zeros((len(parts), *sizes))
    for row, part in zip(batch, parts, strict=True):
        if part is not None:
            row[tuple(slice(size) for size in part.shape[1:])] = part[0]
    return batch


def example_key(record_id: str) -> int:
    """An integer that identifies a record to random gates: the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(record_id.encode(), digest_size=8).digest(), "little") >> 1
