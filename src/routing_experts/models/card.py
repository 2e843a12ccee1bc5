"""The model card of a routed folder: what it was made of, how much it skips, how good it is, and how to use it."""

from pathlib import Path

from routing_experts.config import CONFIG_NAME, RoEConfig
from routing_experts.models.families import known_families
from routing_experts.records import STATIC_NAME, Results, StaticExport, write_text

CARD_NAME = "README.md"
_MARK = "<!-- written by routing-experts -->"
_LOADING = (
    "```python",
    "import routing_experts  # lets transformers load routed folders",
    "from transformers import AutoModelForImageTextToText, AutoProcessor",
    "",
    'model = AutoModelForImageTextToText.from_pretrained("this folder")',
    'processor = AutoProcessor.from_pretrained("this folder")',
    "```",
)
_UNKNOWN = "that of the base model and of the training data; it is not recorded here"


def write_card(
    folder: Path, config: RoEConfig, results: Results | None = None, license_name: str | None = None
) -> None:
    """Writes ``README.md`` beside a model; a card that somebody wrote by hand is left alone.

    Args:
        folder: of the model; a static one's ``static.json`` is read.
        config: its settings.
        results: scores, where it was evaluated with this bias.
        license_name: an identifier such as ``apache-2.0``; that of an earlier card stays.
    """
    path, made = folder / CARD_NAME, folder / STATIC_NAME
    if results is not None and results.keep_bias != config.keep_bias:
        results = None  # of the model before it was calibrated anew
    static = StaticExport.load(made) if config.stripped and made.is_file() else None
    if not is_hand_written(path):
        write_text(path, model_card(config, results, license_name or _license_of(path), static))


def is_hand_written(card: Path) -> bool:
    """Whether a card is there that this library did not write."""
    return card.is_file() and _MARK not in card.read_text(encoding="utf-8")


def _license_of(card: Path) -> str | None:
    """The license that an earlier card of ours names."""
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    return next((line.removeprefix("license: ") for line in lines if line.startswith("license: ")), None)


def model_card(
    config: RoEConfig,
    results: Results | None = None,
    license_name: str | None = None,
    static: StaticExport | None = None,
) -> str:
    """The card's text: the hub's front matter, then Markdown."""
    base = config.base.name_or_path if config.base and config.base.name_or_path else "a base model without a name"
    named = bool(config.base and config.base.name_or_path.count("/") == 1 and not base.startswith((".", "/")))
    front = ["---", "library_name: routing-experts", "pipeline_tag: image-text-to-text", "tags: [routing-experts, roe]"]
    front += [f"base_model: {base}"] * named + [f"license: {license_name}"] * bool(license_name) + ["---"]
    license_told = license_name or _UNKNOWN
    if config.stripped:
        body = _static_body(base, config, static, license_told)
    else:
        body = _body(base, config, results, license_told)
    return "\n".join([*front, _MARK, "", *body, ""])


def _body(base: str, config: RoEConfig, results: Results | None, license_told: str) -> list[str]:
    return [
        f"# {base}, with routed decoder layers",
        "",
        "This model decides for every request which of its decoder layers to run. A skipped layer is replaced by a "
        "low-rank adapter and keeps no keys or values (Routing Experts: Wu et al., ICLR 2025, arXiv 2407.14093).",
        "",
        *_facts(base, license_told),
        f"| target of training | {config.target_skip_ratio:.0%} of the routed layers skipped |",
        f"| gate | {config.gate} |",
        f"| keep bias | {config.keep_bias:+.3f} |",
        *([f"| skip ratios a request may ask for | 0 to {config.budget[-1][0]:.1%} |"] if config.budget else []),
        *(_scores(results) if results is not None else ["| scores | not evaluated yet |"]),
        "",
        *_LOADING,
        "",
        f"Opened without `import routing_experts`, {_unrouted(config)}. Routes are set in `{CONFIG_NAME}`; "
        "`roe calibrate` changes how much is skipped. Layers are chosen from the question and the picture: check "
        "accuracy on your own data before you rely on it.",
    ]


def _unrouted(config: RoEConfig) -> str:
    """What transformers alone makes of the folder."""
    family = known_families().get(config.base.model_type) if config.base is not None else None
    if family is not None and family.package:
        return "transformers does not know the model"
    return "the folder is the dense model"


def _facts(base: str, license_told: str) -> list[str]:
    """How the table begins."""
    return ["| | |", "|---|---|", f"| base model | {base} |", f"| license | {license_told} |"]


def _static_body(base: str, config: RoEConfig, static: StaticExport | None, license_told: str) -> list[str]:
    dropped = ", ".join(map(str, config.routed_layers or ()))
    return [
        f"# {base}, without some of its decoder layers",
        "",
        f"Decoder layers {dropped} (counted from 0) are gone for every request; each one's low-rank adapter stands in "
        "its place. They were chosen by what a routed model skipped (Routing Experts: Wu et al., ICLR 2025, arXiv "
        "2407.14093). Nothing is decided any more, and how much is skipped cannot be changed.",
        "",
        *_facts(base, license_told),
        *(_static_scores(static) if static is not None else ["| scores | not evaluated yet |"]),
        "",
        *_LOADING,
        "",
        "Without `import routing_experts` the folder must not be used: transformers would fill the layers that are "
        "gone with random weights. Check accuracy on your own data before you rely on it.",
    ]


def _static_scores(static: StaticExport) -> list[str]:
    return [
        *(f"| right answers, {row.name} | {row.accuracy:.1%} of {static.questions:,} |" for row in static.rows),
        f"| layers gone | {static.rows[-1].skip_rate:.1%} of {len(static.layer_skip_rates)} |",
    ]


def _scores(results: Results) -> list[str]:
    routed, dense = results.routed, results.dense
    return [
        f"| layers skipped | {routed.skip_rate:.1%} of {results.num_layers} |",
        f"| right answers, routed | {routed.accuracy:.1%} of {results.questions:,} |",
        f"| right answers, dense | {dense.accuracy:.1%} ({dense.source}) |",
        f"| right answers, same layers always skipped | {results.static.accuracy:.1%} |",
    ]
