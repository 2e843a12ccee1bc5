"""LLaVA-HR, which transformers lacks, through transformers' own entrances: as any other family, routed or not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from routing_experts import api
from routing_experts.config import RoEConfig
from routing_experts.models.load import load_base, load_processor
from routing_experts.pocket import build_hr

CODE = """
import sys
import routing_experts
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline
for folder, is_routed in zip(sys.argv[1:], (True, False)):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert routing_experts.is_routed(model) == is_routed, type(model)
    assert type(model).__name__ == "LlavaHrForConditionalGeneration", type(model)
    assert AutoConfig.from_pretrained(folder).model_type == "llava_hr"
    assert AutoProcessor.from_pretrained(folder).patch_size == 32
    pipe = pipeline("image-text-to-text", model=folder)
    assert routing_experts.is_routed(pipe.model) == is_routed
    content = [{"type": "image", "image": Image.new("RGB", (32, 32))}, {"type": "text", "text": "Read all digits."}]
    answer = pipe(text=[{"role": "user", "content": content}], max_new_tokens=3, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A small LLaVA-HR with random towers, routed and plain."""
    place = tmp_path_factory.mktemp("own")
    build_hr.main(place / "plain")
    torch.manual_seed(0)
    processor = load_processor(place / "plain")
    routed = api.convert(load_base(place / "plain"), RoEConfig(target_skip_ratio=0.4), processor)
    api.save_pretrained(routed, place / "routed", processor)
    return [place / "routed", place / "plain"]


def test_transformers_own_entrances_give_the_model(folders):
    """Guards registration in a fresh interpreter: nothing is complained of, and routed folders stay routed."""
    command = [sys.executable, "-W", "ignore", "-c", CODE, *map(str, folders)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "not supported" not in done.stderr + done.stdout
