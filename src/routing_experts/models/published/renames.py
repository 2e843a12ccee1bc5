"""From names of files to names of a model: anchored rules, and the account that has to come out even."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from routing_experts.errors import CheckpointError
from routing_experts.models.published.tensors import Tensors


@dataclass(frozen=True)
class Rule:
    """What becomes of names that match from their first letter to their last.

    Attributes:
        pattern: a regular expression.
        target: what the name becomes, with ``\\1`` for the first group; None for what is left out.
        why: it is left out.
    """

    pattern: str
    target: str | None
    why: str = ""


@dataclass(frozen=True)
class Part:
    """One folder's share of a model.

    Attributes:
        label: what messages call it.
        tensors: of the folder.
        rules: the first that matches counts.
    """

    label: str
    tensors: Tensors
    rules: tuple[Rule, ...]

    def target_of(self, name: str) -> tuple[bool, str | None]:
        """Whether a rule knows the name, and what it becomes."""
        for rule in self.rules:
            match = re.fullmatch(rule.pattern, name)
            if match is not None:
                return True, None if rule.target is None else match.expand(rule.target)
        return False, None

    def reason_to_leave(self, name: str) -> str | None:
        """Why a tensor is left out; None for all others."""
        rule = next((rule for rule in self.rules if re.fullmatch(rule.pattern, name)), None)
        return rule.why if rule is not None and rule.target is None else None


@dataclass(frozen=True)
class Place:
    """Where a tensor of the model is read from."""

    part: Part
    name: str


def left_out(parts: Iterable[Part]) -> dict[str, int]:
    """How many tensors have no place in the model, by the reason."""
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(why for name in part.tensors.shapes if (why := part.reason_to_leave(name)) is not None)
    return dict(reasons)


def match_names(
    parts: Sequence[Part], wanted: Mapping[str, tuple[int, ...]], causes: Iterable[tuple[str, str]] = ()
) -> dict[str, Place]:
    """Finds every tensor of a model in its parts.

    Args:
        parts: what there is.
        wanted: shapes of the model's tensors, by name.
        causes: regular expressions over names that a file has too many or too few of, and what they suggest.

    Returns:
        The place of each wanted name.

    Raises:
        CheckpointError: if a name of a file has no place in the model, one of the model is found nowhere or twice, or
            shapes differ; all of them are named.
    """
    places: dict[str, Place] = {}
    unexpected, doubled, mismatched = [], [], []
    for part in parts:
        for name, shape in part.tensors.shapes.items():
            known, target = part.target_of(name)
            if known and target is None:
                continue
            if target is None or target not in wanted:
                unexpected.append(name)
            elif target in places:
                doubled.append(f"{name} and {places[target].name}")
            elif shape != wanted[target]:
                mismatched.append(f"{name} {list(shape)}, where {list(wanted[target])} is due")
                places[target] = Place(part, name)
            else:
                places[target] = Place(part, name)
    missing = [name for name in wanted if name not in places]
    faults = {"without a place": unexpected, "found twice": doubled, "of another shape": mismatched, "missing": missing}
    if any(faults.values()):
        raise CheckpointError(_complaint(parts, faults, causes))
    return places


def _complaint(parts: Sequence[Part], faults: Mapping[str, list[str]], causes: Iterable[tuple[str, str]]) -> str:
    told = [f"{kind}: {_all(names)}" for kind, names in faults.items() if names]
    everything = [name for names in faults.values() for name in names]
    likely = next((cause for pattern, cause in causes if any(re.search(pattern, name) for name in everything)), None)
    where = ", ".join(part.label for part in parts)
    return (
        f"{where}: the names and shapes do not come out even with the model that the configuration describes. Tensors "
        + "; ".join(told)
        + f". {likely or 'Give the checkpoint that belongs to this configuration, whole.'}"
    )


def _all(names: list[str]) -> str:
    """Every name; those that differ in one number alone are told once, with all of its values."""
    alike: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for name in names:
        first, space, rest = name.partition(" ")
        pieces = re.split(r"\.(\d+)(?=\.|$)", first)
        alike.setdefault((*pieces[::2], space + rest), []).append(tuple(pieces[1::2]))
    return ", ".join(told for texts, numbers in alike.items() for told in _folded(texts, numbers))


def _folded(texts: tuple[str, ...], numbers: list[tuple[str, ...]]) -> list[str]:
    """One name for all that differ in the same number alone."""
    varying = [place for place, values in enumerate(zip(*numbers, strict=True)) if len(set(values)) > 1]
    if len(varying) > 1:
        by_first: dict[str, list[tuple[str, ...]]] = {}
        for values in numbers:
            by_first.setdefault(values[varying[0]], []).append(values)
        return [told for part in by_first.values() for told in _folded(texts, part)]
    shown = list(numbers[0])
    for place in varying:
        shown[place] = _spans(sorted({int(values[place]) for values in numbers}))
    name = texts[0] + "".join(f".{number}{text}" for number, text in zip(shown, texts[1:-1], strict=True))
    return [name + texts[-1]]


def _spans(numbers: list[int]) -> str:
    """Such as {0-3,7} for 0, 1, 2, 3 and 7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "{" + ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans) + "}"
