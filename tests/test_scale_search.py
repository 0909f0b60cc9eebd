"""The optimal scale on weights of every kind, against a search through all breakpoints."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from bf_lib.grids import (
    alternating_scale,
    fake_quantize,
    minmax_scale,
    optimal_scale,
    quantize,
    relative_mse,
)

few = settings(max_examples=40)


def error(weight: Tensor, scale: Tensor, levels: int) -> Tensor:
    """The relative squared error of each channel."""
    return relative_mse(weight, fake_quantize(weight, scale, levels), per_channel=True)


def brute_force(channel: Tensor, levels: int) -> float:
    """The least relative squared error of a channel, over the codes between all breakpoints."""
    bound = (levels - 1) // 2
    a = channel.abs().double().numpy()
    breaks = np.unique(np.outer(a, 2 / (2 * np.arange(1, bound + 1) - 1)))
    scales = np.append((breaks[1:] + breaks[:-1]) / 2, breaks[breaks > 0][0] / 2)
    codes = np.clip(np.round(a / scales[:, None]), 0, bound)
    size = np.square(codes).sum(axis=1)
    fit = np.divide(codes @ a, size, out=np.zeros_like(size), where=size > 0)
    return float(np.square(a - fit[:, None] * codes).sum(axis=1).min() / (a @ a))


def gaussian(out: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(out, n, generator=torch.Generator().manual_seed(seed))


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Small weights with ties, zeros, single elements and outliers, no channel all zero."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 12)))
    magnitude = st.floats(2**-10, 2**10, width=32)
    value = st.one_of(st.just(0.0), magnitude, magnitude.map(lambda x: -x))
    weight = torch.from_numpy(draw(arrays(np.float32, shape, elements=value)))
    weight[:, 0] = torch.where(weight.any(dim=1), weight[:, 0], 1.0)
    return weight


KINDS = {
    "gaussian": gaussian(6, 60),
    "heavy tails": gaussian(6, 60) ** 5,
    "short": gaussian(6, 3),
    "ties": gaussian(6, 60).round() + torch.eye(6, 60),
    "mostly equal": gaussian(6, 60) * (gaussian(6, 60, seed=1) > 1.5) + 1e-3,
    "far outlier": gaussian(6, 60) + 1e4 * torch.eye(6, 60),
    "uniform": torch.rand(6, 60, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("levels", [3, 5, 9, 17, 65])
@pytest.mark.parametrize("weight", KINDS.values(), ids=KINDS.keys())
def test_it_is_the_optimum(weight, levels):
    # In double precision, so that nothing hides behind rounding.
    found = error(weight.double(), optimal_scale(weight.double(), levels), levels)
    wanted = [brute_force(row, levels) for row in weight]
    assert found.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-14)


@few
@given(weights(), st.sampled_from([3, 5, 9, 17]))
def test_it_is_the_optimum_of_any_weight(weight, levels):
    found = error(weight.double(), optimal_scale(weight.double(), levels), levels)
    wanted = [brute_force(row, levels) for row in weight]
    assert found.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-14)


@few
@given(weights(), st.sampled_from([3, 5, 9, 17, 129]))
def test_it_is_never_worse(weight, levels):
    least = error(weight, optimal_scale(weight, levels), levels)
    for scale in (minmax_scale, alternating_scale):
        # Single precision rounds scale times code.
        assert (least <= error(weight, scale(weight, levels), levels) + 1e-7).all()


def test_many_channels_at_once_have_the_scales_of_each():
    weight = gaussian(300, 2000)  # several chunks of the search
    weight[17] = 0
    together = optimal_scale(weight, 9)
    for i in (0, 17, 131, 299):
        assert torch.equal(together[i : i + 1], optimal_scale(weight[i : i + 1], 9))


@pytest.mark.parametrize("scale_of", [minmax_scale, alternating_scale, optimal_scale])
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e30, 1e37])
def test_tiny_and_huge_weights_are_finite(scale_of, size):
    weight = gaussian(3, 20).clamp(-5, 5)
    scale = scale_of(weight * size, 9)
    assert (scale.isfinite() & (scale > 0)).all()
    assert fake_quantize(weight * size, scale, 9).isfinite().all()
    if size > 1e-40:  # below, single precision has no digits left
        expected = error(weight, scale_of(weight, 9), 9)
        torch.testing.assert_close(error(weight * size, scale, 9), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale_of", [minmax_scale, alternating_scale, optimal_scale])
@pytest.mark.parametrize("size", [1e-290, 1e-200, 1e200, 1e300])
def test_double_precision_is_used_to_its_ends(scale_of, size):
    weight = gaussian(3, 20).double().clamp(-5, 5)
    scale = scale_of(weight * size, 9)
    torch.testing.assert_close(scale / size, scale_of(weight, 9), rtol=1e-9, atol=0)


def test_parameters_give_scales_without_history():
    weight = torch.nn.Parameter(gaussian(4, 8))
    assert not optimal_scale(weight, 3).requires_grad


def test_halfway_goes_to_the_even_code():
    weight = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    assert quantize(weight, torch.ones(1, 1), 9).codes.tolist() == [[-2, -2, 0, 0, 2, 2]]


def test_scales_that_do_not_fit_are_refused():
    weight = gaussian(4, 4)
    with pytest.raises(ValueError, match=r"scale must have shape \(4, 1\), got \(4,\)"):
        quantize(weight, torch.ones(4), 3)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive and finite"):
            quantize(weight, torch.tensor([[1.0], [bad], [1.0], [1.0]]), 3)


def test_errors_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        relative_mse(torch.ones(3, 4), torch.ones(4))


def test_relative_mse():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    approximation = torch.tensor([[3.0, 3.0], [0.0, 0.0], [1.0, 0.0]])
    each = relative_mse(weight, approximation, per_channel=True)
    assert each.tolist() == [pytest.approx(0.04), 0.0, float("inf")]
    assert relative_mse(weight, approximation).item() == pytest.approx(2 / 25)
