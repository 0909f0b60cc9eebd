"""Forms of students: how each starts, what of it is trained, and what it weighs."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from toys import WIDTH, toy_unet

from bf_lib.fakequant import bake_weights_
from bf_lib.forms import KINDS, Form
from bf_lib.grids import relative_mse
from bf_lib.layers import list_layers
from bf_lib.sizes import size_report

LEVELS = tuple((layer.name, 5) for layer in list_layers(toy_unet()))
FORMS = {
    "balanced": Form(levels=LEVELS),
    "plain": Form(kind="plain", scales="minmax"),
    "half-shifted": Form(kind="half-shifted"),
    "lora": Form(kind="lora", scales="minmax"),
    "palette": Form(kind="palette"),
    "full": Form(kind="full"),
}


def output(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 10, WIDTH, generator=generator)
    return unet(x, torch.tensor(500), encoder_hidden_states=text).sample


@pytest.fixture(scope="module")
def students(module_monkeypatch):
    """A student of each form, with few time-steps in its cache, which takes less time."""
    for module in ("bf_lib.forms.TRAINED_AT", "bf_lib.student.TRAINED_AT"):
        module_monkeypatch.setattr(module, [100, 500])
    return {kind: form(toy_unet()) for kind, form in FORMS.items()}


@pytest.fixture(scope="module")
def module_monkeypatch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_there_is_one_of_each_kind(students):
    assert tuple(students) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_layers_have_as_many_values_as_the_form_says(kind, students):
    unet = toy_unet()
    most = {"balanced": 5, "full": 10**9}.get(kind, 4)
    for name in (LEVELS[3][0], LEVELS[100][0]):
        weight, original = (
            students[kind].get_submodule(name).weight,
            unet.get_submodule(name).weight,
        )
        assert max(len(row.unique()) for row in weight.flatten(1)) <= most
        error = float(relative_mse(original, weight.detach()))
        assert error == 0 if kind == "full" else 0 < error < 1
        if kind == "palette":
            assert len(weight.unique()) <= most


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_to_be_trained_gets_gradients_and_nothing_else(kind, students):
    student = copy.deepcopy(students[kind])
    output(student).square().mean().backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    ends = {name.rpartition(".")[2] for name, p in student.named_parameters() if p.requires_grad}
    wanted = {
        "lora": {"down", "up", "log_scale"},
        "palette": {"values", "weight", "bias"},
        "full": {"weight", "bias"},
    }
    assert ends == wanted.get(kind, {"original", "log_scale", "weight", "bias"})


@pytest.mark.parametrize("kind", KINDS)
def test_baked_weights_compute_the_same(kind, students):
    student = copy.deepcopy(students[kind])
    with torch.no_grad():
        wanted = output(student)
        bake_weights_(student)
        assert torch.equal(output(student), wanted)
        assert torch.equal(output(students[kind]), wanted)  # what it was copied from still runs
    assert not any("parametrizations" in name for name, _ in student.named_parameters())


def test_the_low_rank_product_begins_at_nothing_and_counts(students):
    plain, low = copy.deepcopy(students["plain"]), copy.deepcopy(students["lora"])
    with torch.no_grad():
        assert torch.equal(output(low), output(plain))
        for name, parameter in low.named_parameters():
            if name.endswith(".up"):
                parameter += 0.1
        assert not torch.equal(output(low), output(plain))


def test_time_layers_can_stay():
    student = Form(kind="plain", cached=False)(toy_unet())
    assert any("time_embedding" in name for name, _ in student.named_parameters())


def test_sizes_are_ordered_as_their_bits():
    unet = toy_unet()
    reports = {kind: form.size(unet, 10) for kind, form in FORMS.items()}
    weights = sum(layer.params for layer in list_layers(unet))
    codes = {
        k: int(r.parts.stored_bytes[r.parts.kind == "codes"].sum()) for k, r in reports.items()
    }
    assert codes["plain"] == codes["lora"] == codes["palette"] == codes["half-shifted"]
    assert codes["plain"] == pytest.approx(weights / 4, abs=256)
    assert codes["balanced"] > codes["plain"]
    stored = {kind: report.stored_bytes for kind, report in reports.items()}
    assert stored["palette"] < stored["half-shifted"] < stored["plain"] < stored["balanced"]
    assert reports["plain"].paper_bits < reports["balanced"].paper_bits
    assert stored["full"] == size_report(unet, None, 10).stored_bytes


def test_impossible_forms_are_refused():
    with pytest.raises(ValueError, match="kind must be"):
        Form(kind="magic", levels=LEVELS)
    for wrong in ({}, {"kind": "plain", "levels": LEVELS}):
        with pytest.raises(ValueError, match="have levels"):
            Form(**wrong)


def test_scales_that_are_not_known_are_refused():
    for wrong in ({"kind": "plain", "scales": "optimal"}, {"levels": (("a", 3),), "scales": "x"}):
        with pytest.raises(ValueError, match=f"scales must be one of .*got '{wrong['scales']}'"):
            Form(**wrong)
