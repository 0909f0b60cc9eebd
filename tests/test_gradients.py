"""Projections of what quantization changes, against finite differences of the model itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from toys import toy_pipeline

from bf_lib.layers import get_layer, list_layers
from bf_lib.sampling import PromptEmbeds, Sampler, denoise, encode_prompts, generators_of
from bf_lib.sensitivity import gradients
from bf_lib.sensitivity.gradients import (
    image_projections,
    noise_projections,
    weight_deltas,
)
from bf_lib.sensitivity.seeds import derived_seeds
from bf_lib.sensitivity.trajectory import recorded

SAMPLER = Sampler(steps=3, guidance=2.5, batch=2)
SEEDS = (4, 7)
NAMES = (
    "down_blocks.0.resnets.0.conv1",  # before everything
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",  # sees the text alone
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.2.downsamplers.0.conv",  # has a stride
    "up_blocks.3.resnets.2.conv_shortcut",
)


@pytest.fixture(scope="module")
def pipe():
    pipe = toy_pipeline()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.double()
    # DPM-Solver++ computes in single precision, too coarse for small differences.
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


@pytest.fixture
def scheduled(pipe, request):
    """The pipeline with another scheduler."""
    kept = pipe.scheduler
    pipe.scheduler = request.param.from_config(kept.config, skip_prk_steps=True)  # as SD-v1.5
    yield pipe
    pipe.scheduler = kept


@pytest.fixture(scope="module")
def embeds(pipe):
    known = encode_prompts(pipe, ["a red star", "two rings"])
    return PromptEmbeds(known.prompts.clone(), known.empty.clone())


@pytest.fixture(scope="module")
def deltas(pipe):
    layers = [layer for layer in list_layers(pipe.unet) if layer.name in NAMES]
    return weight_deltas(pipe.unet, layers, (1, 3))


@torch.no_grad()
def pixels(pipe, embeds, sampler):
    """The images before they are bytes, with shape (n, 3, height, width)."""
    latents = denoise(pipe, embeds, SEEDS, sampler)
    return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)


def slope(pipe, name, delta, result, step=1e-5):
    """The derivative of a result by how much of a delta a layer has."""
    weight = get_layer(pipe.unet, name).weight
    kept = weight.detach().clone()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.copy_(kept + sign * step * delta)
        ends.append(result())
    with torch.no_grad():
        weight.copy_(kept)
    return (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_projections_of_images_are_those_of_finite_differences(pipe, embeds, deltas, guidance):
    sampler = replace(SAMPLER, guidance=guidance)
    found = image_projections(pipe, deltas, embeds, SEEDS, sampler, projections=2)
    assert found.shape == (len(deltas), 2, 2, 2)
    directions = gradients._directions(pipe, SEEDS, 2).double()
    for n, (name, of_layer) in enumerate(deltas.items()):
        for b, delta in enumerate(of_layer):
            change = slope(pipe, name, delta, lambda: pixels(pipe, embeds, sampler))
            wanted = (directions * change).flatten(2).sum(dim=2)
            np.testing.assert_allclose(found[n, b], wanted, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    "scheduled",
    [DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler],
    indirect=True,
    ids=lambda kind: kind.__name__,
)
def test_they_are_so_with_every_scheduler(scheduled, embeds, deltas):
    """In their single precision; with state, scaled inputs, and a time-step that comes twice."""
    found = image_projections(scheduled, deltas, embeds, SEEDS, SAMPLER, projections=1)
    directions = gradients._directions(scheduled, SEEDS, 1).double()
    for n, (name, of_layer) in enumerate(deltas.items()):
        change = slope(
            scheduled, name, of_layer[1], lambda: pixels(scheduled, embeds, SAMPLER), step=2e-2
        )
        wanted = (directions * change).flatten(2).sum(dim=2)
        np.testing.assert_allclose(found[n, 1], wanted, rtol=0.03, atol=3e-3, err_msg=name)


def test_projections_are_not_drawn_from_the_noise():
    noise, projected = generators_of([5])[0], gradients._generators([5])[0]
    assert not torch.equal(torch.randn(8, generator=noise), torch.randn(8, generator=projected))
    seeds = derived_seeds("one", range(1000))
    assert len({*seeds, *derived_seeds("other", range(1000)), *range(1000)}) == 3000
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_the_mean_square_is_the_squared_error_of_bytes(pipe, embeds, deltas):
    """For a change so small that the model is linear in it."""
    name = NAMES[2]
    small = {name: deltas[name][:1] * 1e-3}
    found = image_projections(pipe, small, embeds, SEEDS, SAMPLER, projections=100)
    change = 127.5 * slope(pipe, name, small[name][0], lambda: pixels(pipe, embeds, SAMPLER))
    wanted = change.square().flatten(1).mean(dim=1)
    np.testing.assert_allclose(found.square().mean(dim=2)[0, 0], wanted, rtol=0.4)


def test_projections_of_noise_are_those_of_single_steps(pipe, embeds, deltas):
    found = noise_projections(pipe, deltas, embeds, SEEDS, SAMPLER, projections=1)
    steps = recorded(pipe, embeds, SEEDS, SAMPLER)
    assert found.shape == (len(steps), len(deltas), 2, 1, 2)
    generators = gradients._generators(SEEDS)
    for step, of_step in zip(steps, found, strict=True):

        def guided(step=step):
            with torch.no_grad():
                noise = pipe.unet(step.x, step.t, encoder_hidden_states=step.text).sample
            without, with_text = noise.chunk(2)
            return without + SAMPLER.guidance * (with_text - without)

        direction = gradients._random(generators, (1, 4, 8, 8))[0].double() / 16
        for n, (name, of_layer) in enumerate(deltas.items()):
            change = slope(pipe, name, of_layer[0], guided)
            wanted = (direction * change).flatten(1).sum(dim=1)
            np.testing.assert_allclose(of_step[n, 0, 0], wanted, rtol=1e-4, atol=1e-8)


def test_samples_do_not_depend_on_their_neighbours(pipe, embeds, deltas):
    both = image_projections(pipe, deltas, embeds, SEEDS, SAMPLER, projections=1)
    one = image_projections(pipe, deltas, embeds[[1]], SEEDS[1:], SAMPLER, projections=1)
    np.testing.assert_allclose(one[..., 0], both[..., 1], rtol=1e-8, atol=1e-12)


def test_the_model_is_left_as_it_was(pipe, embeds, deltas):
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    image_projections(pipe, deltas, embeds, SEEDS, SAMPLER, projections=1)
    assert all(torch.equal(before[name], v) for name, v in pipe.unet.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in pipe.unet.parameters())
    assert not any(module._forward_hooks for module in pipe.unet.modules())
