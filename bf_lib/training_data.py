"""The scenes, captions and images that `mini` is trained on, and its tokenizer."""

__all__ = [
    "CAPTIONS",
    "HELD_OUT",
    "SCENES",
    "digest",
    "new_file",
    "new_tokenizer",
    "training_captions",
    "training_images",
    "training_scene",
]

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from bf_lib.drawing import draw
from bf_lib.mini import TOKENS
from bf_lib.provenance import imported_files, library_digest
from bf_lib.scenes import Scene, caption, sample_scene

SCENES = 60_000  # training scenes
HELD_OUT = 512  # those after them, which neither a model nor a student is trained on
CAPTIONS = 4  # phrasings of each


def training_scene(index: int) -> Scene:
    """Returns a training scene; the index is the seed."""
    return sample_scene(np.random.default_rng((1, index)))


def training_captions(index: int) -> list[str]:
    """Returns the captions of a training scene, most of which name the colours."""
    rng = np.random.default_rng((1, index))
    scene = sample_scene(rng)
    return [caption(scene, rng, coloured=0.75) for _ in range(CAPTIONS)]


def _draw_training_scene(index: int) -> np.ndarray:
    return draw(training_scene(index))


def training_images(folder: Path, count: int = SCENES, processes: int = 2) -> np.ndarray:
    """Draws the training scenes once, as uint8 with shape (count, 64, 64, 3), mapped from disk.

    The file is named after its first images and the code that draws all, so that other scenes are
    drawn anew.
    """
    first = np.stack([_draw_training_scene(i) for i in range(min(count, 16))])
    code = library_digest(imported_files(Path(__file__).with_name("drawing.py")))
    path = folder / f"images-{count}-{digest(first.tobytes() + code.encode())}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with torch.multiprocessing.get_context("spawn").Pool(processes) as pool:
            images = np.stack(pool.map(_draw_training_scene, range(count), chunksize=500))
        with new_file(path) as new:
            np.save(new, images)
    return np.load(path, mmap_mode="r")


def new_tokenizer() -> CLIPTokenizer:
    """Builds a CLIP tokenizer in which each word of the captions is one token.

    The merges are learnt from the captions until every word is whole; other words fall apart into
    letters, as they do for CLIP. The two markers come last, so that the end of the text is the
    largest id, as CLIP's pooling expects.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = list("abcdefghijklmnopqrstuvwxyz")
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator([*_words(), *letters], trainer)
    learnt = json.loads(bpe.to_str())["model"]
    pieces = sorted(set(learnt["vocab"]) | {letter + "</w>" for letter in letters})
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(merge) for merge in learnt["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


@cache
def _words() -> list[str]:
    texts = [text for i in range(4000) for text in training_captions(i)]
    return sorted({word for text in texts for word in text.split()})


def digest(data: bytes) -> str:
    """Returns a short name of the contents of a file."""
    return hashlib.sha256(data).hexdigest()[:12]


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives a name to write under, and renames it: two processes at once do no harm."""
    new = path.with_stem(f"{path.stem}-{os.getpid()}")
    yield new
    new.replace(path)
