"""How good `mini` and its judges are: the measurements of its model card, on scenes never trained on."""

__all__ = [
    "fresh_scenes",
    "generator_scores",
    "judge_accuracy",
    "reconstruct",
    "retrieval",
    "vae_psnr",
]

import math
from collections.abc import Sequence

import numpy as np
import open_clip
import pandas as pd
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from bf_lib.drawing import draw_many
from bf_lib.evaluation import challenges, score
from bf_lib.judges import SceneJudge, Seen, read_scenes
from bf_lib.mini import to_float, tokenize
from bf_lib.scenes import Scene, caption, relation_of, sample_scene


def fresh_scenes(count: int, seed: int, held_out: bool = False) -> list[Scene]:
    """Draws scenes from another stream of randomness than the training scenes."""
    rng = np.random.default_rng((3, seed, held_out))
    return [sample_scene(rng, held_out=held_out) for _ in range(count)]


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, images: Tensor, batch: int = 100) -> Tensor:
    """Encodes and decodes images in [-1, 1] with shape (n, 3, h, w), without sampling noise."""
    parts = [vae.decode(vae.encode(x).latent_dist.mode()).sample for x in images.split(batch)]
    return torch.cat(parts).clamp(-1, 1)


def vae_psnr(vae: AutoencoderKL, scenes: Sequence[Scene]) -> float:
    """Returns the PSNR in dB of the reconstructions, from their mean squared error."""
    images = to_float(draw_many(scenes))
    mse = (reconstruct(vae, images) - images).square().mean()
    return float(10 * torch.log10(4 / mse))  # the range is 2


def judge_accuracy(judge: SceneJudge, scenes: Sequence[Scene], images: Tensor) -> pd.Series:
    """Returns how often the scene judge is right, by attribute.

    An object counts as seen when one of the judge's centres is within 6 pixels. Shape and colour
    are shares of the objects drawn, one not seen being wrong; count is the share of scenes
    with exactly as many objects seen as drawn; relation the share of two-object scenes whose
    objects are both seen and placed as drawn.

    Arguments:
        judge: The scene judge.
        scenes: The scenes that were drawn.
        images: Their images in [-1, 1], drawn or reconstructed, with shape (n, 3, 64, 64).
    """
    right: dict[str, list[bool]] = {"shape": [], "colour": [], "count": [], "relation": []}
    for scene, seen in zip(scenes, read_scenes(judge, images), strict=True):
        matched = [_nearest(seen, thing.x, thing.y) for thing in scene.things]
        right["count"].append(len(seen) == len(scene.things))
        for thing, match in zip(scene.things, matched, strict=True):
            right["shape"].append(match is not None and match.shape == thing.shape)
            right["colour"].append(match is not None and match.colour == thing.colour)
        if scene.relation is not None:
            a, b = matched
            right["relation"].append(
                a is not None
                and b is not None
                and relation_of((a.x, a.y), (b.x, b.y)) == scene.relation
            )
    return pd.Series({name: np.mean(values) for name, values in right.items()})


def _nearest(seen: Sequence[Seen], x: float, y: float, within: float = 6.0) -> Seen | None:
    nearest = min(seen, key=lambda s: math.dist((s.x, s.y), (x, y)), default=None)
    if nearest is None or math.dist((nearest.x, nearest.y), (x, y)) > within:
        return None
    return nearest


@torch.inference_mode()
def retrieval(
    clip: open_clip.CLIP, tokenizer: CLIPTokenizer, seed: int, count: int = 256
) -> tuple[float, float]:
    """Returns retrieval@1 among `count` scenes with distinct complete captions.

    Returns:
        The share of images whose caption scores highest, and of captions whose image does.
    """
    rng = np.random.default_rng((4, seed))
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = sample_scene(rng, held_out=bool(rng.random() < 0.2))
        scenes.setdefault(caption(scene, rng, complete=True), scene)
    image = clip.encode_image(to_float(draw_many(list(scenes.values()))), normalize=True)
    text = clip.encode_text(tokenize(tokenizer, list(scenes)), normalize=True)
    similarity, target = image @ text.T, torch.arange(count)
    to_text = (similarity.argmax(1) == target).float().mean()
    to_image = (similarity.argmax(0) == target).float().mean()
    return float(to_text), float(to_image)
