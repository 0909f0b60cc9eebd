"""Layers whose weights are rounded while they are trained (BitsFusion, §3.2 and §4.2).

The full-precision weight stays what is trained, through a straight-through estimator, and the
scale of each output channel is trained with it. With s the scale and codes from -B to B,

    w_hat = s q,   q = clip(round(w / s), -B, B),

the gradients are those of LSQ (Esser et al., 2020, https://arxiv.org/abs/1902.08153):
d w_hat / d w is 1 where |w| <= s B and 0 beyond, and d w_hat / d s is q - w / s inside and q
beyond. The logarithm of the scale is trained, so the scale stays positive and a step changes it
by a share of itself; its gradient, s times that of the scale, is

    <g, w_hat> - <g inside, w>

for the gradient g of w_hat. It is not multiplied by LSQ's factor 1 / sqrt(N B), N the weights of
a scale: Adam divides a gradient by its size, and a factor only matters where that is not well
above Adam's epsilon, or by the share that scales have of the norm by which all gradients are
clipped. What does count is the rate of scales, which is a share of themselves and can be larger
than that of weights (`Plan.rates`).

Going forward, the scale is rounded to float16, in which it is stored; so what is trained is, bit
for bit, what is packed, unless the forward pass has a precision of its own. Grids that are not
balanced have other bounds than -B and B; those without a zero (half-shifted) have their codes at
odd halves.
"""

__all__ = [
    "FakeQuantized",
    "attach_fake_quantizer_",
    "balanced",
    "bake_weights_",
    "fake_quantizers",
]

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.utils import parametrize

from bf_lib.grids import alternating_scale, balanced_codes

LEAST = torch.finfo(torch.float16).smallest_normal  # below it float16 is too coarse for a scale


class FakeQuantized(nn.Module):
    """A parametrization of a weight: rounded going forward, straight through going back.

    Arguments:
        scale: Where the scale of each output channel starts, with shape (out, 1, ...).
        low: The smallest code, one for all channels or with the shape of the scale.
        high: The largest code, likewise.
        shift: 0, or 1/2 for codes at odd halves.
    """

    def __init__(
        self, scale: Tensor, low: float | Tensor, high: float | Tensor, shift: float = 0.0
    ) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(scale.detach().log())
        self.register_buffer("low", torch.as_tensor(low).to(scale), persistent=False)
        self.register_buffer("high", torch.as_tensor(high).to(scale), persistent=False)
        self.shift = shift

    @property
    def scale(self) -> Tensor:
        """The scale of each output channel as it is stored, with shape (out, 1, ...)."""
        return _stored(self.log_scale.detach())

    @property
    def levels(self) -> int:
        """The number of levels of a balanced grid.

        Raises:
            ValueError: If it is another.
        """
        if self.shift or not bool((self.low == -self.high).all()):
            raise ValueError("the grid is not balanced")
        return 2 * int(self.high.flatten()[0]) + 1

    def forward(self, weight: Tensor) -> Tensor:
        """Returns the rounded weight, with shape (out, *)."""
        return _Rounded.apply(weight, self.log_scale, self.low, self.high, self.shift)


class _Rounded(torch.autograd.Function):
    """Rounds with the gradients above; keeps nothing large that its caller does not keep.

    Unless the forward pass is in bfloat16: its caller then keeps copies in that.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        weight: Tensor,
        log_scale: Tensor,
        low: Tensor,
        high: Tensor,
        shift: float,
    ) -> Tensor:
        scale = _stored(log_scale)
        codes = weight / scale
        codes = codes.sub_(shift).round_().add_(shift) if shift else codes.round_()
        rounded = codes.clamp_(low, high).mul_(scale)
        ctx.save_for_backward(weight, rounded, low * scale, high * scale)
        return rounded

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, rounded, low, high = ctx.saved_tensors
        inside = gradient * ((weight >= low) & (weight <= high))
        of_scale = _dot(gradient, rounded) - _dot(inside, weight)
        return inside, of_scale.view_as(low), None, None, None


def _stored(log_scale: Tensor) -> Tensor:
    return log_scale.exp().clamp_min(LEAST).half().to(log_scale.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Returns the inner products of the rows of two tensors, with shape (rows,)."""
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))


def balanced(scale: Tensor, levels: int) -> FakeQuantized:
    """Returns what rounds a weight to a balanced grid.

    Arguments:
        scale: Where the scale of each output channel starts, with shape (out, 1, ...).
        levels: The number of levels; odd, at least 3.
    """
    bound = int(balanced_codes(levels)[-1])
    return FakeQuantized(scale, -bound, bound)


def attach_fake_quantizer_(layer: nn.Module, levels: int) -> FakeQuantized:
    """Makes a layer compute with its rounded weight; it is still a layer of its class.

    Arguments:
        layer: A convolution or linear layer.
        levels: The number of levels of its balanced grid; odd, at least 3.

    Returns:
        What holds the scales, which start from the alternating ones (Eq. 5).
    """
    quantizer = balanced(alternating_scale(layer.weight.detach(), levels), levels)
    parametrize.register_parametrization(layer, "weight", quantizer)
    return quantizer


def fake_quantizers(unet: nn.Module) -> dict[str, FakeQuantized]:
    """Returns what holds the scales of each layer whose weight is rounded, by the layer's name."""
    return {
        name.removesuffix(".parametrizations.weight.0"): module
        for name, module in unet.named_modules()
        if isinstance(module, FakeQuantized)
    }


def bake_weights_(unet: nn.Module) -> None:
    """Makes layers with parametrized weights ordinary: their weights are what they compute with.

    Not with `remove_parametrizations`: that deletes the weight from the class of the layer, which
    copies of it share, so that of a model and its copy the other would have none.
    """
    for layer in unet.modules():
        if parametrize.is_parametrized(layer, "weight"):
            trained = layer.parametrizations.weight.original.requires_grad
            weight = nn.Parameter(layer.weight.detach(), trained)
            del layer.parametrizations
            layer.__class__ = type(layer).__bases__[0]
            layer.weight = weight
