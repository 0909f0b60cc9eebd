"""The sweep and the jobs that share it: restoring, rows that survive a kill and do not mix."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from toys import toy_unet

from bf_lib import jobs
from bf_lib.atomic import DiskFull, append_line
from bf_lib.fakequant import attach_fake_quantizer_
from bf_lib.grids import alternating_scale, fake_quantize
from bf_lib.jobs import TaskFailed, run_job
from bf_lib.layers import get_layer, list_layers
from bf_lib.metrics import load_metrics
from bf_lib.models import load_pipeline
from bf_lib.packed_config import BitsFusionConfig
from bf_lib.packed_unets import pack_
from bf_lib.paths import ROOT
from bf_lib.protocol import study_layers, study_prompts, study_sweep
from bf_lib.recipe import Recipe
from bf_lib.sampling import Sampler
from bf_lib.sensitivity import (
    Sweep,
    candidates,
    leading_roles,
    per_prompt,
    quantized,
    sweep,
    table,
)
from bf_lib.study import Study

LAYERS = ("down_blocks.0.attentions.0.proj_in", "up_blocks.2.resnets.1.conv1")
SWEEP = Sweep(
    model="mini",
    prompts=("a red star", "two blue rings"),
    seeds=(0, 1),
    sampler=Sampler(steps=2, guidance=3.0, batch=2),
    bits=(1, 2),
    layers=LAYERS,
)


def by_candidate(rows):
    return {(row["layer"], row["bits"]): row for row in rows}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The sweep by one process, uninterrupted."""
    return list(run_job(SWEEP, tmp_path_factory.mktemp("one")))


@pytest.mark.parametrize("levels", [3, 9])
def test_one_layer_is_quantized_and_put_back_bit_for_bit(levels):
    unet = toy_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    name = "up_blocks.1.resnets.0.conv1"
    with quantized(unet, name, levels) as error:
        now = unet.state_dict()
        changed = [key for key in before if not torch.equal(before[key], now[key])]
        assert changed == [f"{name}.weight"]
        weight = before[f"{name}.weight"]
        wanted = fake_quantize(weight, alternating_scale(weight, levels), levels)
        assert torch.equal(get_layer(unet, name).weight, wanted)
        ratio = (wanted - weight).square().sum() / weight.square().sum()
        assert error == pytest.approx(float(ratio), rel=1e-5)
    assert all(torch.equal(before[key], value) for key, value in unet.state_dict().items())


def test_a_layer_is_put_back_after_an_error():
    unet = toy_unet()
    name = "conv_in"
    before = unet.conv_in.weight.clone()
    with pytest.raises(RuntimeError, match="inside"), quantized(unet, name, 3):
        raise RuntimeError("inside")
    assert torch.equal(unet.conv_in.weight, before)


def test_candidates_are_all_layers_at_all_bits():
    layers = list_layers(toy_unet())
    assert len(set(candidates(layers, (1, 2, 3)))) == 768


def test_rows_are_complete_and_compare_with_full_precision(rows):
    found = by_candidate(rows)
    assert set(found) == {(None, None)} | {(name, b) for name in LAYERS for b in (1, 2)}
    reference = found[None, None]
    assert reference["mse"] == [0, 0]
    assert reference["perceptual"] == [0, 0]
    # identical images count as one value off by one
    assert reference["psnr"] == pytest.approx([10 * np.log10(255**2 * 64 * 64 * 3)] * 2)
    for name in LAYERS:
        worse, better = found[name, 1], found[name, 2]
        assert worse["weight_mse"] > better["weight_mse"] > 0
        assert np.mean(worse["mse"]) > np.mean(better["mse"]) > 0
        for mse, psnr in zip(worse["mse"], worse["psnr"], strict=True):
            assert psnr == pytest.approx(10 * np.log10(255**2 / mse))


def test_the_table_averages_over_prompts(rows):
    layers = [x for x in list_layers(load_pipeline("mini").unet) if x.name in LAYERS]
    frame = table(rows, layers)
    found = by_candidate(rows)
    assert frame[["layer", "bits"]].to_numpy().tolist() == [[n, b] for n in LAYERS for b in (1, 2)]
    first = found[LAYERS[0], 1]
    assert frame.mse[0] == pytest.approx(np.mean(first["mse"]))
    assert frame.rmse[0] == pytest.approx(np.mean(np.sqrt(first["mse"])))
    drop = np.mean(found[None, None]["clip"]) - np.mean(first["clip"])
    assert frame.clip_drop[0] == pytest.approx(drop)
    tensors = per_prompt(rows, frame)
    assert set(tensors) == {"mse", "psnr", "perceptual", "clip", "clip_drop"}
    for name, values in tensors.items():
        assert values.shape == (4, 2)
        np.testing.assert_allclose(values.mean(dim=1), frame[name], err_msg=name)


def test_a_role_leads_as_often_as_the_prompts_say_so():
    frame = pd.DataFrame({"role": ["a", "a", "a", "b"]})
    clear = torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0], [2.0, 2.0]])
    assert leading_roles(frame, clear).to_dict() == {"b": 1.0}
    # b leads unless the second prompt is drawn twice, in one sample of four
    mixed = torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0], [4.0, 0.0]])
    found = leading_roles(frame, mixed, resamples=4000)
    assert found.to_dict() == pytest.approx({"b": 0.75, "a": 0.25}, abs=0.03)


def test_any_number_of_processes_gives_the_same_rows(rows, tmp_path):
    both = list(run_job(SWEEP, tmp_path, workers=2))
    assert by_candidate(both) == by_candidate(rows)


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_sensitivity import SWEEP
from bf_lib.jobs import run_job
if __name__ == "__main__":
    rows = run_job(SWEEP, Path({folder!r}), workers=2)
    next(rows)
    time.sleep(600)
"""


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_sweep_goes_on_with_the_same_result(rows, tmp_path):
    """Though it takes one row and then looks away, all that are finished are kept."""
    script = tmp_path / "sweep.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    running = subprocess.Popen([sys.executable, str(script)], cwd=ROOT)
    wait_until(lambda: any(len(lines(path)) >= 4 for path in tmp_path.glob("*.jsonl")))
    workers = psutil.Process(running.pid).children(recursive=True)
    assert len(workers) >= 2
    running.send_signal(signal.SIGKILL)
    running.wait()
    wait_until(lambda: not any(is_alive(worker) for worker in workers), seconds=30)
    (path,) = tmp_path.glob("*.jsonl")
    header, *kept = lines(path)
    kept = kept[: len(rows) - 2]  # had it been killed later, there would be nothing to resume
    # A kill may leave half a line, and another process writes its own behind it.
    path.write_text("\n".join([header, *kept[:-1], '{"layer": "half a li', kept[-1]]))
    resumed = list(run_job(SWEEP, tmp_path))
    assert [json.loads(line) for line in kept] == resumed[: len(kept)]
    assert len(resumed) == len(rows)
    assert by_candidate(resumed) == by_candidate(rows)
    assert list(run_job(SWEEP, tmp_path)) == resumed


def lines(path: Path) -> list[str]:
    return path.read_text().split("\n")


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it may end at any moment, also while it is asked
        return False


def test_rows_of_other_settings_are_not_mixed_in(rows, tmp_path):
    small = replace(SWEEP, layers=LAYERS[:1], bits=(1,))
    first = list(run_job(small, tmp_path))
    other = list(run_job(replace(small, seeds=(5, 6)), tmp_path))
    assert by_candidate(other)[LAYERS[0], 1] != by_candidate(first)[LAYERS[0], 1]
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    # Going back to the first settings costs nothing.
    assert list(run_job(small, tmp_path)) == first


def test_rows_of_two_workers_on_one_file_count_once(rows, tmp_path):
    """As when a worker of a killed sweep ends its row while the next sweep begins."""
    once = list(run_job(SWEEP, tmp_path))
    (path,) = tmp_path.glob("*.jsonl")
    append_line(path, json.dumps(once[-1]))
    assert list(run_job(SWEEP, tmp_path)) == once


REFERENCE = replace(SWEEP, layers=(), bits=(1,))  # full precision alone


@pytest.fixture
def marked(tmp_path) -> Path:
    """A folder with a row that is marked, so that one that is computed anew can be told."""
    (row,) = run_job(REFERENCE, tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    path.write_text("\n".join([lines(path)[0], json.dumps(row | {"weight_mse": 99.0})]))
    return tmp_path


def change_unet(pipe):
    with torch.no_grad():
        pipe.unet.conv_in.bias[0] += 1e-3


def change_scheduler(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)


def change_kind_of_scheduler(pipe):
    """To one with the same configuration."""
    kind = type("Other", (type(pipe.scheduler),), {})
    pipe.scheduler = kind.from_config(pipe.scheduler.config)


def change_tokens(pipe):
    pipe.tokenizer.model_max_length -= 1


def change_scale(pipe):
    pipe.vae.register_to_config(scaling_factor=1.5)


def test_rows_of_the_same_sweep_are_kept(marked):
    (row,) = run_job(REFERENCE, marked)
    assert row["weight_mse"] == 99.0


CHANGES = [change_unet, change_scheduler, change_kind_of_scheduler, change_tokens, change_scale]


@pytest.mark.parametrize("change", CHANGES)
def test_rows_of_another_model_are_not_taken(change, marked, monkeypatch):
    def load(self, device):
        pipe = load_pipeline("mini", device=device)
        change(pipe)
        return pipe

    monkeypatch.setattr(Sweep, "load", load)
    (row,) = run_job(REFERENCE, marked)
    assert row["weight_mse"] == 0.0


def test_rows_of_another_judge_are_not_taken(marked, monkeypatch):
    def load(name, device="cpu"):
        perceptual, clip = load_metrics(name, device)
        with torch.no_grad():
            clip.model.logit_scale += 1
        return perceptual, clip

    monkeypatch.setattr(sweep, "load_metrics", load)
    (row,) = run_job(REFERENCE, marked)
    assert row["weight_mse"] == 0.0


@pytest.mark.parametrize("what", ["versions", "library_digest"])
def test_rows_of_other_code_and_libraries_are_not_taken(what, marked, monkeypatch):
    monkeypatch.setattr(jobs, what, lambda *_: "another")
    (row,) = run_job(REFERENCE, marked)
    assert row["weight_mse"] == 0.0


def test_unknown_layers_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no such quantizable layers: \['conv_in', 'typo'\]"):
        next(run_job(replace(SWEEP, layers=("typo", "conv_in", *LAYERS)), tmp_path))


def test_a_layer_that_cannot_be_quantized_is_named():
    unet = toy_unet()
    name = "mid_block.resnets.0.conv1"
    with torch.no_grad():
        get_layer(unet, name).weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"{name}: "), quantized(unet, name, 3):
        pass


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_that_is_quantized_already_is_refused(packed):
    unet = toy_unet()
    name = list_layers(unet)[0].name
    if packed:
        pack_(unet, BitsFusionConfig(Recipe({layer.name: 3 for layer in list_layers(unet)})))
    else:
        attach_fake_quantizer_(get_layer(unet, name), 3)
    with pytest.raises(ValueError, match="quantized already"), quantized(unet, name, 3):
        pass


class Spoilt(Sweep):
    """A sweep of a model that draws as ever, but one of whose layers cannot be quantized."""

    def load(self, device):
        pipe = super().load(device)
        layer = get_layer(pipe.unet, LAYERS[0])
        weight = layer.weight.detach().clone()
        layer.forward = lambda x: F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
        with torch.no_grad():
            layer.weight[0] = torch.nan
        return pipe


def test_a_candidate_that_fails_is_named_after_all_others_are_done(tmp_path):
    settings = {field.name: getattr(SWEEP, field.name) for field in fields(SWEEP)}
    spoilt = Spoilt(**settings | {"bits": (1,)})
    done = []
    with pytest.raises(TaskFailed, match=f"1 of 3 tasks failed:\n1 bit {LAYERS[0]}"):
        for row in run_job(spoilt, tmp_path):
            done.append((row["layer"], row["bits"]))
    assert sorted(done, key=str) == [(None, None), (LAYERS[1], 1)][::-1]


def test_a_full_disk_ends_the_job(tmp_path, monkeypatch):
    def refuse(path, line):
        raise DiskFull(28, "no space left")

    monkeypatch.setattr(jobs, "append_line", refuse)
    with pytest.raises(DiskFull):
        list(run_job(REFERENCE, tmp_path))


def test_prompts_and_seeds_must_pair_up():
    with pytest.raises(ValueError, match="2 prompts with 1 seeds"):
        replace(SWEEP, seeds=(0,))


def test_a_study_gives_its_seed_to_the_noise_and_its_metrics_to_the_model():
    study, prompts, layers = Study.of("mini"), ["a", "b"], list_layers(toy_unet())
    assert study_sweep(study, prompts, layers).seeds == (0, 1)
    assert study_sweep(study, prompts, layers, seed=3).seeds == (6, 7)
    assert study_sweep(study, prompts, layers).metrics == "mini"
    other = Study.of("mini", model="runwayml/stable-diffusion-v1-5")
    assert study_sweep(other, prompts, layers).metrics == "sd15"


def test_a_study_takes_layers_spread_over_the_unet():
    layers = list_layers(toy_unet())
    few = study_layers(Study.of("smoke"), layers)
    assert len(few) == 6
    assert len({layer.role for layer in few}) == 6
    assert few[0].depth < 60 < 200 < few[-1].depth
    assert study_layers(Study.of("mini"), layers) == layers


def test_prompts_of_a_study():
    study = Study.of("mini")
    prompts = study_prompts(study, 0)
    assert len(prompts) == 32
    assert prompts == study_prompts(study, 0)
    assert prompts != study_prompts(study, 1)
    assert study_prompts(Study.of("smoke"), 0) == prompts[:2]
    parti = study_prompts(Study.of("sd15"), 0)
    assert len(set(parti)) == 100
    with pytest.raises(ValueError, match="there are 100 PartiPrompts, not 101"):
        study_prompts(Study.of("sd15", prompts=101), 0)
