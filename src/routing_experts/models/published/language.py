"""The language model of a LLaVA in its original layout: Llama's names, at the top level."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from routing_experts.errors import CheckpointError
from routing_experts.models.published.blueprint import described_by
from routing_experts.models.published.renames import Rule
from routing_experts.models.published.tensors import Tensors

_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TAKEN = (
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias", "head_dim"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
)

LANGUAGE_RULES = (
    Rule(r"(?:.*\.)?rotary_emb\.inv_freq", None, "computed from the configuration"),
    Rule(r"model\.embed_tokens\.weight", "model.language_model.embed_tokens.weight"),
    Rule(r"model\.norm\.weight", "model.language_model.norm.weight"),
    Rule(r"model\.layers\.(\d+)\.(.+)", r"model.language_model.layers.\1.\2"),
    Rule(r"lm_head\.weight", "lm_head.weight"),
)


def has_head(parts: Iterable[Tensors]) -> bool:
    """Whether files hold a head of the language model's own, which is kept then, tied or not."""
    return any("lm_head.weight" in tensors.shapes for tensors in parts)


def llama_config(raw: Mapping[str, Any], folder: Path, owns_head: bool) -> Any:
    """A Llama as large as the checkpoint's configuration says.

    Args:
        raw: the configuration.
        folder: of the checkpoint.
        owns_head: see ``has_head``.

    Raises:
        CheckpointError: if a size is missing, or it is another language model.
    """
    from transformers import LlamaConfig

    named = raw.get("architectures") or []
    if named and not any("llama" in str(name).lower() for name in named):
        raise CheckpointError(
            f"{folder}: architectures {named} are none around a Llama, the one language model that is read. Use a "
            "LLaVA around Llama or Vicuna."
        )

    if missing := [name for name in _NEEDED if raw.get(name) is None]:
        raise CheckpointError(
            f"{folder}/config.json does not say {', '.join(missing)}: sizes are never guessed. Restore the "
            "checkpoint's own configuration."
        )
    settings = {name: raw[name] for name in (*_NEEDED, *_TAKEN) if raw.get(name) is not None}
    if owns_head:
        settings["tie_word_embeddings"] = False
    with described_by(folder):
        return LlamaConfig(**settings)
