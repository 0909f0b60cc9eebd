"""A Stable Diffusion pipeline small enough to run in milliseconds: real classes, random weights.

Its UNet has SD-v1.5's topology, and so its layers by the same names, at widths of 8 to 32.
"""

import string

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bf_lib.models import sd15_unet_config

TOKENS = 10
WIDTH = 16  # of the text encoder

UNET = sd15_unet_config() | {
    "sample_size": 8,
    "block_out_channels": (8, 16, 32, 32),
    "norm_num_groups": 4,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
}


def toy_unet(seed: int = 0) -> UNet2DConditionModel:
    """A UNet of 0.6 M parameters for latents of shape (4, 8, 8)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel.from_config(UNET).eval()


def toy_vae(seed: int = 0) -> AutoencoderKL:
    """An autoencoder between images of 16x16 pixels and latents of shape (4, 8, 8)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoencoderKL(
            sample_size=16,
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            scaling_factor=0.8,
        ).eval()


def toy_tokenizer() -> CLIPTokenizer:
    """A tokenizer whose tokens are letters; the end marker is the largest id, as in CLIP."""
    pieces = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)


def toy_text_encoder(tokenizer: CLIPTokenizer, seed: int = 0) -> CLIPTextModel:
    """A text encoder of one layer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPTextModel(config).eval()


def toy_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A pipeline of all of these, with DPM-Solver++ and SD-v1.5's noise schedule."""
    tokenizer = toy_tokenizer()
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        toy_vae(seed),
        toy_text_encoder(tokenizer, seed),
        tokenizer,
        toy_unet(seed),
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
