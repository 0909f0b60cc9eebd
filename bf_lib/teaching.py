"""What students are trained on: the two stages of BitsFusion, and others beside them (§4.2).

A step draws latents z_0 with captions, time-steps t from a density, and noise n; one caption of
ten is left out. On z_t and t,

- Stage I ("distillation") learns the teacher's noise and features, L_noise + lambda L_feat
  (Eqs. 6 to 8), the caption being left out for both;
- Stage II ("noise") learns the noise n (Eq. 2), and needs no teacher;
- "guided", for comparison, learns the teacher's guided noise: both predict with and without the
  caption.
"""

__all__ = ["OBJECTIVES", "Lesson", "Teaching", "example_losses"]

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save
from torch import Tensor

from bf_lib.coded_rate import coded_bits
from bf_lib.distillation import BlockFeatures, feature_loss, noise_loss
from bf_lib.examples import Examples
from bf_lib.models import load_pipeline
from bf_lib.noising import Batch, noised, predicted
from bf_lib.processes import own_device
from bf_lib.times import draw_times
from bf_lib.training_data import digest
from bf_lib.training_state import averages, load_ema

OBJECTIVES = ("distillation", "guided", "noise")


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a student is taught, and by whom."""

    model: str | Path  # the teacher's pipeline
    examples: Path  # file of `Examples`
    density: tuple[float, ...]  # of time-steps, see `bf_lib.times`
    objective: str = "distillation"
    feature_weight: float = 0.01  # lambda of Eq. 8
    relative: bool = False  # whether a block's features count relative to the teacher's
    squared: bool = True  # whether Stage I's errors are mean squares, or their roots
    rate_weight: float = 0.0  # of the bits of an entropy-coded code, see `bf_lib.coded_rate`
    dropped: float = 0.1  # of the captions
    guidance: float = 7.5  # of "guided"

    def __post_init__(self) -> None:
        wanted = {
            "objective": self.objective in OBJECTIVES,
            "feature_weight": self.feature_weight >= 0,
            "rate_weight": self.rate_weight >= 0,
            "dropped": 0 <= self.dropped <= 1,
            "guidance": self.guidance >= 1,
        }
        wrong = [f"{name}={getattr(self, name)!r}" for name, good in wanted.items() if not good]
        if not math.isclose(total := sum(self.density), 1, rel_tol=1e-6):
            wrong.append(f"a density whose sum is {total:g}")
        if wrong:
            raise ValueError(f"impossible lesson: {', '.join(wrong)}")


class Teaching:
    """A task of `bf_lib.training`: a student, its teacher, and what it learns from.

    Arguments:
        student: Makes the student from the teacher's UNet.
        lesson: What it is taught.
        start: The folder of an earlier training of the same student, to go on from.

    Raises:
        ValueError: If the model does not predict noise, or has other time-steps than the density.
        FileNotFoundError: If there is no training in `start`.
    """

    def __init__(
        self,
        student: Callable[[UNet2DConditionModel], UNet2DConditionModel],
        lesson: Lesson,
        start: Path | None = None,
    ) -> None:
        self.device = own_device()
        self.lesson = lesson
        self.pipe = load_pipeline(lesson.model, device=self.device)
        self._check_schedule(self.pipe.scheduler.config)
        self.teacher = self.pipe.unet.requires_grad_(False)
        self.model = student(self.teacher)
        said = asdict(lesson) | {"model": str(lesson.model), "examples": lesson.examples.name}
        recipe = getattr(self.model, "recipe", None)
        levels = recipe and sorted(recipe.levels.items())
        # Digests of what is long.
        self.identity = {name: digest(str(value).encode()) for name, value in said.items()}
        self.identity["levels"] = digest(str(levels).encode())
        if start is not None:
            load_ema(self.model, start)
            self.identity["start"] = digest(save(averages(start)))
        self.examples = Examples.load(lesson.examples)
        self.density = torch.tensor(lesson.density, dtype=torch.float64)
        self.alphas = self.pipe.scheduler.alphas_cumprod.to(self.device)

    def _check_schedule(self, config: Mapping) -> None:
        if config["prediction_type"] != "epsilon":  # Eqs. 2, 6 and 9 are of noise
            raise ValueError(
                f"{self.lesson.model} predicts {config['prediction_type']!r}; only models that "
                "predict noise ('epsilon') can be taught"
            )
        steps, density = config["num_train_timesteps"], len(self.lesson.density)
        if steps != density:
            raise ValueError(f"{self.lesson.model} has {steps} time-steps, the density {density}")

    def draw(self, size: int, generator: torch.Generator, t: Tensor | None = None) -> Batch:
        """Draws a batch; all random numbers are drawn on the CPU, so that all devices agree.

        Arguments:
            size: How many samples.
            generator: Where they are drawn from.
            t: Their time-steps, with shape (size,); by default drawn from the lesson's density.
        """
        latents, captions = self.examples.draw(size, generator)
        dropped = torch.rand(size, generator=generator) < self.lesson.dropped
        texts = ["" if gone else c for gone, c in zip(dropped.tolist(), captions, strict=True)]
        t = draw_times(self.density, size, generator) if t is None else t
        t = t.to(self.device)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        x = noised(latents.to(self.device), noise, self.alphas[t])
        return Batch(x, t, self.encode(texts), noise)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Returns texts as the UNet reads them, with shape (n, tokens, width)."""
        return self.pipe.encode_prompt(texts, self.device, 1, False)[0]

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns the loss of a batch, by the lesson's objective, and its parts."""
        parts = self._objective(self.draw(size, generator))
        if self.lesson.rate_weight > 0:
            rate = coded_bits(self.model)
            parts |= {"loss": parts["loss"] + self.lesson.rate_weight * rate, "rate": rate}
        return parts

    def _objective(self, batch: Batch) -> dict[str, Tensor]:
        if self.lesson.objective == "noise":
            mse = noise_loss(predicted(self.model, batch), batch.noise)
            return {"loss": mse, "noise": mse}
        if self.lesson.objective == "guided":
            empty = self.encode([""]).expand_as(batch.text)
            both = Batch(
                *(torch.cat([v, v]) for v in (batch.x, batch.t)),
                torch.cat([empty, batch.text]),
                batch.noise,
            )
            with torch.no_grad():
                wanted = self._guided(predicted(self.teacher, both))
            mse = noise_loss(self._guided(predicted(self.model, both)), wanted)
            return {"loss": mse, "noise": mse}
        return self._distillation(batch)

    def _distillation(self, batch: Batch) -> dict[str, Tensor]:
        with_features = self.lesson.feature_weight > 0
        with (
            BlockFeatures(self.teacher) if with_features else nullcontext() as known,
            BlockFeatures(self.model) if with_features else nullcontext() as learnt,
        ):
            with torch.no_grad():
                wanted = predicted(self.teacher, batch)
            squared = self.lesson.squared
            noise = noise_loss(predicted(self.model, batch), wanted, squared)
            if not with_features:
                return {"loss": noise, "noise": noise}
            relative = self.lesson.relative
            features = feature_loss(learnt.taken, known.taken, relative, squared)
        loss = noise + self.lesson.feature_weight * features
        return {"loss": loss, "noise": noise, "features": features}

    def _guided(self, noise: Tensor) -> Tensor:
        unconditional, conditional = noise.float().chunk(2)  # differences, times the guidance
        return unconditional + self.lesson.guidance * (conditional - unconditional)


@torch.no_grad()
def example_losses(
    teaching: Teaching,
    unet: UNet2DConditionModel,
    count: int,
    batch: int = 32,
    seed: int = 0,
    teacher: UNet2DConditionModel | None = None,
) -> list[float]:
    """Returns the loss of Stage II (Eq. 2) for single examples, the same for each UNet.

    Arguments:
        teaching: What they are drawn by, and their time-steps, noise and captions.
        unet: A student, or its teacher.
        count: How many.
        batch: How many at once.
        seed: Another one draws others.
        teacher: Whose noise is wanted, for the loss of Stage I without features (Eq. 6).
    """
    generator, found = torch.Generator().manual_seed(seed), []
    for start in range(0, count, batch):
        drawn = teaching.draw(min(batch, count - start), generator)
        wanted = drawn.noise if teacher is None else predicted(teacher, drawn)
        found += (predicted(unet, drawn) - wanted).square().flatten(1).mean(1).tolist()
    return found
