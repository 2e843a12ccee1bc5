"""Pruning picture tokens (after FastV): what stays, what is computed, and what it is worth."""

import pytest
import torch

from routing_experts.errors import ConfigError
from routing_experts.evaluation.pruning import TokenPruner, share_for
from routing_experts.models.families import family_of
from tiny import GREEDY, IMAGE, NUM_LAYERS, batch_of, for_generate, prompt, route_everywhere, tiny_llava

AFTER = 2


def masked_twin(model, batch, pruner_share, tokens):
    """The textbook: nothing leaves, but from layer K on nobody sees the pruned picture tokens. One row."""
    ids = batch["input_ids"]
    layers = family_of(model).decoder_layers(model)
    found = {}

    def watch(module, args, kwargs):
        if args[0].shape[1] > 1:
            found["normed"] = module.input_layernorm(args[0])
            found["rotary"] = kwargs["position_embeddings"]

    def blind(module, args, kwargs):
        hidden = args[0]
        if hidden.shape[1] > 1 and "hidden_keys" not in found:
            found["hidden_keys"] = lowest(layers[AFTER - 1].self_attn, found, ids[0] == IMAGE, pruner_share)
        held = kwargs["past_key_values"].get_seq_length()
        visible = torch.ones(hidden.shape[1], held, dtype=torch.bool).tril(held - hidden.shape[1])
        visible[:, found["hidden_keys"]] = False
        if hidden.shape[1] > 1:  # what nobody else sees may see itself: an empty softmax would be NaN
            visible[found["hidden_keys"], found["hidden_keys"]] = True
        return args, kwargs | {"attention_mask": visible[None, None]}

    def lowest(attention, found, is_image, share):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

        shape = (*found["normed"].shape[:-1], -1, attention.head_dim)
        query = attention.q_proj(found["normed"]).view(shape).transpose(1, 2)
        key = attention.k_proj(found["normed"]).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *found["rotary"])
        key = repeat_kv(key, attention.num_key_value_groups)
        weights = (query[0, :, -1:] @ key[0].transpose(1, 2) * attention.scaling).softmax(-1).mean((0, 1))
        pictures = is_image.nonzero()[:, 0]
        count = round(share * len(pictures))
        return pictures[weights[pictures].argsort()[:count]]

    hooks = [layers[AFTER - 1].register_forward_pre_hook(watch, with_kwargs=True)]
    hooks += [layer.register_forward_pre_hook(blind, with_kwargs=True) for layer in list(layers)[AFTER:]]
    try:
        return model.generate(**batch, **(GREEDY | {"max_new_tokens": tokens, "min_new_tokens": tokens}))
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("seed", range(6))
def test_pruned_tokens_are_unseen_and_nothing_else_changes(seed):
    model = tiny_llava(dtype=torch.float64)
    batch = for_generate(batch_of([prompt(seed, images=2, words=5)], dtype=torch.float64))
    with TokenPruner(model, 0.5, AFTER).pruned():
        got = model.generate(**batch, **GREEDY)
    assert torch.equal(got, masked_twin(model, batch, 0.5, 5))


def test_the_choice_changes_the_answer_and_leaves_no_trace():
    model = tiny_llava(dtype=torch.float64)
    batch = batch_of([prompt(seed, images=2) for seed in range(4)], dtype=torch.float64)
    with torch.no_grad():
        before = model(**batch).logits[:, -1]
        with TokenPruner(model, 0.75, AFTER).pruned():
            during = model(**batch).logits[:, -1]
        assert not torch.allclose(before, during, atol=1e-3)
        assert torch.equal(model(**batch).logits[:, -1], before)


def test_no_share_is_the_dense_model():
    model = tiny_llava(dtype=torch.float64)
    batch = for_generate(batch_of([prompt(s, words=s + 2) for s in range(4)], dtype=torch.float64))
    pruner = TokenPruner(model, 0.0, AFTER)
    with pruner.pruned():
        assert torch.equal(model.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))
    assert torch.equal(model.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))
    assert pruner.left_out == [0.0] * 8


@pytest.mark.parametrize("share", [0.3, 0.75, 1.0])
def test_a_row_of_a_batch_gets_what_it_gets_alone(share):
    """Contract 3: rows with and without pictures, of any length, some of them equally long."""
    model = tiny_llava(dtype=torch.float64)
    prompts = [prompt(seed, images=seed % 3, words=words) for seed, words in enumerate((3, 7, 2, 6, 10, 3, 11))]
    together = TokenPruner(model, share, AFTER)
    with together.pruned():
        got = model.generate(**for_generate(batch_of(prompts, dtype=torch.float64)), **GREEDY)[:, -5:]
    alone = TokenPruner(model, share, AFTER)
    for row, one in enumerate(prompts):
        with alone.pruned():
            only = model.generate(**for_generate(batch_of([one], dtype=torch.float64)), **GREEDY)[:, -5:]
        assert torch.equal(got[row], only[0]), row
    assert together.left_out == pytest.approx(alone.left_out)


def test_later_layers_are_called_with_fewer_tokens():
    """Guards measured speed: a mask alone would save nothing."""
    model = tiny_llava()
    lengths = []
    layers = family_of(model).decoder_layers(model)
    pruner = TokenPruner(model, 0.5, AFTER)
    with pruner.pruned(), torch.no_grad():
        hooks = [
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: lengths.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
            )
            for layer in layers
        ]
        batch = batch_of([prompt(1, images=2, words=4)])
        cache = model(**batch, use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    whole = batch["input_ids"].shape[1]
    assert lengths == [whole] * AFTER + [whole - 4] * (NUM_LAYERS - AFTER)
    assert [layer.get_seq_length() for layer in cache.layers] == lengths
    assert pruner.left_out == pytest.approx([4 / whole * (NUM_LAYERS - AFTER) / NUM_LAYERS])


def test_the_share_for_a_rate():
    assert share_for(0.2, [0.5, 0.0, 1.0], 10, 2) == pytest.approx(0.5)
    with pytest.raises(ConfigError, match=r"all of them make 40.0%"):
        share_for(0.45, [0.5], 10, 2)


@pytest.mark.parametrize(
    ("settings", "message"), [({"share": 1.2}, "from 0 to 1"), ({"share": 0.5, "after": 5}, "behind layer 1 to 4")]
)
def test_what_cannot_be_pruned_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TokenPruner(tiny_llava(), **settings)
    with pytest.raises(ConfigError, match="routed model"):
        TokenPruner(route_everywhere(tiny_llava()), 0.5)
