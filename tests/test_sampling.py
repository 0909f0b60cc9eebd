"""Sampling: the images are the pipeline's, and a sample depends on its prompt and seed alone."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor
from toys import toy_pipeline

from bf_lib.models import load_pipeline
from bf_lib.sampling import (
    PromptEmbeds,
    Sampler,
    decode,
    encode_prompts,
    generate,
    generate_in_processes,
    generators_of,
    initial_latents,
    latent_shape,
    unet_evaluations,
)

# Diffusers turns tensors into arrays in a way that NumPy 2 will not know for ever.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a red dog", "b", "cat", "two zebras", "cat"]
SEEDS = [3, 1, 4, 1, 5]

# name -> scheduler, its options, eta
SCHEDULERS = {
    "DPM-Solver++": (DPMSolverMultistepScheduler, {}, 0.0),
    "DPM-Solver++ SDE": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, 0.0),
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True}, 0.0),
    "DDIM": (DDIMScheduler, {}, 0.0),
    "DDIM with noise": (DDIMScheduler, {}, 0.7),
    "Euler ancestral": (EulerAncestralDiscreteScheduler, {}, 0.0),
    "Heun": (HeunDiscreteScheduler, {}, 0.0),  # two evaluations a step
}


@pytest.fixture(scope="module")
def toy() -> StableDiffusionPipeline:
    return toy_pipeline()


@pytest.fixture(params=SCHEDULERS)
def each(request: pytest.FixtureRequest, toy: StableDiffusionPipeline):
    """The toy pipeline with each scheduler in turn, and its eta."""
    kind, options, eta = SCHEDULERS[request.param]
    kept = toy.scheduler
    toy.scheduler = kind(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        **({"clip_sample": False} if kind is DDIMScheduler else {}),
        **options,
    )
    yield toy, eta
    toy.scheduler = kept


def by_the_pipeline(pipe: StableDiffusionPipeline, sampler: Sampler) -> Tensor:
    images = pipe(
        PROMPTS,
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance,
        eta=sampler.eta,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="np",
    ).images
    return torch.from_numpy((images * 255).round()).to(torch.uint8)


def largest_difference(a: Tensor, b: Tensor) -> int:
    assert a.dtype == b.dtype == torch.uint8
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_images_are_those_of_the_pipeline(each, guidance):
    pipe, eta = each
    sampler = Sampler(steps=5, guidance=guidance, batch=5, eta=eta)
    images = generate(pipe, PROMPTS, SEEDS, sampler)
    assert images.shape == (5, 16, 16, 3)
    assert images.float().std() > 20  # else all images would be alike
    assert largest_difference(images, by_the_pipeline(pipe, sampler)) <= 1


def test_order_and_shard_do_not_matter(each):
    pipe, eta = each
    sampler = Sampler(steps=4, guidance=4.0, batch=2, eta=eta)
    images = generate(pipe, PROMPTS, SEEDS, sampler)
    turned = generate(pipe, PROMPTS[::-1], SEEDS[::-1], sampler)
    assert torch.equal(turned.flip(0), images)
    shards = [generate(pipe, PROMPTS[i::2], SEEDS[i::2], sampler) for i in range(2)]
    assert torch.equal(shards[0], images[0::2])
    assert torch.equal(shards[1], images[1::2])
    alone = generate(pipe, PROMPTS[3:4], SEEDS[3:4], sampler)
    assert torch.equal(alone, images[3:4])


@pytest.mark.parametrize("batch", [1, 3, 5, 8])
def test_batch_size_does_not_matter_but_for_rounding(each, batch):
    pipe, eta = each
    images = generate(pipe, PROMPTS, SEEDS, Sampler(4, 4.0, batch=2, eta=eta))
    others = generate(pipe, PROMPTS, SEEDS, Sampler(4, 4.0, batch=batch, eta=eta))
    assert largest_difference(images, others) <= 1


def test_a_trained_model_draws_the_same_in_any_order_and_shard():
    """At the sweep's own batch; with other threads, sums of another order differ by rounding."""
    pipe = load_pipeline("mini")
    prompts, seeds = [f"{n} red stars" for n in ("one", "two", "three")] * 6, list(range(18))
    sampler = Sampler(steps=2, guidance=3.0, batch=16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        images = generate(pipe, prompts, seeds, sampler)
        turned = generate(pipe, prompts[::-1], seeds[::-1], sampler).flip(0)
        shards = [generate(pipe, prompts[i::2], seeds[i::2], sampler) for i in range(2)]
        torch.set_num_threads(2)
        others = generate(pipe, prompts, seeds, sampler)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(turned, images)
    assert torch.equal(torch.stack(shards, dim=1).flatten(0, 1), images)
    assert largest_difference(others, images) <= 2


def test_seeds_and_prompts_matter(toy):
    sampler = Sampler(steps=3, batch=2)
    one, same, seed, prompt = generate(
        toy, ["cat", "cat", "cat", "dog"], [1, 1, 2, 1], sampler
    ).int()
    assert torch.equal(one, same)
    assert (one - seed).abs().max() > 5
    assert not torch.equal(one, prompt)


def test_the_pipeline_is_left_as_it_was(toy):
    toy.scheduler.set_timesteps(7)
    before = toy.scheduler.timesteps.clone()
    state = torch.get_rng_state()
    generate(toy, ["a"], [0], Sampler(steps=3, batch=1))
    unet_evaluations(toy, 1, Sampler(steps=3))
    assert torch.equal(toy.scheduler.timesteps, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_forward_pass_has_the_same_shape_and_is_counted(each, monkeypatch):
    pipe, eta = each
    shapes, forward = [], pipe.unet.forward

    def counting(x: Tensor, *args, **options):
        shapes.append(len(x))
        return forward(x, *args, **options)

    monkeypatch.setattr(pipe.unet, "forward", counting)
    sampler = Sampler(steps=3, guidance=4.0, batch=4, eta=eta)
    generate(pipe, PROMPTS, SEEDS, sampler)
    assert set(shapes) == {8}  # conditional and not, in one pass
    assert unet_evaluations(pipe, 4, sampler) == sum(shapes) // 2  # of two batches
    shapes.clear()
    unguided = Sampler(steps=3, guidance=1.0, batch=5, eta=eta)
    generate(pipe, PROMPTS, SEEDS, unguided)
    assert set(shapes) == {5}
    assert unet_evaluations(pipe, 5, unguided) == sum(shapes)


def test_embeddings_are_those_of_the_pipeline_and_can_be_kept(toy):
    embeds = encode_prompts(toy, PROMPTS)
    prompts, empty = toy.encode_prompt(PROMPTS, "cpu", 1, True)
    torch.testing.assert_close(embeds.prompts, prompts)
    torch.testing.assert_close(embeds.empty, empty[:1])
    assert len(embeds) == 5
    sampler = Sampler(steps=2, batch=2)
    images = generate(toy, embeds, SEEDS, sampler)
    assert torch.equal(images, generate(toy, PROMPTS, SEEDS, sampler))
    assert torch.equal(images[3:], generate(toy, embeds[3:], SEEDS[3:], sampler))


def test_an_embedding_does_not_depend_on_its_neighbours(toy):
    together = encode_prompts(toy, PROMPTS).prompts
    for i, prompt in enumerate(PROMPTS):
        assert torch.equal(encode_prompts(toy, [prompt]).prompts[0], together[i])


def test_noise_is_the_same_in_every_batch_and_precision():
    shape = (4, 8, 8)
    noise = initial_latents(generators_of(SEEDS), shape)
    assert noise.shape == (5, *shape)
    assert torch.equal(noise[1], noise[3])  # the same seed
    assert torch.equal(initial_latents(generators_of([4]), shape)[0], noise[2])
    half = initial_latents(generators_of(SEEDS), shape, torch.bfloat16)
    assert torch.equal(half, noise.bfloat16())


def test_images_are_decoded_as_the_pipeline_does(toy):
    latents = initial_latents(generators_of(SEEDS), latent_shape(toy))
    with torch.no_grad():
        pixels = toy.vae.decode(latents / toy.vae.config.scaling_factor).sample
    expected = toy.image_processor.postprocess(pixels, "np", [True] * 5)
    assert torch.equal(decode(toy, latents), torch.from_numpy(expected * 255).round().byte())


def test_images_that_are_not_finite_are_refused(toy):
    latents = initial_latents(generators_of(SEEDS), latent_shape(toy))
    latents[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        decode(toy, latents)


def test_half_precision_generates_much_the_same():
    pipe = toy_pipeline()
    sampler = Sampler(steps=4, batch=5)
    full = generate(pipe, PROMPTS, SEEDS, sampler).float()
    half = generate(pipe.to(torch.bfloat16), PROMPTS, SEEDS, sampler).float()
    assert (half - full).abs().mean() < 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"guidance": 0.5}, "guidance must be at least 1, got 0.5"),
        ({"guidance": float("nan")}, "guidance must be at least 1, got nan"),
        ({"eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_settings_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Sampler(**{"steps": 1, **options})


def test_prompts_and_seeds_must_match(toy):
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        generate(toy, ["a", "b"], [1], Sampler(steps=1))
    with pytest.raises(ValueError, match="nothing to generate"):
        generate(toy, [], [], Sampler(steps=1))
    empty = PromptEmbeds(torch.zeros(0, 10, 16), torch.zeros(1, 10, 16))
    with pytest.raises(ValueError, match="nothing to generate"):
        generate(toy, empty, [], Sampler(steps=1))


def test_processes_draw_what_one_would(toy, tmp_path):
    toy.save_pretrained(tmp_path)
    sampler = Sampler(steps=2, guidance=3.0, batch=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = generate(load_pipeline(tmp_path), PROMPTS, SEEDS, sampler)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(generate_in_processes(tmp_path, PROMPTS, SEEDS, sampler), alone)


@pytest.mark.parametrize(("prompts", "seeds", "processes"), [("ab", [1], 2), ("a", [1], 0)])
def test_impossible_shares_are_refused(prompts, seeds, processes):
    with pytest.raises(ValueError, match=r"must be at least|prompts and"):
        generate_in_processes("mini", list(prompts), seeds, Sampler(steps=1), processes)
