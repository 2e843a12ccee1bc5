"""Pictures padded to squares before they are scaled, as LLaVA's own code does: a processor that does so itself."""

from copy import copy
from typing import Any

from routing_experts.errors import ConfigError

# By name: of each pair transformers imports the one whose libraries are there.
CROPPING = ("CLIPImageProcessor", "CLIPImageProcessorPil", "LlavaImageProcessor", "LlavaImageProcessorPil")


def padding_to_square(processor: Any) -> Any:
    """A processor like this one that pads pictures to squares in the mean colour (LLaVA's ``image_aspect_ratio: pad``).

    The processor remembers: saved beside the model, it pads wherever the model is asked.

    Raises:
        ConfigError: if its pictures are scaled in another way than CLIP's, whose middle would be cropped out.
    """
    from transformers import LlavaImageProcessorPil

    own = processor.image_processor
    if isinstance(own, LlavaImageProcessorPil) and own.do_pad:
        return processor
    if type(own).__name__ not in CROPPING:
        raise ConfigError(
            f"data.pad_to_square with a {type(own).__name__}, which lays pictures out in its own way: padding is for "
            "processors that crop the middle, CLIP's. Leave it out."
        )
    settings = {name: value for name, value in own.to_dict().items() if name != "image_processor_type"}
    padding = copy(processor)
    padding.image_processor = LlavaImageProcessorPil(**(settings | {"do_pad": True}))
    return padding
