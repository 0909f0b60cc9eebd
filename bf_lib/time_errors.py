"""Where on the way from noise to image a student errs (BitsFusion, §4.2, Eq. 9 and Fig. 4)."""

__all__ = ["errors_over_time"]

from collections.abc import Sequence

import pandas as pd
import torch

from bf_lib.distillation import latent_error
from bf_lib.noising import predicted
from bf_lib.progress import progress
from bf_lib.teaching import Teaching


@torch.no_grad()
def errors_over_time(
    teaching: Teaching, times: Sequence[int], count: int = 128, batch: int = 32, seed: int = 0
) -> pd.DataFrame:
    """Measures the error of a student's noise, against its teacher's, at some time-steps.

    The same examples and the same noise are taken at each; the paper takes 128 pairs.

    Arguments:
        teaching: The student, its teacher, and examples.
        times: The time-steps.
        count: How many examples at each.
        batch: How many at once.
        seed: Another one draws other examples.

    Returns:
        Columns t, noise_mse (the mean squared error of the noise) and latent_mse (of the clean
        latents that it stands for, Eq. 9).
    """
    model, training = teaching.model, teaching.model.training
    model.eval()
    records = []
    for time in progress(times, desc="errors over time"):
        generator = torch.Generator().manual_seed(seed)
        noise, latents = [], []
        for start in range(0, count, batch):
            size = min(batch, count - start)
            drawn = teaching.draw(size, generator, torch.full((size,), int(time)))
            got, wanted = predicted(model, drawn), predicted(teaching.teacher, drawn)
            noise.append((got - wanted).square().flatten(1).mean(1))
            latents.append(latent_error(got, wanted, teaching.alphas[drawn.t]))
        means = (float(torch.cat(values).mean()) for values in (noise, latents))
        records.append((int(time), *means))
    model.train(training)
    return pd.DataFrame(records, columns=["t", "noise_mse", "latent_mse"])
