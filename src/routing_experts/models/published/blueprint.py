"""What a published checkpoint becomes: configuration, where each weight comes from, how pictures are prepared."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from routing_experts.errors import CheckpointError, ConfigError, RoutingExpertsError
from routing_experts.models.published.renames import Part, Place, match_names

# Of transformers, for settings of the wrong kind, out of range or unknown to it.
_UNBUILDABLE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError)


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
        causes: what unexpected and missing names suggest, see ``renames.match_names``.
    """

    config: Any
    model_class: Any
    parts: tuple[Part, ...]
    pictures: PictureSettings
    causes: tuple[tuple[str, str], ...]

    def places(self, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
        """Where every tensor of the model is read from.

        Args:
            wanted: their shapes, see ``shapes_of``.

        Raises:
            CheckpointError: if names or shapes do not come out even.
        """
        return match_names(self.parts, wanted, self.causes)

    def build(self, wanted: Mapping[str, tuple[int, ...]]) -> Any:
        """The model with its weights, in the precision of the language model's.

        Raises:
            CheckpointError: if that is no precision to compute in, or as ``places`` does.
        """
        from transformers.initialization import no_init_weights

        places = self.places(wanted)
        embeddings = next(place for name, place in places.items() if name.endswith("embed_tokens.weight"))
        dtype = _read(embeddings).dtype
        with no_init_weights():
            model = self.model_class._from_config(self.config, dtype=dtype)
        state = {name: _read(place).to(dtype) for name, place in places.items()}
        left, beside = model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        assert not beside, beside
        assert set(left) <= set(model.all_tied_weights_keys), left
        return model.eval()


def _read(place: Place) -> torch.Tensor:
    """A tensor of numbers to compute with; raises ``CheckpointError`` for one of a quantised model."""
    value = place.part.tensors.read(place.name)
    if not value.dtype.is_floating_point:
        raise CheckpointError(
            f"{place.part.tensors.folder}: {place.name} is of {value.dtype}: a quantised checkpoint. Give the one that "
            "it was made from; bases are quantised when they are loaded."
        )
    return value


@contextmanager
def described_by(folder: Path) -> Iterator[None]:
    """Blames what transformers cannot make a configuration or an outline of on the checkpoint's own configuration.

    Raises:
        CheckpointError: in place of what transformers and our own configurations raise.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except ConfigError as error:
        raise CheckpointError(f"{folder}/config.json: {error}") from error
    except RoutingExpertsError:
        raise
    except (*_UNBUILDABLE, StrictDataclassError) as error:
        raise CheckpointError(
            f"{folder}/config.json describes no model that can be built ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Restore the checkpoint's own configuration."
        ) from error


def shapes_of(model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, without any memory for them; those that are tied count once."""
    with torch.device("meta"):
        model = model_class(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
