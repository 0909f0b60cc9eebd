"""Which layers bear low bits: each layer quantized alone, images compared (BitsFusion, §3.2).

For every layer i and b in {1, 2, 3}, layer i alone is quantized to 2^b + 1 balanced levels with
the alternating scale (§4.1), the same prompts are drawn from the same seeds, and the images are
compared with those of the full-precision model: MSE, PSNR, a perceptual distance and the drop of
the CLIP score. The paper also fine-tunes each candidate before it is scored; this sweep does not.

Candidates are shared by single-model processes with a fixed number of threads, so any number of
processes gives the same rows. A row is written by the process that made it, at once; a killed
sweep goes on from its rows, unless anything that they depend on differs, when it starts over.
"""

__all__ = [
    "Candidate",
    "Sweep",
    "candidates",
    "quantized",
    "run_sweep",
]

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Self

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bf_lib.atomic import write_atomically
from bf_lib.grids import alternating_scale, fake_quantize, levels_of_bits, relative_mse
from bf_lib.layers import Layer, get_layer, list_layers
from bf_lib.metrics import clip_score, load_metrics, mse, psnr
from bf_lib.models import load_pipeline
from bf_lib.processes import end_with_parent, make_deterministic
from bf_lib.provenance import imported_files, library_digest, versions
from bf_lib.sampling import Sampler, encode_prompts, generate
from bf_lib.study import Study


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layer at one bit-width, all others in full precision."""

    layer: str
    bits: int


def candidates(layers: Sequence[Layer], bits: Sequence[int]) -> list[Candidate]:
    """Lists every layer at every bit-width: 768 for SD-v1.5."""
    return [Candidate(layer.name, b) for layer in layers for b in bits]


@contextmanager
def quantized(unet: nn.Module, name: str, levels: int) -> Iterator[float]:
    """Quantizes one layer for the duration of the block, then puts its weight back bit for bit.

    Yields:
        The relative squared error of the layer's weight.

    Raises:
        ValueError: If the layer's weight cannot be quantized; it says which layer it is.
    """
    weight = get_layer(unet, name).weight
    kept = weight.detach().clone()
    try:
        approximation = fake_quantize(kept, alternating_scale(kept, levels), levels)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    try:
        with torch.no_grad():
            weight.copy_(approximation)
        yield float(relative_mse(kept, approximation))
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@dataclass(frozen=True)
class Sweep:
    """All that the rows of a sweep depend on; sent to each process that works on it."""

    model: str  # preset, folder or hub id
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]  # one for each prompt
    sampler: Sampler
    bits: tuple[int, ...] = (1, 2, 3)
    layers: tuple[str, ...] | None = None  # None is every quantizable layer
    metrics: str = "mini"  # as `metrics.load_metrics` names them
    threads: int = 1
    dtype: str = "float32"

    @classmethod
    def of(
        cls, study: Study, prompts: Sequence[str], layers: Sequence[Layer], seed: int = 0
    ) -> Self:
        """Returns the sweep of a study, with the seeds 0, 1, 2, ... for seed 0, then the next."""
        n = len(prompts)
        return cls(
            model=study.model,
            prompts=tuple(prompts),
            seeds=tuple(range(seed * n, (seed + 1) * n)),
            sampler=Sampler(steps=study.steps, guidance=study.guidance, batch=study.batch),
            bits=study.bits,
            layers=tuple(layer.name for layer in layers),
            metrics="mini" if study.model == "mini" else "sd15",
            threads=study.threads,
            dtype=study.dtype,
        )

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.prompts) or not self.prompts:
            raise ValueError(f"{len(self.prompts)} prompts with {len(self.seeds)} seeds")

    def load(self, device: str) -> StableDiffusionPipeline:
        """Loads the model that is swept."""
        return load_pipeline(self.model, device=device, dtype=getattr(torch, self.dtype))

    def candidates(self, unet: nn.Module) -> list[Candidate]:
        """Lists the candidates of this sweep, layers in order of execution.

        Raises:
            ValueError: If a layer's name is not that of a quantizable layer.
        """
        layers = list_layers(unet)
        if self.layers is not None:
            if unknown := sorted(set(self.layers) - {layer.name for layer in layers}):
                raise ValueError(f"the UNet has no such quantizable layers: {unknown}")
            layers = [layer for layer in layers if layer.name in self.layers]
        return candidates(layers, self.bits)


class Bench:
    """A loaded model, the images it draws in full precision, and what they are compared by."""

    def __init__(self, sweep: Sweep, device: str) -> None:
        self.sweep = sweep
        self.pipe = sweep.load(device)
        self.perceptual, self.clip = load_metrics(sweep.metrics, device)
        self.embeds = encode_prompts(self.pipe, sweep.prompts)
        self.text = self.clip.embed_texts(sweep.prompts)
        self.reference = self.draw()
        self.features = self.perceptual.features(self.reference)

    def draw(self) -> Tensor:
        """Draws the prompts with the model as it now is, as uint8 with shape (n, h, w, 3)."""
        return generate(self.pipe, self.embeds, self.sweep.seeds, self.sweep.sampler)

    def measure(self, images: Tensor) -> dict[str, list[float]]:
        """Compares images with the full-precision ones, prompt by prompt."""
        # Identical images have no finite PSNR: they count as one value off by one.
        finest = 10 * math.log10(255**2 * self.reference[0].numel())
        perceived = self.perceptual.distance(self.features, self.perceptual.features(images))
        return {
            "mse": mse(images, self.reference).tolist(),
            "psnr": psnr(images, self.reference).clamp_max(finest).tolist(),
            "perceptual": perceived.tolist(),
            "clip": clip_score(self.clip.embed_images(images), self.text).tolist(),
        }

    def score(self, candidate: Candidate | None) -> dict:
        """Returns the row of a candidate, or of the full-precision model for None."""
        if candidate is None:
            # Drawn again: what differs from the first time is noise, in every row.
            return {"layer": None, "bits": None, "weight_mse": 0.0} | self.measure(self.draw())
        with quantized(self.pipe.unet, candidate.layer, levels_of_bits(candidate.bits)) as error:
            return asdict(candidate) | {"weight_mse": error} | self.measure(self.draw())


_bench: Bench | None = None  # of this process
_path: Path | None = None  # where it writes its rows


def _start(sweep: Sweep, path: Path, devices: Queue) -> None:
    """Prepares a process of the pool: threads, then the model and its full-precision images."""
    global _bench, _path
    end_with_parent()
    make_deterministic(sweep.threads)
    _bench, _path = Bench(sweep, devices.get()), path


def _score(candidate: Candidate | None) -> dict:
    """Returns the row of a candidate, after it is on file."""
    row = _bench.score(candidate)
    line = (json.dumps(row) + "\n").encode()
    file = os.open(_path, os.O_WRONLY | os.O_APPEND)
    try:
        written = os.write(file, line)  # in one go, so that processes do not mix their lines
    finally:
        os.close(file)
    if written < len(line):
        raise OSError(f"no space left for a row in {_path}")
    return row


def run_sweep(
    sweep: Sweep, path: Path, workers: int | None = None, devices: Sequence[str] | None = None
) -> Iterator[dict]:
    """Yields the row of the full-precision model and of each candidate, those on file first.

    A row holds the candidate's layer and bits (None for full precision), the relative squared
    error of its weight, and a list over prompts of each metric. Rows of another sweep in the same
    file are discarded.

    Arguments:
        sweep: What to sweep.
        path: The file of rows, in JSON lines; the first says what they belong to.
        workers: How many processes share the candidates; by default one for each device.
        devices: The devices of the processes, taken in turn; by default the GPUs, or the CPU.
    """
    devices = devices or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    pipe = sweep.load("cpu")
    wanted = [None, *sweep.candidates(pipe.unet)]
    rows = _resume(path, _header(sweep, pipe, devices))
    yield from rows
    done = {(row["layer"], row["bits"]) for row in rows}
    todo = [c for c in wanted if ((c.layer, c.bits) if c else (None, None)) not in done]
    del pipe
    if todo:
        yield from _share(sweep, todo, path, min(workers or len(devices), len(todo)), devices)


def _share(
    sweep: Sweep,
    todo: Sequence[Candidate | None],
    path: Path,
    workers: int,
    devices: Sequence[str],
) -> Iterator[dict]:
    context = get_context("spawn")
    queue = context.Queue()
    for number in range(workers):
        queue.put(devices[number % len(devices)])
    pool = ProcessPoolExecutor(workers, context, _start, (sweep, path, queue))
    try:
        for future in as_completed([pool.submit(_score, candidate) for candidate in todo]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _resume(path: Path, header: dict) -> list[dict]:
    """Returns the complete rows on file that belong to this sweep, and leaves just them there."""
    lines = path.read_text().split("\n") if path.exists() else []
    rows = [row for line in lines if (row := _parsed(line)) is not None]
    kept = rows[1:] if rows[:1] == [header] else []
    text = "".join(json.dumps(row) + "\n" for row in [header, *kept])
    write_atomically(path, text.encode())
    return kept


def _parsed(line: str) -> dict | None:
    """Reads a row; None for one that a kill or a full disk left incomplete."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _header(sweep: Sweep, pipe: StableDiffusionPipeline, devices: Sequence[str]) -> dict:
    """Says what rows belong to: settings, models, code, libraries and kind of device."""
    perceptual, clip = load_metrics(sweep.metrics)
    models = hashlib.sha256()
    for part in (*pipe.components.values(), perceptual.trunk, clip.model):
        models.update(json.dumps(_description(part), sort_keys=True, default=str).encode())
        for name, value in sorted(part.state_dict().items() if _is_module(part) else ()):
            models.update(name.encode())
            models.update(value.contiguous().flatten().view(torch.uint8).numpy())
    header = {
        "sweep": asdict(sweep),
        "models": models.hexdigest(),
        "code": library_digest(imported_files(Path(__file__))),
        "versions": versions(),
        "devices": sorted({device.partition(":")[0] for device in devices}),
    }
    return json.loads(json.dumps(header))  # tuples become lists


def _is_module(part: object) -> bool:
    return isinstance(part, nn.Module)


def _description(part: object) -> dict:
    """Returns the configuration of a part of a pipeline, without where it was loaded from."""
    if isinstance(part, PreTrainedTokenizerBase):
        return part.get_vocab()
    config = getattr(part, "config", None) or {}
    entries = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {name: value for name, value in entries.items() if not name.startswith("_")}
