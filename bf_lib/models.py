"""Stable Diffusion pipelines by name, folder or hub id, and the shapes of their UNets."""

__all__ = [
    "MODELS",
    "REVISIONS",
    "UNREACHABLE",
    "ModelNotFound",
    "fingerprint",
    "load_pipeline",
    "meta_unet",
    "mini_unet_config",
    "sd15_unet_config",
]

import errno
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_log
from huggingface_hub.utils import httpx
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_log

from bf_lib.paths import ROOT, display_path

# name of a model -> its folder or its hub id
MODELS: dict[str, Path | str] = {
    "mini": ROOT / "data" / "mini",
    "smoke": ROOT / "data" / "mini",  # the preset of that name runs the same model
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}

# hub id -> the commit that the name stands for, so that it stays the same model
REVISIONS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
}

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


# What the hub's clients raise where there are no weights or no network; a proxy that refuses and
# a time-out are not OSErrors.
UNREACHABLE = (OSError, httpx.TransportError)
# Errors of the machine, for which a hint where to get weights would mislead.
NOT_ABOUT_WEIGHTS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO, errno.EMFILE)


class ModelNotFound(FileNotFoundError):
    """The weights of a model are not where they were looked for."""


def load_pipeline(
    model: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    local_files_only: bool = False,
) -> StableDiffusionPipeline:
    """Loads a Stable Diffusion pipeline, without its safety checker and its progress bar.

    The scheduler and everything else are as they were saved. Only safetensors files are read.

    Arguments:
        model: A name in `MODELS`, a folder in diffusers layout, or a hub id.
        device: Where the models go.
        dtype: The floating-point type of the models.
        revision: The branch, tag or commit of a hub id; by default the commit in `REVISIONS`, and
            the main branch where that has none.
        local_files_only: Whether a hub id must be in the local cache already.

    Raises:
        ModelNotFound: If there is no such folder, or the hub has no such weights to give.
    """
    source = MODELS.get(model, model) if isinstance(model, str) else model
    if isinstance(source, str) and (Path(source).exists() or not _HUB_ID.fullmatch(source)):
        source = Path(source)
    if isinstance(source, Path) and not (source / "model_index.json").is_file():
        raise ModelNotFound(_not_found(model, source, "model_index.json"))
    try:
        with _no_loading_bars():
            pipe = StableDiffusionPipeline.from_pretrained(
                source,
                revision=revision or REVISIONS.get(source),
                dtype=dtype,
                safety_checker=None,
                requires_safety_checker=False,
                use_safetensors=True,
                local_files_only=local_files_only,
            )
    except (*UNREACHABLE, SafetensorError) as error:
        if getattr(error, "errno", None) in NOT_ABOUT_WEIGHTS:
            raise
        where = "the local cache" if local_files_only else "the local cache and the hub"
        place = source if isinstance(source, Path) else f"{source} in {where}"
        raise ModelNotFound(_not_found(model, place, "safetensors files")) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _not_found(model: str | Path, place: str | Path, what: str) -> str:
    """Says what was looked for and where, and how to come by it."""
    inside = isinstance(place, Path) and place.is_relative_to(ROOT)
    shown = display_path(place) if inside else place
    if place == MODELS["mini"]:
        remedy = "`mini` ships with the repository; `make mini` trains it again"
    elif isinstance(place, Path):
        remedy = f"give a folder in diffusers layout, a hub id, or one of {', '.join(MODELS)}"
    else:
        remedy = (
            f"where there is a network, `hf download {MODELS.get(str(model), model)}` fetches it; "
            "its folder may be copied elsewhere and be given instead of the name"
        )
    return f"no weights for {str(model)!r}: looked for {what} in {shown}. To get them: {remedy}."


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Keeps the bars of loading, not those of downloading, out of logs and notebooks."""
    shown = [log for log in (diffusers_log, transformers_log) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def sd15_unet_config() -> dict[str, Any]:
    """Returns the configuration of SD-v1.5's UNet, as its public repository has it.

    In spite of its name, diffusers takes `attention_head_dim` as the number of heads here.
    """
    return {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        "up_block_types": (
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ),
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }


def mini_unet_config() -> dict[str, Any]:
    """Returns the configuration of `mini`'s UNet: SD-v1.5's at one eighth of its widths.

    It has 2 heads instead of 8, so that a head keeps 20 to 80 channels, and 8 groups per norm
    instead of 32.
    """
    return sd15_unet_config() | {
        "sample_size": 16,
        "block_out_channels": (40, 80, 160, 160),
        "norm_num_groups": 8,
        "cross_attention_dim": 96,
        "attention_head_dim": 2,
    }


def meta_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """Builds a UNet without its weights, to ask for its layers and sizes."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def fingerprint(parts: Iterable[object]) -> str:
    """Returns a digest of what parts of a pipeline compute: kinds, configurations and weights.

    Whence they were loaded and the device they are on do not matter.

    Arguments:
        parts: Models, tokenizers, schedulers; None and what has neither weights nor configuration
            count by their class.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(_description(part), sort_keys=True, default=str).encode())
        state = part.state_dict() if isinstance(part, nn.Module) else {}
        for name, value in sorted(state.items()):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _description(part: object) -> dict:
    """Returns class and configuration of a part of a pipeline, without whence it was loaded."""
    kind = {"class": type(part).__name__}
    if isinstance(part, PreTrainedTokenizerBase):
        settings = ("model_max_length", "padding_side", "truncation_side", "special_tokens_map")
        rules = part.backend_tokenizer.to_str() if part.is_fast else part.get_vocab()
        return kind | {name: getattr(part, name) for name in settings} | {"rules": rules}
    config = getattr(part, "config", None) or {}
    entries = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return kind | {name: value for name, value in entries.items() if not name.startswith("_")}
