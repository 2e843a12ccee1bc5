"""The other way to save: visual tokens that get little attention leave after a few layers, for a model that runs all.

After Chen et al., "An Image is Worth 1/2 Tokens After Layer 2" (FastV, ECCV 2024): in the last of the first K layers,
each picture token is scored by the attention that the prompt's last token pays it, averaged over heads; those of the
lowest scores are gone from layer K on, and from its caches. Nothing is trained for it.

Really gone: later layers are called with fewer tokens, so that what is measured is what is saved.

Shapes: B rows, T prompt tokens, N of them left after pruning (the longest row's), H heads, S keys and values held.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from routing_experts.errors import ConfigError
from routing_experts.evaluation.questions import BATCH_SIZE, Question, records_of
from routing_experts.inference.generate import prompt_batches
from routing_experts.models.attention import AttendingMask
from routing_experts.models.convert import is_routed
from routing_experts.models.families import family_of

AFTER = 2  # K, the paper's


class TokenPruner:
    """Prunes the picture tokens of each prompt that a dense model is given, while ``pruned`` holds.

    Args:
        model: dense, with SDPA attention.
        share: of each row's picture tokens that leave.
        after: K, the layers that see them all.
    """

    def __init__(self, model: Any, share: float, after: int = AFTER) -> None:
        if is_routed(model):
            raise ConfigError("pruning tokens of a routed model: this control is for models that run all layers.")
        if not 0 <= share <= 1:
            raise ConfigError(f"share={share} of the picture tokens to prune: it lies from 0 to 1.")
        self.layers = list(family_of(model).decoder_layers(model))
        if not 1 <= after < len(self.layers):
            raise ConfigError(f"after={after}: tokens leave behind layer 1 to {len(self.layers) - 1}.")
        self.model, self.share, self.after = model, share, after
        self.left_out: list[float] = []
        self._image_BT = self._real_BT = self._index_BN = self._valid_BN = torch.empty(0)
        self._scores_BT = torch.empty(0)

    @contextmanager
    def pruned(self) -> Iterator["TokenPruner"]:
        """Within, every call of the model prunes; ``left_out`` gathers each row's share of the prefill's work."""
        score = self.layers[self.after - 1].register_forward_pre_hook(self._watch, with_kwargs=True)
        hooks = [layer.register_forward_pre_hook(self._shorten, with_kwargs=True) for layer in self._later]
        whole = self.model.register_forward_pre_hook(self._see, with_kwargs=True)
        try:
            yield self
        finally:
            for hook in (whole, score, *hooks):
                hook.remove()

    @property
    def _later(self) -> Sequence[nn.Module]:
        return self.layers[self.after :]

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A prompt comes: which of its tokens are pictures', which are real."""
        ids = kwargs["input_ids"]
        if ids.shape[1] == 1:
            return
        mask = kwargs.get("attention_mask")
        self._real_BT = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self._image_BT = _are_images(self.model, ids) & self._real_BT
        self._index_BN = torch.empty(0)

    def _watch(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """The layer whose attention scores the tokens, at prefill."""
        if _hidden(args, kwargs).shape[1] == 1:
            return None
        return args, kwargs | {"attention_mask": _ScoringMask(kwargs.get("attention_mask"), self)}

    def note(self, weights_BHS: Tensor) -> None:
        """The last token's attention in the scoring layer."""
        self._scores_BT = weights_BHS.mean(1)

    def _shorten(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A later layer's call: at the first of them tokens leave; its mask and positions follow, as all others' do."""
        hidden = _hidden(args, kwargs)
        given = dict(kwargs)
        decodes = hidden.shape[1] == 1
        if not decodes and not self._index_BN.numel():
            self._choose()
        if decodes:
            given["attention_mask"] = self._decoding_mask(kwargs.get("attention_mask"), kwargs["past_key_values"])
            return args, given
        index_BN = self._index_BN
        given["attention_mask"] = self._prefill_mask(kwargs.get("attention_mask"))
        if kwargs.get("position_embeddings") is not None:
            given["position_embeddings"] = tuple(_taken(part, index_BN) for part in kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None:
            given["position_ids"] = kwargs["position_ids"].expand(len(index_BN), -1).gather(1, index_BN)
        if module is self._later[0]:
            hidden = _taken(hidden, index_BN)
        if "hidden_states" in given:
            return args, given | {"hidden_states": hidden}
        return (hidden, *args[1:]), given

    def _choose(self) -> None:
        """Which positions stay: all but each row's picture tokens of the lowest scores, in their order."""
        real, image = self._real_BT, self._image_BT
        counts = (image.sum(1) * self.share).round().long()
        rank = self._scores_BT.masked_fill(~image, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
        stays = real & ~(image & (rank < counts[:, None]))
        length = int(stays.sum(1).max())
        order = stays.int().argsort(dim=1, stable=True)[:, -length:]  # what stays comes last, in its order
        self._index_BN = order
        self._valid_BN = stays.gather(1, order)
        layers = len(self.layers)
        share_B = counts / real.sum(1) * (layers - self.after) / layers
        self.left_out += share_B.tolist()

    def _prefill_mask(self, mask: Tensor | None) -> Tensor | None:
        index, valid = self._index_BN, self._valid_BN
        if mask is None and bool(valid.all()):
            return None
        size = index.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool, device=index.device).tril()
        seen = causal & valid[:, None, None, :]
        return seen | torch.eye(size, dtype=torch.bool, device=index.device)  # no row of the softmax may be empty

    def _decoding_mask(self, mask: Tensor | None, cache: Any) -> Tensor | None:
        """Of the keys that the layer holds: those that stayed, and all that came since."""
        if mask is None and bool(self._valid_BN.all()):
            return None
        since = cache.get_seq_length() - self._real_BT.shape[1]  # the first layer's, which has the new token already
        came = self._valid_BN.new_ones(len(self._valid_BN), since)
        return torch.cat([self._valid_BN, came], dim=1)[:, None, None, :]


class _ScoringMask(AttendingMask):
    """Attends as under the given mask, and notes what the last token looks at."""

    def __init__(self, base_mask: Tensor | None, pruner: TokenPruner) -> None:
        self.base_mask, self.pruner = base_mask, pruner

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **settings: Any) -> Tensor:
        """SDPA, with its keywords."""
        base = self.base_mask
        groups = query.shape[1] // key.shape[1]
        keys = key.repeat_interleave(groups, dim=1)
        scale = settings.get("scale") or query.shape[-1] ** -0.5
        logits_BHS = torch.einsum("bhd,bhsd->bhs", query[:, :, -1].float(), keys.float()) * scale
        if base is not None:
            logits_BHS = logits_BHS.masked_fill(~base[..., -1, :].bool(), -torch.inf)
        self.pruner.note(logits_BHS.softmax(-1))
        return scaled_dot_product_attention(query, key, value, attn_mask=base, is_causal=base is None, **settings)


def image_shares(
    model: Any, processor: Any, questions: Sequence[Question], prompt_format: str = "chat_template"
) -> list[float]:
    """Of each question's prompt, the share of tokens that are pictures'."""
    shares: list[float] = []
    for batch in prompt_batches(model, processor, records_of(questions), BATCH_SIZE, prompt_format):
        shares += (_are_images(model, batch["input_ids"]).sum(1) / batch["attention_mask"].sum(1)).tolist()
    return shares


def share_for(rate: float, image_shares: Sequence[float], num_layers: int, after: int = AFTER) -> float:
    """The share of picture tokens to prune so that prompts leave out that much of their prefill, on average.

    Args:
        rate: share of all pairs of a prompt's token and a decoder layer.
        image_shares: of each prompt's tokens, how many are pictures'.
        num_layers: L.
        after: K.

    Raises:
        ConfigError: if pruning all of them saves less.
    """
    most = sum(image_shares) / len(image_shares) * (num_layers - after) / num_layers
    if rate > most:
        raise ConfigError(
            f"leaving out {rate:.1%} of the prefill by pruning picture tokens after layer {after}: all of them make "
            f"{most:.1%}. Ask for less."
        )
    return rate / most


def _are_images(model: Any, ids_BT: Tensor) -> Tensor:
    """Which tokens stand for pieces of pictures."""
    images = torch.tensor(list(family_of(model).image_token_ids(model.config)), device=ids_BT.device)
    return torch.isin(ids_BT, images)


def _hidden(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _taken(tensor_BTD: Tensor, index_BN: Tensor) -> Tensor:
    """Rows' positions, by index."""
    spread = tensor_BTD.expand(len(index_BN), -1, -1)
    return spread.gather(1, index_BN[..., None].expand(-1, -1, spread.shape[-1]))
