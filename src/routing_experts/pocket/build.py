"""Makes the pocket model's configuration, tokenizer and processor: everything but its trained weights.

``python -m routing_experts.pocket.build FOLDER`` writes them; ``roe train pocket`` and then ``roe train pocket_hard``
train the weights.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from routing_experts.data.digits import DigitsTask

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = 384
# The kinds of question that merges are made for and that `roe train pocket` begins with; others are spelled by parts.
FIRST_TASKS = ("read_one", "read_all", "exists", "count", "parity", "compare", "sum")
FIRST_TEXT_TASKS = ("text_sum",)
PICTURE_SIZE = 32
PATCH_SIZE = 8
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<|user|>{% elif message.role == 'assistant' %}<|assistant|>{% endif %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE (any text can be written) whose merges fit the digits task; each decimal digit is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    task = DigitsTask(split="train", seed=0, text_share=0.125, tasks=FIRST_TASKS, text_tasks=FIRST_TEXT_TASKS)
    corpus = [text for i in range(2000) for turn in task[i].turns for text in (turn.question, turn.answer)]
    tokenizer.train_from_iterator(corpus, trainer)
    bos = SPECIAL_TOKENS[1]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token=bos,
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        padding_side="left",
        model_max_length=1024,
    )


def build_processor() -> LlavaProcessor:
    """Tokenizer and CLIP picture preprocessing of the pocket model."""
    size = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(processor: LlavaProcessor) -> LlavaConfig:
    """A LLaVA of about two million parameters: CLIP tower, two-layer projector, twelve Llama layers."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=PICTURE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
    )
    text = LlamaConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=3,
        num_key_value_heads=3,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(PICTURE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        architectures=["LlavaForConditionalGeneration"],
    )


def main(folder: Path) -> None:
    """Writes configuration, tokenizer and processor files to ``folder``."""
    processor = build_processor()
    processor.save_pretrained(folder)
    build_config(processor).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
