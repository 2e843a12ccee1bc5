"""The tensors of a folder: names and shapes first, values one at a time."""

import json
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from routing_experts.errors import CheckpointError, first_line

_WHOLE = ("model", "pytorch_model")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
PROJECTOR_ALONE = ("mm_projector",)  # the file of LLaVA's first training stage


class Tensors:
    """Names and shapes of a checkpoint; values are read when asked for.

    Attributes:
        folder: where they lie.
        ignored: parts of names that are passed over, whatever they hold.
        shapes: of every tensor, by name.
    """

    def __init__(self, folder: Path, ignored: Sequence[str] = ()) -> None:
        self.folder, self.ignored = folder, ignored
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._readers: dict[str, Callable[[str], Tensor]] = {}

    def read(self, name: str) -> Tensor:
        """One tensor, as the file has it."""
        return self._readers[name](name)

    def add(self, path: Path, unpickle: bool) -> set[str]:
        """Takes in a file; returns the names in it."""
        shapes, reader = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path, unpickle)
        shapes = {name: shape for name, shape in shapes.items() if not any(part in name for part in self.ignored)}
        if twice := sorted(shapes.keys() & self.shapes.keys()):
            raise CheckpointError(
                f"{path}: {twice[0]} ({len(twice)} tensors) is in another file of the folder too, and which of the two "
                "counts cannot be told. Leave the files of one checkpoint there."
            )
        if empty := sorted(name for name, shape in shapes.items() if 0 in shape):
            raise CheckpointError(
                f"{path}: {empty[0]} ({len(empty)} tensors) holds no values: saved under ZeRO-3 without gathering "
                "them, as a rule. Write the checkpoint again with its weights gathered."
            )
        self.shapes |= shapes
        self._readers |= dict.fromkeys(shapes, reader)
        return set(shapes)


def open_tensors(folder: Path, unpickle: bool = False, stems: tuple[str, ...] = _WHOLE) -> Tensors:
    """Opens the weights of a folder: in shards by its index, in one file, or whatever safetensors lie there.

    Args:
        folder: of the checkpoint.
        unpickle: whether ``.bin`` files may be read, tensors alone, by torch's reader that runs no code of theirs.
        stems: what the files may be called.

    Raises:
        CheckpointError: if there are none, one is missing or cut short, or they are pickles and may not be read.
    """
    tensors = Tensors(folder)
    for ending in (".safetensors", ".bin"):
        for stem in stems:
            index, whole = folder / f"{stem}{ending}.index.json", folder / f"{stem}{ending}"
            if index.is_file():
                _open_shards(tensors, index, unpickle)
                return tensors
            if whole.is_file():
                tensors.add(whole, unpickle)
                return tensors
        if ending == ".safetensors" and stems == _WHOLE:
            files = [path for path in sorted(folder.glob("*.safetensors")) if path.stem not in PROJECTOR_ALONE]
            _check_no_shard_lacks(files)
            for path in files:
                tensors.add(path, unpickle)
            if files:
                return tensors
    raise CheckpointError(
        f"{folder} holds no weights: {stems[0]}.safetensors, shards with {stems[0]}.safetensors.index.json, or "
        f"{stems[-1]}.bin were looked for. Give the folder of a checkpoint, downloaded whole"
        + ("." if unpickle else "; if its weights were published as .bin files alone, allow those with --unpickle.")
    )


def _check_no_shard_lacks(files: Sequence[Path]) -> None:
    """Raises ``CheckpointError`` if shards, which say how many they are, are not all there; no index tells so."""
    found: dict[tuple[str, int], set[int]] = {}
    for path in files:
        if (match := _SHARD.fullmatch(path.stem)) is not None:
            found.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in found.items():
        if lacking := sorted(set(range(1, count + 1)) - numbers):
            named = ", ".join(f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in lacking[:5])
            raise CheckpointError(
                f"{files[0].parent} lacks {named} ({len(lacking)} of {count} shards), and the index of shards too. "
                "Download the checkpoint again, whole."
            )


def _open_shards(tensors: Tensors, index: Path, unpickle: bool) -> None:
    places = _places(index)
    files = sorted(set(places.values()))
    ending = index.name.removesuffix(".index.json").rpartition(".")[2]
    if strange := [name for name in files if Path(name).name != name or not name.endswith(f".{ending}")]:
        raise CheckpointError(
            f"{index} names {strange[0]!r}, which is no .{ending} file beside it. It is not followed: download the "
            "index again."
        )
    if ending == "bin" and not unpickle:  # before anything is missed: a download leaves out what may not be read
        raise _pickle_refused(index.parent / files[0])
    if missing := [name for name in files if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"{index.parent} lacks {', '.join(missing)} ({len(missing)} of {len(files)} shards that {index.name} "
            "names). Download the checkpoint again, whole."
        )
    for name in files:
        there = tensors.add(index.parent / name, unpickle)
        if lacking := [key for key, place in places.items() if place == name and key not in there]:
            raise CheckpointError(
                f"{index.parent / name} lacks {lacking[0]} ({len(lacking)} tensors) that {index.name} says are in it: "
                "shards of different downloads may be mixed. Download the checkpoint again, whole."
            )


def _places(index: Path) -> dict[str, str]:
    """File names by tensor."""
    try:
        told = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{index} is no JSON ({error}). Download it again.") from error
    places = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} is no index of shards: it has no weight_map of file names. Download it again.")
    return places


def _safetensors(path: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    try:
        file = safe_open(path, framework="pt")
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.get_tensor  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}): cut short, or something else under that name. "
            "Download it again."
        ) from error


def _pickled(path: Path, unpickle: bool) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    if not unpickle:
        raise _pickle_refused(path)
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except Exception as error:  # bytes that are no pickle make the reader raise whatever they lead it to
        raise CheckpointError(
            f"{path} cannot be read as tensors ({first_line(error)}): cut short, or it holds more than "
            "tensors, which is never unpickled. Download it again."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(
            f"{path} holds a {type(found).__name__}, no tensors by name. Give a checkpoint's weights."
        )
    tensors: dict[str, Tensor] = found
    return {name: tuple(value.shape) for name, value in tensors.items()}, tensors.__getitem__


def _pickle_refused(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle, the format that older checkpoints were published in. Allow it with --unpickle: its "
        "tensors are read by torch's weights-only reader, which runs no code of the file, and what is written are "
        "safetensors. Only do so with a file whose origin you trust."
    )
