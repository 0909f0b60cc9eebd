"""Images and captions to train on, as latents: drawn scenes, or a folder of one's own."""

__all__ = ["Examples", "folder_examples", "scene_examples"]

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bf_lib.drawing import draw
from bf_lib.mini import to_float
from bf_lib.models import fingerprint, load_pipeline
from bf_lib.processes import end_with_parent
from bf_lib.progress import progress
from bf_lib.training_data import digest, new_file, training_captions, training_scene

ENCODED = 50 * 64**2  # pixels of images in one go
SHARE = 500  # scenes of one task of a process
FORMAT = "2"  # of files: names of those of another do not match


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Images as an autoencoder sees them, each with one or more captions."""

    moments: Tensor  # (n, 2 c, h, w), float16: mean and log-variance of latents
    captions: tuple[tuple[str, ...], ...]  # phrasings of each
    scale: float  # the autoencoder's scaling factor

    def __len__(self) -> int:
        return len(self.captions)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Draws examples with replacement.

        Returns:
            Latents with shape (count, c, h, w), drawn from their distributions and scaled as the
            UNet wants them, and a caption for each.
        """
        chosen = torch.randint(len(self), (count,), generator=generator)
        mean, logvar = self.moments[chosen].float().chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator)
        latents = (mean + noise * (0.5 * logvar.clamp(-30, 20)).exp()) * self.scale
        which = torch.rand(count, generator=generator)
        texts = [self.captions[i] for i in chosen.tolist()]
        return latents, [t[int(w * len(t))] for t, w in zip(texts, which.tolist(), strict=True)]

    def save(self, path: Path) -> None:
        """Writes them to a safetensors file, completely or not at all.

        Captions are bytes of JSON in a tensor: in the header they could have 100 MB at most.
        """
        captions = np.frombuffer(json.dumps(self.captions).encode(), np.uint8)
        tensors = {"moments": self.moments.contiguous(), "captions": torch.tensor(captions)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as new:
            save_file(tensors, new, {"scale": repr(self.scale)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote."""
        with safe_open(path, "pt") as file:
            written = json.loads(file.get_tensor("captions").numpy().tobytes())
            captions, scale = tuple(map(tuple, written)), float(file.metadata()["scale"])
            return cls(file.get_tensor("moments"), captions, scale)


def scene_examples(
    model: str | Path, count: int, folder: Path, first: int = 0, processes: int = 2
) -> Path:
    """Draws scenes and encodes them, once for an autoencoder; returns the file of `Examples`.

    Scenes are those that `mini` is trained on, from the one with the index `first`.

    Arguments:
        model: The name or folder of the pipeline whose autoencoder encodes them.
        count: How many.
        folder: Where they are kept.
        first: The index of the first.
        processes: How many processes share the work.
    """
    vae = load_pipeline(model).vae
    known = digest(f"{FORMAT} {fingerprint([vae])}".encode())
    path = folder / f"scenes-{first}-{count}-{known}.safetensors"
    if not path.exists():
        stops = [*range(first, first + count, SHARE), first + count]
        tasks = [(model, range(a, b)) for a, b in zip(stops, stops[1:], strict=False)]
        with get_context("spawn").Pool(processes, _start_process) as pool:
            moments = torch.from_numpy(np.concatenate(pool.starmap(_drawn_moments, tasks, 1)))
        captions = tuple(tuple(training_captions(i)) for i in range(first, first + count))
        Examples(moments, captions, vae.config.scaling_factor).save(path)
    return path


def folder_examples(
    pipe: StableDiffusionPipeline, images: Path, folder: Path, size: int | None = None
) -> Path:
    """Encodes the images of a folder, once for an autoencoder; returns the file of `Examples`.

    Other images, captions or sizes are other files; an image is known by its name and its time.

    Arguments:
        pipe: The pipeline whose autoencoder encodes them.
        images: A folder with images and `metadata.csv`, as of Hugging Face's image folders, with
            columns file_name and text.
        folder: Where they are kept.
        size: Height and width that images are cut and resized to; by default the pipeline's.

    Raises:
        FileNotFoundError: If there is no metadata.csv, or not an image that it names.
        ValueError: If it lacks a column, or has no rows.
    """
    table = pd.read_csv(images / "metadata.csv", dtype=str, keep_default_na=False)
    if missing := sorted({"file_name", "text"} - set(table.columns)):
        raise ValueError(f"{images / 'metadata.csv'} has no column {missing[0]!r}")
    if table.empty:
        raise ValueError(f"{images / 'metadata.csv'} has no rows")
    size = size or pipe.unet.config.sample_size * pipe.vae_scale_factor
    paths = [images / name for name in table.file_name]
    seen = [(path.name, path.stat().st_mtime_ns) for path in paths]
    known = digest(
        repr([FORMAT, fingerprint([pipe.vae]), size, seen, table.text.tolist()]).encode()
    )
    file = folder / f"images-{len(paths)}-{known}.safetensors"
    if not file.exists():
        pictures = _pictures(progress(paths, desc="encode images"), size)
        parts = (np.stack(part) for part in _batches(pictures, max(1, ENCODED // size**2)))
        moments = torch.cat([encoded(pipe.vae, part) for part in parts])
        captions = tuple((text,) for text in table.text)
        Examples(moments, captions, pipe.vae.config.scaling_factor).save(file)
    return file


@torch.inference_mode()
def encoded(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Returns mean and log-variance of the latents of images, float16 on the CPU.

    Arguments:
        vae: The autoencoder.
        images: Shape (n, h, w, 3), uint8.

    Returns:
        Shape (n, 2 c, h / f, w / f), with the autoencoder's c channels and factor f.
    """
    x = to_float(images).to(vae.device, vae.dtype)
    return vae.encode(x).latent_dist.parameters.half().cpu()


def _pictures(paths: Iterable[Path], size: int) -> Iterator[np.ndarray]:
    for path in paths:
        with Image.open(path) as image:
            yield np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))


def _batches(items: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    part = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


# ---- processes


def _start_process() -> None:
    end_with_parent()
    torch.set_num_threads(1)


def _drawn_moments(model: str | Path, indices: range) -> np.ndarray:
    vae = load_pipeline(model).vae
    images = np.stack([draw(training_scene(i)) for i in indices])
    count = ENCODED // (images.shape[1] * images.shape[2])
    parts = [images[i : i + count] for i in range(0, len(images), count)]
    return torch.cat([encoded(vae, part) for part in parts]).numpy()
