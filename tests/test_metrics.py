"""Metrics against other implementations of them."""

from pathlib import Path

import open_clip
import pytest
import torch
import torchmetrics
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from bf_lib import metrics
from bf_lib.metrics import ClipScorer, clip_score, clip_vit_b32, load_metrics, mse, psnr
from bf_lib.models import ModelNotFound


def images(seed: int = 0, n: int = 4, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, side, side, 3), generator=generator, dtype=torch.uint8)


def test_mse_and_psnr_agree_with_torchmetrics():
    a, b = images(0), images(1)
    for i in range(4):
        x, y = a[i].double(), b[i].double()
        expected = torchmetrics.functional.mean_squared_error(x.flatten(), y.flatten())
        assert mse(a, b)[i].item() == pytest.approx(expected.item(), rel=1e-9)
        expected = torchmetrics.functional.image.peak_signal_noise_ratio(x, y, data_range=255.0)
        assert psnr(a, b)[i].item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_clip_judge_takes_pixels_from_minus_one_to_one():
    scorer, texts = metrics.mini_clip(), ["a red star", "two blue rings"]
    pixels = images(n=2, side=64)
    with torch.inference_mode():
        image = scorer.model.encode_image(pixels.permute(0, 3, 1, 2) / 127.5 - 1)
        text = scorer.model.encode_text(scorer.tokenize(texts))
    wanted = nn.functional.cosine_similarity(image, text)
    torch.testing.assert_close(scorer(pixels, texts), wanted, rtol=1e-4, atol=1e-5)


def test_mse_is_in_squared_units_of_0_to_255():
    a = torch.zeros(2, 3, 3, 3, dtype=torch.uint8)
    b = torch.stack([torch.full_like(a[0], 255), torch.full_like(a[0], 2)])
    assert mse(a, b).tolist() == [255.0**2, 4.0]
    assert mse(b, a).tolist() == mse(a, b).tolist()
    assert psnr(a, b).tolist() == [0.0, pytest.approx(42.1102, abs=1e-4)]


def test_identical_images_have_no_error():
    assert mse(images(), images()).tolist() == [0.0] * 4
    assert psnr(images(), images()).tolist() == [float("inf")] * 4


def test_images_must_have_one_shape():
    with pytest.raises(
        ValueError, match=r"differ in shape: \(4, 16, 16, 3\) and \(1, 16, 16, 3\)"
    ):
        mse(images(), images(n=1))


def test_clip_score_is_the_cosine():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 8, generator=generator) for _ in range(2))
    expected = torchmetrics.functional.pairwise_cosine_similarity(a, b).diagonal()
    torch.testing.assert_close(clip_score(a, b), expected)
    torch.testing.assert_close(clip_score(3 * a, 0.1 * b), expected)
    assert clip_score(a, -a).tolist() == pytest.approx([-1.0] * 6)  # not cut off at zero
    with pytest.raises(ValueError, match=r"embeddings differ: \(6, 8\) and \(1, 8\)"):
        clip_score(a, b[:1])


class Random(nn.Module):
    """A CLIP of one random layer per tower."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Parameter(torch.randn(3 * 16 * 16, 5, generator=generator))
        self.text = nn.Parameter(torch.randn(256, 5, generator=generator))

    def encode_image(self, x: Tensor, normalize: bool) -> Tensor:
        assert normalize
        return nn.functional.normalize(x.flatten(1) @ self.image, dim=-1)

    def encode_text(self, tokens: Tensor, normalize: bool) -> Tensor:
        assert normalize
        return nn.functional.normalize(self.text[tokens].sum(1), dim=-1)


def test_clip_scorer_scores_each_image_with_its_text():
    scorer = ClipScorer(
        name="random",
        model=Random(),
        tokenize=lambda texts: torch.tensor([[ord(c) for c in text.ljust(6)] for text in texts]),
        preprocess=lambda batch: batch.permute(0, 3, 1, 2).float() / 127.5 - 1,
    )
    texts = ["cat", "dog", "bird", "a fish"]
    scores = scorer(images(), texts)
    assert scores.shape == (4,)
    # The formula of torchmetrics' CLIPScore, but for its factor 100 and its cut at 0.
    a, b = scorer.embed_images(images()), scorer.embed_texts(texts)
    torch.testing.assert_close(
        scores, ((a / a.norm(dim=-1, keepdim=True)) * (b / b.norm(dim=-1, keepdim=True))).sum(-1)
    )
    for batch in (1, 3):
        torch.testing.assert_close(scorer.embed_images(images(), batch), a)
        torch.testing.assert_close(scorer.embed_texts(texts, batch), b)
    assert not a.requires_grad


def test_clip_vit_b32_prepares_images_as_open_clip_does(monkeypatch, tmp_path):
    """With a small model in the place of ViT-B/32: that one is a download."""
    small = open_clip.CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    )
    transform = open_clip.image_transform(32, is_train=False)
    asked = {}

    def create(name: str, pretrained: str) -> tuple:
        asked.update(name=name, pretrained=pretrained)
        return small, None, transform

    monkeypatch.setattr(metrics, "hf_hub_download", lambda *_: str(tmp_path / "weights"))
    monkeypatch.setattr(metrics.open_clip, "create_model_and_transforms", create)
    scorer = clip_vit_b32()
    assert asked == {"name": "ViT-B-32-quickgelu", "pretrained": str(tmp_path / "weights")}
    pictures = images(side=48)
    pil = [metrics.Image.fromarray(picture.numpy()) for picture in pictures]
    with torch.no_grad():
        expected = small.eval().encode_image(torch.stack([transform(p) for p in pil]))
        words = small.encode_text(open_clip.get_tokenizer("ViT-B-32")(["a cat"] * 4))
    scores = scorer(pictures, ["a cat"] * 4)
    torch.testing.assert_close(scores, torch.cosine_similarity(expected, words))


def test_missing_clip_weights_are_named(monkeypatch):
    def fail(*_: str) -> Path:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(metrics, "hf_hub_download", fail)
    with pytest.raises(ModelNotFound, match=r"no weights for CLIP ViT-B/32: .*hf download timm/"):
        clip_vit_b32()


def test_unknown_metrics_are_refused():
    with pytest.raises(ValueError, match="'mini' or 'sd15', got 'smoke'"):
        load_metrics("smoke")
