"""Chats and the engine on families whose pictures are laid out otherwise than LLaVA's."""

import pytest
import torch
from PIL import Image

from routing_experts.config import RoEConfig
from routing_experts.data.markers import find_markers
from routing_experts.data.records import Record, Turn
from routing_experts.inference.chat import ChatSession
from routing_experts.inference.engine import Engine, EngineSettings
from routing_experts.inference.generate import answer
from routing_experts.inference.requests import Request, Sampling
from routing_experts.models.convert import convert
from routing_experts.models.options import RoutingOptions
from tiny_families import FAMILIES
from tiny_processors import PROCESSORS

PICTURES = [Image.new("RGB", size, colour) for size, colour in (((60, 20), "red"), ((20, 40), "blue"))]
FORCED = RoutingOptions(route=torch.tensor([True, False, True, False, True]))
NEW = 4


@pytest.fixture(params=PROCESSORS)
def routed(request, monkeypatch):
    """A converted tiny model in float64 and its processor; it writes letters only, which give the same ids again."""
    processor = PROCESSORS[request.param](monkeypatch)
    # Without the space before answers, which a model that was trained on it writes itself and a random one does not.
    processor.chat_template = processor.chat_template.replace(" {% endif %}", "{% endif %}")
    vocabulary = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 1024}
    model = FAMILIES[request.param](image=processor.image_token_id, dtype=torch.float64, **vocabulary)
    letters = processor.tokenizer.convert_tokens_to_ids(list("abcdefgh"))
    others = [row for row in range(len(processor.tokenizer)) if row not in letters]
    model.lm_head.weight.data[others] = model.lm_head.weight.data[letters].mean(0)  # never above the likeliest letter
    config = RoEConfig(adapter_init="xavier", routing_token_std=1.0)
    return convert(model, config, find_markers(processor)), processor


def whole(model, processor, turns, images, options, new=NEW):
    record = Record("whole", (*turns[:-1], Turn(turns[-1].question, "")), tuple(images))
    (found,) = answer(model, processor, [record], options=options, max_new_tokens=new)
    return found


@pytest.mark.parametrize("policy", ["prefill", "project"])
@pytest.mark.parametrize("forced", [True, False], ids=["forced", "decided"])
def test_a_chat_answers_as_the_whole_dialogue_would(routed, policy, forced):
    """Guards pictures that the cache has seen: they stay away, later ones come, and each keeps its place."""
    model, processor = routed
    if policy == "project" and not forced:
        policy = "prefill"  # its earlier turns' states are their own by design; see test_chat
    options = FORCED if forced else RoutingOptions()
    chat = ChatSession(model, processor, policy, options)
    turns, images = [], []
    for question, new in (("<image>\nWhat?", PICTURES[:1]), ("Sure?", []), ("<image>\nAnd this?", PICTURES[1:])):
        reply = chat.ask(question, new, max_new_tokens=NEW)
        images += new
        turns.append(Turn(question, reply.text))
        expected = whole(model, processor, turns, images, options)
        assert reply.text
        assert (reply.text, reply.route) == (expected.text, expected.route)
        reuses = forced and len(turns) > 1 and model.config.model_type != "qwen2_5_vl"
        assert (reply.reused_tokens > 0) == reuses


def test_the_engine_answers_as_generate_does(routed):
    """Guards prompts of different numbers of pictures in one batch, their positions among them; rows come and go."""
    model, processor = routed
    asked = [("<image>\nWhat?", PICTURES[:1]), ("How many?", []), ("<image> or <image>?", PICTURES), ("No?", [])]
    requests = [
        Request(text, tuple(images), sampling=Sampling(max_new_tokens=NEW + number))
        for number, (text, images) in enumerate(asked)
    ]
    found = Engine(model, processor, EngineSettings(max_rows=3)).generate(requests)
    for number, ((text, images), one) in enumerate(zip(asked, found, strict=True)):
        expected = whole(model, processor, [Turn(text, "")], images, RoutingOptions(), NEW + number)
        assert one.error is None
        assert (one.text, one.route) == (expected.text, expected.route)
