"""The judges of `mini`: a scene judge that reads objects off an image, and a CLIP judge.

Both are trained by the project on drawn scenes alone, apart from the generator: they share no
weights with it and see every combination, also those it never saw. The scene judge is a detector
of centre points (Zhou et al., "Objects as Points", 2019, https://arxiv.org/abs/1904.07850).
"""

__all__ = [
    "CLIP_PLAN",
    "SCENE_PLAN",
    "ClipTask",
    "Seen",
    "SceneJudge",
    "SceneTask",
    "export",
    "load_clip_judge",
    "load_scene_judge",
    "new_clip",
    "read_scenes",
]

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from bf_lib.drawing import draw_many
from bf_lib.mini import TOKENS, new_tokenizer, to_float, tokenize
from bf_lib.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZE,
    Scene,
    caption,
    sample_medley,
    sample_scene,
)
from bf_lib.training import Plan, load_ema

SCENE_PLAN = Plan(steps=2400, batch=64, lr=2e-3, warmup=50, decay=0.6, ema=0.995)
CLIP_PLAN = Plan(
    steps=3000, batch=128, lr=1e-3, warmup=200, decay=0.7, ema=0.995, weight_decay=0.1
)

CELL = 4  # pixels a side of the judge's cells
THRESHOLD = 0.5  # least heat of an object

_COLOURS, _BACKGROUNDS = tuple(COLOURS), tuple(BACKGROUNDS)


@dataclass(frozen=True, slots=True)
class Seen:
    """An object read off an image: its look, centre in pixels and confidence."""

    shape: str
    colour: str
    x: float
    y: float
    heat: float


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.body(x))


class SceneJudge(nn.Module):
    """Maps an image to the heat, look and centre of an object in each of 16x16 cells."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, stride=2, padding=1),
            nn.GroupNorm(8, width // 2),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            *(_Residual(width) for _ in range(4)),
        )
        self.head = nn.Conv2d(width, 3 + len(SHAPES) + len(_COLOURS), 1)
        self.background = nn.Linear(width, len(_BACKGROUNDS))
        nn.init.constant_(self.head.bias[:1], -4.0)  # most cells are empty

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reads images in [-1, 1] with shape (n, 3, 64, 64).

        Returns:
            The logit of heat, offsets (x, y) in cells, shape and colour logits, with shape
            (n, 19, 16, 16), and the logits of the background, with shape (n, 4).
        """
        features = self.trunk(images)
        return self.head(features), self.background(features.mean(dim=(2, 3)))


class SceneTask:
    """Heat of the centres (penalty-reduced focal loss) and look at each centre (cross-entropy)."""

    def __init__(self) -> None:
        self.model = SceneJudge()

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rng = _numpy_generator(generator)
        scenes = [_any_scene(rng) for _ in range(size)]
        images = to_float(draw_many(scenes))
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
            "shape": F.cross_entropy(at[:, 3:11], look[:, 2].long()),
            "colour": F.cross_entropy(at[:, 11:], look[:, 3].long()),
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


def _spoil(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blurs, brightens and adds noise at random: the images of a generator are not clean."""
    n = len(images)
    amount = torch.rand(4, n, 1, 1, 1, generator=generator)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, soft, amount[0].square())
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


@torch.inference_mode()
def read_scenes(judge: SceneJudge, images: Tensor, batch: int = 256) -> list[list[Seen]]:
    """Reads the objects off images, most confident first.

    Arguments:
        judge: The trained judge.
        images: Images in [-1, 1] with shape (n, 3, 64, 64).
        batch: How many images to read at once.
    """
    seen = []
    for part in images.split(batch):
        cells, _ = judge(part)
        heat = torch.sigmoid(cells[:, :1])
        peak = (heat == F.max_pool2d(heat, 5, stride=1, padding=2)) & (heat > THRESHOLD)
        for image, peaks in zip(cells, peak[:, 0], strict=True):
            found = [_seen(image[:, y, x], int(x), int(y)) for y, x in peaks.nonzero()]
            seen.append(sorted(found, key=lambda thing: -thing.heat))
    return seen


def _seen(cell: Tensor, x: int, y: int) -> Seen:
    return Seen(
        shape=SHAPES[int(cell[3:11].argmax())],
        colour=_COLOURS[int(cell[11:].argmax())],
        x=CELL * (x + float(cell[1])),
        y=CELL * (y + float(cell[2])),
        heat=float(cell[0].sigmoid()),
    )


def new_clip(vocab_size: int) -> open_clip.CLIP:
    """Builds the untrained CLIP judge: four image and three text layers of width 128."""
    vision = {"image_size": SIZE, "patch_size": 8, "width": 128, "head_width": 32, "layers": 4}
    text = {"context_length": TOKENS, "vocab_size": vocab_size}
    text |= {"width": 128, "heads": 4, "layers": 3}
    return open_clip.CLIP(embed_dim=128, vision_cfg=vision, text_cfg=text)


class ClipTask:
    """The symmetric contrastive loss of CLIP (Radford et al. 2021) on scenes and captions.

    Half of the captions name every attribute and half leave some out. Each process contrasts its
    own part of the batch.
    """

    def __init__(self) -> None:
        self.tokenizer = new_tokenizer()
        self.model = new_clip(len(self.tokenizer))

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rng = _numpy_generator(generator)
        scenes = [sample_scene(rng, held_out=bool(rng.random() < 0.2)) for _ in range(size)]
        texts = [caption(scene, rng, complete=bool(rng.random() < 0.5)) for scene in scenes]
        images = _spoil(to_float(draw_many(scenes)), generator)
        with torch.autocast("cpu", torch.bfloat16):
            image = self.model.encode_image(images, normalize=True)
            text = self.model.encode_text(tokenize(self.tokenizer, texts), normalize=True)
        logits = self.model.logit_scale.exp().clamp(max=100) * image.float() @ text.float().T
        target = torch.arange(size)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        right = (logits.argmax(1) == target).float().mean()
        return {"loss": loss, "retrieval": right}


def export(folder: Path, target: Path) -> None:
    """Writes the trained judges of `folder` in half precision to `target`."""
    target.mkdir(parents=True, exist_ok=True)
    clip = new_clip(len(new_tokenizer()))
    for name, model in (("scene", SceneJudge()), ("clip", clip)):
        state = load_ema(model, folder / f"{name}_judge").half().state_dict()
        save_file({k: v.contiguous() for k, v in state.items()}, target / f"{name}.safetensors")


def load_scene_judge(folder: Path) -> SceneJudge:
    """Loads the scene judge that ships with a model folder such as `data/mini`."""
    judge = SceneJudge()
    judge.load_state_dict(load_file(folder / "judges" / "scene.safetensors"))
    return judge.eval()


def load_clip_judge(folder: Path) -> tuple[open_clip.CLIP, CLIPTokenizer]:
    """Loads the CLIP judge that ships with a model folder, and its tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    clip = new_clip(len(tokenizer))
    clip.load_state_dict(load_file(folder / "judges" / "clip.safetensors"))
    return clip.eval(), tokenizer
