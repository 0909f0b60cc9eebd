"""Trains the text encoder of `mini` to understand its captions, before the UNet sees a word.

Stable Diffusion's text encoder comes from CLIP, which has read nearly everything, and stays as it
is while the UNet is trained. Here it learns from captions alone, of every combination: the images
of some are held out, not the words. What a caption says of each object must be readable, by a
linear map, from the states at the end of the text. A contrastive loss would be content with less:
it takes a caption for a bag of words, and tells "a star left of a moon" from its mirror image
badly (Yuksekgonul et al. 2023, https://arxiv.org/abs/2210.01936).
"""

__all__ = [
    "TEXT_PLAN",
    "ReadingTask",
    "export_reader",
    "load_reader",
    "load_text_encoder",
    "meaning",
    "new_reader",
    "reads",
    "said",
]

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from bf_lib.atomic import write_atomically
from bf_lib.mini import new_text_encoder, tokenize
from bf_lib.scenes import (
    BACKGROUNDS,
    COLOURS,
    NUMBERS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    Scene,
    caption,
    sample_scene,
)
from bf_lib.training_data import new_tokenizer
from bf_lib.training_plan import Plan
from bf_lib.training_state import load_ema

READ = 60_000  # captions
TEXT_PLAN = Plan(steps=2000, batch=256, lr=1e-3, warmup=100, decay=0.7, ema=0.99)

# What can be said of an object that a caption names, and of the background; the first of each is
# nothing at all. The questions are about the first and the second object that is named, and not
# about stars or moons: nothing then asks for a direction of its own for orange circles, which the
# UNet is never shown.
_OF_OBJECT = (
    NUMBERS,
    (None, *SHAPES),
    (None, *COLOURS),
    (None, *RELATIONS),
    (None, "small", "large"),
)
_NAMED = 2  # at most
_QUESTIONS = (*_OF_OBJECT * _NAMED, (None, *BACKGROUNDS))


def said(scene: Scene, text: str) -> list[int]:
    """Returns what a caption says of its scene, as answers to 11 questions.

    For the first and the second object that it names: how many there are, their shape, colour, on
    which side of the other object, how large; and at last the background. What the caption leaves
    out is answered by 0.
    """
    words = text.split()
    named: dict[int, tuple] = {}
    for i, thing in enumerate(scene.things):
        side = scene.relation if i == 0 or scene.relation is None else OPPOSITE[scene.relation]
        count = sum(other.shape == thing.shape for other in scene.things)
        place = next(at for at, word in enumerate(words) if word.startswith(thing.shape))
        named[place] = (NUMBERS[count], thing.shape, thing.colour, side, thing.size or None)
    nothing = (NUMBERS[0], None, None, None, None)
    objects = ([named[place] for place in sorted(named)] + [nothing] * _NAMED)[:_NAMED]
    given = [*(answer for each in objects for answer in each), scene.background]
    told = {*words, *NUMBERS, *SHAPES, *RELATIONS}  # the last three are said in other words, too
    known = [answer if answer in told else None for answer in given]
    return [question.index(answer) for question, answer in zip(_QUESTIONS, known, strict=True)]


def meaning(scene: Scene, text: str) -> tuple:
    """Returns what a caption says whatever it names first: equal if no image tells them apart."""
    *answers, background = said(scene, text)
    size = len(_OF_OBJECT)
    objects = [tuple(answers[i : i + size]) for i in range(0, len(answers), size)]
    return (*sorted(objects), background)


def new_reader(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """Builds an untrained text encoder, and the linear map that reads the answers off it."""
    encoder = new_text_encoder(tokenizer)
    reader = nn.Linear(encoder.config.hidden_size, sum(map(len, _QUESTIONS)))
    return nn.ModuleDict({"text_encoder": encoder, "reader": reader})


class ReadingTask:
    """Cross-entropy of what captions say, read at the end of the text and at the padding."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        # Of every combination: only the images of those held out are kept from the generator.
        scenes = [sample_scene(rng, held_out=bool(rng.random() < 0.2)) for _ in range(READ)]
        texts = [caption(scene, rng, coloured=0.5) for scene in scenes]
        tokenizer = new_tokenizer()
        self.tokens = tokenize(tokenizer, texts)
        self.answers = torch.tensor([said(*pair) for pair in zip(scenes, texts, strict=True)])
        self.end = len(tokenizer) - 1  # the id of the end of the text, and of the padding
        self.model = new_reader(tokenizer)

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(len(self.tokens), (size,), generator=generator)
        tokens, answers = self.tokens[chosen], self.answers[chosen]
        states = self.model["text_encoder"](tokens).last_hidden_state
        after = tokens == self.end
        logits = self.model["reader"](states[after]).split([len(q) for q in _QUESTIONS], dim=1)
        targets = answers.repeat_interleave(after.sum(1), dim=0).unbind(1)
        losses = [F.cross_entropy(*pair) for pair in zip(logits, targets, strict=True)]
        read = torch.stack([x.argmax(1) == y for x, y in zip(logits, targets, strict=True)], dim=1)
        return {"loss": torch.stack(losses).sum(), "all_right": read.all(1).float().mean()}


def load_text_encoder(folder: Path, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Returns the trained text encoder of `folder`, in single precision."""
    return load_ema(new_reader(tokenizer), folder)["text_encoder"].eval()


def export_reader(folder: Path, target: Path) -> None:
    """Writes the linear map of the trained text encoder of `folder` to `target`."""
    reader = load_ema(new_reader(new_tokenizer()), folder)["reader"]
    tensors = {name: value.contiguous() for name, value in reader.state_dict().items()}
    write_atomically(target / "reader.safetensors", save(tensors))


def load_reader(path: Path) -> nn.Linear:
    """Returns the linear map that reads what captions say off the text encoder's states."""
    tensors = load_file(path)
    reader = nn.Linear(*reversed(tensors["weight"].shape))
    reader.load_state_dict(tensors)
    return reader.eval()


@torch.inference_mode()
def reads(
    encoder: CLIPTextModel,
    reader: nn.Linear,
    tokenizer: CLIPTokenizer,
    scenes: Sequence[Scene],
    texts: Sequence[str],
) -> float:
    """Returns the share of captions of which all that they say is read off the end of the text."""
    tokens = tokenize(tokenizer, list(texts))
    end = tokens.argmax(dim=1)  # the end of the text has the largest id, and the first one counts
    states = encoder(tokens).last_hidden_state[torch.arange(len(tokens)), end]
    logits = reader(states).split([len(question) for question in _QUESTIONS], dim=1)
    answers = torch.stack([each.argmax(dim=1) for each in logits], dim=1)
    wanted = torch.tensor([said(*pair) for pair in zip(scenes, texts, strict=True)])
    return float((answers == wanted).all(dim=1).float().mean())
