"""Tokenizer, pictures and prompt of an imported LLaVA: what transformers' own processor has to be told."""

from pathlib import Path
from typing import Any

import torch
from transformers import AddedToken

from routing_experts.errors import CheckpointError, MissingExtraError
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
    from transformers import LlamaTokenizerFast

    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise CheckpointError(
            f"{folder} has neither tokenizer.model nor tokenizer.json. Download the checkpoint whole."
        )
    if not (folder / "tokenizer.json").is_file():
        _need_sentencepiece()
    try:
        tokenizer = LlamaTokenizerFast.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({error}). Download it again.") from error
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


def _need_sentencepiece() -> None:
    from importlib.util import find_spec

    lacking = [name for name in ("sentencepiece", "google.protobuf") if find_spec(name) is None]
    if lacking:
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

    tokenizer.padding_side = "left"
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
