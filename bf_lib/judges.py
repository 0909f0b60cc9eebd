"""The judges of `mini`: a scene judge that reads objects off an image, and a CLIP judge.

They are trained apart from the generator (`bf_lib.train_judges`) and share no weights with it.
The scene judge is a detector of centre points (Zhou et al., "Objects as Points", 2019,
https://arxiv.org/abs/1904.07850).
"""

__all__ = [
    "CELL",
    "SceneJudge",
    "Seen",
    "load_clip_judge",
    "load_scene_judge",
    "new_clip",
    "read_scenes",
]

from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from bf_lib.mini import TOKENS
from bf_lib.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE

CELL = 4  # pixels a side of the judge's cells
THRESHOLD = 0.5  # least heat of an object
# the channels of a cell after its heat and offsets
SHAPE_AT = slice(3, 3 + len(SHAPES))
COLOUR_AT = slice(SHAPE_AT.stop, None)

_COLOURS, _BACKGROUNDS = tuple(COLOURS), tuple(BACKGROUNDS)


@dataclass(frozen=True, slots=True)
class Seen:
    """An object read off an image: its look, centre in pixels and confidence."""

    shape: str
    colour: str
    x: float
    y: float
    heat: float


def _halve(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    """Layers that halve the height and the width of an image."""
    conv = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)
    return conv, nn.GroupNorm(8, outputs), nn.SiLU()


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
            *_halve(3, width // 2),
            *_halve(width // 2, width),
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
        heat = cells[:, :1]  # as logits: where sigmoid is 1 in float32, they still differ
        peak = heat == F.max_pool2d(heat, 5, stride=1, padding=2)
        peak &= heat.sigmoid() > THRESHOLD
        for image, peaks in zip(cells, peak[:, 0], strict=True):
            found = [_seen(image[:, y, x], int(x), int(y)) for y, x in peaks.nonzero()]
            seen.append(sorted(found, key=lambda thing: -thing.heat))
    return seen


def _seen(cell: Tensor, x: int, y: int) -> Seen:
    return Seen(
        shape=SHAPES[int(cell[SHAPE_AT].argmax())],
        colour=_COLOURS[int(cell[COLOUR_AT].argmax())],
        x=CELL * (x + float(cell[1])),
        y=CELL * (y + float(cell[2])),
        heat=float(cell[0].sigmoid()),
    )


def new_clip(vocab_size: int) -> open_clip.CLIP:
    """Builds the untrained CLIP judge: convolutions for images, three text layers of width 128.

    The last 4x4 cells are not averaged, so that an image's embedding knows what is where.
    """
    width = 256  # of the embeddings
    unused = {"image_size": SIZE, "patch_size": SIZE, "width": 64, "layers": 1}
    text = {"context_length": TOKENS, "vocab_size": vocab_size}
    text |= {"width": 128, "heads": 4, "layers": 3}
    clip = open_clip.CLIP(embed_dim=width, vision_cfg=unused, text_cfg=text)
    clip.visual = nn.Sequential(
        *_halve(3, 32),
        *_halve(32, 64),
        *(_Residual(64) for _ in range(2)),
        *_halve(64, 128),
        *(_Residual(128) for _ in range(2)),
        *_halve(128, 128),
        _Residual(128),
        nn.Flatten(),
        nn.Linear(128 * (SIZE // 16) ** 2, width),
    )
    return clip


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
