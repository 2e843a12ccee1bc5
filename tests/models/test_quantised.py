"""Bases in four bits: RoE parts load onto them in the precision that hidden states have."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from routing_experts.config import RoEConfig
from routing_experts.models.convert import convert
from routing_experts.models.load import from_pretrained

pytest.importorskip("bitsandbytes")


@pytest.fixture
def parts_and_base(tmp_path):
    """A Llama whose matrices fill whole blocks of sixty-four, and the RoE parts of its conversion."""
    torch.manual_seed(0)
    settings = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64}
    base = LlamaForCausalLM(LlamaConfig(hidden_size=128, intermediate_size=256, **settings)).eval()
    base.save_pretrained(tmp_path / "base")
    model = convert(LlamaForCausalLM.from_pretrained(tmp_path / "base"), RoEConfig(adapter_init="xavier"))
    model.save_pretrained(tmp_path / "parts", base_weights=False)
    return tmp_path / "parts", tmp_path / "base", model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_load_onto_a_four_bit_base(dtype, parts_and_base):
    """Guards quantised serving: adapters stay as trained, the base's matrices are packed, and the model answers."""
    from transformers import BitsAndBytesConfig

    parts, base, trained = parts_and_base
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = from_pretrained(parts, base=str(base), quantization_config=quantised, dtype=dtype)
    layer = model.model.layers[1]
    assert not layer.mlp.up_proj.weight.dtype.is_floating_point
    assert layer.skip_down.weight.dtype == layer.router.weight.dtype == dtype
    torch.testing.assert_close(layer.skip_down.weight, trained.model.layers[1].skip_down.weight.to(dtype))
    ids = torch.tensor([[1, 20, 21, 22]])
    assert model.generate(input_ids=ids, max_new_tokens=2, pad_token_id=0).shape == (1, 6)
