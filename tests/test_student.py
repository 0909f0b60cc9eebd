"""Students: what is trained is what is packed, saved and loaded, bit for bit."""

import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from toys import WIDTH, toy_pipeline, toy_unet

import bf_lib
from bf_lib.fakequant import fake_quantizers
from bf_lib.grids import fake_quantize
from bf_lib.layers import all_layers, list_layers
from bf_lib.packed_unets import pack_student
from bf_lib.recipe import Recipe, RecipeError
from bf_lib.student import quantize
from bf_lib.timecache import UncachedStep

STEPS = [1.0, 250.0, 999.0]


def recipe_of(unet: UNet2DConditionModel) -> Recipe:
    levels = {layer.name: (3, 5, 9)[i % 3] for i, layer in enumerate(list_layers(unet))}
    return Recipe(levels, {"rule": "by turns"})


def output(unet: UNet2DConditionModel, t: float = 250.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 10, WIDTH, generator=generator)
    return unet(x, torch.tensor(t), encoder_hidden_states=text).sample


@pytest.fixture
def student() -> UNet2DConditionModel:
    unet = toy_unet()
    return quantize(unet, recipe_of(unet), STEPS)


def train_a_little(student: UNet2DConditionModel, rate: float = 1e-2) -> None:
    optimizer = torch.optim.Adam(student.parameters(), rate)
    for _ in range(3):
        optimizer.zero_grad()
        output(student).square().mean().backward()
        optimizer.step()


def test_a_student_is_an_ordinary_unet_with_rounded_weights(student):
    unet = toy_unet()
    assert type(student) is UNet2DConditionModel
    for name, levels in recipe_of(unet).levels.items():
        layer, original = student.get_submodule(name), unet.get_submodule(name)
        assert isinstance(layer, type(original))
        scale = fake_quantizers(student)[name].scale
        assert torch.equal(layer.weight, fake_quantize(original.weight, scale, levels))
    names = [layer.name for layer in all_layers(unet) if "time_emb" in layer.name]
    assert names and not any(f"{name}.weight" in student.state_dict() for name in names)


def test_all_parameters_are_trained(student):
    output(student).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    scales = [q.log_scale for q in fake_quantizers(student).values()]
    assert sum(bool(s.grad.abs().sum() > 0) for s in scales) > 250


def test_the_original_stays_as_it_is():
    unet = toy_unet().requires_grad_(False)
    before = copy.deepcopy(unet.state_dict())
    train_a_little(quantize(unet, recipe_of(unet), STEPS))
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert not any(p.requires_grad for p in unet.parameters())


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_a_trained_student_is_packed_bit_for_bit(student, compress, tmp_path):
    train_a_little(student)
    packed = pack_student(student, STEPS[1:], compress, source="toy")
    with torch.no_grad():
        for name, value in student.named_parameters():
            if "parametrizations" not in name:  # biases and norms, as they are stored
                value.copy_(value.half())
        assert torch.equal(output(packed), output(student))
        packed.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["_name_or_path"] == "toy"
        loaded = UNet2DConditionModel.from_pretrained(tmp_path)
        assert torch.equal(output(loaded), output(student))
    header = loaded.hf_quantizer.header
    assert header.timesteps == 2 and header.source == "toy" and header.compress == compress
    assert dict(header.levels) == dict(student.recipe.levels)
    assert header.made["rule"] == "by turns" and header.made["scales"] == "trained"
    assert len(header.levels) + len(header.left) == 282
    with pytest.raises(UncachedStep):
        output(loaded, STEPS[0])


def test_packing_a_student_leaves_it_as_it_is(student):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    pack_student(student)
    after = student.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.requires_grad for p in student.parameters())


def test_save_packed_takes_a_student(student, tmp_path):
    bf_lib.save_packed(student, tmp_path)
    with torch.no_grad():
        wanted = output(pack_student(student))
        assert torch.equal(output(bf_lib.load_packed(tmp_path)), wanted)


def test_time_layers_can_stay():
    unet = toy_unet()
    student = quantize(unet, recipe_of(unet), timesteps=None)
    assert output(student, 3.0).isfinite().all()
    assert any("time_embedding" in name for name, _ in student.named_parameters())
    assert pack_student(student).hf_quantizer.header.timesteps is None


def test_other_scales_start_elsewhere():
    unet = toy_unet()
    found = {s: quantize(unet, recipe_of(unet), STEPS, s) for s in ("alternating", "minmax")}
    name = list_layers(unet)[0].name
    scales = [fake_quantizers(student)[name].scale for student in found.values()]
    assert (scales[0] < scales[1]).all()


def test_a_pipeline_of_diffusers_runs_a_student_and_what_is_packed_of_it_alike():
    pipe = toy_pipeline()
    student = quantize(pipe.unet, recipe_of(pipe.unet))
    with torch.no_grad():
        for parameter in student.parameters():  # as they are stored
            parameter.copy_(parameter.half())
    images = []
    for unet in (student, pack_student(student)):
        pipe.unet = unet
        generator = torch.Generator().manual_seed(0)
        drawn = pipe("a b", num_inference_steps=3, generator=generator, output_type="pt")
        images.append(drawn.images)
    assert torch.equal(*images)


def test_what_cannot_be_quantized_is_refused_by_name(student):
    unet = toy_unet()
    with pytest.raises(RecipeError, match="is missing"):
        quantize(unet, {list_layers(unet)[0].name: 3})
    name = list_layers(unet)[7].name
    unet.get_submodule(name).weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=f"{name}: weights are NaN"):
        quantize(unet, recipe_of(unet), STEPS)
    with pytest.raises(UncachedStep, match="7"):
        pack_student(student, [7])
    with pytest.raises(ValueError, match="only students that `quantize` made"):
        pack_student(toy_unet())
