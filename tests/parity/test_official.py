"""Parity with the authors' code: what it computed on a tiny random model, and our routed layer must compute too.

Fed with the recorded weights, inputs, masks and positions, training (router, gate, mix, adapter, loss, gradients) and
prefill must give the recorded numbers. Our own masks and positions are tested in ``test_own_masks.py``.
"""

import functools
import os
from types import SimpleNamespace

import golden
import pytest
import torch
from torch import Tensor

from routing_experts.models import mixing
from routing_experts.models.cache import RoutedCache
from routing_experts.models.context import RoutingContext
from routing_experts.nn import gates
from routing_experts.nn.gates import GateSettings, gate_weights
from routing_experts.nn.losses import cross_entropy_per_example, roe_loss, skip_rate_per_example

RECORDING = golden.load()
RUNS = sorted(RECORDING.facts["runs"])
DRAWN = [run for run in RUNS if RECORDING.facts["runs"][run]["training_stage"] == 0]
LOGGED = [run for run in RUNS if run not in DRAWN]
PROMPTS = RECORDING.names("infer")

close = functools.partial(torch.testing.assert_close, rtol=5e-5, atol=5e-5)
close_loss = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)


def settings_of(run: str) -> GateSettings:
    """The softmax gate of a recorded run; draws are sharpened by multiplying, which is a small temperature."""
    said = RECORDING.facts["runs"][run]
    temperature = said["temp"] if "temp" in said else 1 / said["sharpness"]
    return GateSettings("softmax", temperature=temperature, bias=said["bias"])


def recorded(run: str) -> dict[str, Tensor]:
    return RECORDING.group(run)


def forward(model, inputs: golden.Inputs, context: RoutingContext, cache=None) -> SimpleNamespace:
    """Runs the model; per layer, what enters it and what leaves the last, in the recording's order."""
    states: list[Tensor] = []
    layers = model.model.layers
    hooks = [
        layers[0].register_forward_pre_hook(lambda module, args, kwargs: states.append(args[0]), with_kwargs=True),
        *(layer.register_forward_hook(lambda module, args, output: states.append(output)) for layer in layers),
        model.model.norm.register_forward_hook(lambda module, args, output: states.append(output)),
    ]
    logits = model(
        inputs_embeds=inputs.embeddings(model),
        attention_mask=inputs.ordinary_mask(model),
        position_ids=inputs.positions_BN[:, inputs.num_routing :],
        routing=context,
        past_key_values=cache,
        use_cache=cache is not None,
    ).logits
    for hook in hooks:
        hook.remove()
    return SimpleNamespace(model=model, inputs=inputs, context=context, cache=cache, logits=logits, states=states)


def train(run: str, layout: str, attention: str, gate: GateSettings) -> SimpleNamespace:
    """One recorded training step through our layers, our losses and backward."""
    inputs = golden.training_inputs(RECORDING, run.rsplit(".", 1)[0])
    model = golden.build_model(RECORDING, attention).train()
    context = RoutingContext(
        inputs.visible_BRK,
        inputs.turns_BT,
        inputs.valid_BQ,
        torch.zeros(len(inputs.ids_BT), dtype=torch.int64),
        gate=gate,
        rotary=inputs.rotary(model),
        layout=layout,
    )
    out = forward(model, inputs, context)
    out.weights = torch.stack([context.weights[index] for index in range(RECORDING.num_layers)])
    out.ce = cross_entropy_per_example(out.logits, inputs.labels_BT)
    out.skip_rate = skip_rate_per_example(out.weights[:, :, 1:, 1], inputs.valid_BQ)
    out.per_example = roe_loss(out.ce, out.skip_rate, model.roe_config.target_skip_ratio)
    out.loss = out.per_example.mean()
    out.loss.backward()
    return out


@functools.cache
def trained(run: str, layout: str, attention: str) -> SimpleNamespace:
    """A recorded step through the softmax gate; where the authors drew, their draws stand in for router logits."""
    with pytest.MonkeyPatch.context() as patch:
        if run in DRAWN:
            draws = iter(recorded(run)["random_draws"])
            patch.setattr(mixing, "router_logits", lambda normed, router: next(draws))
        return train(run, layout, attention, settings_of(run))


every_run = pytest.mark.parametrize("run", RUNS)
every_layout = pytest.mark.parametrize(
    ("layout", "attention"), [(layout, kind) for layout in ("two_call", "fused") for kind in ("sdpa", "eager")]
)
shipped = pytest.mark.skipif("ROE_GOLDEN_DIR" in os.environ, reason="of the recording that ships with the tests")


def test_recording_holds_something():
    assert RUNS or PROMPTS


@shipped
def test_recording_covers_all_stages_and_several_routes():
    """Otherwise a model that never asks its routers, or a gate of one kind, would pass."""
    assert {said["training_stage"] for said in RECORDING.facts["runs"].values()} == {0, 1, 2}
    assert len({tuple(RECORDING.tensors[f"infer.{name}.keep"].tolist()) for name in PROMPTS}) > 2


@pytest.mark.parametrize("batch", sorted({run.rsplit(".", 1)[0] for run in RUNS}))
def test_inputs_are_the_recorded_ones(batch):
    """Expansion, embeddings, visibility and turn weights that the tests derive equal those that were recorded."""
    tensors, inputs = RECORDING.group(batch), golden.training_inputs(RECORDING, batch)
    if "inputs_embeds" in tensors:
        embedded = inputs.embeddings(golden.build_model(RECORDING))
        assert torch.equal(embedded, tensors["inputs_embeds"][:, inputs.num_routing :])
    if "prep.labels" in tensors:
        assert torch.equal(inputs.labels_BT, tensors["prep.labels"][:, inputs.num_routing :])
    if "visible" in tensors:
        derived = golden.training_visibility(inputs.question_BRN, inputs.real_BT)
        assert torch.equal(derived, tensors["visible"].bool())
        assert torch.equal(derived, tensors["attention_mask_final"] == 0)
    if "turn_weight" in tensors:
        valid = inputs.valid_BQ.float()
        close(valid / valid.sum(1, keepdim=True), tensors["turn_weight"][:, 1:, 0])


@every_layout
@pytest.mark.parametrize("run", LOGGED)
def test_router_logits(run, layout, attention):
    out = trained(run, layout, attention)
    ours = torch.stack([out.context.logits[index] for index in range(RECORDING.num_layers)])
    valid = out.inputs.valid_BQ
    close(ours[:, valid], recorded(run)["router_logits"][:, valid])


@every_layout
@every_run
def test_routing_weights(run, layout, attention):
    out = trained(run, layout, attention)
    present = torch.cat([torch.ones_like(out.inputs.valid_BQ[:, :1]), out.inputs.valid_BQ], 1)
    close(out.weights[:, present], recorded(run)["routing_weights"][:, present])


@every_layout
@every_run
def test_hidden_states(run, layout, attention):
    out, expected = trained(run, layout, attention), recorded(run)
    if "hidden_states" not in expected:
        pytest.skip("recorded without hidden states")
    num_routing, real = out.inputs.num_routing, out.inputs.real_BT
    present = torch.cat([torch.ones_like(out.inputs.valid_BQ[:, :1]), out.inputs.valid_BQ], 1)
    for index, wanted in enumerate(expected["hidden_states"]):
        close(out.states[index][real], wanted[:, num_routing:][real])
        close(out.context.tokens[index][present], wanted[:, :num_routing][present])
    close(out.states[-1][real], expected["final_hidden"][:, num_routing:][real])


@every_layout
@every_run
def test_logits_and_losses(run, layout, attention):
    out, expected = trained(run, layout, attention), recorded(run)
    predicts = out.inputs.labels_BT[:, 1:] != golden.IGNORED
    assert predicts.any()
    ordinary = expected["logits"][:, out.inputs.num_routing :]
    close(out.logits[:, :-1][predicts], ordinary[:, :-1][predicts])
    close_loss(out.ce, expected["ce"])
    close_loss(out.skip_rate, expected["skip_ratio"])
    close_loss((RECORDING.target - out.skip_rate).clamp_min(0), expected["skip_hinge"])
    close_loss(out.per_example, expected["per_example_loss"])
    close_loss(out.loss, expected["loss"][0])


@every_layout
@every_run
def test_gradients(run, layout, attention):
    """Of all that was recorded: whole gradients of the RoE parts and the image features, norms of everything."""
    out = trained(run, layout, attention)
    batch, stage = run.rsplit(".", 1)
    norms = RECORDING.facts["scalars"].get(batch, {}).get(stage, {}).get("grad_norms", {})
    whole = {name.removeprefix("grad."): v for name, v in recorded(run).items() if name.startswith("grad.")}
    if not norms and not whole:
        pytest.skip("recorded without gradients")

    def ours(name: str) -> Tensor:
        part = out.inputs.features if name == "image_features" else golden.parameter(out.model, name)
        grad = part.grad if name == "image_features" else golden.gradient(out.model, name)
        return torch.zeros_like(part) if grad is None else grad

    for name, wanted in whole.items():
        close(ours(name), wanted, msg=lambda text, name=name: f"{name}: {text}")
    for name, wanted in norms.items():
        close(float(ours(name).norm()), wanted or 0.0, msg=lambda text, name=name: f"{name}: {text}")


def draws_are_decisive(run: str) -> bool:
    """Whether the authors' softmax of sharpened draws came out one-hot; it is soft where two draws nearly tie."""
    weights = recorded(run)["routing_weights"]
    return bool((weights.amax(-1) > 1 - 1e-6).all())


@pytest.mark.parametrize("run", DRAWN)
def test_random_gate_arithmetic(run, monkeypatch):
    """Our random gate takes the larger draw where the authors sharpen a softmax: one decision, context included."""
    inputs = golden.training_inputs(RECORDING, run.rsplit(".", 1)[0])
    gate = GateSettings("random", bias=RECORDING.facts["runs"][run]["bias"])
    for draws, wanted in zip(recorded(run)["random_draws"], recorded(run)["routing_weights"], strict=True):
        monkeypatch.setattr(gates, "uniform", lambda *coordinates, draws=draws: draws)
        ours = gate_weights(gate, torch.zeros_like(draws), inputs.valid_BQ, torch.arange(len(draws)), 0)
        decided = wanted.amax(-1) > 0.5 + 1e-3
        assert torch.equal(ours[decided], wanted[decided].round())


@every_layout
@pytest.mark.parametrize("run", DRAWN)
def test_random_gate_in_the_mix(run, layout, attention, monkeypatch):
    """The stage as we run it, without routing tokens: the authors' move nothing then, since nobody reads them."""
    if not draws_are_decisive(run):
        pytest.skip("recorded draws nearly tie: the authors' weights are soft there, ours one-hot")
    expected, draws = recorded(run), recorded(run)["random_draws"]
    monkeypatch.setattr(gates, "uniform", lambda seed, step, keys, layer, turns: draws[layer])
    out = train(run, layout, attention, GateSettings("random", bias=RECORDING.facts["runs"][run]["bias"]))
    assert not out.context.tokens
    close_loss(out.ce, expected["ce"])
    close_loss(out.skip_rate, expected["skip_ratio"])
    close_loss(out.loss, expected["loss"][0])
    for name in (name for name in expected if name.startswith("grad.layers.")):
        grad = golden.gradient(out.model, name.removeprefix("grad."))
        close(torch.zeros_like(expected[name]) if grad is None else grad, expected[name])


def exchange_routers(model, tensors: dict[str, Tensor]) -> None:
    """Some prompts were recorded with another router in a layer: ``router_layer0``."""
    for name, value in tensors.items():
        if name.startswith("router_layer"):
            golden.parameter(model, f"layers.{name.removeprefix('router_layer')}.router").data.copy_(value)


def prefill(name: str, layout: str, attention: str, cache: bool = False) -> SimpleNamespace:
    inputs = golden.prompt_inputs(RECORDING, name)
    model = golden.build_model(RECORDING, attention).eval()
    exchange_routers(model, RECORDING.group("infer." + name))
    context = RoutingContext(
        inputs.visible_BRK,
        inputs.turns_BT,
        inputs.valid_BQ,
        torch.zeros(1, dtype=torch.int64),
        rotary=inputs.rotary(model),
        layout=layout,
    )
    with torch.no_grad():
        return forward(model, inputs, context, RoutedCache(model.config) if cache else None)


@every_layout
@pytest.mark.parametrize("name", PROMPTS)
def test_prefill(name, layout, attention):
    """Decisions, router logits, every layer's states and the logits of each recorded prompt, decided hard."""
    out, expected = prefill(name, layout, attention), RECORDING.group("infer." + name)
    num_routing = out.inputs.num_routing
    layers = range(RECORDING.num_layers)
    assert torch.equal(torch.stack([out.context.keep[index][0] for index in layers]), expected["keep"].bool())
    close(torch.stack([out.context.logits[index][0, -1] for index in layers]), expected["router_logits"])
    for index, wanted in enumerate(expected["prefill_hidden_states"]):
        close(out.states[index][0], wanted[num_routing:])
        close(out.context.tokens[index][0], wanted[:num_routing])
    close(out.logits[0], expected["prefill_logits"][num_routing:])
    if "tokens" in expected:
        assert out.logits[0, -1].argmax() == expected["tokens"][0]


def remember_routing_tokens(out: SimpleNamespace, cache: RoutedCache) -> None:
    """Puts the routing tokens' keys and values into the layers that ran, as the authors' cache holds them."""
    cos, sin = (table[:, None] for table in out.inputs.rotary(out.model))
    for index, layer in enumerate(out.model.model.layers):
        slot = cache.layers[index]
        slot.length += out.inputs.num_routing
        if not slot.any_keep:
            continue
        normed = layer.input_layernorm(out.context.tokens[index])
        keys, values = (
            projection(normed).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        halves = keys.chunk(2, -1)
        keys = keys * cos + torch.cat([-halves[1], halves[0]], -1) * sin
        slot.inner.update(keys, values)


@every_layout
@pytest.mark.parametrize("name", [name for name in PROMPTS if f"infer.{name}.step_logits" in RECORDING.tensors])
def test_decoding(name, layout, attention):
    """Our decoding steps give the authors' once their cache's oddity, routing tokens that stay, is added to ours."""
    out, expected = prefill(name, layout, attention, cache=True), RECORDING.group("infer." + name)
    cache = out.cache
    with torch.no_grad():
        remember_routing_tokens(out, cache)
        for step, position in enumerate(expected["decode_position_ids"], start=1):
            token = expected["tokens"][step - 1].view(1, 1)
            logits = out.model(token, position_ids=position.view(1, 1), past_key_values=cache, use_cache=True).logits
            close(logits[0, -1], expected["step_logits"][step])
            assert logits[0, -1].argmax() == expected["tokens"][step]
