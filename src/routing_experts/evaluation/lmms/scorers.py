"""Scorers of our own, where lmms-eval's need a judge behind a network, or the task is ours.

MM-Vet's answers are free text that GPT-4 grades; without a judge its scorer gives 0. What can be told without one is
whether the elements of the ground truth stand in the answer: for short answers nearly the same, for long ones a lower
bound.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from routing_experts.evaluation.scoring import is_right

_WORD = re.compile(r"-?[0-9]+(?:[.,][0-9]+)*|[^\W_]+")


def shown(doc: Mapping[str, Any]) -> list[Any]:
    """A document's picture, if it has one."""
    return [doc["image"].convert("RGB")] if doc.get("image") is not None else []


def asked(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """A document's question, as it stands."""
    return str(doc["question"])


def matched(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The digits' score: exact match, as everywhere in this package."""
    return {"exact_match": float(is_right(results[0], str(doc["answer"])))}


def found(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """MM-Vet's elements that stand in the answer."""
    return {"elements_found": elements_found(results[0], str(doc["answer"]))}


def elements_found(said: str, truth: str) -> float:
    """The share of a ground truth's elements (``<AND>``) that stand in an answer; of alternatives (``<OR>``) the best.

    Words and numbers must match whole, without regard to case and punctuation: "5" does not stand in "15".
    """
    answer = _words(said)
    shares = []
    for alternative in truth.split("<OR>"):
        elements = [_words(element) for element in alternative.split("<AND>")]
        elements = [element for element in elements if element.strip()]
        if elements:
            shares.append(sum(element in answer for element in elements) / len(elements))
    return max(shares, default=0.0)


def _words(text: str) -> str:
    """Words and numbers (with sign and decimals) alone, a space around each."""
    return f" {' '.join(_WORD.findall(text.casefold()))} "
