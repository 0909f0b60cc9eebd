"""Layers whose weights are rounded while they are trained (BitsFusion, §3.2 and §4.2).

The full-precision weight stays what is trained, through a straight-through estimator, and the
scale of each output channel is trained with it. With s the scale and B the largest code,

    w_hat = s round(clip(w / s, -B, B)),

the gradients are those of LSQ (Esser et al., 2020, https://arxiv.org/abs/1902.08153):
d w_hat / d w is 1 inside the range and 0 beyond, and d w_hat / d s is round(w / s) - w / s inside
and the sign times B beyond. The logarithm of the scale is trained, so the scale stays positive and
a step changes it by a share of itself; LSQ's factor on its gradient would change nothing under
Adam, which divides by the gradient's size.
"""

__all__ = ["FakeQuantized", "attach_fake_quantizer_"]

from torch import Tensor, nn
from torch.nn.utils import parametrize

from bf_lib.grids import alternating_scale, balanced_codes
from bf_lib.layers import get_layer


class FakeQuantized(nn.Module):
    """A parametrization of a weight: rounded going forward, straight through going back."""

    def __init__(self, weight: Tensor, levels: int) -> None:
        super().__init__()
        self.bound = int(balanced_codes(levels)[-1])
        self.log_scale = nn.Parameter(alternating_scale(weight, levels).log())

    @property
    def scale(self) -> Tensor:
        """The scale of each output channel, with shape (out, 1, ...)."""
        return self.log_scale.exp()

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the rounded weight, with shape (out, *)."""
        scale = self.scale
        inside = (weight / scale).clamp(-self.bound, self.bound)
        codes = inside + (inside.round() - inside).detach()
        return (codes * scale).to(weight.dtype)


def attach_fake_quantizer_(unet: nn.Module, name: str, levels: int) -> FakeQuantized:
    """Makes a layer compute with its rounded weight, the class of the layer staying what it is.

    `torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")` takes it off again.

    Arguments:
        unet: The model that the layer is of.
        name: The layer's dotted name.
        levels: The number of levels of its grid; odd, at least 3.

    Returns:
        What holds the scales, started from the alternating ones (Eq. 5).
    """
    layer = get_layer(unet, name)
    quantizer = FakeQuantized(layer.weight.detach(), levels)
    parametrize.register_parametrization(layer, "weight", quantizer)
    return quantizer
