"""What a published checkpoint becomes: configuration, where each weight comes from, how pictures are prepared."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from routing_experts.errors import CheckpointError
from routing_experts.models.published.renames import Part, Place, account


@dataclass(frozen=True)
class PictureSettings:
    """How a picture is prepared, and how many tokens it becomes.

    Attributes:
        size: pixels of the square that it is scaled to.
        patch_size: pixels of that square that a token stands for, along a side.
        extra_tokens: of the tower, such as CLIP's class token.
        strategy: ``default`` drops the first token, ``full`` keeps all.
        pads: to a square, in the mean colour, before it is scaled.
    """

    size: int
    patch_size: int
    extra_tokens: int
    strategy: str
    pads: bool


@dataclass(frozen=True)
class Blueprint:
    """A model that can be built.

    Attributes:
        config: of the model, as large as the checkpoint says.
        model_class: that it is of.
        parts: the folders that its weights come from.
        pictures: how they are prepared.
        causes: what unexpected and missing names suggest, see ``renames.account``.
    """

    config: Any
    model_class: Any
    parts: tuple[Part, ...]
    pictures: PictureSettings
    causes: tuple[tuple[str, str], ...]

    def account(self, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
        """Where every tensor of the model is read from.

        Args:
            wanted: their shapes, see ``shapes_of``.

        Raises:
            CheckpointError: if names or shapes do not come out even.
        """
        return account(self.parts, wanted, self.causes)

    def build(self, wanted: Mapping[str, tuple[int, ...]]) -> Any:
        """The model with its weights, in the precision of the language model's.

        Raises:
            CheckpointError: if that is no precision to compute in, or as ``account`` does.
        """
        from transformers.initialization import no_init_weights

        places = self.account(wanted)
        embeddings = next(place for name, place in places.items() if name.endswith("embed_tokens.weight"))
        dtype = embeddings.part.tensors.read(embeddings.name).dtype
        if not dtype.is_floating_point:
            raise CheckpointError(
                f"{embeddings.part.tensors.folder}: {embeddings.name} is of {dtype}: a quantised checkpoint. Give the "
                "one that it was made from; bases are quantised when they are loaded."
            )
        with no_init_weights():
            model = self.model_class._from_config(self.config, dtype=dtype)
        state = {name: place.part.tensors.read(place.name).to(dtype) for name, place in places.items()}
        left, beside = model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        assert not beside, beside
        assert set(left) <= set(model.all_tied_weights_keys), left
        return model.eval()


def shapes_of(model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, without any memory for them; those that are tied count once."""
    with torch.device("meta"):
        model = model_class(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
