"""A tiny randomly initialised multimodal checkpoint with routed experts in its text part."""

from pathlib import Path

import torch
from tiny_models import COMMON, VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models import aria
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.aria.processing_aria import AriaProcessor

IMAGE_TOKEN, IMAGE_TOKENS, IMAGE_PIXELS = 9, 16, 980
"""Of Aria: stands for an image; how many of them an image becomes; the length of its sides."""


def save_tiny_aria(folder: Path) -> Path:
    """Writes a checkpoint and its processor: an image of 7 by 7 patches is 16 tokens."""
    text = aria.AriaTextConfig(**COMMON, intermediate_size=64, moe_num_experts=8, moe_topk=2, moe_num_shared_experts=1)
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": IMAGE_PIXELS, "patch_size": IMAGE_PIXELS // 7,
    }  # fmt: skip
    config = aria.AriaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE_TOKEN,
        projector_patch_to_query_dict={49: IMAGE_TOKENS},
    )
    torch.manual_seed(0)
    model = aria.AriaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15 if "embed" not in name else 1.0)
    model.save_pretrained(folder)
    vocabulary = {f"w{token}": token for token in range(VOCABULARY) if token != IMAGE_TOKEN} | {"<|img|>": IMAGE_TOKEN}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w2", pad_token="w2", extra_special_tokens={"image_token": "<|img|>"}
    )
    images = AriaImageProcessorPil(max_image_size=IMAGE_PIXELS, min_image_size=336)
    AriaProcessor(images, tokenizer, size_conversion={IMAGE_PIXELS: IMAGE_TOKENS}).save_pretrained(folder)
    return folder
