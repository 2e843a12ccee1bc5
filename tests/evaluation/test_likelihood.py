"""Answers' likelihoods: against the textbook, in batches, and on the route of the prompt alone."""

from dataclasses import replace

import pytest
import torch

from routing_experts.config import RoEConfig
from routing_experts.data.encode import Encoder
from routing_experts.data.markers import find_markers
from routing_experts.errors import RecordError, RouteError
from routing_experts.evaluation.difficulty import answer_losses, tenths
from routing_experts.evaluation.evaluate import ask
from routing_experts.evaluation.likelihood import likelihoods
from routing_experts.evaluation.questions import digits_questions, records_of
from routing_experts.models.convert import convert
from routing_experts.models.families import family_of
from routing_experts.models.load import load_base, load_processor
from routing_experts.models.options import RoutingOptions


@pytest.fixture(scope="module")
def processor():
    return load_processor("pocket")


@pytest.fixture(scope="module")
def questions():
    return digits_questions(12, 3) + digits_questions(4, 4, turns=3)


@pytest.fixture(scope="module")
def base():
    return load_base("pocket").double()


@pytest.fixture(scope="module")
def routed(processor):
    model = convert(
        load_base("pocket"), RoEConfig(adapter_init="xavier", routing_token_std=1.0), find_markers(processor), seed=3
    )
    for layer in family_of(model).decoder_layers(model)[1:]:
        torch.nn.init.normal_(layer.router.weight, generator=torch.Generator().manual_seed(5))
    return model.double().eval()


def answered(question, answer=None):
    *earlier, last = question.record.turns
    turns = (*earlier, replace(last, answer=question.answer if answer is None else answer))
    return replace(question.record, turns=turns)


@pytest.mark.parametrize("kind", ["base", "routed"])
@pytest.mark.parametrize("batch_size", [1, 5])
@torch.no_grad()
def test_it_is_the_sum_over_the_answers_tokens(kind, batch_size, request, processor, questions):
    """The textbook: the prompt's route, then one token after the other behind a growing prompt."""
    model, encoder = request.getfixturevalue(kind), Encoder(processor)
    found = list(likelihoods(model, processor, [answered(q) for q in questions], batch_size))
    routes = [a.route for a in ask(model, processor, questions, 4).answers]
    assert [one.route for one in found] == routes
    assert kind == "base" or len(set(routes)) > 2
    for question, one in zip(questions[::3], found[::3], strict=True):
        whole, prompt = encoder(answered(question)).input_ids, encoder(question.record).input_ids
        assert torch.equal(whole[: len(prompt)], prompt)
        total, greedy = 0.0, True
        vision = {n: t.double() for n, t in encoder(question.record).vision.items()}
        options = {} if kind == "base" else {"routing_options": RoutingOptions(route=torch.tensor(one.route))}
        for place in range(len(prompt), len(whole)):
            logits = model(input_ids=whole[None, :place], **vision, **options).logits[0, -1]
            total += float(logits.log_softmax(-1)[whole[place]])
            greedy &= int(logits.argmax()) == int(whole[place])
        assert one.log_probability == pytest.approx(total, abs=1e-6)
        assert (one.num_tokens, one.is_greedy) == (len(whole) - len(prompt), greedy)


def test_what_is_scored_decides_nothing(routed, processor, questions):
    routes = [
        [one.route for one in likelihoods(routed, processor, [answered(q, a) for q in questions])]
        for a in ("0", "yes, and a long one")
    ]
    assert routes[0] == routes[1]


def test_a_greedy_answer_is_what_the_model_says(base, processor, questions):
    said = ask(base, processor, questions, 4)
    found = likelihoods(base, processor, [answered(q, a.text) for q, a in zip(questions, said.answers, strict=True)])
    assert all(one.is_greedy for one in found)


def test_options_move_a_routed_model_and_are_refused_for_a_dense_one(base, routed, processor, questions):
    records = [answered(q) for q in questions]
    kept = list(likelihoods(routed, processor, records, options=RoutingOptions(skip_ratio=0.0)))
    assert all(all(one.route) for one in kept)
    dense = [one.log_probability for one in likelihoods(base, processor, records)]
    assert [one.log_probability for one in kept] == pytest.approx(dense, abs=1e-6)
    with pytest.raises(RouteError, match="not routed"):
        list(likelihoods(base, processor, records, options=RoutingOptions(skip_ratio=0.0)))


def test_an_empty_answer_is_refused(base, processor, questions):
    with pytest.raises(RecordError, match=questions[0].record.id):
        list(likelihoods(base, processor, records_of(questions)))


def test_questions_fall_into_tenths_by_the_bases_loss(base, processor):
    questions = digits_questions(40, 9)
    losses = answer_losses(base, processor, questions)
    parts = tenths(losses)
    assert sorted(parts) == [part for part in range(10) for _ in range(4)]
    by_part = [[loss for loss, part in zip(losses, parts, strict=True) if part == wanted] for wanted in (0, 9)]
    assert max(by_part[0]) <= min(by_part[1])
    assert tenths([1.0, 1.0, 1.0]) == [0, 3, 6]
