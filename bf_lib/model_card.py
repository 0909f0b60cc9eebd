"""How good `mini` and its judges are: what its model card says, on scenes never trained on."""

__all__ = [
    "as_pictures",
    "captions",
    "fresh_scenes",
    "generator_scores",
    "images_of",
    "judge_accuracy",
    "psnr",
    "reconstruct",
    "retrieval",
    "samples",
    "write",
]

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from numpy import ndarray as Array
from torch import Tensor
from transformers import CLIPTokenizer

from bf_lib.atomic import write_atomically
from bf_lib.drawing import draw_many
from bf_lib.evaluation import challenges, interval, score
from bf_lib.judges import SceneJudge, Seen, read_scenes
from bf_lib.mini import to_float, tokenize
from bf_lib.sampling import Sampler, generate, generate_in_processes
from bf_lib.scenes import Scene, caption, relation_of, sample_scene
from bf_lib.train_text import meaning

STEPS = 20  # of DPM-Solver++


def fresh_scenes(count: int, seed: int, held_out: bool = False) -> list[Scene]:
    """Draws scenes from another stream of randomness than the training scenes."""
    rng = np.random.default_rng((3, seed, held_out))
    return [sample_scene(rng, held_out=held_out) for _ in range(count)]


def images_of(scenes: Sequence[Scene]) -> Tensor:
    """Draws scenes as floats in [-1, 1], with shape (n, 3, 64, 64)."""
    return to_float(draw_many(scenes))


def captions(scenes: Sequence[Scene], seed: int = 0) -> list[str]:
    """Describes each scene in a random phrasing."""
    rng = np.random.default_rng((6, seed))
    return [caption(scene, rng) for scene in scenes]


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, images: Tensor, batch: int = 100) -> Tensor:
    """Encodes and decodes images in [-1, 1] with shape (n, 3, h, w), without sampling noise."""
    parts = [vae.decode(vae.encode(x).latent_dist.mode()).sample for x in images.split(batch)]
    return torch.cat(parts).clamp(-1, 1)


def psnr(images: Tensor, reference: Tensor) -> float:
    """Returns the PSNR in dB of images in [-1, 1], from their mean squared error."""
    return float(10 * torch.log10(4 / (images - reference).square().mean()))  # the range is 2


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
    """Returns retrieval@1 among `count` scenes whose captions name everything.

    No two captions say the same: "a red star on sand" and "a picture of a red star on a sand
    background" are one, which no image could tell apart.

    Returns:
        The share of images whose caption scores highest, and of captions whose image does.
    """
    rng = np.random.default_rng((4, seed))
    told: dict[tuple[int, ...], tuple[Scene, str]] = {}
    while len(told) < count:
        scene = sample_scene(rng, held_out=bool(rng.random() < 0.2))
        text = caption(scene, rng, complete=True)
        told.setdefault(meaning(scene, text), (scene, text))
    scenes, texts = zip(*told.values(), strict=True)
    image = clip.encode_image(images_of(scenes), normalize=True)
    text = clip.encode_text(tokenize(tokenizer, list(texts)), normalize=True)
    similarity, target = image @ text.T, torch.arange(count)
    to_text = (similarity.argmax(1) == target).float().mean()
    to_image = (similarity.argmax(0) == target).float().mean()
    return float(to_text), float(to_image)


def generator_scores(
    model: str | Path,
    judge: SceneJudge,
    guidance: float,
    count: int,
    seed: int,
    held_out: bool = False,
) -> pd.Series:
    """Returns the share of challenges that a pipeline's images pass, by task.

    Arguments:
        model: The pipeline's name or folder; its scheduler takes 20 steps.
        judge: The scene judge.
        guidance: The scale of classifier-free guidance.
        count: How many challenges of each task.
        seed: Which challenges, and which noise.
        held_out: Whether to ask for combinations that were kept out of training.
    """
    asked = challenges(count, seed, held_out)
    seeds = [10_000 * (seed + 1) + i for i in range(len(asked))]
    sampler = Sampler(steps=STEPS, guidance=guidance, batch=32)
    prompts = [challenge.prompt for challenge in asked]
    images = generate_in_processes(model, prompts, seeds, sampler)
    return score(asked, read_scenes(judge, to_float(images.numpy())))


def samples(pipe: StableDiffusionPipeline, prompts: Sequence[str], guidance: float) -> Array:
    """Draws an image of each prompt, from the first seeds, as uint8 (n, 64, 64, 3)."""
    sampler = Sampler(steps=STEPS, guidance=guidance, batch=len(prompts))
    return generate(pipe, prompts, range(len(prompts)), sampler).numpy()


def as_pictures(images: Tensor) -> Array:
    """Turns images in [-1, 1] with shape (n, 3, h, w) into uint8 with shape (n, h, w, 3)."""
    unit = (images.permute(0, 2, 3, 1) + 1) * 127.5
    return unit.round().clamp(0, 255).to(torch.uint8).numpy()


def write(
    folder: Path,
    psnr: Mapping[bool, float],
    accuracy: pd.DataFrame,
    retrieval: tuple[float, float],
    guidance: float,
    scores: pd.DataFrame,
    count: int,
) -> Path:
    """Writes the model card from measurements, and returns its path.

    Arguments:
        folder: The model's folder.
        psnr: The autoencoder's PSNR in dB, by whether the scenes are held out.
        accuracy: `judge_accuracy` by (where, kind) of images.
        retrieval: The CLIP judge's, image to text and text to image.
        guidance: The guidance scale of the scores.
        scores: The share of challenges passed by task, with columns unseen and held out.
        count: How many challenges each share is of.
    """
    judge = [
        f"| {where} scenes, {kind} | " + " | ".join(f"{100 * v:.1f}" for v in row) + " |"
        for (where, kind), row in accuracy.iterrows()
    ]
    tasks = [
        f"| {task} | {row['unseen']:.3f} | {row['held out']:.3f} |"
        for task, row in scores.iterrows()
    ]
    text = _CARD.format(
        psnr=psnr[False],
        held=psnr[True],
        judge="\n".join(judge),
        attributes=" | ".join(accuracy.columns),
        rules="|".join(" --: " for _ in accuracy.columns),
        to_text=100 * retrieval[0],
        to_image=100 * retrieval[1],
        steps=STEPS,
        guidance=guidance,
        tasks="\n".join(tasks),
        count=count,
        margin=_margin(count),
    )
    write_atomically(folder / "README.md", text.encode())
    return folder / "README.md"


def _margin(count: int) -> float:
    """Returns how far an end of a 95 % interval of a share is from it at most."""
    shares = [passed / count for passed in range(count + 1)]
    return max(abs(share - end) for share in shares for end in interval(share, count))


_CARD = """\
# mini

A small text-to-image latent diffusion model with Stable Diffusion v1.5's topology at an eighth of
its widths: the same 282 conv and linear layers with the same names. Trained from nothing
(`make mini`) on procedurally drawn 64x64 scenes; nothing in it comes from another model or data
set. It exists so that a study of quantization runs on a laptop, offline.

    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained("data/mini")
    images = pipe("two red stars", num_inference_steps={steps}, guidance_scale={guidance:g}).images

| part | what | weights |
| --- | --- | --- |
| `unet` | `UNet2DConditionModel`, widths 40/80/160/160, 2 heads | fp16 |
| `text_encoder` | `CLIPTextModel`, 3 layers of width 96, 24 tokens, a vocabulary of words | fp32 |
| `vae` | `AutoencoderKL`, 64x64x3 to 16x16x4 | fp16 |
| `judges/scene.safetensors` | reads the objects off an image (`bf_lib.judges.SceneJudge`) | fp16 |
| `judges/clip.safetensors` | a small `open_clip` CLIP, for the CLIP score | fp16 |

The text encoder learnt from captions alone, of all combinations: what a caption says is readable,
linearly, off its last states. Then it stayed as it was, as CLIP's does in SD-v1.5. Of images, only
the training combinations were shown to the autoencoder and the UNet.

The judges share no weights with the generator. All numbers are of the stored weights, on scenes
that no part was trained on; notebook 90 writes this file from what it measured.

## Autoencoder

{psnr:.1f} dB PSNR on unseen scenes, {held:.1f} dB on held-out combinations.

## Judges

Scene judge, % right (an object that is not found counts as wrong):

| images | {attributes} |
| --- |{rules}|
{judge}

CLIP judge, retrieval@1 among 256 distinct captions: {to_text:.1f} % image to text,
{to_image:.1f} % text to image.

## Generator

The share of images that pass, read by the scene judge: {steps} DPM-Solver++ steps, guidance
{guidance:g} (the best on other images, all of training combinations). Held-out combinations never
occurred in training: colours of shapes, counts of shapes, pairs of shapes; their prompts always
name the colours, which must then be right in every task. Each share is of {count} images, each
from a prompt drawn at random (there are only 8 of single objects, 20 of counts and 48 of two
objects, so these repeat, and training knew them) and noise of its own; 95 % intervals, which take
images as independent, are at most {margin:.2f} to either side.

| task | training combinations | held-out combinations |
| --- | --: | --: |
{tasks}

## Limits

It knows 61 words. It draws up to four objects of 8 shapes and 8 colours and nothing else; of
other prompts it makes something similar. Its numbers are not numbers of Stable Diffusion v1.5.
"""
