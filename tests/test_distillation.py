"""Losses of distillation: values by hand, and features that are those of the blocks."""

import pytest
import torch
from toys import WIDTH, toy_unet

from bf_lib.distillation import BlockFeatures, feature_loss, latent_error, noise_loss
from bf_lib.models import load_pipeline


def test_losses_are_mean_squares():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]])
    assert noise_loss(a, b) == 2
    assert float(noise_loss(a, b, squared=False)) == pytest.approx(2**0.5)
    two = torch.tensor([[3.0, 4.0], [0.0, 0.0]])  # roots of each sample, not of all
    assert float(noise_loss(two, 0 * two, squared=False)) == pytest.approx(12.5**0.5 / 2, rel=1e-5)
    assert feature_loss([a, b], [b, b]) == 1
    # relative to the mean square of the second, 6.5
    assert float(feature_loss([a, b], [b, b], relative=True)) == pytest.approx(1 / 6.5)
    rooted = feature_loss([a, b], [b, b], relative=True, squared=False)
    assert float(rooted) == pytest.approx((2 / 6.5) ** 0.5 / 2, rel=1e-5)
    with pytest.raises(ValueError, match="zip"):
        feature_loss([a], [a, b])


def test_the_error_of_latents_is_that_of_the_clean_latents_noise_stands_for():
    """By Eq. 9, and by solving z_t = sqrt(a) z_0 + sqrt(1 - a) n for z_0 with either noise."""
    generator = torch.Generator().manual_seed(0)
    alphas = load_pipeline("mini").scheduler.alphas_cumprod[[10, 500, 990]]
    z_t, first, second = torch.randn(3, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    a = alphas.double().view(3, 1, 1, 1)
    clean = [(z_t - (1 - a).sqrt() * n) / a.sqrt() for n in (first, second)]
    wanted = (clean[0] - clean[1]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(latent_error(first, second, alphas.double()), wanted)


def test_features_are_what_the_blocks_hand_on():
    unet = toy_unet()
    seen = []
    for block in (*unet.down_blocks, *unet.up_blocks):
        block.register_forward_hook(lambda _, __, out: seen.append(out))
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 10, WIDTH)
    with BlockFeatures(unet) as features:
        unet(x, 3, encoder_hidden_states=text)
        taken = features.taken
    assert len(taken) == 8
    for feature, out in zip(taken, seen, strict=True):
        assert torch.equal(feature, out[0] if isinstance(out, tuple) else out)
    assert taken[0].shape == (2, 8, 4, 4) and taken[-1].shape == (2, 8, 8, 8)
    unet(x, 4, encoder_hidden_states=text)  # the hooks are gone
    assert features.last == {}


def test_gradients_flow_through_features():
    unet = toy_unet()
    with BlockFeatures(unet) as features:
        unet(torch.randn(1, 4, 8, 8), 3, encoder_hidden_states=torch.randn(1, 10, WIDTH))
        feature_loss(features.taken, [torch.zeros_like(f) for f in features.taken]).backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0
