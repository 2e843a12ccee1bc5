"""Makes a small LLaVA-HR around the pocket model's language model, for trying that family out on a laptop.

``python -m routing_experts.pocket.build_hr FOLDER`` writes the model with its processor: the language model knows the
digits' questions already, and its ConvNeXt is taught to tell digits apart, which takes minutes; CLIP and what joins the
three are untrained. It looks at pictures of 128 by 128 pixels: CLIP sees them at 16 by 16, where a digit, 12 to 15
pixels wide and high, is a spot of two; the ConvNeXt sees them whole. Both maps have four places a side, so a picture is
16 tokens; CLIP's three by three positions are spread to them.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from routing_experts.models.llava_hr import LlavaHrConfig, LlavaHrVisionConfig
from routing_experts.models.llava_hr.modeling import LlavaHrForConditionalGeneration
from routing_experts.models.load import load_base, load_processor
from routing_experts.pocket.sight import teach_sight

PICTURE_SIZE = 128
LOW_RESOLUTION = 16  # pixels of the picture that CLIP gets
CELL = PICTURE_SIZE // 2  # of a digit, in pictures of two by two
LAYER_SCALE = 0.1  # of an untaught ConvNeXt's blocks, which would do next to nothing for a short training at 1e-6
SEED = 0


def build_processor() -> LlavaProcessor:
    """The pocket model's tokenizer and template, with pictures of 128 pixels; a token stands for 32 by 32 of them."""
    pocket = load_processor("pocket")
    size = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=pocket.tokenizer,
        patch_size=32,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=pocket.chat_template,
    )


def build_model() -> Any:
    """A LLaVA-HR of two million parameters, two thirds of them the pocket model's."""
    pocket = load_base("pocket")
    vision = LlavaHrVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=12,
        patch_size=4,
        input_image_size=PICTURE_SIZE,
        slow_hidden_sizes=(24, 48, 96, 128),
        slow_depths=(1, 1, 2, 1),
        adapter_layers=(0, 1, 2),
    )
    config = LlavaHrConfig(
        vision_config=vision,
        text_config=pocket.config.text_config,
        image_token_index=pocket.config.image_token_id,
        tie_word_embeddings=True,
        architectures=["LlavaHrForConditionalGeneration"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlavaHrForConditionalGeneration(config)  # type: ignore[arg-type]
        for name, parameter in model.model.vision_tower.slow_tower.named_parameters():
            if name.endswith("layer_scale_parameter"):
                parameter.data.fill_(LAYER_SCALE)
    model.model.language_model.load_state_dict(pocket.model.language_model.state_dict())
    model.generation_config = pocket.generation_config
    return model.eval()


def main(folder: Path, sees: bool = False, blur: int = 1) -> float | None:
    """Writes model and processor.

    Args:
        folder: for both.
        sees: teach its ConvNeXt first, which takes minutes.
        blur: how many times smaller the pictures that it is taught on are made, and then as large again.

    Returns:
        The share of digits that the ConvNeXt named rightly, if it was taught.
    """
    model = build_model()
    right = teach_sight(model.model.vision_tower.slow_tower, blur=blur) if sees else None
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return right


if __name__ == "__main__":
    main(Path(sys.argv[1]), sees=True)
