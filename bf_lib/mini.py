"""The parts of `mini`, the embedded model, untrained: Stable Diffusion v1.5 at an eighth.

`bf_lib.train_mini` trains them; `bf_lib.models.load_pipeline("mini")` loads the result.
"""

__all__ = ["TOKENS", "new_text_encoder", "new_unet", "new_vae", "to_float", "tokenize"]

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bf_lib.models import mini_unet_config

TOKENS = 24  # length of a tokenized caption; the longest has 21 with its two markers
TEXT_WIDTH = 96  # an eighth of CLIP ViT-L's 768


def new_vae() -> AutoencoderKL:
    """Builds the untrained autoencoder, 64x64x3 <-> 16x16x4."""
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Returns token ids with shape (n, 24)."""
    return tokenizer(
        texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Builds the untrained text encoder: three layers of width 96."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """Builds the untrained UNet: SD-v1.5's topology at one eighth of its widths."""
    return UNet2DConditionModel(**mini_unet_config())


def to_float(images: np.ndarray) -> Tensor:
    """Turns uint8 images (n, h, w, 3) into floats in [-1, 1] with shape (n, 3, h, w)."""
    return torch.from_numpy(np.array(images, order="C")).permute(0, 3, 1, 2).float() / 127.5 - 1
