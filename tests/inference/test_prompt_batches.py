"""Prompts may be as long as the model knows positions, whoever batches them."""

import pytest

from routing_experts.data.records import Record, Turn
from routing_experts.errors import RecordError
from routing_experts.inference.generate import prompt_batches
from routing_experts.models.load import load_base, load_processor


@pytest.mark.parametrize(("positions", "fits"), [(4096, True), (1024, False)])
def test_a_prompt_may_be_as_long_as_the_model_knows(positions, fits):
    """Guards timings behind an evaluation: what was answered must not be too long to be timed."""
    model, processor = load_base("pocket"), load_processor("pocket")
    model.config.get_text_config(decoder=True).max_position_embeddings = positions
    record = Record("long", (Turn("7 " * 1500, ""),))
    if fits:
        assert next(prompt_batches(model, processor, [record], 1))["input_ids"].shape[1] > 2048
        return
    with pytest.raises(RecordError, match="long"):
        next(prompt_batches(model, processor, [record], 1))
