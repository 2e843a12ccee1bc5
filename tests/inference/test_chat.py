"""Chat sessions: what each policy promises, what it runs, and a dialogue that survives mistakes."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image

from routing_experts import RoEConfig, RoutingOptions, convert, load_pocket
from routing_experts.data.digits import DigitsTask
from routing_experts.data.encode import Encoder
from routing_experts.data.records import IMAGE_PLACEHOLDER, Record, Turn
from routing_experts.errors import RecordError, RequestError
from routing_experts.inference.chat import ChatSession
from routing_experts.models.options import KEEP_ALL, SKIP_ALL

DIALOGUES = DigitsTask(split="heldout", seed=5, min_turns=4, max_turns=4, text_share=0.0)
QUESTIONS = ("Read all digits.", "Is there a 7?", "Sort all digits.", "Add all digits.")
NUM_LAYERS = 12
FIXED = {
    "forced": RoutingOptions(route=torch.tensor([1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1]).bool()),
    "all kept": KEEP_ALL,
    "all skipped": SKIP_ALL,
}


@pytest.fixture(scope="module")
def routed():
    """The pocket model in float64, with routers that tell questions apart."""
    model, processor = load_pocket()
    model = convert(model.double(), RoEConfig(routing_token_std=1.0, adapter_init="xavier"), processor)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in model.get_decoder().layers[1:]:
            layer.router.weight.copy_(2 * torch.randn(layer.router.weight.shape, generator=generator))
    return model, processor


@pytest.fixture(scope="module")
def dense():
    model, processor = load_pocket()
    return model.double(), processor


def picture(index: int) -> Image.Image:
    return DIALOGUES[index].images[0]


def whole(model, processor, turns, images=(), options=None):
    """The last question's answer by the model's own generate, on the whole dialogue at once; and its route."""
    encoded = Encoder(processor)(Record("whole", tuple(turns), tuple(images)))
    vision = {name: tensor.double() for name, tensor in encoded.vision.items()}
    settings = {"routing_options": options} if options else {}
    out = model.generate(
        encoded.input_ids[None],
        **vision,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        **settings,
    )
    text = processor.tokenizer.decode(out.sequences[0, len(encoded.input_ids) :], skip_special_tokens=True)
    cache = out.past_key_values
    return text.strip(), tuple(cache.route[0].tolist()) if hasattr(cache, "route") else (True,) * NUM_LAYERS


def assert_each_turn_is_the_whole(session, model, processor, options=None, count=4):
    """Asks about a picture, then about a second one with it in mind; returns the replies."""
    turns, images, replies = [], [], []
    for number, question in enumerate(QUESTIONS[:count]):
        new = [picture(number)] if number in (0, 2) else []
        turns.append(Turn(f"{IMAGE_PLACEHOLDER}\n" * len(new) + question, ""))
        images += new
        reply = session.ask(question, new, max_new_tokens=8)
        assert (reply.text, reply.route) == whole(model, processor, turns, images, options)
        turns[-1] = replace(turns[-1], answer=reply.text)
        replies.append(reply)
    return replies


def test_prefill_is_generate_on_the_whole_dialogue(routed):
    """Guards the default: each turn's answer and route, with pictures in later turns, with routes that change."""
    replies = assert_each_turn_is_the_whole(ChatSession(*routed), *routed)
    assert len({reply.route for reply in replies}) > 1
    assert [reply.reused_tokens for reply in replies] == [0] * 4
    held = [sum(r.route) * (r.prefilled_tokens + r.new_tokens - 1) for r in replies]
    assert [r.cache_bytes for r in replies] == [rows * 2 * 96 * 8 for rows in held]  # skipped layers hold nothing


@pytest.mark.parametrize("policy", ["prefill", "project"])
@pytest.mark.parametrize("name", FIXED)
def test_one_route_for_all_turns_needs_no_second_prefill(routed, name, policy):
    """Guards the exact shortcut: where no turn decides, keys stay, and the result is the whole dialogue's."""
    session = ChatSession(*routed, policy, FIXED[name])
    replies = assert_each_turn_is_the_whole(session, *routed, FIXED[name], count=2 if name == "all skipped" else 4)
    assert all(reply.reused_tokens for reply in replies[1:]) or name == "all skipped"


def test_a_base_model_keeps_its_cache(dense):
    """Guards the baseline that routed chats are compared with: it may not be slowed down."""
    replies = assert_each_turn_is_the_whole(ChatSession(*dense), *dense)
    assert all(all(reply.route) for reply in replies)
    assert_only_new_tokens_run(replies)


def assert_only_new_tokens_run(replies):
    for before, reply in pairwise(replies):
        assert reply.reused_tokens == before.reused_tokens + before.prefilled_tokens + before.new_tokens - 1
        assert 0 < reply.prefilled_tokens < 40


@pytest.mark.parametrize("layout", ["two_call", "fused"])
def test_project_with_routers_that_keep_all_is_the_base_model(routed, dense, layout):
    """Guards ``project`` through the session: decided anew each turn, new tokens alone, second picture and all."""
    model, processor = routed
    before = model.roe_config
    model.roe_config = replace(before, keep_bias=1e6, layout=layout)
    try:
        replies = assert_each_turn_is_the_whole(ChatSession(model, processor, "project"), *dense)
    finally:
        model.roe_config = before
    assert_only_new_tokens_run(replies)


def test_project_runs_new_tokens_alone(routed):
    """Guards the saving, by the tokens that enter the decoder, on routes that change; every layer holds every token."""
    model, processor = routed
    fed = []
    handle = (
        model.get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: fed.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
            with_kwargs=True,
        )
    )
    session, replies = ChatSession(model, processor, "project"), []
    for number, question in enumerate(QUESTIONS):
        replies.append(session.ask(question, [picture(0)] if number == 0 else [], max_new_tokens=8))
        assert [n for n in fed if n > 1] == [reply.prefilled_tokens for reply in replies]
    handle.remove()
    assert_only_new_tokens_run(replies)
    assert len({reply.route for reply in replies}) > 1
    last = replies[-1]
    assert (
        last.cache_bytes == NUM_LAYERS * (last.reused_tokens + last.prefilled_tokens + last.new_tokens - 1) * 2 * 96 * 8
    )
    first = whole(model, processor, [Turn(f"{IMAGE_PLACEHOLDER}\n{QUESTIONS[0]}", "")], [picture(0)])
    assert (replies[0].text, replies[0].route) == first  # a first turn has no past


def test_an_answer_that_reads_otherwise_is_prefilled_again(routed):
    """Guards correctness where an answer's text does not give its tokens back: the whole dialogue runs again."""
    model, processor = routed
    session = ChatSession(model, processor, "project")
    told = session.ask(QUESTIONS[0], [picture(0)], max_new_tokens=8)
    session._turns = (replace(session._turns[0], answer=f"x{told.text}"),)
    again = session.ask(QUESTIONS[1], max_new_tokens=8)
    assert again.reused_tokens == 0
    turns = [*session._turns[:1], Turn(QUESTIONS[1], "")]
    assert (again.text, again.route) == whole(model, processor, turns, [picture(0)])


def test_messages_tell_the_dialogue(dense):
    """Guards the form that processors take, pictures included."""
    model, processor = dense
    session = ChatSession(model, processor, system="Be brief.")
    session.ask(QUESTIONS[0], [picture(0)])
    session.ask(QUESTIONS[1])
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert session.messages[1]["content"] == [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]
    text = processor.apply_chat_template(session.messages, add_generation_prompt=False)
    assert text.count("<image>") == 1


@pytest.mark.parametrize("policy", ["prefill", "project"])
def test_a_mistake_leaves_the_dialogue_as_it_was(routed, policy, tmp_path):
    """Guards a long chat against a mistyped path: the next question gets what it would have got."""
    sessions = [ChatSession(*routed, policy) for _ in range(2)]
    for session in sessions:
        session.ask(QUESTIONS[0], [picture(0)], max_new_tokens=8)
    with pytest.raises(RecordError, match="is not there"):
        sessions[0].ask(QUESTIONS[1], [tmp_path / "none.png"])
    with pytest.raises(RecordError, match="placeholders"):
        sessions[0].ask("What is <image>?")
    with pytest.raises(RequestError, match="num_beams=3"):
        sessions[0].ask(QUESTIONS[1], num_beams=3)
    with pytest.raises(RequestError, match="1024 positions"):
        sessions[0].ask(QUESTIONS[1], max_new_tokens=1024)
    first, second = (session.ask(QUESTIONS[1], max_new_tokens=8) for session in sessions)
    assert replace(first, seconds=0) == replace(second, seconds=0)


def test_an_interrupted_answer_costs_a_prefill_and_no_more(routed):
    """Guards against a cache that holds half an answer: it is thrown away."""
    session, calm = (ChatSession(*routed, "project") for _ in range(2))
    for one in (session, calm):
        one.ask(QUESTIONS[0], [picture(0)], max_new_tokens=8)

    class Streamer:
        def put(self, ids):
            raise KeyboardInterrupt

        def end(self):
            """Never reached."""

    with pytest.raises(KeyboardInterrupt):
        session.ask(QUESTIONS[1], max_new_tokens=8, streamer=Streamer())
    assert session.ask(QUESTIONS[1], max_new_tokens=8).reused_tokens == 0
    assert len(session.messages) == 4


def test_an_empty_answer_is_not_kept(dense):
    """Guards the turn after it: prompts cannot hold a turn without an answer."""
    session = ChatSession(*dense)
    session.ask(QUESTIONS[0], [picture(0)])
    end = dense[0].generation_config.eos_token_id
    reply = session.ask(QUESTIONS[1], max_new_tokens=1, forced_eos_token_id=end)
    assert (reply.text, len(session.messages)) == ("", 2)
    assert session.ask(QUESTIONS[1]).text in ("yes", "no")


def test_an_unknown_policy_is_refused(dense):
    with pytest.raises(RequestError, match="prefill, project"):
        ChatSession(*dense, "again")
