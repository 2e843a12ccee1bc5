"""RoEConfig: what is saved beside the weights. Validated when built; no torch.

Source of the method and its names: Wu et al., "Routing Experts", ICLR 2025 (arXiv 2407.14093).
"""

import json
import math
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from routing_experts.errors import CheckpointError, ConfigError, RouteError

CONFIG_NAME = "roe_config.json"
FORMAT_VERSION = 3  # 2 brought budget, 3 router_input and stripped
CONTROL_GATES = ("random", "static")  # they ask no router
GATES = ("softmax", "straight_through", "gumbel_straight_through", *CONTROL_GATES)
SPARSITY_SCOPES = ("example", "run")
ADAPTER_INITS = ("zero", "xavier")
TEXT_SPANS = ("last_question", "history")
ROUTER_INPUTS = ("routing_tokens", "pooled")
LAYOUTS = ("two_call", "fused")
MAX_TARGET = 0.5  # of routed layers: the random routes of the first stage reach no further
BUDGET_GAP = 0.02  # of the skip rate: pairs of a budget further apart are a jump, not a curve


@dataclass(frozen=True)
class TurnMarkers:
    """Token ids by which a prompt format marks its turns; found from the processor, kept with the checkpoint.

    Attributes:
        generation_prompt: what stands before an answer, e.g. the ids of ``ASSISTANT:``.
        end_of_answer: what closes an answer, e.g. the EOS id.
        user_prompt: what opens a user's message; empty if unknown.
    """

    generation_prompt: tuple[int, ...]
    end_of_answer: tuple[int, ...]
    user_prompt: tuple[int, ...] = ()


@dataclass(frozen=True)
class BaseModel:
    """The model that the RoE parts were made for; loading onto another one is refused."""

    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    name_or_path: str = ""
    fingerprint: str = ""


@dataclass
class RoEConfig:
    """The method's settings that belong to a model, as opposed to a training run.

    Attributes:
        target_skip_ratio: ρ, the share of routed layers that the sparsity loss asks to skip; from 0 to 0.5, because the
            warm-up's random routes reach one half at most (b = 1 − √(2ρ) is negative beyond).
        bottleneck_size: K, the adapter's inner width; None for a quarter of the hidden size (paper: 1024 of 4096).
        adapter_init: "zero" makes a fresh skip path an identity; "xavier" is the paper's.
        gate: how training turns router logits into keep and skip weights. Two are controls that ask no router:
            "random" draws routes all through training, "static" skips every routed layer for everyone, always.
        routed_layers: which decoder layers may be skipped; None for all but the first ``num_unrouted_layers``.
        num_unrouted_layers: how many leading layers always run when ``routed_layers`` is None. Layer 0's router sees
            nothing but the routing embeddings, so its decision is the same for every example.
        router_input: what routers read: the states of "routing_tokens", or "pooled" ones: the means of the ordinary
            tokens' states over the same spans, for which nothing travels beside the sequence (an ablation; ours).
        text_span: what the text routing token sees at inference: the last question, or all after the context (paper).
        sparsity_loss_coef: c of the loss.
        sparsity_scope: what has to reach the target: every "example" on its own (the paper), or the mean over the
            "run", so that easy examples may skip more and hard ones less.
        ce_sharpness: α of the loss: examples that are answered badly are asked to skip less.
        routing_token_std: standard deviation of the routing tokens' normal initialisation.
        keep_bias: added to every keep logit at inference; 0 after training, set by calibration. Higher keeps more.
        budget: calibrated pairs (skip rate, keep bias), by which a request may name the share of layers to skip; rates
            are shares of all decoder layers and rise, biases fall. Empty until ``roe calibrate`` traces it.
        layout: how routing tokens travel, in training and at prefill: "two_call" is the bitwise reference, "fused" is
            faster.
        prompt_format: how dialogues are laid out, in training and whenever this library asks: ``chat_template``, or
            ``vicuna_v1``, ``llama_3`` or ``hermes_2``.
        markers: how prompts mark their turns.
        base: the base model; filled in by ``convert``.
        stripped: of a static model, whether the dropped layers' own weights are gone; set by ``roe export --static``.
    """

    target_skip_ratio: float = 0.3
    bottleneck_size: int | None = None
    adapter_init: str = "zero"
    gate: str = "gumbel_straight_through"
    routed_layers: tuple[int, ...] | None = None
    num_unrouted_layers: int = 1
    router_input: str = "routing_tokens"
    text_span: str = "last_question"
    sparsity_loss_coef: float = 1.0
    sparsity_scope: str = "run"
    ce_sharpness: float = 5.0
    routing_token_std: float = 0.02
    keep_bias: float = 0.0
    budget: tuple[tuple[float, float], ...] = ()
    layout: str = "fused"
    prompt_format: str = "chat_template"
    markers: TurnMarkers | None = None
    base: BaseModel | None = None
    stripped: bool = False
    format_version: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        if self.routed_layers is not None:
            self.routed_layers = tuple(self.routed_layers)
        _check_range(
            "target_skip_ratio", self.target_skip_ratio, 0.0, MAX_TARGET, "random warm-up routes cannot skip more"
        )
        _check_choice("adapter_init", self.adapter_init, ADAPTER_INITS)
        _check_choice("gate", self.gate, GATES)
        _check_choice("sparsity_scope", self.sparsity_scope, SPARSITY_SCOPES)
        if self.gate == "static" and not self.routed_layers:
            raise ConfigError(
                "gate='static' without routed_layers: it skips the routed layers for everyone, so they must be named. "
                "Give routed_layers, such as [5, 6, 7]."
            )
        _check_choice("router_input", self.router_input, ROUTER_INPUTS)
        if self.stripped and self.gate != "static":
            raise ConfigError(f"stripped with gate {self.gate!r}: only layers that nobody runs can be gone.")
        _check_choice("text_span", self.text_span, TEXT_SPANS)
        _check_choice("layout", self.layout, LAYOUTS)
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            raise ConfigError(
                f"bottleneck_size={self.bottleneck_size}: the adapter's inner width must be at least 1. "
                "Set a positive number, or leave it out for a quarter of the hidden size."
            )
        if self.num_unrouted_layers < 0:
            raise ConfigError(f"num_unrouted_layers={self.num_unrouted_layers}: it is a count. Set 0 or more.")
        self.budget = _checked_budget(self.budget)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "RoEConfig":
        """The settings of a named preset: ``default``, or ``paper`` (the paper's method to the letter)."""
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r}: the presets are {', '.join(PRESETS)}. Name one of them.")
        return cls(**(PRESETS[name] | overrides))

    def layers_to_route(self, num_layers: int) -> tuple[int, ...]:
        """The routed layers' indices in a model of ``num_layers``, in order.

        Raises:
            ConfigError: if ``routed_layers`` names a layer twice, none, or one that the model lacks.
        """
        if self.routed_layers is None:
            chosen = tuple(range(self.num_unrouted_layers, num_layers))
        else:
            chosen = self.routed_layers
        wrong = [layer for layer in chosen if not 0 <= layer < num_layers]
        if wrong or len(set(chosen)) != len(chosen) or not chosen:
            raise ConfigError(
                f"routed layers {list(chosen)}: the base model has {num_layers} decoder layers, numbered 0 to "
                f"{num_layers - 1}, and each may be named once. "
                + (f"Take out {wrong}." if wrong else "Name at least one layer, each once.")
            )
        return tuple(sorted(chosen))

    def keep_bias_for(self, skip_ratio: float) -> float:
        """The keep bias at which requests skip this share of all decoder layers on average; +inf for 0.

        Raises:
            RouteError: if the model has no budget, the ratio is beyond it, or routers decide so much alike that no
                bias comes near.
        """
        if skip_ratio == 0:
            return math.inf
        if self.gate in CONTROL_GATES:
            raise RouteError(
                f"skip_ratio={skip_ratio} of a model with gate {self.gate!r}: a bias moves what routers decide, and "
                "its were never trained. Pass skip_ratio=0 to run all layers, or give a route."
            )
        if not self.budget:
            raise RouteError(
                f"skip_ratio={skip_ratio} of a model without a budget: nobody has measured which keep bias gives which "
                "rate. Run `roe calibrate MODEL` once, or pass skip_ratio=0 to run all layers."
            )
        most = self.budget[-1][0]
        if not 0 < skip_ratio <= most:
            raise RouteError(
                f"skip_ratio={skip_ratio}: this model's budget was calibrated from 0 to {most:.3f} of all its decoder "
                "layers. Choose a ratio within the range."
            )
        # All layers are kept at +inf, so that the curve begins at rate 0 wherever its first pair stands.
        pairs = ((0.0, math.inf), *self.budget)
        above = bisect_left([rate for rate, _ in pairs], skip_ratio)
        (less, higher), (more, lower) = pairs[above - 1], pairs[above]
        if more - less <= BUDGET_GAP and higher < math.inf:
            return higher + (lower - higher) * (skip_ratio - less) / (more - less)
        nearest, bias = min(pairs[above - 1 : above + 1], key=lambda pair: abs(pair[0] - skip_ratio))
        if abs(nearest - skip_ratio) > BUDGET_GAP:
            raise RouteError(
                f"skip_ratio={skip_ratio}: this model's rate jumps from {less:.3f} to {more:.3f}, since too many of "
                "its routers decide alike at once. Choose a ratio near one of the two."
            )
        return bias

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RoEConfig":
        """The inverse of ``to_dict``; unknown fields and newer formats are refused, not ignored.

        Raises:
            CheckpointError: if the format is newer than this library's.
            ConfigError: if a field is unknown or out of range.
        """
        version = values.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise CheckpointError(
                f"format_version={version!r}: this library reads up to {FORMAT_VERSION}; a newer one wrote the file. "
                "Upgrade routing-experts (pip install -U routing-experts)."
            )
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(
                f"unknown settings {unknown}: RoEConfig has {', '.join(f.name for f in fields(cls))}. "
                "Correct the spelling or remove them."
            )
        values = dict(values) | {"format_version": FORMAT_VERSION}  # what it is saved as from now on
        kinds: dict[str, Any] = {"markers": TurnMarkers, "base": BaseModel}
        for name, kind in kinds.items():
            try:
                inner = values.get(name) and dict(values[name])
                values[name] = inner and kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in inner.items()})
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"{name}={values[name]!r}: {kind.__name__} has {', '.join(f.name for f in fields(kind))}. "
                    "Restore the entry as it was written."
                ) from error
        return cls(**values)

    def save(self, folder: Path) -> None:
        """Writes ``roe_config.json``, whole or not at all."""
        temporary = folder / f".{CONFIG_NAME}.tmp"
        temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / CONFIG_NAME)

    @classmethod
    def load(cls, folder: Path) -> "RoEConfig":
        """Reads ``roe_config.json``.

        Raises:
            CheckpointError: if it is missing, is not JSON, or has a newer format.
        """
        path = folder / CONFIG_NAME
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no {CONFIG_NAME}: a routed model's folder holds one. "
                "Give the folder that `roe train` or `save_pretrained` wrote."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"{path} is not JSON ({error}). Restore it from the training run's folder."
            ) from error
        if not isinstance(values, dict):
            raise CheckpointError(
                f"{path} holds {type(values).__name__}, not settings. Restore it from the training run's folder."
            )
        return cls.from_dict(values)


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "adapter_init": "xavier",
        "gate": "softmax",
        "num_unrouted_layers": 0,
        "sparsity_scope": "example",
        "text_span": "history",
    },
}


def _check_range(name: str, value: float, low: float, high: float, reason: str) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name}={value}: it must lie from {low} to {high}, since {reason}. Set it within the range.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r}: it must be one of {', '.join(choices)}. Correct the spelling.")


def _checked_budget(pairs: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    """The pairs as tuples of floats; ``ConfigError`` unless rates are shares that rise and biases fall."""
    try:
        budget = tuple((float(rate), float(bias)) for rate, bias in pairs)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"budget={pairs!r}: it holds pairs (skip rate, keep bias). Let `roe calibrate` write it."
        ) from error
    for rate, bias in budget:
        if not 0 <= rate <= 1 or not math.isfinite(bias):
            raise ConfigError(
                f"budget pair ({rate}, {bias}): a skip rate is a share from 0 to 1, and its keep bias finite. Let "
                "`roe calibrate` write it."
            )
    for (less, higher), (more, lower) in pairwise(budget):
        if not (less < more and higher > lower):
            raise ConfigError(
                f"budget pairs ({less}, {higher}) and ({more}, {lower}): rates rise and biases fall from pair to pair, "
                "since a lower bias keeps fewer layers. Let `roe calibrate` write it."
            )
    return budget
