"""Tiny randomly initialised multimodal checkpoints with routed experts in their text part."""

from pathlib import Path

import torch
from tiny_models import COMMON, VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models import aria, qwen3_vl_moe
from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil
from transformers.models.aria.processing_aria import AriaProcessor

IMAGE_TOKEN, IMAGE_TOKENS, IMAGE_PIXELS = 9, 16, 980
"""Of Aria: stands for an image; how many of them an image becomes; the length of its sides."""
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


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
    _save(aria.AriaForConditionalGeneration, config, folder)
    vocabulary = {f"w{token}": token for token in range(VOCABULARY) if token != IMAGE_TOKEN} | {"<|img|>": IMAGE_TOKEN}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w2", pad_token="w2", extra_special_tokens={"image_token": "<|img|>"}
    )
    images = AriaImageProcessorPil(max_image_size=IMAGE_PIXELS, min_image_size=336)
    AriaProcessor(images, tokenizer, size_conversion={IMAGE_PIXELS: IMAGE_TOKENS}).save_pretrained(folder)
    return folder


def save_tiny_qwen3_vl_moe(folder: Path) -> Path:
    """Writes a checkpoint without a processor: for text alone."""
    text = COMMON | EXPERTS | {"intermediate_size": 128, "head_dim": 32}
    text["rope_parameters"] = {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6], "mrope_interleaved": True
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "patch_size": 14,
        "out_hidden_size": 128, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = qwen3_vl_moe.Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=10,
        video_token_id=11,
        vision_start_token_id=12,
        vision_end_token_id=13,
    )
    return _save(qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration, config, folder)


def _save(model_class: type, config: object, folder: Path) -> Path:
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15 if "embed" not in name else 1.0)
    model.save_pretrained(folder)
    return folder
