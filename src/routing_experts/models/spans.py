"""Which tokens belong to the context, to each question and to each answer. Training and inference both ask here.

A *segment id* a token: 0 context, ``2q - 1`` question q, ``2q`` answer q (q from 1), -1 padding. The context is
everything through the last image of the first user turn; without a picture it is the system prompt, or BOS alone.
Question q runs from the end of the previous answer to the end of its generation prompt; answer q follows, its
end-of-answer token included. See ``design.md``'s rule that a routing token never sees generated or scored tokens.

Shapes: B examples, T tokens.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from routing_experts.config import TurnMarkers

CONTEXT = 0
PADDING = -1


def question_segment(turn: int) -> int:
    """The segment id of question ``turn``, counted from 1."""
    return 2 * turn - 1


def answer_segment(turn: int) -> int:
    """The segment id of the answer to question ``turn``, counted from 1."""
    return 2 * turn


def turns_of(segment_ids: Tensor) -> Tensor:
    """The turn that a token's routing weights come from: 0 context, q for question and answer q, -1 padding."""
    return torch.where(segment_ids < 0, segment_ids, (segment_ids + 1) // 2)


def segments_from_ids(
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None,
    image_token_ids: Collection[int],
    markers: TurnMarkers | None,
) -> Tensor:
    """Finds the segments of a prompt or a whole dialogue from its token ids alone.

    Args:
        input_ids_BT: left- or right-padded ids, image tokens expanded.
        attention_mask_BT: 1 for real tokens; None where nothing is padding.
        image_token_ids: ids that stand for visual features.
        markers: how this model's prompts mark their turns. Without them all that follows the context is one
            question, which is right for dialogues of one turn.

    Returns:
        Segment ids [B, T], int64.
    """
    real_BT = torch.ones_like(input_ids_BT, dtype=torch.bool)
    if attention_mask_BT is not None:
        real_BT = attention_mask_BT.bool()
    position_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
    nothing_BT = torch.zeros_like(real_BT)
    opens_BT = _ends_of(input_ids_BT, real_BT, markers.generation_prompt) if markers else nothing_BT
    closes_BT = _ends_of(input_ids_BT, real_BT, markers.end_of_answer) if markers else nothing_BT
    users_BT = _ends_of(input_ids_BT, real_BT, markers.user_prompt) if markers else nothing_BT

    answering_BT = _last_before(opens_BT, position_T) > _last_before(closes_BT, position_T)
    opens_BT = opens_BT & ~answering_BT  # an answer that quotes a generation prompt opens no second one
    opened_BT = opens_BT.cumsum(1) - opens_BT.long()  # answers opened strictly before a token
    segment_BT = torch.where(answering_BT, 2 * opened_BT, 2 * opened_BT + 1)

    # The context ends with the last image before the first answer; without one, where the first user turn starts.
    is_image_BT = torch.isin(input_ids_BT, torch.tensor(list(image_token_ids), device=input_ids_BT.device))
    is_image_BT = is_image_BT & real_BT & (opened_BT == 0)
    last_image_B = torch.where(is_image_BT, position_T, -1).amax(1)
    first_real_B = real_BT.int().argmax(1)
    user_length = len(markers.user_prompt) if markers else 0
    first_user_B = torch.where(users_BT, position_T, input_ids_BT.shape[1]).amin(1) - user_length + 1
    has_user_B = users_BT.any(1)
    text_start_B = torch.where(has_user_B & (first_user_B > first_real_B), first_user_B, first_real_B + 1)
    question_start_B = torch.where(last_image_B >= 0, last_image_B + 1, text_start_B)
    segment_BT = torch.where(position_T < question_start_B[:, None], CONTEXT, segment_BT)
    return torch.where(real_BT, segment_BT, PADDING)


def open_history(segment_ids_BT: Tensor) -> Tensor:
    """Makes one question of everything after the context, as the authors' code sees a prompt (preset ``paper``).

    What follows the last question was generated or is scored: it stays an answer, which no routing token sees.
    """
    last_B1 = segment_ids_BT.amax(1, keepdim=True)
    is_last_answer_BT = (segment_ids_BT == last_B1) & (last_B1 > CONTEXT) & (last_B1 % 2 == 0)
    return torch.where(is_last_answer_BT, answer_segment(1), segment_ids_BT.clamp(max=question_segment(1)))


def only_last_question(segment_ids_BT: Tensor) -> Tensor:
    """Whose turn decides at inference: the last question becomes turn 1, earlier turns (history) turn 0's answer side.

    Returns:
        [B, T]: 0 context, 1 last question, 2 whatever follows or precedes it, -1 padding. The routing token of turn 1
        then sees the last question only.
    """
    turns_BT = turns_of(segment_ids_BT)
    last_B1 = turns_BT.amax(1, keepdim=True)
    is_last_BT = (segment_ids_BT == 2 * last_B1 - 1) & (segment_ids_BT > CONTEXT)  # a row may have no question
    other_BT = (segment_ids_BT > CONTEXT) & ~is_last_BT
    last_BT = torch.where(is_last_BT, question_segment(1), segment_ids_BT)
    return torch.where(other_BT, answer_segment(1), last_BT)


def _ends_of(input_ids_BT: Tensor, real_BT: Tensor, pattern: Sequence[int]) -> Tensor:
    """True at the last token of each occurrence of ``pattern`` in real tokens; padding may share ids with it."""
    found_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    length = len(pattern)
    if not length or input_ids_BT.shape[1] < length:
        return found_BT
    wanted = torch.tensor(list(pattern), device=input_ids_BT.device)
    matches = input_ids_BT.unfold(1, length, 1) == wanted
    found_BT[:, length - 1 :] = (matches & real_BT.unfold(1, length, 1)).all(-1)
    return found_BT


def _last_before(mask_BT: Tensor, position_T: Tensor) -> Tensor:
    """The last position strictly before each token where the mask is true, or -1."""
    last_BT = torch.where(mask_BT, position_T, -1).cummax(1).values
    return torch.cat([torch.full_like(last_BT[:, :1], -1), last_BT[:, :-1]], 1)
