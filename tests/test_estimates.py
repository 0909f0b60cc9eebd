"""The fast estimate: units, portions, methods, and the single step that skips what is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import toy_pipeline, toy_unet

from bf_lib.grids import levels_of_bits
from bf_lib.jobs import run_job
from bf_lib.layers import list_layers
from bf_lib.sampling import PromptEmbeds, Sampler, encode_prompts
from bf_lib.sensitivity import Estimate, estimate
from bf_lib.sensitivity.candidates import quantized
from bf_lib.sensitivity.estimates import Portion, byte_error, combined
from bf_lib.sensitivity.single_step import noise_errors, remembered, resumed
from bf_lib.sensitivity.trajectory import recorded

PROMPTS = ("a red star", "two rings", "a moon")
SAMPLER = Sampler(steps=2, guidance=2.0, batch=2)
JOB = Estimate(model="", prompts=PROMPTS, seeds=(0, 1, 2), sampler=SAMPLER, projections=2)


@pytest.fixture(scope="module")
def pipe():
    return toy_pipeline()


@pytest.mark.parametrize("method", ["image gradient", "noise gradient"])
def test_portions_do_not_change_an_estimate(pipe, method):
    whole = estimate(pipe, PROMPTS, replace(SAMPLER, batch=3), method=method, projections=2)
    parts = estimate(pipe, PROMPTS, replace(SAMPLER, batch=1), method=method, projections=2)
    assert list(whole.layer.unique()) == [layer.name for layer in list_layers(pipe.unet)]
    assert whole.levels.tolist()[:3] == [3, 5, 9]
    assert (whole.error >= 0).all() and (whole.error > 0).mean() > 0.95
    np.testing.assert_allclose(whole.error, parts.error, rtol=1e-3, atol=1e-9)


def test_rows_may_come_in_any_order(pipe):
    bench = JOB.bench(pipe)
    tasks = JOB.tasks(pipe.unet)
    assert tasks == [Portion(0, 2), Portion(2, 1)]
    assert tasks[0].label == ("estimate", "prompts 0 to 1")
    rows = [bench.score(task) for task in tasks]
    table = combined(rows[::-1], bench.layers, JOB.bits)
    assert table.equals(combined(rows, bench.layers, JOB.bits))
    errors = np.concatenate([np.array(row["errors"]) for row in rows], axis=-1)
    assert table.error[0] == pytest.approx(errors[0, 0].mean())
    # the square of the mean root over prompts
    assert table.score[0] == pytest.approx(np.sqrt(errors[0, 0]).mean() ** 2)


def test_processes_share_an_estimate(pipe, tmp_path):
    layers = tuple(layer.name for layer in list_layers(pipe.unet)[:3])
    sampler = Sampler(steps=1, guidance=2.0, batch=1)
    job = Estimate("mini", PROMPTS, (0, 1, 2), sampler, layers=layers)
    alone = list(run_job(job, tmp_path / "one"))
    shared = list(run_job(job, tmp_path / "two", workers=2))
    first, second = (
        {row["start"]: (row["count"], row["errors"]) for row in rows} for rows in (alone, shared)
    )
    assert first == second and len(first) == 3
    assert list(run_job(job, tmp_path / "two")) == shared  # from the file


def test_more_bits_mean_less_error(pipe):
    table = estimate(pipe, PROMPTS, SAMPLER, projections=2)
    wide = table.pivot(index="layer", columns="bits", values="error")
    assert (wide[1] > wide[3]).mean() > 0.9


def test_a_single_step_takes_all_prompts_at_once(pipe):
    assert replace(JOB, method="single step").tasks(pipe.unet) == [Portion(0, 3)]
    table = estimate(pipe, PROMPTS[:1], SAMPLER, method="single step", bits=(1,))
    assert len(table) == 256 and (table.error > 0).mean() > 0.95


def test_an_estimate_knows_its_methods():
    with pytest.raises(ValueError, match="method must be one of .*, got 'guess'"):
        replace(JOB, method="guess")
    with pytest.raises(ValueError, match="3 prompts with 1 seeds"):
        replace(JOB, seeds=(0,))
    with pytest.raises(ValueError, match="projections must be at least 1, got 0"):
        replace(JOB, projections=0)


def test_an_estimate_of_a_spoilt_model_is_refused():
    pipe = toy_pipeline()
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] = torch.inf
    bench = JOB.bench(pipe)
    with pytest.raises(ValueError, match="NaN or infinite"):
        bench.score(Portion(0, 1))


# ---- bytes


@pytest.mark.parametrize("size", [0.01, 0.3, 1.0, 7.0])
def test_the_error_of_bytes_is_that_of_rounded_values(size):
    rng = np.random.default_rng(0)
    value = rng.uniform(0, 255, 400_000)
    change = rng.normal(scale=size, size=len(value))
    wanted = np.mean((np.round(value + change) - np.round(value)) ** 2)
    found = byte_error(torch.tensor([size**2], dtype=torch.float64))
    assert float(found) == pytest.approx(wanted, rel=0.05)


def test_large_errors_are_hardly_changed_by_rounding():
    assert float(byte_error(torch.tensor([400.0]))) == pytest.approx(400.0, rel=0.01)
    assert float(byte_error(torch.tensor([0.0]))) == 0.0


# ---- single steps


def test_what_is_skipped_does_not_change_a_single_step(pipe):
    layers = [layer for n, layer in enumerate(list_layers(pipe.unet)) if n % 25 == 3]
    known = encode_prompts(pipe, PROMPTS)
    embeds = PromptEmbeds(known.prompts.clone(), known.empty.clone())
    found = noise_errors(pipe, layers, (1,), embeds, (0, 1, 2), SAMPLER)
    assert found.shape == (len(layers), 1, 3)
    # of two steps, three samples take the first, the second, the second
    steps = recorded(pipe, embeds, (0, 1, 2), SAMPLER)
    for n, step in enumerate([steps[0], steps[1], steps[1]]):
        rows = [n, n + 3]

        def guided(step=step, rows=rows):
            text = step.text[rows]
            with torch.no_grad():
                a, b = pipe.unet(step.x[rows], step.t, encoder_hidden_states=text).sample
            return (a + SAMPLER.guidance * (b - a)).double()

        reference = guided()
        for k, layer in enumerate(layers):
            with quantized(pipe.unet, layer.name, levels_of_bits(1)):
                wanted = (guided() - reference).square().mean()
            # the smallest are squares of the last bits of float32
            close = pytest.approx(float(wanted), rel=1e-3, abs=1e-11)
            assert float(found[k, 0, n]) == close, layer.name


def test_parts_before_a_layer_are_not_computed():
    unet = toy_unet()
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 10, 16)
    with torch.no_grad(), remembered(unet) as parts:
        whole = unet(x, 5, encoder_hidden_states=text).sample
    names = [part.name for part in parts]
    assert names[0] == "down_blocks.0.resnets.0" and names[-1] == "up_blocks.3.attentions.2"
    inside = "up_blocks.1.attentions.1"
    calls = []
    handles = [
        get.register_forward_hook(lambda module, *_: calls.append(module))
        for part in parts
        for get in [next(m for m in part.module.modules() if not list(m.children()))]
    ]
    with torch.no_grad(), resumed(parts, f"{inside}.proj_in"):
        again = unet(x, 5, encoder_hidden_states=text).sample
    for handle in handles:
        handle.remove()
    assert torch.equal(again, whole)
    assert len(calls) == len(names) - names.index(inside)
    with torch.no_grad():  # and afterwards all of it is
        assert not torch.equal(unet(x + 1, 5, encoder_hidden_states=text).sample, whole)
