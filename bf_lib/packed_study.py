"""What packed UNets weigh and cost, measured: `python -m bf_lib.packed_study` at SD-v1.5's size.

The weights of SD-v1.5 are not needed to know how large a file is and how long it takes to load:
Gaussian ones of the same shapes do. Each model is loaded in a process of its own, so that the
memory it takes is that of the process, and not a sum of tensors.
"""

__all__ = [
    "decode_speeds",
    "gaussian_unet",
    "loaded_costs",
    "rounded_unet",
    "main",
    "saved_costs",
]

import argparse
import copy
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from bf_lib.grids import balanced_codes, fake_quantize
from bf_lib.models import meta_unet, sd15_unet_config
from bf_lib.packed_config import BitsFusionConfig
from bf_lib.packed_layers import packed_layers
from bf_lib.packed_unets import load_packed, pack_
from bf_lib.packed_weights import SCALES, decoded_in, scale_of, stored_scale
from bf_lib.packing import pack, unpack_, word
from bf_lib.recipe import Recipe, published_recipe
from bf_lib.timecache import sampling_steps
from bf_lib.timing import loaded, medians_in_turns, unet_inputs

REPEATS = 5  # of a step, in turns; medians are reported


@torch.no_grad()
def rounded_unet(unet: UNet2DConditionModel, config: BitsFusionConfig) -> UNet2DConditionModel:
    """Returns a copy whose weights are rounded and remain what they were, numbers of their own.

    It computes what a packed UNet must, by other means: nothing is packed.
    """
    rounded = copy.deepcopy(unet)
    config.cache_(rounded)
    for name, parameter in rounded.named_parameters():
        layer = name.removesuffix(".weight")
        levels = config.recipe.levels.get(layer)
        if levels is None or layer == name:
            parameter.copy_(parameter.half())
        else:
            scale = stored_scale(SCALES[config.scales](parameter, levels))
            parameter.copy_(fake_quantize(parameter, scale, levels))
    return rounded


@torch.no_grad()
def gaussian_unet(
    widths: Sequence[int] = (320, 640, 1280, 1280), seed: int = 0
) -> UNet2DConditionModel:
    """Builds SD-v1.5's UNet with Gaussian weights that keep the size of what goes through a layer.

    Arguments:
        widths: Of its four resolutions; SD-v1.5's by default.
        seed: Of the weights.
    """
    config = sd15_unet_config() | {"block_out_channels": tuple(widths)}
    unet = meta_unet(config).to_empty(device="cpu").eval()
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
    """Packs a copy of a UNet and saves it, with and without entropy coding.

    Arguments:
        unet: The UNet.
        recipe: The levels of its layers.
        folder: Where the folders "packed" and "zstd" go.
        steps: Of DDIM, whose time features are cached.

    Returns:
        Columns tier, mb (the file), stored_bits (for each parameter of the original), pack_s (to
        search scales, round and pack all weights), save_s (to write the file) and differ: how many
        layers of the file have other weights than rounding the original to their scales gives.
    """
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    timesteps = sampling_steps(DDIMScheduler(steps_offset=1), steps)
    packed = copy.deepcopy(unet)
    started = time.perf_counter()
    pack_(packed, BitsFusionConfig(recipe, timesteps=timesteps, source="Gaussian weights"))
    packing = time.perf_counter() - started
    rows = []
    for tier in ("packed", "zstd"):
        started = time.perf_counter()
        packed.save_pretrained(folder / tier, compress="zstd" if tier == "zstd" else None)
        saving = time.perf_counter() - started
        size = sum(file.stat().st_size for file in (folder / tier).glob("*.safetensors"))
        differ = _differing(load_packed(folder / tier), unet)
        rows.append((tier, size / 1e6, 8 * size / parameters, packing, saving, differ))
    return pd.DataFrame(rows, columns=["tier", "mb", "stored_bits", "pack_s", "save_s", "differ"])


@torch.no_grad()
def _differing(packed: nn.Module, original: nn.Module) -> int:
    """Counts the layers whose weights are not those of the original, rounded and never packed."""
    count = 0
    for name, layer in packed_layers(packed).items():
        weight = original.get_submodule(name).weight
        scale = scale_of(layer.scale).float().view(-1, *[1] * (weight.ndim - 1))
        count += not torch.equal(layer.weight, fake_quantize(weight, scale, layer.levels))
    return count


def loaded_costs(folder: Path, latents: int = 32, threads: int | None = None) -> pd.DataFrame:
    """Loads both tiers, each in a process of its own, and times steps beside the dense model.

    Arguments:
        folder: What `saved_costs` wrote to.
        latents: The width and height of latents; a step has two of them.
        threads: Of torch; by default its own choice.

    Returns:
        Columns tier, load_s, resident_mb (by which the process grew), differ (how many numbers of
        a step's result are not the same in all three ways), and the medians of a step's
        time: packed_s, dense_s (with decoded weights kept) and full_s (an ordinary UNet), and the
        ratios packed_over_full and dense_over_full.
    """
    rows = []
    for tier in ("packed", "zstd"):
        command = [sys.executable, "-m", "bf_lib.packed_study", "--load", str(folder / tier)]
        options = ["--latents", str(latents), "--threads", str(threads or torch.get_num_threads())]
        done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
        rows.append({"tier": tier} | json.loads(done.stdout.splitlines()[-1]))
    table = pd.DataFrame(rows)
    for kind in ("packed", "dense"):
        table[f"{kind}_over_full"] = table[f"{kind}_s"] / table.full_s
    return table


def _load_and_step(folder: Path, latents: int) -> dict[str, float]:
    """Loads a packed UNet, and times its steps: the work of one process of `loaded_costs`."""
    unet, loading, grown = loaded(lambda: load_packed(folder))
    x, text = unet_inputs(unet, latents)
    t = unet.time_proj.timesteps[-1]

    def step(model: nn.Module) -> Callable[[], Tensor]:
        return torch.inference_mode()(lambda: model(x, t, encoder_hidden_states=text).sample)

    dense = load_packed(folder, "dense")
    full = load_packed(folder).dequantize()
    steps = {"packed_s": step(unet), "dense_s": step(dense), "full_s": step(full)}
    results = [run() for run in steps.values()]  # the first decodes what is kept
    differ = sum(int((result != results[0]).sum()) for result in results)
    found = {"load_s": loading, "resident_mb": grown / 1e6, "differ": differ}
    return found | medians_in_turns(steps, REPEATS)


def decode_speeds(
    levels: Sequence[int], threads: int = 1, count: int = 9 * 1280 * 1280
) -> pd.DataFrame:
    """Times how fast weights are decoded into memory that is there, and how fast it is written.

    Arguments:
        levels: The numbers of levels.
        threads: Of torch.
        count: How many weights; by default those of the most frequent kind of SD-v1.5's layers.

    Returns:
        Columns levels, bits (of a packed code), threads, codes_per_s (codes in int8 or wider),
        weights_per_s (weights in float32) and written_per_s: how many float32 are written in the
        same time, which no decoder can beat.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = [(n, word(n).bits_per_code, threads, *_speeds(n, count)) for n in levels]
    finally:
        torch.set_num_threads(before)
    columns = ["levels", "bits", "threads", "codes_per_s", "weights_per_s", "written_per_s"]
    return pd.DataFrame(rows, columns=columns)


def _speeds(levels: int, count: int) -> tuple[float, float, float]:
    generator = torch.Generator().manual_seed(0)
    codes = balanced_codes(levels)[torch.randint(levels, (count,), generator=generator)]
    words, scale = pack(codes, levels), torch.full((1,), 0.5).half().view(torch.int16)
    filled = len(words) * word(levels).codes
    room, target = torch.empty(filled), codes.new_empty(filled)
    return (
        count / _best(lambda: unpack_(target, words, levels)),
        count / _best(lambda: decoded_in(room, words, scale, levels, (1, count))),
        count / _best(lambda: room[:count].fill_(1.0)),
    )


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
    print(loaded_costs(options.folder, options.latents, options.threads).round(3).to_string())
    levels = (3, 5, 9, 17, 33, 65, 129)
    speeds = [decode_speeds(levels, threads) for threads in (1, options.threads)]
    print(pd.concat(speeds).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
