"""Which layers bear low bits: each layer quantized alone, images compared (BitsFusion, §3.2).

For every layer i and b in {1, 2, 3}, layer i alone is quantized to 2^b + 1 balanced levels with
the alternating scale (§4.1), the same prompts are drawn from the same seeds, and the images are
compared with those of the full-precision model: MSE, PSNR, a perceptual distance and the drop of
the CLIP score. The paper also fine-tunes each candidate before it is scored; this sweep does not.

Candidates are shared by single-model processes with a fixed number of threads, so any number of
processes gives the same rows. A row is written by the process that made it, at once, to a file
that is named after everything that the row depends on; a killed sweep goes on from its rows, and
a sweep that differs in anything has a file of its own.
"""

__all__ = [
    "Candidate",
    "CandidateFailed",
    "Sweep",
    "candidates",
    "quantized",
    "run_sweep",
]

import hashlib
import json
import math
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

from bf_lib.atomic import append_line, write_atomically
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


class CandidateFailed(ValueError):
    """Candidates cannot be scored, because a weight or an image is NaN or infinite."""


def candidates(layers: Sequence[Layer], bits: Sequence[int]) -> list[Candidate]:
    """Lists every layer at every bit-width: 768 for SD-v1.5."""
    return [Candidate(layer.name, b) for layer in layers for b in bits]


@contextmanager
def quantized(unet: nn.Module, name: str, levels: int) -> Iterator[float]:
    """Quantizes one layer for the duration of the block, then puts its weight back bit for bit.

    Arguments:
        unet: The model that the layer is of.
        name: The layer's dotted name.
        levels: The number of levels of its grid; odd, at least 3.

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
        levels = levels_of_bits(candidate.bits)
        try:
            with quantized(self.pipe.unet, candidate.layer, levels) as error:
                return asdict(candidate) | {"weight_mse": error} | self.measure(self.draw())
        except ValueError as error:
            raise CandidateFailed(
                f"{candidate.layer} at {candidate.bits} bits: {error}"
            ) from error


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
    append_line(_path, json.dumps(row))
    return row


def run_sweep(
    sweep: Sweep, folder: Path, workers: int | None = None, devices: Sequence[str] | None = None
) -> Iterator[dict]:
    """Yields the row of the full-precision model and of each candidate, those on file first.

    A row holds the candidate's layer and bits (None for full precision), the relative squared
    error of its weight, and a list over prompts of each metric.

    Arguments:
        sweep: What to sweep.
        folder: Where the rows are kept, in a file of the sweep's own.
        workers: How many processes share the candidates; by default one for each device.
        devices: The devices of the processes, taken in turn; by default the GPUs, or the CPU.

    Raises:
        CandidateFailed: If candidates could not be scored; all others are on file by then.
    """
    devices = devices or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    pipe = sweep.load("cpu")
    wanted = [None, *sweep.candidates(pipe.unet)]
    header = _header(sweep, pipe, devices)
    path = _row_file(folder, header)
    if not path.exists():
        write_atomically(path, json.dumps(header).encode())
    rows = _rows(path)
    yield from rows.values()
    todo = [c for c in wanted if ((c.layer, c.bits) if c else (None, None)) not in rows]
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
    failed = []
    try:
        for future in as_completed([pool.submit(_score, candidate) for candidate in todo]):
            try:
                row = future.result()
            except CandidateFailed as error:
                failed.append(str(error))
                continue
            yield row
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        raise CandidateFailed(
            "\n".join([f"{len(failed)} of {len(todo)} candidates failed:", *sorted(failed)])
        )


def _row_file(folder: Path, header: dict) -> Path:
    """Returns the file of a sweep's rows: JSON lines, the first of them the header.

    Its name is a digest of the header, so that rows of two sweeps cannot meet in one file.
    """
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    return folder / f"rows-{digest[:16]}.jsonl"


def _rows(path: Path) -> dict[tuple[str | None, int | None], dict]:
    """Returns the rows on file by candidate, without those that a kill left incomplete."""
    parsed = [_parsed(line) for line in path.read_text().split("\n")[1:]]
    return {(row["layer"], row["bits"]): row for row in parsed if row is not None}


def _parsed(line: str) -> dict | None:
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
    """Returns class and configuration of a part of a pipeline, without whence it was loaded."""
    kind = {"class": type(part).__name__}
    if isinstance(part, PreTrainedTokenizerBase):
        settings = ("model_max_length", "padding_side", "truncation_side", "special_tokens_map")
        rules = part.backend_tokenizer.to_str() if part.is_fast else part.get_vocab()
        return kind | {name: getattr(part, name) for name in settings} | {"rules": rules}
    config = getattr(part, "config", None) or {}
    entries = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return kind | {name: value for name, value in entries.items() if not name.startswith("_")}
