"""Tokenizer, pictures and prompt of an imported LLaVA: what transformers' own processor has to be told."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AddedToken

from routing_experts.errors import CheckpointError, MissingExtraError, first_line
from routing_experts.models.published.blueprint import PictureSettings

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
MULTIPLE = 64  # of the vocabulary, as transformers' own conversion has it
_SEED = 0  # of the new rows, which are drawn around the mean of the old ones


def read_tokenizer(folder: Path, vocabulary: int) -> Any:
    """The checkpoint's Llama tokenizer, with tokens of its own for pictures and padding.

    Args:
        folder: of the checkpoint.
        vocabulary: rows of its embeddings.

    Raises:
        CheckpointError: if there is none, or it has more tokens than the embeddings have rows.
        MissingExtraError: if it is a SentencePiece model and that package is not installed.
    """
    from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise CheckpointError(
            f"{folder} has neither tokenizer.model nor tokenizer.json. Download the checkpoint whole."
        )
    check_packages(folder)
    try:
        if (folder / "tokenizer.json").is_file():  # says itself where spaces go
            read = PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            read = LlamaTokenizerFast.from_pretrained(folder, legacy=_is_legacy(folder))
    except Exception as error:  # of the tokenizers' library, some of whose are bare exceptions
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {first_line(error)}). Download its "
            "tokenizer files again."
        ) from error
    if read.bos_token is None or read.eos_token is None:
        raise CheckpointError(
            f"{folder}: its tokenizer.json does not say which tokens begin and end a text, so that the model would "
            "never stop; tokenizer_config.json says it. Download all of its tokenizer files."
        )
    # As a plain one: read as a Llama's again, it would be built anew, and differently by the model's type.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        model_max_length=read.model_max_length,
        padding_side="left",  # as an attribute it would not be saved
        clean_up_tokenization_spaces=False,
        **{name: getattr(read, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")},
    )
    if len(tokenizer) > vocabulary:
        raise CheckpointError(
            f"{folder}: a tokenizer of {len(tokenizer)} tokens, embeddings of {vocabulary}: one of them is another "
            "checkpoint's. Restore the tokenizer that belongs to it."
        )
    if len(tokenizer) < vocabulary:
        raise CheckpointError(
            f"{folder}: a tokenizer of {len(tokenizer)} tokens, embeddings of {vocabulary}: rows that no token stands "
            "for would have to be guessed at. Restore the tokenizer that belongs to it."
        )
    return tokenizer


def _is_legacy(folder: Path) -> bool:
    """Whether a space is put before every piece of a text, not the first alone; so it was where nothing is said."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return True
    said = json.loads(path.read_text(encoding="utf-8"))
    return bool(said.get("legacy", True)) if isinstance(said, dict) else True


def check_packages(folder: Path) -> None:
    """Raises ``MissingExtraError`` if what reads the folder's tokenizer is not installed."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return
    from importlib.util import find_spec

    if any(find_spec(name) is None for name in ("sentencepiece", "google")) or find_spec("google.protobuf") is None:
        raise MissingExtraError(
            "the checkpoint's tokenizer is a SentencePiece model, which is read with sentencepiece and protobuf. "
            "Install them: pip install 'routing-experts[import]'."
        )


def grow_vocabulary(model: Any, tokenizer: Any) -> None:
    """Gives pictures and padding a token each, behind the old ones, and rows to both in model and head.

    The rows are drawn around the mean of the old ones, by transformers and the same each time; nothing reads them but
    the head, since pictures' features take the place of the token's row.
    """
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.unk_token:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=MULTIPLE)
    model.config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    for config in (model.config.text_config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id


def make_processor(tokenizer: Any, pictures: PictureSettings) -> Any:
    """Transformers' LLaVA processor, with pictures prepared as the checkpoint's own code prepares them.

    Args:
        tokenizer: knows the picture's token.
        pictures: how they are prepared.
    """
    from transformers import LlavaImageProcessorPil, LlavaProcessor

    square = {"height": pictures.size, "width": pictures.size}
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            do_pad=pictures.pads, size={"shortest_edge": pictures.size}, crop_size=square
        ),
        tokenizer=tokenizer,
        patch_size=pictures.patch_size,
        vision_feature_select_strategy=pictures.strategy,
        num_additional_image_tokens=pictures.extra_tokens,
        image_token=IMAGE_TOKEN,
    )
