"""Rates of entropy-coded codes: lengths, their gradient, and training that makes them less."""

import math
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from lessons import TIMES, seeded, ternary, toy_lesson
from toys import toy_unet

from bf_lib.coded_rate import code_lengths, coded_bits
from bf_lib.fakequant import fake_quantizers
from bf_lib.layers import list_layers
from bf_lib.packed_unets import pack_student
from bf_lib.student import quantize
from bf_lib.teaching import Teaching
from bf_lib.training import Plan, fit
from bf_lib.training_state import load_ema


def test_lengths_are_those_of_the_frequencies():
    codes = torch.tensor([0] * 5 + [1] * 2 + [-1] * 0)
    lengths = code_lengths(codes, 1)  # counts 1, 6 and 3 of ten
    torch.testing.assert_close(lengths, -torch.tensor([0.1, 0.6, 0.3]).log2())


def test_bits_are_the_entropy_of_the_codes():
    unet = toy_unet()
    levels = {layer.name: 3 + 2 * (i % 2) for i, layer in enumerate(list_layers(unet))}
    student = quantize(unet, levels, TIMES)
    bits = weights = 0
    for name, quantizer in fake_quantizers(student).items():
        codes = (student.get_submodule(name).weight.detach() / quantizer.scale).round()
        seen = Counter(codes.flatten().tolist())
        total = codes.numel() + quantizer.levels  # each level counts once more
        bits -= sum(n * math.log2((n + 1) / total) for n in seen.values())
        weights += codes.numel()
    assert coded_bits(student).item() == pytest.approx(bits / weights, rel=1e-5)


def test_weights_are_drawn_to_the_frequent_level():
    """The gradient is the slope between the lengths of the levels on either side."""
    student = ternary(toy_unet())
    coded_bits(student).backward()
    total = sum(layer.params for layer in list_layers(student))
    for name, quantizer in fake_quantizers(student).items():
        weight = student.get_submodule(name).parametrizations.weight.original
        scale = quantizer.log_scale.detach().exp()
        places = (weight.detach() / scale).clamp(-1, 1)
        lengths = code_lengths((weight.detach() / quantizer.scale).round().clamp(-1, 1), 1)
        below, above = lengths[1] - lengths[0], lengths[2] - lengths[1]
        slope = torch.where(places < 0, below, above) * (places.abs() < 1)
        torch.testing.assert_close(weight.grad, slope / scale / total, rtol=1e-4, atol=1e-12)
        drawn = -(slope * places).flatten(1).sum(1) / total  # of the logarithm of the scale
        torch.testing.assert_close(quantizer.log_scale.grad.flatten(), drawn, rtol=1e-4, atol=1e-9)


def test_a_rate_makes_the_file_smaller(tmp_path):
    lesson = toy_lesson(tmp_path / "model")
    plan = Plan(steps=8, batch=4, lr=5e-3, warmup=1, ema=0.0, weight_decay=0.0)
    sizes = {}
    for weight in (0.0, 3.0):
        make = partial(Teaching, ternary, replace(lesson, rate_weight=weight))
        folder = tmp_path / f"{weight}"
        fit(make, plan, folder, processes=1)
        student = load_ema(make().model, folder)
        pack_student(student, TIMES, "zstd").save_pretrained(folder / "packed")
        file = next((folder / "packed").glob("*.safetensors"))
        sizes[weight] = coded_bits(student).item(), file.stat().st_size
    assert sizes[3.0][0] < 0.9 * sizes[0.0][0]
    saved = (
        (sizes[0.0][0] - sizes[3.0][0]) * sum(layer.params for layer in list_layers(student)) / 8
    )
    assert sizes[0.0][1] - sizes[3.0][1] > 0.8 * saved  # small layers have a table of their own


def test_the_rate_counts_beside_the_other_losses(tmp_path):
    lesson = toy_lesson(tmp_path)
    for objective in ("distillation", "guided", "noise"):
        plain = replace(lesson, objective=objective)
        alone = Teaching(ternary, plain).loss(0, 4, seeded())
        both = Teaching(ternary, replace(plain, rate_weight=0.5)).loss(0, 4, seeded())
        torch.testing.assert_close(both["loss"], alone["loss"] + 0.5 * both["rate"])
