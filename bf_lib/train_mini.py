"""Trains `mini`: a small latent diffusion model of procedurally drawn scenes.

Latent diffusion (Rombach et al. 2022, https://arxiv.org/abs/2112.10752) in SD-v1.5's steps: an
autoencoder to 4x16x16 latents, the latents of all scenes computed once, a text encoder trained
beforehand (`bf_lib.train_text`), and a UNet with SD-v1.5's topology trained to predict the noise
(Ho et al. 2020), with the weights of min-SNR-5 (Hang et al. 2023,
https://arxiv.org/abs/2303.09556).
"""

__all__ = [
    "ROUNDS",
    "VAE_PLAN",
    "GeneratorTask",
    "Round",
    "VaeTask",
    "export",
    "round_folder",
    "trained_pipeline",
    "training_latents",
]

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor

from bf_lib.mini import TOKENS, new_unet, new_vae, to_float, tokenize
from bf_lib.noising import noised
from bf_lib.train_text import load_text_encoder
from bf_lib.training_data import (
    CAPTIONS,
    SCENES,
    digest,
    new_file,
    new_tokenizer,
    training_captions,
    training_images,
    training_scene,
)
from bf_lib.training_plan import Plan
from bf_lib.training_state import load_ema

ENCODED = 1000  # scenes encoded in one go
DROP = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
SNR_CAP = 5.0  # min-SNR weighting
# Where the noise hides nearly all, the error of the clean latents is about 1 / (1 + 65 SNR) of
# their variance. Added to the SNR, this makes the loss there as heavy as elsewhere.
SNR_FLOOR = 1 / 65
SCHEDULE = {  # SD-v1.5's
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


@dataclass(frozen=True)
class Round:
    """A round of the UNet's training."""

    plan: Plan
    late: float  # the time-steps have the density t^(late - 1)
    more: Mapping[str, float] = field(default_factory=dict)  # kinds of scenes shown so much more


# Each begins with the averaged weights of the one before. Which object is where, and how many
# there are, is decided at noisy time-steps and by small differences, which the rate that is best
# to learn drawing drowns: that is the second round. The third and the fourth sharpen the outlines,
# which decide what an object is taken for and which the second leaves soft. The last two came when
# the text encoder of the weights that ship was replaced, see `data/README.md`.
ROUNDS = (
    Round(Plan(steps=4500, batch=64, lr=1.2e-3, warmup=200, decay=0.75, ema=0.999), late=1.5),
    Round(Plan(steps=4500, batch=64, lr=5e-4, warmup=200, decay=0.7, ema=0.999, seed=1), late=2.5),
    Round(
        Plan(steps=2300, batch=64, lr=4e-4, warmup=100, decay=0.9, ema=0.998, seed=2),
        late=1.3,
        more={"pair": 2.0, "count": 1.5},
    ),
    Round(
        Plan(steps=1600, batch=64, lr=3e-4, warmup=100, decay=0.9, ema=0.998, seed=3),
        late=1.5,
        more={"single": 2.0, "pair": 2.0, "count": 1.5},
    ),
    Round(
        Plan(steps=3500, batch=64, lr=8e-4, warmup=60, decay=0.75, ema=0.998, seed=5),
        late=1.5,
        more={"single": 1.5, "pair": 1.5, "count": 1.5},
    ),
    Round(
        Plan(steps=2700, batch=64, lr=6e-4, warmup=60, decay=0.8, ema=0.998, seed=6),
        late=2.0,
        more={"relation": 2.0},
    ),
)
VAE_PLAN = Plan(steps=1200, batch=32, lr=2e-3, warmup=50, decay=0.7, ema=0.995)


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


def training_latents(folder: Path, processes: int = 2) -> dict[str, Tensor]:
    """Encodes the training scenes once, with the trained autoencoder of `folder`/vae.

    The file is named after the autoencoder: with another one they are encoded anew.

    Returns:
        moments: Mean and log-variance of each scene's latents in half precision, with shape
            (n, 8, 16, 16).
        scale: One over the standard deviation of the latents' means.
    """
    weights = (folder / "vae" / "checkpoint.safetensors").read_bytes()
    path = folder / f"latents-{SCENES}-{digest(weights)}.safetensors"
    if not path.exists():
        starts = range(0, SCENES, ENCODED)
        with torch.multiprocessing.get_context("spawn").Pool(processes) as pool:
            parts = pool.starmap(_encode, [(folder, start) for start in starts], chunksize=1)
        moments = torch.from_numpy(np.concatenate(parts)).contiguous()
        scale = 1 / moments[:, :4].float().std()
        with new_file(path) as new:
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
    """Noise prediction by the UNet from a caption read by the trained text encoder (Eq. 2).

    Arguments:
        folder: Where the trained autoencoder and text encoder are.
        number: The index of the round in `ROUNDS`.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.data = training_latents(folder)
        tokenizer = new_tokenizer()
        texts = [text for i in range(SCENES) for text in training_captions(i)]
        self.tokens = tokenize(tokenizer, texts).short().view(SCENES, CAPTIONS, TOKENS)
        self.empty = tokenize(tokenizer, [""])
        self.text_encoder = load_text_encoder(folder / "text_encoder", tokenizer)
        self.model = new_unet()
        if number > 0:
            load_ema(self.model, round_folder(folder, number - 1))
        self.late, more = ROUNDS[number].late, ROUNDS[number].more
        kinds = [training_scene(i).kind for i in range(SCENES)]
        self.shown = torch.tensor([more.get(kind, 1.0) for kind in kinds])
        # In bfloat16 on CPU the backward pass of fused attention is several times slower than
        # that of plain matrix products.
        self.model.set_attn_processor(AttnProcessor())
        self.alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.multinomial(self.shown, size, generator=generator)
        mean, logvar = self.data["moments"][chosen].float().chunk(2, dim=1)
        z = mean + torch.randn(mean.shape, generator=generator) * torch.exp(0.5 * logvar)
        z = z * self.data["scale"]
        phrasing = torch.randint(CAPTIONS, (size,), generator=generator)
        tokens = self.tokens[chosen, phrasing].long()
        dropped = torch.rand(size, generator=generator) < DROP
        tokens = torch.where(dropped[:, None], self.empty, tokens)
        with torch.no_grad():
            context = self.text_encoder(tokens).last_hidden_state
        # One quantile from each of `size` equal stretches, which lowers the variance of the loss.
        quantile = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        t = (1000 * quantile ** (1 / self.late)).long().clamp(max=999)
        noise = torch.randn(z.shape, generator=generator)
        alpha = self.alphas[t]
        noisy = noised(z, noise, alpha)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.model(noisy, t, context).sample.float()
        error = (predicted - noise).pow(2).mean(dim=(1, 2, 3))
        snr = alpha / (1 - alpha)
        weight = (snr + SNR_FLOOR).clamp(max=SNR_CAP) / snr
        return {"loss": (error * weight).mean(), "mse": error.mean()}


def round_folder(folder: Path, number: int) -> Path:
    """Returns the folder of a round of the UNet's training."""
    return folder / f"unet_{number + 1}"


def trained_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Puts the trained parts in `folder` together, in single precision."""
    tokenizer = new_tokenizer()
    unet = load_ema(new_unet(), round_folder(folder, len(ROUNDS) - 1))
    vae = load_ema(new_vae(), folder / "vae")
    scale = float(training_latents(folder)["scale"])
    vae.register_to_config(scaling_factor=scale)
    # As SD-v1.5's own DPM-Solver++ configuration has them.
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE, steps_offset=1)
    return StableDiffusionPipeline(
        vae.eval(),
        load_text_encoder(folder / "text_encoder", tokenizer),
        tokenizer,
        unet.eval(),
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(folder: Path, target: Path) -> None:
    """Writes the trained pipeline in diffusers folder layout to `target`.

    The UNet and the autoencoder are stored in half precision. The text encoder is not: unless told
    otherwise, diffusers loads its models in single precision and transformers in that of the file,
    and a pipeline of both does not run.
    """
    pipe = trained_pipeline(folder)
    pipe.unet.half()
    pipe.vae.half()
    pipe.save_pretrained(target, safe_serialization=True)
