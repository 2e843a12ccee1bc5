"""The folders that a model is put together from: the checkpoint, and what it was trained beside."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routing_experts.errors import CheckpointError, first_line
from routing_experts.models.published.language import LANGUAGE_RULES
from routing_experts.models.published.renames import Part
from routing_experts.models.published.tensors import PROJECTOR_ALONE, Tensors, open_tensors

# What is downloaded: no optimisers, no training arguments, nothing of other frameworks.
_TEXTS = ("*.json", "*.model", "*.jinja", "*.txt")
_SAFE = ("model*.safetensors", f"{PROJECTOR_ALONE[0]}.safetensors")
_PICKLED = ("pytorch_model*.bin", f"{PROJECTOR_ALONE[0]}.bin")
_HUB_NAME_PARTS = 2
STOCK_TOWERS = ("openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14")


@dataclass(frozen=True)
class Sources:
    """What a checkpoint leaves out, as folders or hub names.

    Attributes:
        vision_tower: the stock CLIP; the one that the checkpoint names by default.
        slow_tower: LLaVA-HR's ConvNeXt, for checkpoints of its first stage.
        language_model: that a first stage was trained beside.
        unpickle: whether ``.bin`` files may be read, see ``tensors``.
    """

    vision_tower: str | None = None
    slow_tower: str | None = None
    language_model: str | None = None
    unpickle: bool = False

    def texts(self, name: str | Path) -> Path:
        """A folder here, or a download of a hub name's settings: the newest, or of ``name@revision``.

        Raises:
            CheckpointError: if it is neither, or cannot be reached.
        """
        return Path(name) if Path(name).is_dir() else _downloaded(str(name), _TEXTS)

    def folder(self, name: str | Path) -> Path:
        """The same with its weights: safetensors where there are any, else pickles where they may be read."""
        if Path(name).is_dir():
            return Path(name)
        found = _downloaded(str(name), (*_TEXTS, *_SAFE))
        if self.unpickle and not any(found.glob("*.safetensors")):
            return _downloaded(str(name), (*_TEXTS, *_PICKLED))
        return found

    def open_checkpoint(self, folder: Path) -> tuple[Tensors, tuple[Part, ...]]:
        """The checkpoint's tensors; with them the language model's, where a first stage left it out.

        Raises:
            CheckpointError: if a first stage's file is given and no language model beside it, or the reverse.
        """
        found = {path.name.partition(".")[0] for end in ("safetensors", "bin") for path in folder.glob(f"*.{end}*")}
        weights = found - {"training_args"}
        if weights != {PROJECTOR_ALONE[0]}:
            if weights and self.language_model is not None:
                raise CheckpointError(
                    f"{folder} is a whole model, with its own language model: {self.language_model} would replace what "
                    "was tuned. Leave --language-model out."
                )
            return open_tensors(folder, self.unpickle), ()
        if self.language_model is None:
            raise CheckpointError(
                f"{folder} is a checkpoint of the first training stage: {PROJECTOR_ALONE[0]} alone, no language model. "
                "Give the checkpoint of the second stage, or name the language model too (--language-model)."
            )
        language = open_tensors(self.folder(self.language_model), self.unpickle)
        return open_tensors(folder, self.unpickle, PROJECTOR_ALONE), (
            Part("the language model", language, LANGUAGE_RULES),
        )

    def open_tower(self, raw: Mapping[str, Any]) -> Tensors:
        """The stock CLIP tower."""
        return open_tensors(self.folder(self._tower(raw)), self.unpickle)

    def tower_name(self, raw: Mapping[str, Any]) -> str:
        """What the tower is called."""
        return str(self.vision_tower or raw.get("mm_vision_tower"))

    def named_tower(self) -> Path | None:
        """Of the tower that was named beside a checkpoint that holds its own: its settings say what shapes do not."""
        return None if self.vision_tower is None else self.texts(self.vision_tower)

    def refuse_slow_tower(self, folder: Path, why: str) -> None:
        """Refuses a ConvNeXt that would not be used."""
        if self.slow_tower is not None:
            raise CheckpointError(f"{folder} {why}: --slow-tower would be ignored. Leave it out.")

    def open_slow_tower(self, raw: Mapping[str, Any], folder: Path) -> Tensors:
        """The stock ConvNeXt."""
        if self.slow_tower is None:
            raise CheckpointError(
                f"{folder} leaves out its high-resolution tower, as checkpoints of the first stage do. Name the one "
                f"that it was trained beside (--slow-tower); the checkpoint calls it {raw.get('vision_tower_slow')}, "
                "and timm has its ConvNeXts on the hub under timm/."
            )
        return open_tensors(self.folder(self.slow_tower), self.unpickle)

    def _tower(self, raw: Mapping[str, Any]) -> str:
        if self.vision_tower is not None:
            return self.vision_tower
        named = raw.get("mm_vision_tower")
        if named not in STOCK_TOWERS:
            raise CheckpointError(
                f"the checkpoint holds no vision tower and names {named!r} (mm_vision_tower), which is none of "
                f"{', '.join(STOCK_TOWERS)}: a checkpoint does not decide what else is opened. If you know that tower, "
                "name it yourself (--vision-tower)."
            )
        return str(named)


def _downloaded(name: str, wanted: Sequence[str]) -> Path:
    """The folder of a hub name's files of these patterns; raises ``CheckpointError``."""
    hub_name, _, revision = name.partition("@")
    if len(hub_name.split("/")) != _HUB_NAME_PARTS or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name} is no folder here and no hub name. Give one of the two.")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            hub_name, revision=revision or None, allow_patterns=list(wanted), ignore_patterns=["*/*"]
        )
    except Exception as error:  # the hub's, its HTTP and transfer libraries' and the disk's have no base in common
        raise CheckpointError(
            f"{name} is no folder here, and it cannot be fetched from the hub ({type(error).__name__}: "
            f"{first_line(error)}). Check the name, its revision, the connection and the disk, or download it "
            "elsewhere and give its folder."
        ) from error
    return Path(found)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint.

    Raises:
        CheckpointError: if there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{folder} has no config.json, so its sizes are unknown. Download it whole.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}). Download it again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, no settings by name. Download it again.")
    return raw
