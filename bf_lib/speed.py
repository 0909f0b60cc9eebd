"""How fast the sweep is, beside a bare loop of UNet forwards, and the search for optimal scales.

    python -m bf_lib.speed --preset mini --rounds 5

The sweep: in each round every layout of processes takes its turn, first with the bare loop and
then with the sweep, so that a machine that slows down slows all of them. A candidate of the sweep
is quantizing a layer, sampling and decoding all prompts, and comparing the images; a turn of the
bare loop is as many UNet evaluations in batches of the same size.

The search: Gaussian weights in the shapes of SD-v1.5's layers at their published bit-widths.
"""

__all__ = ["measure", "scale_seconds", "summary"]

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection

import pandas as pd
import torch

from bf_lib.grids import levels_of_bits, optimal_scale
from bf_lib.layers import list_layers, published_bits
from bf_lib.models import load_pipeline, meta_unet, sd15_unet_config
from bf_lib.processes import end_with_parent, make_deterministic
from bf_lib.progress import progress
from bf_lib.protocol import study_layers, study_prompts, study_sweep
from bf_lib.sampling import latent_shape, unet_evaluations
from bf_lib.sensitivity.candidates import Candidate
from bf_lib.sensitivity.sweep import Bench, Sweep
from bf_lib.study import PRESETS, Study

WORK = ("bare loop", "sweep")


@torch.inference_mode()
def _bare_loop(bench: Bench, evaluations: int) -> None:
    """Runs the UNet alone for so many evaluations, in the sweep's batches."""
    batch = bench.sweep.sampler.batch * (2 if bench.sweep.sampler.guided else 1)
    unet, dtype, device = bench.pipe.unet, bench.pipe.unet.dtype, bench.pipe.device
    x = torch.randn(batch, *latent_shape(bench.pipe)).to(device, dtype)
    text = bench.embeds.prompts[:1].expand(batch, -1, -1)
    for start in range(0, evaluations, batch):
        count = min(batch, evaluations - start)
        unet(x[:count], 500, encoder_hidden_states=text[:count], return_dict=False)


def _serve(sweep: Sweep, evaluations: int, device: str, link: Connection) -> None:
    """Does what is asked for over the link, until that is closed."""
    end_with_parent()
    make_deterministic(sweep.threads)
    bench = sweep.bench(sweep.load(device))
    link.send("ready")
    with suppress(EOFError):
        while asked := link.recv():
            if isinstance(asked, Candidate):
                bench.score(asked)
            else:
                _bare_loop(bench, evaluations)
            link.send("done")


@contextmanager
def _processes(sweep: Sweep, count: int, evaluations: int) -> Iterator[list[Connection]]:
    context = get_context("spawn")
    gpus = torch.cuda.device_count()
    links, started = [], []
    try:
        for number in range(count):
            ours, theirs = context.Pipe()
            links.append(ours)
            device = f"cuda:{number % gpus}" if gpus else "cpu"
            process = context.Process(target=_serve, args=(sweep, evaluations, device, theirs))
            process.start()
            started.append(process)
            theirs.close()  # so that a process that dies is an end of file here
        for link in links:
            link.recv()
        yield links
    finally:
        for link in links:
            link.close()  # which ends its process
        for process in started:
            process.join(timeout=10)
            process.terminate()


def _turn(links: Sequence[Connection], asked: Sequence[object]) -> float:
    """Returns the seconds until every process has done its part."""
    since = time.perf_counter()
    for link, part in zip(links, asked, strict=True):
        link.send(part)
    for link in links:
        link.recv()
    return time.perf_counter() - since


def measure(
    sweep: Sweep, rounds: int, layouts: Sequence[tuple[int, int]] = ((2, 1), (1, 2))
) -> pd.DataFrame:
    """Times both kinds of work in each layout of processes, in turn.

    Arguments:
        sweep: The sweep; its number of threads is the layout's.
        rounds: How often each takes its turn, after one that is not counted.
        layouts: Pairs of processes and threads of each.

    Returns:
        Columns round, processes, threads, work ("bare loop" or "sweep"), and
        evaluations_per_second of the UNet, over all processes.
    """
    pipe = load_pipeline(sweep.model)
    known = sweep.tasks(pipe.unet)[1:]  # without full precision
    evaluations = unet_evaluations(pipe, len(sweep.prompts), sweep.sampler)
    del pipe
    rows = []
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for processes, threads in layouts:
        if processes < 1 or threads < 1:
            raise ValueError(f"a layout needs a process and a thread, got {processes, threads}")
    with _all_processes(sweep, layouts, evaluations) as links:
        for turn in progress(range(rounds + 1), desc="time the sweep"):
            for layout in layouts:
                chosen = [known[(turn * layout[0] + i) % len(known)] for i in range(layout[0])]
                for work, asked in zip(WORK, (["loop"] * layout[0], chosen), strict=True):
                    seconds = _turn(links[layout], asked)
                    if turn > 0:  # the first one warms up
                        rate = layout[0] * evaluations / seconds
                        rows.append((turn, *layout, work, rate))
    columns = ["round", "processes", "threads", "work", "evaluations_per_second"]
    return pd.DataFrame(rows, columns=columns)


@contextmanager
def _all_processes(
    sweep: Sweep, layouts: Sequence[tuple[int, int]], evaluations: int
) -> Iterator[dict[tuple[int, int], list[Connection]]]:
    """Starts the processes of every layout; those that are not asked wait without working."""
    if not layouts:
        yield {}
        return
    first, *others = layouts
    with (
        _processes(replace(sweep, threads=first[1]), first[0], evaluations) as links,
        _all_processes(sweep, others, evaluations) as rest,
    ):
        yield {first: links} | rest


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the median rate of each layout and kind of work, and the sweep's share of the loop.

    The share is the median over rounds of the ratio within a round.
    """
    index = ["round", "processes", "threads"]
    wide = table.pivot(index=index, columns="work", values="evaluations_per_second")
    wide["sweep / bare loop"] = wide["sweep"] / wide["bare loop"]
    return wide.groupby(["processes", "threads"], sort=False).median()


def scale_seconds(
    shapes: Iterable[tuple[tuple[int, ...], int]], threads: int
) -> tuple[int, float]:
    """Times `optimal_scale` on Gaussian weights.

    Arguments:
        shapes: The shape of each layer's weight, with its number of levels.
        threads: How many threads search.

    Returns:
        How many weights there were, and the seconds.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    count, seconds = 0, 0.0
    for shape, levels in shapes:
        weight = torch.randn(shape, generator=generator)
        since = time.perf_counter()
        optimal_scale(weight, levels)
        seconds += time.perf_counter() - since
        count += weight.numel()
    return count, seconds


def _sd15_shapes() -> list[tuple[tuple[int, ...], int]]:
    bits = published_bits().set_index("name").bits
    layers = list_layers(meta_unet(sd15_unet_config()))
    return [(layer.shape, levels_of_bits(bits[layer.name])) for layer in layers]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bf_lib.speed")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="mini")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="single-thread processes")
    options = parser.parse_args()
    if options.workers < 2:
        parser.error(f"workers must be at least 2, got {options.workers}")
    study = Study.of(options.preset)
    layers = list_layers(load_pipeline(study.model).unet)
    sweep = study_sweep(study, study_prompts(study, seed=0), study_layers(study, layers))
    layouts = (options.workers, 1), (1, options.workers)
    table = measure(sweep, options.rounds, layouts)
    print(f"UNet evaluations per second, medians of {options.rounds} rounds")
    print(summary(table).round(2).to_string())
    rates = table[table.work == "sweep"].pivot(
        index="round", columns=["processes", "threads"], values="evaluations_per_second"
    )
    first, second = layouts
    gain = (rates[first] / rates[second]).median()
    print(f"sweep, {first[0]} processes of {first[1]} thread over ", end="")
    print(f"{second[0]} of {second[1]} threads: {gain:.2f}x")
    count, seconds = scale_seconds(progress(_sd15_shapes(), desc="optimal scales"), threads=2)
    print(f"optimal scales of {count / 1e6:.0f} million weights, 2 threads: {seconds:.0f} s")


if __name__ == "__main__":
    _main()
