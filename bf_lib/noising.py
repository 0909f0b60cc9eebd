"""Noised latents, which a UNet is trained and compared on."""

__all__ = ["Batch", "noised", "predicted"]

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Noised latents at their time-steps, with text."""

    x: Tensor  # (n, c, h, w)
    t: Tensor  # (n,)
    text: Tensor  # (n, tokens, width)
    noise: Tensor  # (n, c, h, w): what is to be predicted

    def __getitem__(self, part: slice) -> "Batch":
        return Batch(self.x[part], self.t[part], self.text[part], self.noise[part])


def noised(latents: Tensor, noise: Tensor, alphas: Tensor) -> Tensor:
    """Returns latents at times of training, sqrt(a) z + sqrt(1 - a) n.

    Not a scheduler's `add_noise`: that of DPM-Solver++ looks times up among those of sampling,
    and that of Euler does not scale its result as the UNet wants it.

    Arguments:
        latents: The clean latents z, with shape (n, *).
        noise: The noise n, with the same shape.
        alphas: The cumulative product a of the noise schedule at each sample's time, shape (n,).
    """
    a = alphas.view(-1, *[1] * (latents.ndim - 1))
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def predicted(unet: nn.Module, batch: Batch) -> Tensor:
    """Returns the noise that a UNet predicts of a batch, with shape (n, c, h, w)."""
    return unet(batch.x, batch.t, encoder_hidden_states=batch.text, return_dict=False)[0]
