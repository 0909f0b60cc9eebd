"""Cached time features: the same outputs, for the time-steps of any scheduler, and no others."""

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from toys import UNET, WIDTH, toy_pipeline, toy_unet

from bf_lib.layers import all_layers
from bf_lib.models import meta_unet, sd15_unet_config
from bf_lib.timecache import (
    UncachedStep,
    cache_time_features_,
    cached_time_features,
    install_time_features_,
    sampling_steps,
    time_features,
)

SCHEDULERS = [
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    EulerDiscreteScheduler,
]
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TEXT = torch.randn(3, 10, WIDTH, generator=torch.Generator().manual_seed(1))


def evaluated(unet: UNet2DConditionModel, t: object, count: int = 3) -> torch.Tensor:
    with torch.no_grad():
        return unet(X[:count], t, encoder_hidden_states=TEXT[:count]).sample


def cached(timesteps: object, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    unet = toy_unet()
    cache_time_features_(unet, timesteps, dtype)
    return unet


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("t", [1, 500.5, 999])
def test_outputs_are_those_of_the_time_layers(count, t):
    fresh, ours = evaluated(toy_unet(), t, count), evaluated(cached([1, 500.5, 999]), t, count)
    if count == 1:
        assert torch.equal(ours, fresh)
    # Features are computed one time-step at a time; in larger batches the time layers may take
    # their sums in another order.
    torch.testing.assert_close(ours, fresh, rtol=1e-5, atol=1e-6)


def test_samples_of_a_batch_may_have_different_time_steps():
    unet = cached([3, 7])
    mixed = evaluated(unet, torch.tensor([7, 3, 7]))
    for n, t in enumerate([7, 3, 7]):
        torch.testing.assert_close(mixed[n], evaluated(unet, t)[n], rtol=1e-5, atol=1e-6)


def test_the_time_layers_are_gone():
    unet = cached([1, 2, 3])
    assert not [layer.name for layer in all_layers(unet) if "time" in layer.name]
    assert len(all_layers(unet)) == 258
    removed = {name for name, _ in toy_unet().named_parameters()}
    removed -= {name for name, _ in unet.named_parameters()}
    assert len(removed) == 2 * (22 + 2) and all("time" in name for name in removed)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_pipelines_call_a_cached_unet_as_any_other(kind, guidance):
    pipe = toy_pipeline()
    pipe.scheduler = kind(**NOISE)
    steps = 4
    ours = copy.deepcopy(pipe)
    cache_time_features_(ours.unet, sampling_steps(pipe.scheduler, steps), torch.float32)

    def drawn(pipe):
        generators = [torch.Generator().manual_seed(n) for n in range(2)]
        options = {"num_inference_steps": steps, "guidance_scale": guidance}
        return pipe(["a", "b c"], generator=generators, output_type="pt", **options).images

    torch.testing.assert_close(drawn(ours), drawn(pipe), rtol=0, atol=1e-4)


def test_one_cache_has_room_for_several_lists():
    lists = [sampling_steps(kind(**NOISE), 5) for kind in SCHEDULERS]
    assert any((steps != steps.round()).any() for steps in lists)  # Euler's are fractions
    unet = cached(torch.cat(lists))
    known = cached_time_features(unet).timesteps
    assert torch.equal(known, torch.cat(lists).unique())
    full = toy_unet()
    for t in torch.cat(lists):
        torch.testing.assert_close(evaluated(unet, t), evaluated(full, t), rtol=1e-5, atol=1e-6)


def test_a_step_that_is_not_cached_is_an_error_that_says_what_to_do():
    unet, full = cached([1, 500.5]), toy_unet()
    with pytest.raises(UncachedStep, match=r"time-steps 2 are not .* has 2: 1, 500\.5\. To add"):
        evaluated(unet, 2)
    with pytest.raises(UncachedStep, match="time-steps 2, 3 are not"):
        evaluated(unet, torch.tensor([3, 1, 2]))
    more = time_features(full, [1, 2], torch.float32)
    install_time_features_(unet, cached_time_features(unet).joined(more))
    assert cached_time_features(unet).timesteps.tolist() == [1, 2, 500.5]
    for t in (1, 2, 500.5):
        torch.testing.assert_close(evaluated(unet, t), evaluated(full, t), rtol=1e-5, atol=1e-6)


def test_some_time_steps_are_taken_from_a_cache():
    known = time_features(toy_unet(), range(0, 1000, 100))
    some, wanted = known.at([700, 0, 700]), time_features(toy_unet(), [0, 700])
    assert torch.equal(some.timesteps, wanted.timesteps)
    assert all(torch.equal(v, wanted.features[name]) for name, v in some.features.items())
    with pytest.raises(UncachedStep, match="time-steps 50 are not"):
        known.at([0, 50])
    many = time_features(toy_unet(), range(60))
    with pytest.raises(UncachedStep, match=r"has 60: 0, 1.* 49, \.\.\.\. To add"):
        many.at([999])


def test_half_precision_is_the_default_and_close():
    unet = toy_unet()
    known = cache_time_features_(unet, [10, 600])
    assert {values.dtype for values in known.features.values()} == {torch.float16}
    exact = evaluated(toy_unet(), 600)
    difference = (evaluated(unet, 600) - exact).abs().max()
    assert 0 < difference < 1e-2 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_the_unet_does_not_move_its_time_steps(dtype):
    unet = cached([999.5, 998.5]).to(dtype)
    assert cached_time_features(unet).timesteps.tolist() == [998.5, 999.5]
    with torch.no_grad():
        out = unet(X.to(dtype), 999.5, encoder_hidden_states=TEXT.to(dtype)).sample
    assert out.dtype == dtype


def test_a_cached_unet_is_saved_copied_and_compiled_as_any_other(tmp_path):
    unet = cached([5, 6])
    state = unet.state_dict()
    other = cached([8, 9])
    other.load_state_dict(state)
    expected = evaluated(unet, 6)
    assert torch.equal(evaluated(other, 6), expected)
    assert torch.equal(evaluated(copy.deepcopy(unet), 6), expected)
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(evaluated(compiled, torch.tensor(6)), expected)
    with pytest.raises(RuntimeError, match="not in the cache"):
        evaluated(compiled, torch.tensor(7))


def test_sd15_needs_20160_numbers_a_step():
    unet = meta_unet(sd15_unet_config())
    layers = [layer for layer in all_layers(unet) if layer.name.endswith("time_emb_proj")]
    assert sum(layer.out_channels for layer in layers) == 20_160
    weights = sum(layer.params for layer in layers)
    assert weights / (50 * 20_160) == pytest.approx(25.6)


def test_what_also_depends_on_other_inputs_is_refused():
    config = UNET | {"class_embed_type": "timestep"}
    with pytest.raises(ValueError, match="class_embed_type"):
        time_features(UNet2DConditionModel.from_config(config), [1])
    with pytest.raises(ValueError, match="no time-steps"):
        time_features(toy_unet(), [])
    with pytest.raises(ValueError, match="no time layers any more"):
        time_features(cached([1]), [2])


def test_features_of_another_unet_do_not_fit():
    narrow = UNet2DConditionModel.from_config(UNET | {"block_out_channels": (8, 16, 16, 16)})
    known = time_features(toy_unet(), [1])
    with pytest.raises(ValueError, match="different layers"):
        known.joined(time_features(narrow, [2]))
    with pytest.raises(ValueError, match="differ in type"):
        known.joined(time_features(toy_unet(), [2], torch.float32))
    shallow = UNet2DConditionModel.from_config(UNET | {"layers_per_block": 1})
    with pytest.raises(ValueError, match="other layers"):
        install_time_features_(shallow, known)


def test_features_beyond_half_precision_are_refused():
    unet = toy_unet()
    with torch.no_grad():
        unet.mid_block.resnets[0].time_emb_proj.bias[0] = 1e6
    with pytest.raises(ValueError, match=r"mid_block\.resnets\.0.* NaN or infinite"):
        time_features(unet, [1])
    assert time_features(unet, [1], torch.float32).numbers == sum(
        layer.out_channels for layer in all_layers(unet) if "time_emb_proj" in layer.name
    )
