"""What packed UNets weigh and cost, measured: `python -m bf_lib.packed_study` at SD-v1.5's size.

The weights of SD-v1.5 are not needed to know how large a file is and how long it takes to load:
Gaussian ones of the same shapes do. Each model is loaded in a process of its own, so that the
memory it takes is that of the process, and not a sum of tensors.
"""

__all__ = [
    "decode_speeds",
    "gaussian_unet",
    "loaded_costs",
    "main",
    "saved_costs",
]

import argparse
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import pandas as pd
import psutil
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from bf_lib.diffusers_quantizer import BitsFusionConfig, load_packed, pack_
from bf_lib.grids import balanced_codes
from bf_lib.models import meta_unet, sd15_unet_config
from bf_lib.packing import pack, unpack, word
from bf_lib.recipe import Recipe, published_recipe
from bf_lib.timecache import sampling_steps

REPEATS = 5  # of a step, in turns; medians are reported


@torch.no_grad()
def gaussian_unet(config: dict | None = None, seed: int = 0) -> UNet2DConditionModel:
    """Builds a UNet with Gaussian weights that keep the size of what goes through each layer.

    Arguments:
        config: Of the UNet; SD-v1.5's by default.
        seed: Of the weights.
    """
    unet = meta_unet(config or sd15_unet_config()).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    for module in unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            spread = 1 / math.sqrt(module.weight[0].numel())
            module.weight.normal_(0, spread, generator=generator)
            if module.bias is not None:
                module.bias.normal_(0, 0.02, generator=generator)
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.weight.fill_(1)
            module.bias.zero_()
    return unet


def saved_costs(
    unet: UNet2DConditionModel, recipe: Recipe, folder: Path, steps: int = 50
) -> pd.DataFrame:
    """Packs a UNet in place and saves it, with and without entropy coding.

    Arguments:
        unet: The UNet.
        recipe: The levels of its layers.
        folder: Where the folders "packed" and "zstd" go.
        steps: Of DDIM, whose time features are cached.

    Returns:
        Columns tier, mb (the file), stored_bits (for each parameter of the original), pack_s (to
        round and pack all weights) and save_s (to write the file).
    """
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    timesteps = sampling_steps(DDIMScheduler(steps_offset=1), steps)
    started = time.perf_counter()
    pack_(unet, BitsFusionConfig(recipe, timesteps=timesteps, source="Gaussian weights"))
    packing = time.perf_counter() - started
    rows = []
    for tier in ("packed", "zstd"):
        started = time.perf_counter()
        unet.save_pretrained(folder / tier, compress="zstd" if tier == "zstd" else None)
        saving = time.perf_counter() - started
        size = sum(file.stat().st_size for file in (folder / tier).glob("*.safetensors"))
        rows.append((tier, size / 1e6, 8 * size / parameters, packing, saving))
    return pd.DataFrame(rows, columns=["tier", "mb", "stored_bits", "pack_s", "save_s"])


def loaded_costs(folder: Path, latents: int = 32, threads: int | None = None) -> pd.DataFrame:
    """Loads both tiers, each in a process of its own, and times steps beside the dense model.

    Arguments:
        folder: What `saved_costs` wrote to.
        latents: The width and height of latents; a step has two of them.
        threads: Of torch; by default its own choice.

    Returns:
        Columns tier, load_s, resident_mb (by which the process grew), and the medians of a step's
        time: packed_s, dense_s (with decoded weights kept) and full_s (an ordinary UNet).
    """
    rows = []
    for tier in ("packed", "zstd"):
        command = [sys.executable, "-m", "bf_lib.packed_study", "--load", str(folder / tier)]
        options = ["--latents", str(latents), "--threads", str(threads or torch.get_num_threads())]
        done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
        rows.append({"tier": tier} | json.loads(done.stdout.splitlines()[-1]))
    return pd.DataFrame(rows)


def _load_and_step(folder: Path, latents: int) -> dict[str, float]:
    """Loads a packed UNet, and times its steps: the work of one process of `loaded_costs`."""
    torch.zeros(64, 64) @ torch.zeros(64, 64)  # what torch sets up at first use
    gc.collect()
    process = psutil.Process()
    before, started = process.memory_info().rss, time.perf_counter()
    unet = load_packed(folder)
    loading = time.perf_counter() - started
    gc.collect()
    resident = process.memory_info().rss - before
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, unet.config.in_channels, latents, latents, generator=generator)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    t = unet.time_proj.timesteps[-1]

    def step(model: nn.Module) -> Callable[[], Tensor]:
        return torch.inference_mode()(lambda: model(x, t, encoder_hidden_states=text).sample)

    dense = load_packed(folder, "dense")
    full = load_packed(folder).dequantize()
    steps = {"packed_s": step(unet), "dense_s": step(dense), "full_s": step(full)}
    results = [run() for run in steps.values()]  # the first decodes what is kept
    assert all(torch.equal(result, results[0]) for result in results)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, run in steps.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: median(values) for name, values in seconds.items()}
    return {"load_s": loading, "resident_mb": resident / 1e6} | medians


def decode_speeds(levels: Sequence[int], count: int = 4_000_000) -> pd.DataFrame:
    """Times how fast codes are unpacked by the threads that torch has.

    Returns:
        Columns levels, bits (of a packed code), weights_per_s, and copied_per_s: how many int8
        codes are copied in the same time, which no decoder can beat.
    """
    rows = []
    for number in levels:
        generator = torch.Generator().manual_seed(0)
        codes = balanced_codes(number)[torch.randint(number, (count,), generator=generator)]
        words, target = pack(codes, number), torch.empty_like(codes)
        unpacking = _best(lambda w=words, n=number: unpack(w, n, count))
        copying = _best(lambda c=codes, t=target: t.copy_(c))
        rows.append((number, word(number).bits_per_code, count / unpacking, count / copying))
    return pd.DataFrame(rows, columns=["levels", "bits", "weights_per_s", "copied_per_s"])


def _best(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    """Builds, saves and loads SD-v1.5's shapes, and prints what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/sd15_shape"))
    parser.add_argument("--load", type=Path, help="a packed UNet: load it and time its steps")
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.load:
        print(json.dumps(_load_and_step(options.load, options.latents)))
        return
    saved = saved_costs(gaussian_unet(), published_recipe(), options.folder)
    gc.collect()
    print(saved.round(3).to_string(index=False))
    loaded = loaded_costs(options.folder, options.latents, options.threads)
    loaded["packed_over_full"] = loaded.packed_s / loaded.full_s
    loaded["dense_over_full"] = loaded.dense_s / loaded.full_s
    print(loaded.round(3).to_string(index=False))
    print(decode_speeds((3, 5, 9, 17, 33, 65, 129)).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
