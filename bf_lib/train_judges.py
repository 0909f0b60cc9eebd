"""Trains the judges of `mini` on drawn scenes alone.

They see every combination, also those the generator never sees, and images that are bent, blurred
and noisy, because a generator's are not clean.
"""

__all__ = ["CLIP_PLAN", "SCENE_PLAN", "ClipTask", "SceneTask", "export"]

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from bf_lib.atomic import write_atomically
from bf_lib.drawing import draw_many
from bf_lib.judges import CELL, COLOUR_AT, SHAPE_AT, SceneJudge, new_clip
from bf_lib.mini import to_float, tokenize
from bf_lib.scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SHAPES,
    SIZE,
    Scene,
    caption,
    sample_medley,
    sample_scene,
)
from bf_lib.training_data import new_tokenizer
from bf_lib.training_plan import Plan
from bf_lib.training_state import load_ema

SCENE_PLAN = Plan(steps=2400, batch=64, lr=2e-3, warmup=50, decay=0.6, ema=0.995)
CLIP_PLAN = Plan(
    steps=5000, batch=128, lr=4e-4, warmup=200, decay=0.64, ema=0.995, weight_decay=0.1
)

BENDS = 12  # knots along a side, between which outlines are bent smoothly

_COLOURS, _BACKGROUNDS = tuple(COLOURS), tuple(BACKGROUNDS)


class SceneTask:
    """Heat of the centres (penalty-reduced focal loss) and look at each centre (cross-entropy)."""

    def __init__(self) -> None:
        self.model = SceneJudge()

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rng = _numpy_generator(generator)
        scenes = [_any_scene(rng) for _ in range(size)]
        images = _distort(to_float(draw_many(scenes)), generator)
        heat, where, look = _targets(scenes)
        with torch.autocast("cpu", torch.bfloat16):
            cells, background = self.model(_spoil(images, generator))
        cells, background = cells.float(), background.float()
        shown = torch.tensor([_BACKGROUNDS.index(scene.background) for scene in scenes])
        n, y, x = where
        at = cells[n, :, y, x]
        parts = {
            "heat": _focal(cells[:, 0], heat),
            "offset": F.l1_loss(at[:, 1:3], look[:, :2]),
            "shape": F.cross_entropy(at[:, SHAPE_AT], look[:, 2].long()),
            "colour": F.cross_entropy(at[:, COLOUR_AT], look[:, 3].long()),
            "background": F.cross_entropy(background, shown),
        }
        return {"loss": sum(parts.values())} | parts


def _numpy_generator(generator: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))


def _any_scene(rng: np.random.Generator) -> Scene:
    chance = rng.random()
    if chance < 0.4:
        return sample_medley(rng)
    return sample_scene(rng, held_out=bool(chance < 0.55))


def _distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Bends outlines by a pixel or so and softens them: a generator's are not drawn by a ruler.

    Without this, the judge takes a star with blunt tips for a square, which no person would.
    """
    n = len(images)
    amount = torch.rand(2, n, 1, 1, 1, generator=generator)
    bends = torch.randn(n, 2, BENDS, BENDS, generator=generator) * (2 / SIZE) * amount[0]
    bends = F.interpolate(bends, size=(SIZE, SIZE), mode="bicubic", align_corners=True)
    at = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(images.shape), align_corners=False)
    images = F.grid_sample(
        images, at + bends.permute(0, 2, 3, 1), padding_mode="border", align_corners=False
    )
    soft = _blur(_blur(_blur(images)))  # nearly a Gaussian of 1.4 pixels
    return torch.lerp(images, soft, amount[1])


def _blur(images: Tensor) -> Tensor:
    """Averages over 3x3 pixels."""
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def _spoil(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blurs, brightens and adds noise at random: the images of a generator are not clean."""
    n = len(images)
    amount = torch.rand(4, n, 1, 1, 1, generator=generator)
    images = torch.lerp(images, _blur(images), amount[0].square())
    images = images * (0.9 + 0.2 * amount[1]) + 0.1 * (amount[2] - 0.5)
    noise = torch.randn(images.shape, generator=generator)
    return images + 0.12 * amount[3].square() * noise


def _targets(scenes: list[Scene]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]:
    """Returns the wanted heat (n, 16, 16), the cells of the centres, and the look of each."""
    side = SIZE // CELL
    heat = torch.zeros(len(scenes), side, side)
    line = torch.arange(side).float()
    where, look = [], []
    for n, scene in enumerate(scenes):
        for thing in scene.things:
            cx, cy = thing.x / CELL, thing.y / CELL
            x, y = int(cx), int(cy)
            bump = torch.exp(-((line - x) ** 2)[None] / 1.2 - ((line - y) ** 2)[:, None] / 1.2)
            heat[n] = torch.maximum(heat[n], bump)
            where.append((n, y, x))
            look.append((cx - x, cy - y, SHAPES.index(thing.shape), _COLOURS.index(thing.colour)))
    n, y, x = torch.tensor(where).T
    return heat, (n, y, x), torch.tensor(look)


def _focal(logits: Tensor, heat: Tensor) -> Tensor:
    """The penalty-reduced focal loss of Zhou et al. 2019, Eq. 1."""
    centre = heat == 1
    hit = F.logsigmoid(logits) * torch.sigmoid(-logits) ** 2
    miss = F.logsigmoid(-logits) * torch.sigmoid(logits) ** 2 * (1 - heat) ** 4
    return -torch.where(centre, hit, miss).sum() / centre.sum().clamp(min=1)


class ClipTask:
    """The symmetric contrastive loss of CLIP (Radford et al. 2021) on scenes and captions.

    Half of a batch are scenes of one kind before one background, with captions that name every
    attribute: they differ in little, so that the little must be read. The others are of all kinds,
    and half of their captions leave something out. Each process contrasts its own part.
    """

    def __init__(self) -> None:
        self.tokenizer = new_tokenizer()
        self.model = new_clip(len(self.tokenizer))

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rng = _numpy_generator(generator)
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
        background = str(rng.choice(_BACKGROUNDS))
        alike = [replace(_scene(rng, kind), background=background) for _ in range(size // 2)]
        mixed = [_scene(rng) for _ in range(size - len(alike))]
        scenes = alike + mixed
        texts = [caption(scene, rng, complete=True) for scene in alike]
        texts += [caption(scene, rng, complete=bool(rng.random() < 0.5)) for scene in mixed]
        images = _spoil(to_float(draw_many(scenes)), generator)
        with torch.autocast("cpu", torch.bfloat16):
            image = self.model.encode_image(images, normalize=True)
            text = self.model.encode_text(tokenize(self.tokenizer, texts), normalize=True)
        logits = self.model.logit_scale.exp().clamp(max=100) * image.float() @ text.float().T
        target = torch.arange(size)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        right = (logits.argmax(1) == target).float().mean()
        return {"loss": loss, "retrieval": right}


def _scene(rng: np.random.Generator, kind: str | None = None) -> Scene:
    return sample_scene(rng, kind, held_out=bool(rng.random() < 0.2))


def export(folder: Path, target: Path) -> None:
    """Writes the trained judges of `folder` in half precision to `target`."""
    clip = new_clip(len(new_tokenizer()))
    for name, model in (("scene", SceneJudge()), ("clip", clip)):
        state = load_ema(model, folder / f"{name}_judge").half().state_dict()
        tensors = {key: value.contiguous() for key, value in state.items()}
        write_atomically(target / f"{name}.safetensors", save(tensors))
