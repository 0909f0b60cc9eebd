"""Image metrics of the sensitivity analysis: MSE, PSNR, perceptual distance, CLIP score.

All take images as uint8 with shape (n, height, width, 3) and return one number per image (§3.2
and App. B of BitsFusion). `load_metrics` gives those that suit a model.
"""

__all__ = [
    "ClipScorer",
    "clip_score",
    "clip_vit_b32",
    "load_metrics",
    "mini_clip",
    "mse",
    "psnr",
]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor, nn

from bf_lib.judges import load_clip_judge
from bf_lib.mini import to_float, tokenize
from bf_lib.models import MODELS, UNREACHABLE, ModelNotFound
from bf_lib.perceptual import Perceptual, lpips_alex, lpips_lite0

# ViT-B/32, the paper's CLIP, with OpenAI's weights in the format of open_clip
CLIP_REPOSITORY, CLIP_FILE = "timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors"


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Returns the mean squared error of each image, in squared units of 0..255.

    These are the units of the paper's axes (Fig. 9).

    Arguments:
        a: Images as uint8, with shape (n, *).
        b: What they are compared with, with the same shape.

    Returns:
        The errors in float64, with shape (n,).
    """
    if a.shape != b.shape:
        raise ValueError(f"images differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    # Squared differences of whole numbers are exact in single precision; their mean is not.
    return (a.float() - b.float()).square().flatten(1).mean(dim=1, dtype=torch.float64)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio of each image in dB, for a data range of 255.

    That of identical images is infinite.

    Arguments:
        a: Images as uint8, with shape (n, *).
        b: What they are compared with, with the same shape.

    Returns:
        The ratios in float64, with shape (n,).
    """
    return 10 * torch.log10(255**2 / mse(a, b))


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """Returns the cosine similarity of each image with its text, in [-1, 1].

    This is the scale of the paper, where SD-v1.5 has 0.3175 (Table 3): not times 100 and not cut
    off at 0, as torchmetrics has it.

    Arguments:
        images: The embeddings of the images, with shape (n, d).
        texts: The embeddings of the texts, with shape (n, d).

    Returns:
        The scores, with shape (n,).
    """
    if images.shape != texts.shape:
        raise ValueError(f"embeddings differ: {tuple(images.shape)} and {tuple(texts.shape)}")
    return F.cosine_similarity(images, texts, dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class ClipScorer:
    """A CLIP model with what prepares its input."""

    name: str  # what to call the model in tables and figures
    model: nn.Module  # with open_clip's encode_image and encode_text
    tokenize: Callable[[list[str]], Tensor]  # texts -> token ids (n, tokens)
    preprocess: Callable[[Tensor], Tensor]  # uint8 (n, h, w, 3) -> what the model takes

    @torch.inference_mode()
    def embed_images(self, images: Tensor, batch: int = 64) -> Tensor:
        """Returns embeddings of unit length, with shape (n, d).

        Arguments:
            images: Images as uint8, with shape (n, h, w, 3).
            batch: How many of them the model sees at once.
        """
        device = next(self.model.parameters()).device
        parts = (self.preprocess(part).to(device) for part in images.split(batch))
        return torch.cat([self.model.encode_image(part, normalize=True) for part in parts])

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch: int = 64) -> Tensor:
        """Returns embeddings of unit length, with shape (n, d)."""
        device = next(self.model.parameters()).device
        parts = self.tokenize(list(texts)).to(device).split(batch)
        return torch.cat([self.model.encode_text(part, normalize=True) for part in parts])

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Returns the CLIP score of each image with its text, with shape (n,)."""
        return clip_score(self.embed_images(images), self.embed_texts(texts))


def mini_clip(device: str | torch.device = "cpu") -> ClipScorer:
    """Loads the CLIP judge of `mini`, which was trained on its scenes."""
    model, tokenizer = load_clip_judge(Path(MODELS["mini"]))
    return ClipScorer(
        name="CLIP judge",
        model=model.to(device),
        tokenize=partial(tokenize, tokenizer),
        preprocess=lambda images: to_float(images.cpu().numpy()),
    )


def clip_vit_b32(device: str | torch.device = "cpu") -> ClipScorer:
    """Loads CLIP ViT-B/32 (OpenAI), the paper's CLIP (§5).

    Raises:
        ModelNotFound: If its weights are neither in the local cache nor can be downloaded.
    """
    try:
        weights = hf_hub_download(CLIP_REPOSITORY, CLIP_FILE)
    except UNREACHABLE as error:
        raise ModelNotFound(
            f"no weights for CLIP ViT-B/32: looked for {CLIP_FILE} of {CLIP_REPOSITORY} in the "
            "local cache and on the hub. To get them: where there is a network, "
            f"`hf download {CLIP_REPOSITORY} {CLIP_FILE}` puts them in the cache."
        ) from error
    # OpenAI trained with the quick form of GELU.
    name = "ViT-B-32-quickgelu"
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=weights)
    return ClipScorer(
        name="CLIP ViT-B/32",
        model=model.eval().to(device),
        tokenize=open_clip.get_tokenizer(name),
        preprocess=partial(_each, transform),
    )


def load_metrics(model: str, device: str | torch.device = "cpu") -> tuple[Perceptual, ClipScorer]:
    """Loads the perceptual distance and the CLIP that suit a model.

    Arguments:
        model: "mini", or "sd15" for any model of photographs and pictures at large.
        device: Where the networks go.

    Raises:
        ModelNotFound: If their weights cannot be had.
        ValueError: If there are no metrics of this name.
    """
    if model == "mini":
        return lpips_lite0(device), mini_clip(device)
    if model == "sd15":
        return lpips_alex(device), clip_vit_b32(device)
    raise ValueError(f"metrics must be those of 'mini' or 'sd15', got {model!r}")


def _each(transform: Callable[[Image.Image], Tensor], images: Tensor) -> Tensor:
    """Applies a transform of PIL images to each of a batch."""
    return torch.stack([transform(Image.fromarray(image.cpu().numpy())) for image in images])
