"""What a student learns from its teacher (BitsFusion, §4.2, Eqs. 6 to 9).

    L_dist = L_noise + lambda L_feat

with the squared error of the predicted noise, and that of the features which the Down and Up
blocks hand on, as in BK-SDM (Kim et al., 2023, https://arxiv.org/abs/2305.15798). The paper
writes norms and does not say whether they are squared or how features of different blocks, whose
sizes differ by orders of magnitude, are weighted. Here errors are mean squares, or their roots
for each sample, and those of a block's features can be divided by those of the teacher's features.
"""

__all__ = ["BlockFeatures", "feature_loss", "latent_error", "noise_loss"]

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 1e-12  # of a mean square, so that the gradient of its root stays finite


def noise_loss(predicted: Tensor, wanted: Tensor, squared: bool = True) -> Tensor:
    """Returns the mean squared error of predicted noise: Eq. 6 against the teacher's, or Eq. 2.

    Arguments:
        predicted: Noise, with shape (n, *).
        wanted: The same of the teacher, or what was added.
        squared: Or else the root of each sample's mean square, averaged over samples.
    """
    predicted, wanted = predicted.float(), wanted.float()  # where forward passes are in bfloat16
    if squared:
        return F.mse_loss(predicted, wanted)
    means = (predicted - wanted).square().flatten(1).mean(dim=1)
    return (means + SMALLEST).sqrt().mean()


def feature_loss(
    features: Sequence[Tensor],
    wanted: Sequence[Tensor],
    relative: bool = False,
    squared: bool = True,
) -> Tensor:
    """Returns the error of features, averaged over blocks (Eq. 7).

    Arguments:
        features: The student's features of each block.
        wanted: The teacher's.
        relative: Whether each block's error is divided by what it would be of the teacher's
            features beside zeros.
        squared: As in `noise_loss`.
    """
    errors = [noise_loss(f, w, squared) for f, w in zip(features, wanted, strict=True)]
    if relative:
        whole = [noise_loss(torch.zeros_like(w), w, squared) for w in wanted]
        errors = [e / w for e, w in zip(errors, whole, strict=True)]
    return torch.stack(errors).mean()


def latent_error(predicted: Tensor, wanted: Tensor, alphas: Tensor) -> Tensor:
    """Returns the squared error of the clean latents that noise predictions stand for (Eq. 9).

    With z_t = sqrt(a) z_0 + sqrt(1 - a) n, an error of the noise is one of z_0 that is
    sqrt((1 - a) / a) times as large.

    Arguments:
        predicted: The student's noise, with shape (n, *).
        wanted: The teacher's.
        alphas: The cumulative product a of the noise schedule at each sample's time, shape (n,).

    Returns:
        The mean over each sample's elements, with shape (n,).
    """
    squared = (predicted - wanted).square().flatten(1).mean(dim=1)
    return (1 - alphas) / alphas * squared


class BlockFeatures:
    """Keeps what the Down and Up blocks of a UNet hand on, for the last forward pass.

    Use it as a context: the hooks are removed at its end.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.blocks = [*unet.down_blocks, *unet.up_blocks]
        self.last: dict[int, Tensor] = {}

    def __enter__(self) -> Self:
        self.handles = [
            block.register_forward_hook(lambda _, __, out, n=n: self._keep(n, out))
            for n, block in enumerate(self.blocks)
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self.handles:
            handle.remove()
        self.last = {}

    def _keep(self, number: int, out: Tensor | tuple) -> None:
        self.last[number] = out[0] if isinstance(out, tuple) else out  # a Down block's skips go

    @property
    def taken(self) -> list[Tensor]:
        """The features of each block of the last pass, Down blocks first."""
        return [self.last[n] for n in range(len(self.blocks))]
