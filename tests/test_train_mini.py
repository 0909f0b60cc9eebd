"""The data and the losses that `mini` is trained with."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from bf_lib import train_mini
from bf_lib.mini import TOKENS, new_unet, new_vae, to_float
from bf_lib.train_mini import ROUNDS, GeneratorTask, Round, VaeTask
from bf_lib.train_text import new_reader
from bf_lib.training_data import CAPTIONS, new_tokenizer, training_scene


@pytest.fixture
def trained(tmp_path, few):
    """A folder with an autoencoder and a text encoder in it, with random weights."""
    torch.manual_seed(0)
    state = {f"ema/{name}": p.detach() for name, p in new_vae().named_parameters()}
    reader = new_reader(new_tokenizer())
    text = {f"ema/{name}": p.detach() for name, p in reader.named_parameters()}
    for name, weights in (("vae", state), ("text_encoder", text)):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "checkpoint.safetensors", {"state": "{}"})
    return tmp_path


def test_images_become_floats_with_black_at_minus_one():
    images = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    images[0, 0, 1] = (255, 0, 255)
    floats = to_float(images)
    assert floats.shape == (1, 3, 2, 2)
    assert floats[0, :, 0, 1].tolist() == [1, -1, 1]


def test_latents_have_unit_variance_and_follow_the_autoencoder(trained):
    data = train_mini.training_latents(trained)
    assert data["moments"].shape == (12, 8, 16, 16)
    assert float((data["moments"][:, :4].float() * data["scale"]).std()) == pytest.approx(1, 1e-2)
    assert len(list(trained.glob("latents-*"))) == 1

    torch.manual_seed(1)
    state = {f"ema/{name}": p.detach() for name, p in new_vae().named_parameters()}
    save_file(state, trained / "vae" / "checkpoint.safetensors", {"state": "{}"})
    other = train_mini.training_latents(trained)
    assert not torch.equal(other["moments"], data["moments"])


def test_the_generators_loss_is_min_snr_with_a_floor(trained):
    """A UNet that predicts nothing has an error of one: the mean weight over the time-steps."""
    task = GeneratorTask(trained, 0)
    assert task.tokens.shape == (12, CAPTIONS, TOKENS)
    torch.nn.init.zeros_(task.model.conv_out.weight)
    torch.nn.init.zeros_(task.model.conv_out.bias)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        batches = pd.DataFrame(task.loss(step, 10, generator) for step in range(5))
    scalars = batches.astype(float).mean()
    assert float(scalars["mse"]) == pytest.approx(1, abs=0.02)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
    alpha = torch.cumprod(1 - betas, 0)
    snr = alpha / (1 - alpha)
    # the time-steps have the density t^(late - 1)
    density = torch.arange(1000).double().add(0.5) ** (train_mini.ROUNDS[0].late - 1)
    weight = (5 / snr).clamp(max=1 + train_mini.SNR_FLOOR / snr)
    expected = float((weight * density).sum() / density.sum())
    assert float(scalars["loss"]) == pytest.approx(expected, rel=0.05)


def test_a_round_starts_from_the_averaged_weights_of_the_one_before(trained):
    state = {f"ema/{name}": p.detach() + 0.5 for name, p in new_unet().named_parameters()}
    first = train_mini.round_folder(trained, 0)
    first.mkdir()
    save_file(state, first / "checkpoint.safetensors", {"state": "{}"})
    for name, p in GeneratorTask(trained, 1).model.named_parameters():
        assert torch.equal(p, state[f"ema/{name}"])


def test_some_kinds_of_scenes_are_shown_more_often(trained, monkeypatch):
    more = Round(ROUNDS[0].plan, late=1.0, more={"pair": 3.0})
    monkeypatch.setattr(train_mini, "ROUNDS", (more,))
    kinds = [training_scene(i).kind for i in range(12)]
    assert "pair" in kinds
    shown = GeneratorTask(trained, 0).shown
    assert shown.tolist() == [3.0 if kind == "pair" else 1.0 for kind in kinds]


def test_only_the_unet_learns_from_the_generators_loss(trained):
    task = GeneratorTask(trained, 0)
    task.loss(0, 2, torch.Generator().manual_seed(0))["loss"].backward()
    assert all(p.grad is None for p in task.text_encoder.parameters())
    assert all(p.grad is not None for p in task.model.parameters())


def test_a_few_steps_lower_the_loss_of_the_autoencoder(tmp_path, few):
    torch.manual_seed(0)
    task = VaeTask(tmp_path)
    task.images = task.images[:, ::4, ::4]  # the slow part is to convolve
    optimizer = torch.optim.AdamW(task.model.parameters(), 2e-3)
    losses = []
    for _ in range(6):
        scalars = task.loss(0, 1, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        scalars["loss"].backward()
        optimizer.step()
        losses.append(scalars["mse"].item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_unet_has_the_size_that_the_documentation_says():
    assert sum(p.numel() for p in new_unet().parameters()) == pytest.approx(13.5e6, rel=0.01)
