"""LLaVA-1.5 in both layouts: an import of the original computes what transformers makes of llava-hf's files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlamaTokenizerFast, LlavaConfig, LlavaForConditionalGeneration

from published import (
    LLAVA_TOWER,
    TINY,
    drawn,
    language_settings,
    llava_settings,
    llava_shapes,
    write_checkpoint,
    write_clip,
    write_tokenizer,
)
from routing_experts.data.encode import Encoder
from routing_experts.data.records import Record, Turn
from routing_experts.models.published.reading import import_published
from routing_experts.models.published.sources import Sources

PICTURES = tuple(
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24 + seed, 30, 3), np.uint8)) for seed in range(2)
)
DIALOGUES = {
    "no picture": ((Turn("How many boats left?", ""),), 0),
    "one picture": ((Turn("<image>\nWhat is it?", ""),), 1),
    "two pictures": ((Turn("<image>\n<image>\nWhich is larger?", ""),), 2),
    "three turns": ((Turn("<image>\nWhat is it?", "A kite."), Turn("Which colour?", "Red"), Turn("Why?", "")), 1),
}
# llava-hf's names on disk, of transformers before version 5.
NATIVE = {
    "model.mm_projector.0.": "multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "multi_modal_projector.linear_2.",
    LLAVA_TOWER: "vision_tower.vision_model.",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}


def native_name(name: str) -> str:
    start = next(start for start in NATIVE if name.startswith(start))
    return NATIVE[start] + name.removeprefix(start)


def write_native(folder: Path, tensors: dict[str, torch.Tensor], rows: int, image: int) -> None:
    """A folder as llava-hf publishes it: old names, the vocabulary grown, a configuration of parts."""
    grown = {
        name: torch.cat([value, torch.zeros(rows - len(value), value.shape[1])])
        if name in ("model.embed_tokens.weight", "lm_head.weight")
        else value
        for name, value in tensors.items()
    }
    folder.mkdir()
    save_file({native_name(name): value.contiguous() for name, value in grown.items()}, folder / "model.safetensors")
    text = language_settings(TINY) | {"vocab_size": rows, "model_type": "llama"}
    del text["torch_dtype"], text["transformers_version"]
    vision = CLIPVisionConfig(
        hidden_size=TINY.clip,
        intermediate_size=TINY.clip_ffn,
        num_hidden_layers=TINY.clip_layers,
        num_attention_heads=TINY.clip_heads,
        image_size=TINY.image,
        patch_size=TINY.patch,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text),
        image_token_index=image,
        image_seq_length=TINY.patches,
        architectures=["LlavaForConditionalGeneration"],
    )
    config.save_pretrained(folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The import, its processor, and the native model."""
    root = tmp_path_factory.mktemp("both")
    tensors = drawn(llava_shapes(TINY, tower=True))
    folder = write_checkpoint(root / "original", tensors, llava_settings(TINY))
    write_tokenizer(folder)
    write_clip(root / "clip", TINY)
    imported, processor = import_published(folder, Sources(vision_tower=str(root / "clip")))
    rows, image = len(imported.get_input_embeddings().weight), imported.config.image_token_id
    write_native(root / "native", tensors, rows, image)
    native, told = LlavaForConditionalGeneration.from_pretrained(root / "native", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return imported, processor, native.eval()


@pytest.mark.parametrize("name", DIALOGUES)
@torch.no_grad()
def test_logits_are_those_of_the_native_layout(both, name):
    """Guards the acceptance of an import: the same ids and pixels give equal logits over the old vocabulary."""
    imported, processor, native = both
    turns, count = DIALOGUES[name]
    encoded = Encoder(processor, "vicuna_v1")(Record("r", turns, PICTURES[:count]))
    batch = {"input_ids": encoded.input_ids[None], **encoded.vision}
    assert len(encoded.vision.get("pixel_values", ())) == count
    assert (encoded.input_ids == native.config.image_token_id).sum() == count * TINY.patches
    logits = [model(**batch).logits[..., : TINY.vocabulary] for model in (imported, native)]
    assert torch.equal(*logits)
    routed = [model.generate(**batch, do_sample=False, max_new_tokens=4) for model in (imported, native)]
    assert torch.equal(*routed)


def test_a_tokenizer_json_is_taken_as_it_is(both, tmp_path):
    """Guards ids of checkpoints that were saved anew: their file says where spaces go, and nothing else is asked."""
    _, processor, _ = both
    folder = write_checkpoint(tmp_path / "saved", drawn(llava_shapes(TINY, tower=True)), llava_settings(TINY))
    write_tokenizer(folder)
    tokenizer = LlamaTokenizerFast.from_pretrained(folder, legacy=False)
    for path in folder.glob("*token*"):
        path.unlink()
    tokenizer.save_pretrained(folder)
    assert not (folder / "tokenizer.model").exists()
    write_clip(tmp_path / "clip", TINY)
    _, other = import_published(folder, Sources(vision_tower=str(tmp_path / "clip")))
    record = Record("r", (Turn("<image>\nWhat is it?", "A kite."), Turn("USER of it?", "")), PICTURES[:1])
    ids = [Encoder(one, "vicuna_v1")(record).input_ids.tolist() for one in (processor, other)]
    assert ids[0] == ids[1]
