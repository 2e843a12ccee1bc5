"""From names of files to names of a model: anchored rules, and the account that has to come out even."""

import re
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


@dataclass(frozen=True)
class Place:
    """Where a tensor of the model is read from."""

    part: Part
    name: str


def account(
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
    """Every name; those that differ in numbers alone are told once, with a star for the number."""
    alike: dict[str, list[str]] = {}
    for name in names:
        first, _, rest = name.partition(" ")
        alike.setdefault(re.sub(r"\d+", "*", first) + (f" {rest}" if rest else ""), []).append(name)
    return ", ".join(
        group[0] if len(group) == 1 else f"{pattern} ({len(group)} of them)" for pattern, group in alike.items()
    )
