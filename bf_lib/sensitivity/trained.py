"""The sweep with each candidate fine-tuned before it is scored, as the paper does (§3.2, Alg. 1).

One layer is quantized, and the UNet learns the noise that the full-precision model predicts. The
paper trains "weights and scales" and does not say whether those of the layer or of the whole UNet,
how long, on which data or at what rate. Here it is the layer's weight, bias and scales by default:
Adam moves weights by about their rate at each step, however small the error is, so that a short
training of the whole UNet would hide what a harmless layer does. Where gradients are smaller than
its epsilon (1e-8) it moves them less: a layer that does next to no harm is left as it is.

Every candidate sees the same latents, times and captions in the same order, at a rate that falls
linearly to zero. The latents are drawn by the full-precision model from captions of their own, so
no images are needed. As in the paper's first stage, a caption is left out in one case of ten.
"""

__all__ = ["TrainedBench", "TrainedSweep", "Training"]

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.lr_scheduler import LinearLR

from bf_lib.fakequant import attach_fake_quantizer_
from bf_lib.grids import levels_of_bits, relative_mse
from bf_lib.layers import get_layer
from bf_lib.noising import Batch, noised, predicted
from bf_lib.sampling import PromptEmbeds, denoise, encode_prompts
from bf_lib.sensitivity.candidates import FULL_PRECISION, Candidate
from bf_lib.sensitivity.seeds import derived_seeds
from bf_lib.sensitivity.sweep import Bench, Sweep

SCOPES = ("layer", "unet")
DROPPED = 0.1  # of the captions, as in Eq. 6


@dataclass(frozen=True, slots=True)
class Training:
    """How each candidate is fine-tuned."""

    captions: tuple[str, ...]  # other than the prompts of the sweep
    steps: int
    batch: int
    lr: float
    scope: str = "layer"  # what is trained beside the scales: the "layer" or the whole "unet"
    held_out: int = 64  # samples that only tell how much was learnt
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {SCOPES}, got {self.scope!r}")
        if min(self.steps, self.batch, self.held_out, len(self.captions)) < 1 or self.lr <= 0:
            raise ValueError(f"impossible training: {self}")


@dataclass(frozen=True, kw_only=True)
class TrainedSweep(Sweep):
    """All that the rows of a sweep with trained candidates depend on."""

    training: Training

    def __post_init__(self) -> None:
        Sweep.__post_init__(self)
        if self.dtype != "float32":
            raise ValueError(f"candidates are trained in float32, not in {self.dtype}")
        if shared := sorted(set(self.training.captions) & set(self.prompts)):
            raise ValueError(f"prompts of the sweep must not be trained on: {shared[:3]}")

    def bench(self, pipe: StableDiffusionPipeline) -> "TrainedBench":
        """Returns what trains and scores candidates."""
        return TrainedBench(self, pipe)


class TrainedBench(Bench):
    """A loaded model with its images and lessons."""

    def __init__(self, sweep: TrainedSweep, pipe: StableDiffusionPipeline) -> None:
        super().__init__(sweep, pipe)
        plan = sweep.training
        self.lessons = _lessons(pipe, plan, plan.steps * plan.batch + plan.held_out, sweep)

    def score(self, task: Candidate) -> dict:
        """Returns the row of a candidate, with its noise error before and after its training."""
        if task == FULL_PRECISION:
            same = {"noise_mse_before": 0.0, "noise_mse_after": 0.0}
            return asdict(task) | {"weight_mse": 0.0} | same | self.measure(self.draw())
        unet, plan = self.pipe.unet, self.sweep.training
        held_out = self.lessons[plan.steps * plan.batch :]
        weight = get_layer(unet, task.layer).weight.detach().clone()
        with _restored(unet, task.layer, plan.scope):
            attach_fake_quantizer_(get_layer(unet, task.layer), levels_of_bits(task.bits))
            before = self._error(held_out)
            self._fit(get_layer(unet, task.layer))
            found = {
                "weight_mse": float(relative_mse(weight, get_layer(unet, task.layer).weight)),
                "noise_mse_before": before,
                "noise_mse_after": self._error(held_out),
            }
            return asdict(task) | found | self.measure(self.draw())

    def _fit(self, layer: nn.Module) -> None:
        unet, plan = self.pipe.unet, self.sweep.training
        unet.requires_grad_(plan.scope == "unet")
        trained = list((unet if plan.scope == "unet" else layer).parameters())
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, plan.lr, weight_decay=0.0)
        schedule = LinearLR(optimizer, 1.0, 1 / plan.steps, plan.steps - 1)
        for step in range(plan.steps):
            part = self.lessons[step * plan.batch : (step + 1) * plan.batch]
            loss = F.mse_loss(predicted(unet, part), part.noise)  # Eq. 6
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _error(self, lessons: Batch) -> float:
        size = self.sweep.training.batch
        parts = [lessons[i : i + size] for i in range(0, len(lessons.x), size)]
        found = [(predicted(self.pipe.unet, part) - part.noise).square() for part in parts]
        return float(torch.cat(found).mean())


@torch.no_grad()
def _lessons(pipe: StableDiffusionPipeline, plan: Training, count: int, sweep: Sweep) -> Batch:
    """Noises latents that the model drew itself, and asks it for the noise."""
    known = encode_prompts(pipe, plan.captions)
    embeds = PromptEmbeds(known.prompts.clone(), known.empty.clone())
    drawn = _drawn(pipe, embeds, plan, sweep)
    generator = torch.Generator().manual_seed(plan.seed)
    times = pipe.scheduler.config.num_train_timesteps
    which = torch.randint(len(drawn), (count,), generator=generator).to(drawn.device)
    t = torch.randint(times, (count,), generator=generator).to(drawn.device)
    noise = torch.randn((count, *drawn.shape[1:]), generator=generator).to(drawn)
    dropped = (torch.rand(count, generator=generator) < DROPPED).to(drawn.device)
    text = torch.where(dropped[:, None, None], embeds.empty, embeds.prompts[which])
    x = noised(drawn[which], noise, pipe.scheduler.alphas_cumprod.to(drawn)[t])
    asked = Batch(x, t, text, noise)
    parts = [slice(i, i + plan.batch) for i in range(0, count, plan.batch)]
    wanted = torch.cat([predicted(pipe.unet, asked[part]) for part in parts])
    return replace(asked, noise=wanted)


def _drawn(
    pipe: StableDiffusionPipeline, embeds: PromptEmbeds, plan: Training, sweep: Sweep
) -> Tensor:
    """Draws the latents of each caption, with shape (captions, channels, height, width)."""
    first = plan.seed * len(plan.captions)
    seeds = derived_seeds("lessons", range(first, first + len(plan.captions)))
    size = sweep.sampler.batch
    starts = range(0, len(seeds), size)
    parts = [
        denoise(pipe, embeds[i : i + size], seeds[i : i + size], sweep.sampler) for i in starts
    ]
    return torch.cat(parts)


@contextmanager
def _restored(unet: nn.Module, name: str, scope: str) -> Iterator[None]:
    """Puts what is trained back bit for bit after the block, and the layer as it was."""
    layer = get_layer(unet, name)
    model = unet if scope == "unet" else layer
    kept = {key: value.detach().clone() for key, value in model.state_dict().items()}
    trained = {key for key, parameter in unet.named_parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
        model.load_state_dict(kept)
        for key, parameter in unet.named_parameters():
            parameter.requires_grad_(key in trained)
