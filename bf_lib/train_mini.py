"""Trains `mini`: a small latent diffusion model of procedurally drawn scenes.

Latent diffusion (Rombach et al. 2022, https://arxiv.org/abs/2112.10752) in three steps: an
autoencoder to 4x16x16 latents, the latents of all scenes computed once, and a UNet with SD-v1.5's
topology trained together with its text encoder on the noise-prediction loss (Ho et al. 2020),
weighted by min-SNR-5 (Hang et al. 2023, https://arxiv.org/abs/2303.09556).

The generator is trained in rounds. The first learns to draw and what the words mean, from captions
most of which name the colours; the second, from captions half of which do not, which are harder to
learn from, also what to draw when little is said. Each starts from the averaged weights of the one
before.
"""

__all__ = [
    "ROUNDS",
    "VAE_PLAN",
    "GeneratorTask",
    "Round",
    "VaeTask",
    "export",
    "generator_log",
    "new_tokenizer",
    "train_generator",
    "trained_pipeline",
    "training_captions",
    "training_images",
    "training_latents",
    "training_scene",
]

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTokenizer

from bf_lib.drawing import draw
from bf_lib.mini import TOKENS, new_text_encoder, new_unet, new_vae, to_float, tokenize
from bf_lib.scenes import Scene, caption, sample_scene
from bf_lib.training import Plan, fit, load_ema, read_log

SCENES = 60_000  # training scenes
CAPTIONS = 4  # phrasings of each
ENCODED = 1000  # scenes encoded in one go
DROP = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
SNR_CAP = 5.0  # min-SNR weighting
SCHEDULE = {  # SD-v1.5's
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}

VAE_PLAN = Plan(steps=1800, batch=32, lr=2e-3, warmup=50, decay=0.7, ema=0.995)


@dataclass(frozen=True)
class Round:
    """A round of the generator's training."""

    plan: Plan
    coloured: float  # share of the captions that name the colours


ROUNDS = (
    Round(Plan(steps=5000, batch=64, lr=1.2e-3, warmup=200, decay=0.5, ema=0.999), coloured=0.8),
    Round(
        Plan(steps=7000, batch=64, lr=8e-4, warmup=200, decay=0.7, ema=0.999, seed=1), coloured=0.5
    ),
)


def training_scene(index: int) -> Scene:
    """Returns a training scene; the index is the seed."""
    return sample_scene(np.random.default_rng((1, index)))


def training_captions(index: int, coloured: float) -> list[str]:
    """Returns the captions of a training scene, a share of which name the colours."""
    rng = np.random.default_rng((1, index))
    scene = sample_scene(rng)
    return [caption(scene, rng, coloured=coloured) for _ in range(CAPTIONS)]


def _draw_training_scene(index: int) -> np.ndarray:
    return draw(training_scene(index))


def training_images(folder: Path, count: int = SCENES, processes: int = 2) -> np.ndarray:
    """Draws the training scenes once, as uint8 with shape (count, 64, 64, 3), mapped from disk.

    The file is named after its first images, so that other scenes are drawn anew.
    """
    first = np.stack([_draw_training_scene(i) for i in range(min(count, 16))])
    path = folder / f"images-{count}-{_digest(first.tobytes())}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with torch.multiprocessing.get_context("spawn").Pool(processes) as pool:
            images = np.stack(pool.map(_draw_training_scene, range(count), chunksize=500))
        with _new_file(path) as new:
            np.save(new, images)
    return np.load(path, mmap_mode="r")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """Gives a name to write under, and renames it: two processes at once do no harm."""
    new = path.with_stem(f"{path.stem}-{os.getpid()}")
    yield new
    new.rename(path)


class VaeTask:
    """Squared error of the reconstruction, with a weak pull of the latents to the unit normal."""

    def __init__(self, folder: Path) -> None:
        self.images = training_images(folder)
        self.model = new_vae()

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(self.images), (size,), generator=generator)
        x = to_float(self.images[np.sort(chosen.numpy())])
        with torch.autocast("cpu", torch.bfloat16):
            moments = self.model.quant_conv(self.model.encoder(x))
            mean, logvar = moments.float().chunk(2, dim=1)
            logvar = logvar.clamp(-20, 10)
            noise = torch.randn(mean.shape, generator=generator)
            y = self.model.decode(mean + noise * torch.exp(0.5 * logvar)).sample.float()
        mse = F.mse_loss(y, x)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return {"loss": mse + 0.1 * F.l1_loss(y, x) + 5e-5 * kl, "mse": mse, "kl": kl}


def new_tokenizer() -> CLIPTokenizer:
    """Builds a CLIP tokenizer in which each word of the captions is one token.

    The merges are learnt from the captions until every word is whole; other words fall apart into
    letters, as they do for CLIP. The two markers come last, so that the end of the text is the
    largest id, as CLIP's pooling expects.
    """
    texts = [text for i in range(4000) for text in training_captions(i, coloured=0.8)]
    words = {word for text in texts for word in text.split()}
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = list("abcdefghijklmnopqrstuvwxyz")
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator([*sorted(words), *letters], trainer)
    learnt = json.loads(bpe.to_str())["model"]
    pieces = sorted(set(learnt["vocab"]) | {letter + "</w>" for letter in letters})
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in learnt["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def training_latents(folder: Path, processes: int = 2) -> dict[str, Tensor]:
    """Encodes the training scenes once, with the trained autoencoder of `folder`/vae.

    The file is named after the autoencoder: with another one they are encoded anew.

    Returns:
        moments: Mean and log-variance of each scene's latents in half precision, with shape
            (n, 8, 16, 16).
        scale: What makes the latents of unit variance.
    """
    weights = (folder / "vae" / "checkpoint.safetensors").read_bytes()
    path = folder / f"latents-{SCENES}-{_digest(weights)}.safetensors"
    if not path.exists():
        starts = range(0, SCENES, ENCODED)
        with torch.multiprocessing.get_context("spawn").Pool(processes) as pool:
            parts = pool.starmap(_encode, [(folder, start) for start in starts], chunksize=1)
        moments = torch.from_numpy(np.concatenate(parts)).contiguous()
        scale = 1 / moments[:, :4].float().std()
        with _new_file(path) as new:
            save_file({"moments": moments, "scale": scale[None]}, new)
    return load_file(path)


@torch.inference_mode()
def _encode(folder: Path, start: int) -> np.ndarray:
    torch.set_num_threads(1)
    vae = load_ema(new_vae(), folder / "vae").eval()
    images = training_images(folder)[start : start + ENCODED]
    with torch.autocast("cpu", torch.bfloat16):
        moments = [vae.quant_conv(vae.encoder(x)) for x in to_float(images).split(50)]
    return torch.cat(moments).half().numpy()


class GeneratorTask:
    """Noise prediction by the UNet from a caption read by the text encoder (Eq. 2)."""

    def __init__(self, folder: Path, number: int) -> None:
        self.data = training_latents(folder)
        tokenizer = new_tokenizer()
        self.empty = tokenize(tokenizer, [""])
        coloured = ROUNDS[number].coloured
        texts = [text for i in range(SCENES) for text in training_captions(i, coloured)]
        self.tokens = tokenize(tokenizer, texts).short().view(SCENES, CAPTIONS, TOKENS)
        unet = new_unet()
        # In bfloat16 on CPU the backward pass of fused attention is several times slower than
        # that of plain matrix products.
        unet.set_attn_processor(AttnProcessor())
        self.model = nn.ModuleDict({"unet": unet, "text_encoder": new_text_encoder(tokenizer)})
        if number > 0:
            load_ema(self.model, _round_folder(folder, number - 1))
        self.alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(self.data["moments"]), (size,), generator=generator)
        mean, logvar = self.data["moments"][chosen].float().chunk(2, dim=1)
        z = mean + torch.randn(mean.shape, generator=generator) * torch.exp(0.5 * logvar)
        z = z * self.data["scale"]
        phrasing = torch.randint(CAPTIONS, (size,), generator=generator)
        tokens = self.tokens[chosen, phrasing].long()
        dropped = torch.rand(size, generator=generator) < DROP
        tokens = torch.where(dropped[:, None], self.empty, tokens)
        # One time-step from each of `size` equal stretches, which lowers the variance of the loss.
        t = (torch.arange(size) + torch.rand(size, generator=generator)) * (1000 / size)
        t = t.long()
        noise = torch.randn(z.shape, generator=generator)
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            context = self.model["text_encoder"](tokens).last_hidden_state
            predicted = self.model["unet"](noisy, t, context).sample.float()
        error = (predicted - noise).pow(2).mean(dim=(1, 2, 3))
        snr = (alpha / (1 - alpha)).flatten()
        return {"loss": (error * (SNR_CAP / snr).clamp(max=1)).mean(), "mse": error.mean()}


def train_generator(folder: Path) -> None:
    """Trains the generator round by round, from where it was left."""
    training_latents(folder)
    for number, part in enumerate(ROUNDS):
        fit(partial(GeneratorTask, folder, number), part.plan, _round_folder(folder, number))


def generator_log(folder: Path) -> pd.DataFrame:
    """Returns the log of all rounds, their steps counted on."""
    logs, done = [], 0
    for number, part in enumerate(ROUNDS):
        log = read_log(_round_folder(folder, number))
        logs.append(log.assign(step=log.step + done, round=number + 1))
        done += part.plan.steps
    return pd.concat(logs, ignore_index=True)


def _round_folder(folder: Path, number: int) -> Path:
    return folder / f"generator_{number + 1}"


def trained_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Puts the trained parts in `folder` together, in single precision."""
    tokenizer = new_tokenizer()
    parts = nn.ModuleDict({"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)})
    load_ema(parts, _round_folder(folder, len(ROUNDS) - 1))
    vae = load_ema(new_vae(), folder / "vae")
    scale = float(training_latents(folder)["scale"])
    vae.register_to_config(scaling_factor=scale)
    # As SD-v1.5's own DPM-Solver++ configuration has them.
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE, steps_offset=1)
    return StableDiffusionPipeline(
        vae.eval(),
        parts["text_encoder"].eval(),
        tokenizer,
        parts["unet"].eval(),
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(folder: Path, target: Path) -> None:
    """Writes the trained pipeline in half precision to `target`, in diffusers folder layout."""
    trained_pipeline(folder).to(torch.float16).save_pretrained(target, safe_serialization=True)
