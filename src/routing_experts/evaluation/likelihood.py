"""How likely a model finds given answers, without generating: losses of right answers, choices by likelihood.

A routed model's route is decided by the prompt, as if the answer were still to come.

Shapes: B records, T tokens, P positions that predict some row's answer, L decoder layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from routing_experts.data.collate import Collator
from routing_experts.data.encode import Encoder
from routing_experts.data.records import Record
from routing_experts.errors import RecordError
from routing_experts.inference.generate import NOT_FOR_GENERATE, longest_prompt, to_model
from routing_experts.models.convert import is_routed
from routing_experts.models.model import routing_context
from routing_experts.models.options import RoutingOptions, refuse_for_dense
from routing_experts.nn.losses import IGNORED


@dataclass(frozen=True)
class Likelihood:
    """An answer's likelihood, with the token that closes it.

    Attributes:
        log_probability: of all its tokens, in nats.
        num_tokens: how many they are.
        is_greedy: whether each of them is the likeliest there, given those before.
        route: keep flags of the L layers.
    """

    log_probability: float
    num_tokens: int
    is_greedy: bool
    route: tuple[bool, ...]

    @property
    def loss(self) -> float:
        """The mean negative log-probability of a token."""
        return -self.log_probability / self.num_tokens


def likelihoods(
    model: Any,
    processor: Any,
    records: Sequence[Record],
    batch_size: int = 64,
    options: RoutingOptions | None = None,
    prompt_format: str = "chat_template",
) -> Iterator[Likelihood]:
    """The likelihood of each record's last answer, in order.

    Raises:
        RecordError: if a record's last turn has no answer.
        RouteError: for options that do not fit the model.
    """
    for record in records:
        if not record.turns[-1].answer.strip():
            raise RecordError(f"record {record.id}: an empty answer has no likelihood. Give one.")
    encoder = Encoder(processor, prompt_format, longest_prompt(model))
    collate = Collator(processor.tokenizer.pad_token_id or 0, padding_side="right")
    for start in range(0, len(records), batch_size):
        batch = collate([encoder(record) for record in records[start : start + batch_size]])
        yield from _score(model, batch, options)


@torch.inference_mode()
def _score(model: Any, batch: dict[str, Tensor], options: RoutingOptions | None) -> Iterator[Likelihood]:
    segments_BT = batch["segment_ids"]
    last_B1 = segments_BT.amax(1, keepdim=True)
    answers_BT = (segments_BT == last_B1) & (batch["labels"] != IGNORED)
    predicting_P = answers_BT.any(0).nonzero()[:, 0] - 1  # logits of a whole batch would take gigabytes
    inputs = to_model({n: t for n, t in batch.items() if n not in NOT_FOR_GENERATE}, model)
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    route_BL = torch.ones(len(segments_BT), num_layers, dtype=torch.bool)
    if is_routed(model):
        # As a prompt that waits for its answer: what is scored takes part in the turn, but decides nothing.
        context = routing_context(model, segments_BT.to(model.device), options)
        logits = model(**inputs, routing=context, use_cache=False, logits_to_keep=predicting_P).logits
        for layer, keep_B in context.keep.items():
            route_BL[:, layer] = keep_B
    else:
        refuse_for_dense(options)
        logits = model(**inputs, use_cache=False, logits_to_keep=predicting_P).logits
    for row, answer_T in enumerate(answers_BT):
        where = answer_T.nonzero()[:, 0]
        ids = batch["input_ids"][row, where].to(logits.device)
        kept = torch.searchsorted(predicting_P, where - 1).to(logits.device)
        log_probabilities = logits[row, kept].float().log_softmax(-1)
        yield Likelihood(
            log_probability=float(log_probabilities.gather(1, ids[:, None]).sum()),
            num_tokens=len(ids),
            is_greedy=bool((log_probabilities.argmax(-1) == ids).all()),
            route=tuple(route_BL[row].tolist()),
        )
