"""What docs say of LLaVA-HR: the way to its second stage, and what its towers take beside the decoder."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig

from routing_experts.models.llava_hr import LlavaHrVisionConfig
from routing_experts.models.llava_hr.modeling import LlavaHrForConditionalGeneration, LlavaHrVisionModel


def test_the_way_to_a_second_stage_that_docs_show(published_hr, tmp_path, monkeypatch):
    """Guards the snippet as it stands there: pictures of 1,024 pixels, padded, of as many tokens as the tower gives."""
    monkeypatch.chdir(tmp_path)
    model = LlavaHrForConditionalGeneration.from_pretrained(published_hr.loaded)
    model.config.vision_config.adapter_layers = []
    LlavaHrForConditionalGeneration(model.config).save_pretrained("models/llava-hr-stage-1")
    published_hr.processor.save_pretrained("models/llava-hr-stage-1")
    page = Path(__file__).parents[3] / "docs/families.md"
    exec(page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0], {})
    second = AutoModelForImageTextToText.from_pretrained("models/llava-hr-stage-2")
    vision = second.config.vision_config
    assert (vision.input_image_size, vision.freeze_vision, vision.adapter_layers) == (1024, False, [0, 1, 2])
    processor = AutoProcessor.from_pretrained("models/llava-hr-stage-2")
    wide = Image.new("RGB", (64, 8), (255, 0, 0))
    encoded = processor(text="<image>", images=wide, return_tensors="pt")
    assert encoded.pixel_values.shape == (1, 3, 1024, 1024)
    assert (encoded.input_ids == second.config.image_token_id).sum() == vision.patches_per_side**2
    assert not torch.equal(encoded.pixel_values[0, :, 0, 0], encoded.pixel_values[0, :, 512, 512])  # padded


@pytest.mark.parametrize(
    ("tower", "text", "share"),
    [
        ({}, LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32), 1 / 7),
        (
            {"slow_hidden_sizes": (384, 768, 1536, 3072), "slow_depths": (3, 4, 30, 3)},
            LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40),
            1 / 4,
        ),
    ],
    ids=["7B", "X-13B"],
)
def test_the_towers_take_as_much_as_docs_say(tower, text, share):
    """Guards the sentence on what routing leaves as it is, at the published sizes: no weight is made for it."""
    vision, tokens = LlavaHrVisionConfig(**tower), 1100  # a picture and a question
    with torch.device("meta"), FlopCounterMode(display=False) as counted, torch.no_grad():
        LlavaHrVisionModel(vision)(torch.zeros(1, 3, vision.input_image_size, vision.input_image_size))
    widths = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    decoder = text.num_hidden_layers * (2 * tokens * widths + 4 * tokens**2 * text.hidden_size)
    assert abs(counted.get_total_flops() / decoder - share) < 0.01
