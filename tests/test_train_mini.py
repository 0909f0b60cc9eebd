"""The data and the losses that `mini` is trained with."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from bf_lib import train_mini
from bf_lib.drawing import draw
from bf_lib.mini import TOKENS, new_unet, new_vae, to_float, tokenize
from bf_lib.scenes import COLOURS, is_held_out
from bf_lib.train_mini import (
    GeneratorTask,
    VaeTask,
    new_tokenizer,
    training_captions,
    training_scene,
)


@pytest.fixture
def few(monkeypatch):
    """Twelve training scenes, encoded four at a time."""
    monkeypatch.setattr(train_mini, "SCENES", 12)
    monkeypatch.setattr(train_mini, "ENCODED", 4)
    monkeypatch.setattr(train_mini.training_images, "__defaults__", (12, 1))
    # Processes of their own would not know of this.
    monkeypatch.setattr(train_mini.torch.multiprocessing, "get_context", lambda _: Alone())


class Alone:
    """Stands for a pool of processes, and works in this one."""

    def Pool(self, processes):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def map(self, function, items, chunksize):
        return [function(item) for item in items]

    def starmap(self, function, items, chunksize):
        return [function(*item) for item in items]


def test_no_training_scene_is_held_out_and_each_is_its_index():
    scenes = [training_scene(i) for i in range(50)]
    assert not any(is_held_out(scene) for scene in scenes)
    assert scenes == [training_scene(i) for i in range(50)]
    assert len(set(scenes)) == 50


def test_captions_are_of_their_scene_and_name_as_many_colours_as_asked_for():
    named = {0.0: [], 0.5: [], 1.0: []}
    for coloured, found in named.items():
        for i in range(200):
            captions = training_captions(i, coloured)
            assert len(captions) == train_mini.CAPTIONS
            assert captions == training_captions(i, coloured)
            shapes = {thing.shape for thing in training_scene(i).things}
            assert all(shape in text for text in captions for shape in shapes)
            found += [bool(set(text.split()) & set(COLOURS)) for text in captions]
    shares = {coloured: np.mean(found) for coloured, found in named.items()}
    assert shares[0.0] == 0
    assert shares[0.5] == pytest.approx(0.5, abs=0.05)
    assert shares[1.0] == 1


def test_every_word_is_one_token_and_every_caption_fits():
    tokenizer = new_tokenizer()
    for i in range(4000, 4200):  # captions that the tokenizer was not made from
        for text in training_captions(i, coloured=0.5):
            tokens = tokenize(tokenizer, [text])[0]
            used = len(text.split()) + 2  # with the markers of start and end
            assert used <= TOKENS
            assert tokens[0] == tokenizer.bos_token_id
            assert (tokens == tokenizer.eos_token_id).nonzero()[0].item() == used - 1
            assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == text
    assert tokens.max() == tokenizer.eos_token_id  # CLIP's pooling looks for the largest


def test_an_unknown_word_falls_apart_into_letters():
    tokenizer = new_tokenizer()
    assert tokenizer.tokenize("red dog") == ["red</w>", "d", "o", "g</w>"]


def test_images_become_floats_with_black_at_minus_one():
    images = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    images[0, 0, 1] = (255, 0, 255)
    floats = to_float(images)
    assert floats.shape == (1, 3, 2, 2)
    assert floats[0, :, 0, 1].tolist() == [1, -1, 1]


def test_scenes_are_drawn_once_and_again_when_they_change(tmp_path, monkeypatch, few):
    images = train_mini.training_images(tmp_path)
    np.testing.assert_array_equal(images[5], draw(training_scene(5)))
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    train_mini.training_images(tmp_path)
    assert file.stat().st_mtime_ns == written
    real = train_mini.training_scene
    monkeypatch.setattr(train_mini, "training_scene", lambda i: real(i + 100))
    changed = train_mini.training_images(tmp_path)
    np.testing.assert_array_equal(changed[5], draw(real(105)))


@pytest.fixture
def trained(tmp_path, few):
    """A folder with an autoencoder in it, with random weights."""
    torch.manual_seed(0)
    state = {f"ema/{name}": p.detach() for name, p in new_vae().named_parameters()}
    (tmp_path / "vae").mkdir()
    save_file(state, tmp_path / "vae" / "checkpoint.safetensors", {"state": "{}"})
    return tmp_path


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


def test_the_generators_loss_is_min_snr(trained):
    """A UNet that predicts nothing has an error of one: the mean weight over the time-steps."""
    task = GeneratorTask(trained, 0)
    assert task.tokens.shape == (12, train_mini.CAPTIONS, TOKENS)
    torch.nn.init.zeros_(task.model["unet"].conv_out.weight)
    torch.nn.init.zeros_(task.model["unet"].conv_out.bias)
    size = 50
    with torch.no_grad():
        scalars = task.loss(0, size, torch.Generator().manual_seed(0))
    assert float(scalars["mse"]) == pytest.approx(1, abs=0.02)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
    alpha = torch.cumprod(1 - betas, 0)[10::20]  # the middles of fifty stretches
    snr = alpha / (1 - alpha)
    weight = (5 / snr).clamp(max=1)
    assert float(scalars["loss"]) == pytest.approx(float(weight.mean()), rel=0.05)


def test_a_round_starts_from_the_averaged_weights_of_the_one_before(trained):
    torch.manual_seed(5)
    first = GeneratorTask(trained, 0)
    state = {f"ema/{name}": p.detach() + 0.5 for name, p in first.model.named_parameters()}
    (trained / "generator_1").mkdir()
    save_file(state, trained / "generator_1" / "checkpoint.safetensors", {"state": "{}"})
    second = GeneratorTask(trained, 1)
    for name, p in second.model.named_parameters():
        assert torch.equal(p, state[f"ema/{name}"])
    assert not torch.equal(second.tokens, first.tokens)  # other captions


def test_the_logs_of_the_rounds_are_counted_on(tmp_path):
    for number in range(2):
        folder = tmp_path / f"generator_{number + 1}"
        folder.mkdir()
        pd.DataFrame({"step": [20, 40], "loss": [1.0, 0.5]}).to_csv(folder / "log.csv")
    log = train_mini.generator_log(tmp_path)
    steps = train_mini.ROUNDS[0].plan.steps
    assert log.step.tolist() == [20, 40, steps + 20, steps + 40]
    assert log["round"].tolist() == [1, 1, 2, 2]


def test_a_few_steps_lower_the_loss_of_the_autoencoder(tmp_path, few):
    torch.manual_seed(0)
    task = VaeTask(tmp_path)
    optimizer = torch.optim.AdamW(task.model.parameters(), 2e-3)
    losses = []
    for _ in range(8):
        scalars = task.loss(0, 4, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        scalars["loss"].backward()
        optimizer.step()
        losses.append(scalars["mse"].item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_unet_has_the_size_that_the_documentation_says():
    assert sum(p.numel() for p in new_unet().parameters()) == pytest.approx(13.5e6, rel=0.01)
