"""Noised latents."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from bf_lib.noising import Batch, noised

# SD's schedule: betas whose roots are evenly spaced
ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_latents_are_noised_as_the_model_was_trained(kind):
    """The two differ in what `add_noise` of a scheduler that has no steps set takes times for."""
    scheduler = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 999])
    found = noised(latents, noise, scheduler.alphas_cumprod[t])
    for n, a in enumerate(ALPHAS[t]):
        wanted = a**0.5 * latents[n] + (1 - a) ** 0.5 * noise[n]
        torch.testing.assert_close(found[n], wanted.float(), rtol=1e-4, atol=1e-5)


def test_a_part_of_a_batch_has_its_own_of_everything():
    values = torch.arange(4.0)
    part = Batch(values, values + 10, values + 20, values + 30)[1:3]
    found = [x.tolist() for x in (part.x, part.t, part.text, part.noise)]
    assert found == [[1, 2], [11, 12], [21, 22], [31, 32]]
