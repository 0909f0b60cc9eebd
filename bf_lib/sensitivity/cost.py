"""What a sweep and an estimate cost, in counted FLOPs and in UNet evaluations, before either runs.

One multiplication with its addition is two FLOPs. They are counted by torch on models without
weights (the meta device), so that those of SD-v1.5 are known on any machine.
"""

__all__ = [
    "Cost",
    "counted",
    "estimate_flops",
    "plan",
    "sd15_vae_config",
    "seconds_per_evaluation",
    "sweep_flops",
]

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import pandas as pd
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bf_lib.layers import list_layers
from bf_lib.sampling import Sampler, latent_shape
from bf_lib.sensitivity.single_step import PART
from bf_lib.study import Study


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs of one latent or image."""

    layers: int  # that are quantized
    forward: int  # of the UNet
    backward: int  # of the UNet, to its activations alone
    linear: int  # of the quantized layers, without what lies between them
    rest: float  # of the UNet from the part that a layer is in, averaged over layers
    decode: int  # of the decoder
    decode_backward: int


def counted(unet_config: Mapping, vae_config: Mapping, tokens: int) -> Cost:
    """Counts the FLOPs of a UNet and a decoder.

    Arguments:
        unet_config: The configuration of the UNet.
        vae_config: The configuration of the autoencoder.
        tokens: The length of a prompt.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(unet_config)).requires_grad_(False)
        vae = AutoencoderKL.from_config(dict(vae_config)).requires_grad_(False)
        size = unet.config.sample_size
        x = torch.zeros(1, unet.config.in_channels, size, size, requires_grad=True)
        text = torch.zeros(1, tokens, unet.config.cross_attention_dim, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        noise = unet(x, 0, encoder_hidden_states=text, return_dict=False)[0]
    flops = {
        name.removeprefix(f"{type(unet).__name__}."): sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
    }
    latents = x.detach().requires_grad_()
    pixels, decode = _with_flops(lambda: vae.decode(latents, return_dict=False)[0])
    names = [layer.name for layer in list_layers(unet)]
    return Cost(
        layers=len(names),
        forward=counter.get_total_flops(),
        backward=_with_flops(lambda: _pull(noise, [x, text]))[1],
        linear=sum(flops[name] for name in names),
        rest=_rest(flops, names),
        decode=decode,
        decode_backward=_with_flops(lambda: _pull(pixels, [latents]))[1],
    )


def _with_flops(work: Callable[[], Tensor]) -> tuple[Tensor, int]:
    with FlopCounterMode(display=False) as counter:
        result = work()
    return result, counter.get_total_flops()


def _pull(result: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    return torch.autograd.grad(result, inputs, torch.zeros_like(result))[0]


def _rest(flops: Mapping[str, int], names: Sequence[str]) -> float:
    """Returns the FLOPs from the part that a layer is in to the end, averaged over layers."""
    matches = [PART.match(name) for name in names]
    parts = list(dict.fromkeys(match[0] for match in matches if match))
    before = dict(zip(parts, accumulate((flops[part] for part in parts), initial=0), strict=False))
    skipped = [before[match[0]] if match else 0 for match in matches]
    return flops["Global"] - sum(skipped) / len(names)


def sweep_flops(cost: Cost, prompts: int, sampler: Sampler, bits: int) -> float:
    """Returns the FLOPs of a sweep over all layers; those of the judges are not counted."""
    image = _evaluations(sampler) * cost.forward + cost.decode
    return (cost.layers * bits + 1) * prompts * image


def estimate_flops(
    cost: Cost, method: str, prompts: int, sampler: Sampler, bits: int, projections: int
) -> float:
    """Returns the FLOPs of an estimate of all layers by one of `estimates.METHODS`."""
    evaluations = _evaluations(sampler)
    way = evaluations * cost.forward  # of the latents in full precision
    if method == "single step":
        rows = evaluations // sampler.steps
        return prompts * (way + rows * (cost.forward + cost.layers * bits * cost.rest))
    back = cost.forward + bits * cost.linear + projections * cost.backward
    passes = evaluations * back
    if method == "image gradient":
        passes += cost.decode + projections * cost.decode_backward
    return prompts * (way + passes)


def _evaluations(sampler: Sampler) -> int:
    """Returns the evaluations of the UNet that one image takes, where a step is one time-step."""
    return sampler.steps * (2 if sampler.guided else 1)


def plan(
    study: Study, cost: Cost, seconds: float, gpus: int, projections: int = 4, prompts: int = 4
) -> pd.DataFrame:
    """Returns what the sweep and the estimate of a study take, before anyone starts them.

    Arguments:
        study: The study.
        cost: Of its model.
        seconds: Of one UNet evaluation, measured in a batch of the study's size.
        gpus: How many devices, or processes on a CPU, work at once.
        projections: Of the estimate by the image gradient.
        prompts: Of the estimate by the image gradient.

    Returns:
        One row for the sweep and one for the estimate, with columns work, evaluations (FLOPs in
        units of one UNet evaluation), petaflop and hours.
    """
    sampler = Sampler(study.steps, study.guidance, study.batch)
    bits = len(study.bits)
    flops = {
        "sweep": sweep_flops(cost, study.prompts, sampler, bits),
        "estimate": estimate_flops(cost, "image gradient", prompts, sampler, bits, projections),
    }
    table = pd.DataFrame({"work": list(flops), "petaflop": [f / 1e15 for f in flops.values()]})
    table["evaluations"] = [f / cost.forward for f in flops.values()]
    table["hours"] = table.evaluations * seconds / gpus / 3600
    return table


def seconds_per_evaluation(
    pipe: StableDiffusionPipeline, text: Tensor, rows: int, rounds: int = 5
) -> float:
    """Times the UNet alone, in seconds of one latent.

    Arguments:
        pipe: The model.
        text: The text of one sample, with shape (1, tokens, width).
        rows: Latents at once.
        rounds: How often, after one that is not counted; the median is returned.
    """
    x = torch.randn(rows, *latent_shape(pipe)).to(text)
    taken = []
    for _ in range(rounds + 1):
        since = time.perf_counter()
        with torch.inference_mode():
            noise = pipe.unet(x, 500, encoder_hidden_states=text.expand(len(x), -1, -1))[0]
        float(noise.mean())  # waits for a GPU
        taken.append((time.perf_counter() - since) / len(x))
    return statistics.median(taken[1:])


def sd15_vae_config() -> dict[str, object]:
    """Returns the configuration of SD-v1.5's autoencoder, as its public repository has it."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    }
