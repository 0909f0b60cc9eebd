"""Training for the size of a file after entropy coding, which the paper does not do.

An entropy coder takes -log2 p_k bits for a code k that a share p_k of its layer's weights has, and
a file of `compress="zstd"` comes close to it (FORMAT.md). To make it smaller, the length of a code
is added to what is minimised, interpolated linearly between levels, so that weights are drawn
towards the levels that are frequent already: the scalar case of entropy-constrained vector
quantization (Chou, Lookabaugh and Gray, 1989, https://doi.org/10.1109/29.17498), with the lengths
of each step's codes.
Of three levels the frequent one is zero, and what comes of it is a sparse ternary model.
"""

__all__ = ["code_lengths", "coded_bits"]

import torch
from torch import Tensor, nn

from bf_lib.fakequant import FakeQuantized, fake_quantizers


def code_lengths(codes: Tensor, bound: int) -> Tensor:
    """Returns how many bits an entropy coder takes for each level, with shape (2 B + 1,).

    Arguments:
        codes: Codes of any shape, from -B to B; each level counts as seen once more than it was.
        bound: The largest code, B.
    """
    counts = torch.bincount((codes.flatten() + bound).int(), minlength=2 * bound + 1) + 1
    return -(counts / counts.sum()).log2()


def coded_bits(student: nn.Module) -> Tensor:
    """Returns the bits of a code, entropy-coded layer by layer: a mean over all rounded weights.

    The value is that of the codes; its gradient is that of the interpolated lengths, for weights
    within the range and for scales, and zero for weights beyond it, as in `bf_lib.fakequant`.

    Arguments:
        student: A student with balanced grids.
    """
    quantizers = fake_quantizers(student)
    bits, weights = [], 0
    for name, quantizer in quantizers.items():
        weight = student.get_submodule(name).parametrizations.weight.original
        bits.append(_bits(weight, quantizer))
        weights += weight.numel()
    return torch.stack(bits).sum() / weights


def _bits(weight: Tensor, quantizer: FakeQuantized) -> Tensor:
    bound = quantizer.levels // 2
    places = (weight / quantizer.log_scale.exp()).clamp(-bound, bound)
    with torch.no_grad():
        codes = (weight / quantizer.scale).round_().clamp_(-bound, bound)
        lengths = code_lengths(codes, bound)
        exact = lengths[(codes + bound).int()].sum()
        below = places.floor().clamp_max_(bound - 1)
        slopes = lengths.diff()[(below + bound).int()]
    # Between two levels the length is linear, so its gradient is the slope there.
    drawn = (slopes * places).sum()
    return exact + drawn - drawn.detach()
