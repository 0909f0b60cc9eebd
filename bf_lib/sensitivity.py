"""Which layers bear low bits: each layer quantized alone, images compared (BitsFusion, §3.2).

For every layer i and b in {1, 2, 3}, layer i alone is quantized to 2^b + 1 balanced levels with
the alternating scale (§4.1), the same prompts are drawn from the same seeds, and the images are
compared with those of the full-precision model: MSE, PSNR, LPIPS and the drop of the CLIP score.
The paper also fine-tunes each candidate before it is scored; this sweep does not.

Candidates are shared by single-model processes with a fixed number of threads, so any number of
processes gives the same rows. A row is written as soon as it is known; a killed sweep goes on from
its rows, unless the model, the settings or the code differ, when it starts over.
"""

__all__ = [
    "Candidate",
    "Sweep",
    "candidates",
    "per_prompt",
    "quantized",
    "run_sweep",
    "table",
]

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from pathlib import Path
from threading import Thread
from typing import Self

import diffusers
import numpy as np
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from bf_lib.atomic import write_atomically
from bf_lib.grids import alternating_scale, fake_quantize, levels_of_bits, relative_mse
from bf_lib.layers import Layer, get_layer, list_layers
from bf_lib.metrics import clip_score, load_metrics, mse, psnr
from bf_lib.models import load_pipeline
from bf_lib.provenance import imported_files, library_digest
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
    """
    weight = get_layer(unet, name).weight
    kept = weight.detach().clone()
    approximation = fake_quantize(kept, alternating_scale(kept, levels), levels)
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
    def of(cls, study: Study, prompts: Sequence[str], layers: Sequence[Layer]) -> Self:
        """Returns the sweep of a study, with the seeds 0, 1, 2, ..."""
        return cls(
            model=study.model,
            prompts=tuple(prompts),
            seeds=tuple(range(len(prompts))),
            sampler=Sampler(steps=study.steps, guidance=study.guidance, batch=study.batch),
            bits=study.bits,
            layers=tuple(layer.name for layer in layers),
            metrics="sd15" if study.preset == "sd15" else "mini",
            threads=study.threads,
            dtype=study.dtype,
        )

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.prompts) or not self.prompts:
            raise ValueError(f"{len(self.prompts)} prompts with {len(self.seeds)} seeds")

    def load(self, device: str) -> StableDiffusionPipeline:
        """Loads the model that is swept."""
        return load_pipeline(self.model, device=device, dtype=getattr(torch, self.dtype))


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
            "lpips": perceived.tolist(),
            "clip": clip_score(self.clip.embed_images(images), self.text).tolist(),
        }

    def score(self, candidate: Candidate | None) -> dict:
        """Returns the row of a candidate, or of the full-precision model for None."""
        if candidate is None:
            return {"layer": None, "bits": None, "weight_mse": 0.0} | self.measure(self.reference)
        with quantized(self.pipe.unet, candidate.layer, levels_of_bits(candidate.bits)) as error:
            return asdict(candidate) | {"weight_mse": error} | self.measure(self.draw())


_bench: Bench | None = None  # of this process


def _start(sweep: Sweep, devices: Queue) -> None:
    """Prepares a process of the pool: threads, then the model and its full-precision images."""
    global _bench
    Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(sweep.threads)
    _bench = Bench(sweep, devices.get())


def _die_with_parent() -> None:
    """Ends this process when its parent is killed; it would wait for work for ever."""
    wait([parent_process().sentinel])
    os._exit(1)


def _score(candidate: Candidate | None) -> dict:
    return _bench.score(candidate)


def run_sweep(
    sweep: Sweep, path: Path, workers: int = 1, devices: Sequence[str] | None = None
) -> Iterator[dict]:
    """Yields the row of the full-precision model and of each candidate, those on file first.

    A row holds the candidate's layer and bits (None for full precision), the relative squared
    error of its weight, and a list over prompts of each metric.

    Arguments:
        sweep: What to sweep.
        path: The file of rows, in JSON lines; the first says what they belong to.
        workers: How many processes share the candidates.
        devices: The devices of the processes, taken in turn; by default the GPUs, or the CPU.
    """
    devices = devices or [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    pipe = sweep.load("cpu")
    layers = [x for x in list_layers(pipe.unet) if sweep.layers is None or x.name in sweep.layers]
    rows = _resume(path, _header(sweep, pipe))
    yield from rows
    done = {(row["layer"], row["bits"]) for row in rows}
    todo = [c for c in candidates(layers, sweep.bits) if (c.layer, c.bits) not in done]
    todo = ([] if (None, None) in done else [None]) + todo
    del pipe
    if todo:
        yield from _share(sweep, todo, path, min(workers, len(todo)), devices)


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
    pool = ProcessPoolExecutor(workers, context, _start, (sweep, queue))
    try:
        for future in as_completed([pool.submit(_score, candidate) for candidate in todo]):
            row = future.result()
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            yield row
    finally:
        pool.shutdown(cancel_futures=True)


def _resume(path: Path, header: dict) -> list[dict]:
    """Returns the complete rows on file that belong to this sweep, and leaves just them there."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last may be partial
    known = lines and json.loads(lines[0]) == header
    kept = lines[1:] if known else []
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(line + "\n" for line in [json.dumps(header), *kept])
    write_atomically(path, text.encode())
    return [json.loads(line) for line in kept]


def _header(sweep: Sweep, pipe: StableDiffusionPipeline) -> dict:
    """Says what rows belong to: the settings, the weights, the code and the libraries."""
    weights = hashlib.sha256()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        for name, value in sorted(part.state_dict().items()):
            weights.update(name.encode())
            weights.update(value.contiguous().cpu().flatten().view(torch.uint8).numpy())
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    code = library_digest(imported_files(Path(__file__)))
    header = {"sweep": asdict(sweep), "weights": weights.hexdigest(), "code": code}
    return json.loads(json.dumps(header | {"versions": versions}))  # tuples become lists


def table(rows: Iterable[Mapping], layers: Sequence[Layer]) -> pd.DataFrame:
    """Returns the candidates in order of layers and bits, with each metric averaged over prompts.

    The CLIP drop is the score of the full-precision images less the candidate's: positive where
    quantization loses something.
    """
    found = {(row["layer"], row["bits"]): row for row in rows}
    reference = np.array(found.pop((None, None))["clip"])
    known = {layer.name: layer for layer in layers}
    records = []
    for (name, bits), row in found.items():
        layer, levels = known[name], levels_of_bits(bits)
        records.append(
            {
                "layer": name,
                "role": layer.role,
                "block": layer.block,
                "depth": layer.depth,
                "params": layer.params,
                "bits": bits,
                "levels": levels,
                "weight_mse": row["weight_mse"],
                "mse": np.mean(row["mse"]),
                "psnr": np.mean(row["psnr"]),
                "lpips": np.mean(row["lpips"]),
                "clip": np.mean(row["clip"]),
                "clip_drop": np.mean(reference - row["clip"]),
            }
        )
    return pd.DataFrame(records).sort_values(["depth", "bits"], ignore_index=True)


def per_prompt(rows: Iterable[Mapping], frame: pd.DataFrame) -> dict[str, Tensor]:
    """Returns each metric of each candidate and prompt, with shape (candidates, prompts).

    The candidates are in the order of `frame`; "reference_clip" with shape (prompts,) holds the
    CLIP scores of the full-precision images.
    """
    found = {(row["layer"], row["bits"]): row for row in rows}
    order = [found[key] for key in zip(frame.layer, frame.bits, strict=True)]
    tensors = {
        name: torch.tensor([row[name] for row in order]) for name in ("mse", "lpips", "clip")
    }
    return tensors | {"reference_clip": torch.tensor(found[None, None]["clip"])}
