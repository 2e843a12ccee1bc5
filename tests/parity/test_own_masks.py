"""Our own spans, masks and positions: where they equal the authors' recorded ones, where not, and why.

What the recorded masks cannot prove, a slow textbook twin proves in float64 (``twin.py``).
"""

import functools
import random

import golden
import pytest
import torch
import twin
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from routing_experts.config import RoEConfig, TurnMarkers
from routing_experts.models.context import RoutingContext
from routing_experts.models.convert import convert
from routing_experts.models.spans import (
    CONTEXT,
    PADDING,
    answer_segment,
    only_last_question,
    open_history,
    question_segment,
    segments_from_ids,
    turns_of,
)
from routing_experts.nn.gates import GateSettings
from routing_experts.nn.losses import cross_entropy_per_example, roe_loss, skip_rate_per_example

RECORDING = golden.load()
BATCHES = sorted({run.rsplit(".", 1)[0] for run in RECORDING.facts["runs"]})
PROMPTS = RECORDING.names("infer")
LAYOUTS = ("two_call", "fused")


def own_segments(ids_BT: Tensor, real_BT: Tensor | None = None) -> Tensor:
    return segments_from_ids(ids_BT, real_BT, (RECORDING.image_id,), RECORDING.markers)


def image_bound(ids_T: Tensor) -> int:
    """The index of the first token after the image."""
    return int((ids_T == RECORDING.image_id).nonzero().max()) + 1


def token_after_image_moved(rows_RK: Tensor, ids_T: Tensor) -> Tensor:
    """Recorded rows with the token after the image given from the context to the first question."""
    moved, bound = rows_RK.clone(), image_bound(ids_T)
    assert moved[0, bound]
    assert not moved[1, bound]
    moved[0, bound], moved[1, bound] = False, True
    return moved


def case(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, own segments, recorded question rows and weight rows of an unusual input; no batch axis, no routing keys."""
    if name not in RECORDING.names("mask_case"):
        pytest.skip("not in this recording")
    ids_1T, _, question_RT, weight_RT = golden.mask_case(RECORDING, name)
    return ids_1T[0], own_segments(ids_1T)[0], question_RT, weight_RT


def own_rows(segments_T: Tensor) -> tuple[Tensor, Tensor]:
    """Our question and weight rows over ordinary tokens [R, T], as the recording has them."""
    context = RoutingContext.from_segments(segments_T[None])
    rows = torch.arange(context.num_tokens)[:, None]
    return context.visible_BRK[0, :, : len(segments_T)], context.turns_BT == rows


# Training


@pytest.mark.parametrize("batch", BATCHES)
def test_training_masks_differ_by_the_token_after_the_image_only(batch):
    """The authors' bound of the context includes the first token after the image (LLaVA's newline) in training but
    not at inference. Ours ends with the image in both, so that a router is asked at inference what it learnt."""
    inputs = golden.training_inputs(RECORDING, batch)
    context = RoutingContext.from_segments(own_segments(inputs.ids_BT, inputs.real_BT))
    assert torch.equal(context.valid_BQ, inputs.valid_BQ)
    for row, ids_T in enumerate(inputs.ids_BT):
        wanted = token_after_image_moved(inputs.visible_BRK[row], ids_T)
        # The recording lets an absent turn's routing token see itself, and so do we: whole rows are compared.
        assert torch.equal(context.visible_BRK[row], wanted)
        turns_T = inputs.turns_BT[row].clone()
        turns_T[image_bound(ids_T)] = 1
        assert torch.equal(context.turns_BT[row], turns_T)


@pytest.mark.parametrize("batch", BATCHES)
def test_training_segments_follow_the_labels(batch):
    """Markers in the ids and labels of the recording tell the same story of questions and answers."""
    inputs = golden.training_inputs(RECORDING, batch)
    segments_BT = own_segments(inputs.ids_BT, inputs.real_BT)
    is_answer_BT = (segments_BT > 0) & (segments_BT % 2 == 0)
    assert torch.equal(is_answer_BT, inputs.labels_BT != golden.IGNORED)
    assert torch.equal(segments_BT == PADDING, ~inputs.real_BT)


@functools.cache
def own_training_logits(batch: str, rows: tuple[int, ...] | None, layout: str) -> tuple[Tensor, Tensor]:
    """Router logits [L, B, Q, 2] of our own masks and positions, and which turns exist."""
    inputs = golden.training_inputs(RECORDING, batch)
    model = golden.build_model(RECORDING)
    pick = slice(None) if rows is None else list(rows)
    real_BT = inputs.real_BT[pick]
    used = int(real_BT.sum(1).max())
    context = RoutingContext.from_segments(
        own_segments(inputs.ids_BT[pick], real_BT)[:, :used], gate=GateSettings("softmax"), layout=layout
    )
    embedded = inputs.embeddings(model)[pick][:, :used]
    with torch.no_grad():
        model(inputs_embeds=embedded, attention_mask=real_BT[:, :used].long(), routing=context, use_cache=False)
    return torch.stack([context.logits[index] for index in range(RECORDING.num_layers)]), context.valid_BQ


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", BATCHES)
def test_an_example_routes_alone_as_in_its_batch(batch, layout):
    """The authors' routing tokens stand in front, so an example's positions start at its batch's turn count plus one
    and its decisions depend on its neighbours. Ours share the first real token's position, whatever the batch."""
    together, valid_BQ = own_training_logits(batch, None, layout)
    for row in range(len(valid_BQ)):
        alone, valid_1Q = own_training_logits(batch, (row,), layout)
        assert int(valid_1Q.sum()) == int(valid_BQ[row].sum())
        torch.testing.assert_close(alone[:, 0], together[:, row, : alone.shape[2]], rtol=5e-5, atol=5e-5)


def test_recorded_decisions_depend_on_the_batch():
    """The other half of the reason above, in the authors' numbers: one example, alone and in a batch."""
    alone, together = (RECORDING.tensors.get(f"{b}.stage2_temp1.router_logits") for b in ("train_alone", "train"))
    if alone is None or together is None:
        pytest.skip("not in this recording")
    assert float((alone[:, 0] - together[:, 0, : alone.shape[2]]).abs().max()) > 0.01
    inputs = golden.training_inputs(RECORDING, "train"), golden.training_inputs(RECORDING, "train_alone")
    starts = [int(i.positions_BN[0, i.num_routing]) for i in inputs]
    assert starts == [i.num_routing for i in inputs]
    assert starts[0] != starts[1]


# Inference


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_spans_with_history_are_the_recorded_ones(name):
    """The preset ``paper`` asks at inference as the authors do, but for one thing: their inference, unlike their
    training, lets the text routing token see the image routing token (it stands before it, and no padding mask hides
    it). The router concatenates both already; ours see themselves and their span in training and inference."""
    inputs = golden.prompt_inputs(RECORDING, name)
    context = RoutingContext.from_segments(open_history(own_segments(inputs.ids_BT)))
    length = inputs.ids_BT.shape[1]
    assert torch.equal(context.visible_BRK[..., :length], inputs.visible_BRK[..., :length])
    assert torch.equal(context.turns_BT, inputs.turns_BT)
    only_theirs = (inputs.visible_BRK & ~context.visible_BRK).nonzero().tolist()
    assert only_theirs == [[0, 1, length]]
    assert not (context.visible_BRK & ~inputs.visible_BRK).any()


@pytest.mark.parametrize("name", PROMPTS)
def test_last_question_is_what_training_shows(name):
    """The authors' text routing token sees all history at inference, though each saw one question in training. Our
    default sees the last question: the same tokens in a one-turn prompt, fewer in a later turn."""
    inputs = golden.prompt_inputs(RECORDING, name)
    segments_1T = own_segments(inputs.ids_BT)
    num_turns = int(turns_of(segments_1T).max())
    length = inputs.ids_BT.shape[1]
    last = RoutingContext.from_segments(only_last_question(segments_1T)).visible_BRK[0, :, :length]
    as_trained = RoutingContext.from_segments(segments_1T).visible_BRK[0, :, :length]
    assert torch.equal(last[0], inputs.visible_BRK[0, 0, :length])
    assert torch.equal(last[1], as_trained[num_turns])
    recorded = inputs.visible_BRK[0, 1, :length]
    assert not (last[1] & ~recorded).any()
    assert torch.equal(last[1], recorded) == (num_turns == 1)


# Unusual inputs


@pytest.mark.parametrize(
    "name", ["one_token_answers_plus_eos", "image_cut_inside_second_question", "image_trailing_ignored_token"]
)
def test_unusual_masks_that_agree(name):
    """Short answers, a dialogue cut inside a question, a stray token after the last answer: both make the same rows
    (what follows an answer is the next turn, finished or not), but for the token after the image, as in training."""
    ids_T, segments_T, question_RT, weight_RT = case(name)
    own_question_RT, own_weight_RT = own_rows(segments_T)
    assert torch.equal(own_question_RT, token_after_image_moved(question_RT, ids_T))
    assert torch.equal(own_weight_RT, token_after_image_moved(weight_RT, ids_T))


def test_answer_without_labels_is_still_an_answer():
    """With every label ignored, the authors take the answer for part of the question, since they find turns by labels.
    We find them by the prompt's markers: a question's end must be known at inference, where no label is."""
    ids_T, segments_T, question_RT, weight_RT = case("image_all_labels_ignored")
    own_question_RT, own_weight_RT = own_rows(segments_T)
    moved_RT = token_after_image_moved(question_RT, ids_T)
    assert torch.equal(own_question_RT[0], moved_RT[0])
    assert torch.equal(own_question_RT[1] | (segments_T == answer_segment(1)), moved_RT[1])
    assert (segments_T == answer_segment(1)).any()
    assert torch.equal(own_weight_RT, token_after_image_moved(weight_RT, ids_T))


def test_unlabelled_end_of_answer_belongs_to_the_answer():
    """An EOS without a label opens the authors' next question. Ours stays with the answer that it ends, as it does in
    a prompt with history, where labels do not exist."""
    ids_T, segments_T, question_RT, weight_RT = case("single_labelled_token_answer")
    own_question_RT, own_weight_RT = own_rows(segments_T)
    (end_of_answer,) = RECORDING.markers.end_of_answer
    first_end = int((ids_T == end_of_answer).nonzero()[0])
    wanted_question_RT = token_after_image_moved(question_RT, ids_T)
    wanted_weight_RT = token_after_image_moved(weight_RT, ids_T)
    wanted_question_RT[2, first_end] = False
    wanted_weight_RT[2, first_end], wanted_weight_RT[1, first_end] = False, True
    assert torch.equal(own_question_RT, wanted_question_RT)
    assert torch.equal(own_weight_RT, wanted_weight_RT)


TEXT_ONLY = [name for name in RECORDING.names("mask_case") if "text_only" in name]


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_text_only_context_is_the_system_prompt(name):
    """Without an image the authors take the first 35 tokens (34 at inference) for the context, whatever they are: short
    dialogues lose their only turn, others are cut inside a question or an answer. Ours ends where the user begins."""
    ids_T, segments_T, question_RT, _ = case(name)
    _, labels_1T, _, _ = golden.mask_case(RECORDING, name)
    user = RECORDING.markers.user_prompt
    first_user = next(i for i in range(len(ids_T)) if tuple(ids_T[i : i + len(user)].tolist()) == user)
    own_question_RT, own_weight_RT = own_rows(segments_T)
    is_answer_T = labels_1T[0] != golden.IGNORED
    assert torch.equal(own_question_RT[0], torch.arange(len(ids_T)) < first_user)
    assert torch.equal(own_question_RT.any(0), ~is_answer_T)
    assert int(own_question_RT.sum(0).max()) == int(own_weight_RT.sum(0).max()) == 1
    num_answers = int((is_answer_T & ~is_answer_T.roll(1)).sum())
    assert len(own_question_RT) == num_answers + 1
    assert (own_question_RT[1:].any(1)).all()
    bound = question_RT[0].nonzero().max() + 1
    assert not torch.equal(own_question_RT[0, :bound], question_RT[0, :bound])


# The textbook twin

MARKERS = TurnMarkers(generation_prompt=(5, 6), end_of_answer=(2,), user_prompt=(3, 4))
IMAGE, BOS, FIRST_WORD, VOCABULARY = 7, 1, 10, 40
SHAPE = twin.Shape(3, 4, 2, 6, 1e-5, 10000.0, (0, 1, 2))


class Dialogue:
    """A random dialogue: ids, what each token belongs to, and labels."""

    def __init__(self, chance: random.Random, num_turns: int, with_image: bool) -> None:
        self.ids: list[int] = []
        self.places: list[twin.Place] = []
        self.labels: list[int | None] = []

        def words(low: int, high: int) -> list[int]:
            return [chance.randrange(FIRST_WORD, VOCABULARY) for _ in range(chance.randint(low, high))]

        def say(ids: list[int], part: str, turn: int) -> None:
            self.ids += ids
            self.places += [twin.Place(part, turn)] * len(ids)
            self.labels += ids if part == "answer" else [None] * len(ids)

        say([BOS, *words(1, 3)], "context", 0)
        for turn in range(1, num_turns + 1):
            asks = [*MARKERS.user_prompt]
            if turn == 1 and with_image:
                say([*asks, IMAGE, IMAGE, IMAGE], "context", 0)
                asks = []
            say([*asks, *words(1, 4), *MARKERS.generation_prompt], "question", turn)
            say([*words(1, 3), *MARKERS.end_of_answer], "answer", turn)

    @property
    def segments(self) -> list[int]:
        number = {"context": lambda turn: CONTEXT, "question": question_segment, "answer": answer_segment}
        return [number[place.part](place.turn) for place in self.places]


def exact_norm(self, hidden: Tensor) -> Tensor:
    return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def exact_rotary(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    powers = torch.arange(0, SHAPE.head_size, 2, dtype=x.dtype) / SHAPE.head_size
    angles = (position_ids[..., None] * SHAPE.rope_base**-powers).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


@pytest.fixture
def in_float64(monkeypatch):
    """Transformers computes norms and rotary tables in float32, whatever the model's dtype."""
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", exact_norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", exact_rotary)


def random_model(seed: int, routed_layers: tuple[int, ...]) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=SHAPE.num_heads * SHAPE.head_size,
        intermediate_size=20,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_key_value_heads,
        rms_norm_eps=SHAPE.eps,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    roe = RoEConfig.preset("paper", bottleneck_size=5, routed_layers=routed_layers, target_skip_ratio=0.5)
    model = convert(LlamaForCausalLM(config).double(), roe, MARKERS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.3)
            if "norm" in name:
                weight.add_(1)
    return model.train()


def padded(rows: list[list[int]], left: list[int], length: int, filler: int) -> Tensor:
    return torch.tensor(
        [[filler] * n + row + [filler] * (length - n - len(row)) for row, n in zip(rows, left, strict=True)]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("seed", "routed_layers"), [(0, (0, 1, 2)), (1, (0, 1, 2)), (2, (1, 2)), (3, (0, 2))])
def test_routed_layers_equal_their_textbook_twin(seed, routed_layers, layout, in_float64):
    """States, router logits, weights, losses and all gradients of a padded batch, against one dialogue at a time."""
    chance = random.Random(seed)
    dialogues = [Dialogue(chance, turns, with_image) for turns, with_image in ((1, True), (3, True), (2, False))]
    left = [chance.randint(1, 3), 0, chance.randint(1, 3)]
    length = max(n + len(d.ids) for n, d in zip(left, dialogues, strict=True)) + 2  # padding on both sides
    ids_BT = padded([d.ids for d in dialogues], left, length, 0)
    real_BT = padded([[1] * len(d.ids) for d in dialogues], left, length, 0)
    labels_BT = padded(
        [[golden.IGNORED if token is None else token for token in d.labels] for d in dialogues],
        left,
        length,
        golden.IGNORED,
    )
    segments_BT = segments_from_ids(ids_BT, real_BT, (IMAGE,), MARKERS)
    assert torch.equal(segments_BT, padded([d.segments for d in dialogues], left, length, PADDING))

    model = random_model(seed, routed_layers)
    temperature, bias = chance.uniform(0.5, 2), chance.uniform(-0.5, 0.5)
    context = RoutingContext.from_segments(
        segments_BT,
        gate=GateSettings("softmax", temperature=temperature, bias=bias),
        layout=layout,
        last_routed=routed_layers[-1],
    )
    states: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, args, output: states.append(output)) for layer in model.model.layers]
    logits = model(
        input_ids=ids_BT,
        attention_mask=real_BT,
        position_ids=(real_BT.cumsum(1) - 1).masked_fill(real_BT == 0, 1),  # padding stands elsewhere, as in generate
        routing=context,
        use_cache=False,
    ).logits
    for hook in hooks:
        hook.remove()
    skips = torch.stack([context.weights[index][:, 1:, 1] for index in routed_layers])
    cross_entropy = cross_entropy_per_example(logits, labels_BT)
    skip_rate = skip_rate_per_example(skips, context.valid_BQ)
    losses = roe_loss(cross_entropy, skip_rate, 0.5)
    losses.sum().backward()

    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    shape = twin.Shape(**(vars(SHAPE) | {"routed_layers": routed_layers}))
    twin_losses = []
    for row, (n, dialogue) in enumerate(zip(left, dialogues, strict=True)):
        result = twin.train(
            weights, shape, dialogue.places, dialogue.ids, dialogue.labels, temperature, bias, target=0.5
        )
        here, turns = slice(n, n + len(dialogue.ids)), dialogue.places[-1].turn
        for index in range(SHAPE.num_layers):
            close(states[index][row, here], torch.stack(result.states[index + 1]))
            if index <= routed_layers[-1]:
                close(context.tokens[index][row, : turns + 1], torch.stack(result.routing[index]))
        for index in routed_layers:
            close(context.logits[index][row, :turns], torch.stack(result.router_logits[index]))
            close(context.weights[index][row, : turns + 1], torch.stack(result.weights[index]))
        close(logits[row, here], torch.stack(result.logits))
        close(cross_entropy[row], result.cross_entropy)
        close(skip_rate[row], result.skip_rate)
        close(losses[row], result.loss)
        twin_losses.append(result.loss)
    sum(twin_losses).backward()
    for name, weight in model.named_parameters():
        close(weight.grad, weights[name].grad, msg=lambda text, name=name: f"{name}: {text}")
