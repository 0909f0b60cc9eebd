"""The measurements of the model card, with models whose answer is known."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_judges import Painted
from torch import nn

from bf_lib import model_card
from bf_lib.evaluation import TASKS
from bf_lib.scenes import is_held_out


class Copy(nn.Module):
    """An autoencoder that loses nothing but a constant."""

    def __init__(self, off=0.0):
        super().__init__()
        self.off = off

    def encode(self, x):
        return type("Encoded", (), {"latent_dist": type("Dist", (), {"mode": lambda _: x})()})

    def decode(self, z):
        return type("Decoded", (), {"sample": z + self.off})


class Reader(nn.Module):
    """A scene judge that has seen the scenes; `blind` hides the first object of each."""

    def __init__(self, scenes, blind=False):
        super().__init__()
        self.painted = Painted(scenes)
        if blind:
            for n, scene in enumerate(scenes):
                first = scene.things[0]
                x, y = int(first.x / 4), int(first.y / 4)
                self.painted.cells[n, 0, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3] = -9.0

    def forward(self, images):
        return self.painted(images)


class Names(nn.Module):
    """A CLIP that gives each scene and each text a direction of its own, two perhaps swapped."""

    def __init__(self, count, swap):
        super().__init__()
        self.images, self.texts = torch.eye(count), torch.eye(count)
        if swap:  # the first two texts are taken for each other
            self.texts[[0, 1]] = self.texts[[1, 0]]

    def encode_image(self, images, normalize):
        return self.images

    def encode_text(self, tokens, normalize):
        return self.texts


def test_fresh_scenes_are_their_own_and_of_the_combinations_asked_for():
    known, held = (model_card.fresh_scenes(30, seed=2, held_out=h) for h in (False, True))
    assert not any(map(is_held_out, known))
    assert all(map(is_held_out, held))
    assert known == model_card.fresh_scenes(30, seed=2)
    assert known != model_card.fresh_scenes(30, seed=3)


def test_psnr_of_a_constant_error():
    images = model_card.images_of(model_card.fresh_scenes(3, seed=0)) * 0.9
    rebuilt = model_card.reconstruct(Copy(off=0.02), images)
    # an error of 0.02 in a range of 2 is 1 %: 40 dB
    assert model_card.psnr(rebuilt, images) == pytest.approx(40, abs=0.01)
    assert model_card.reconstruct(Copy(off=5.0), images).max() == 1


def test_pictures_round_to_the_nearest_value():
    images = torch.tensor([-1.0, 0.0, 1.0, 2.0]).view(1, 1, 2, 2)
    assert model_card.as_pictures(images)[0, :, :, 0].tolist() == [[0, 128], [255, 255]]


def test_a_judge_that_has_seen_the_scenes_is_always_right():
    scenes = model_card.fresh_scenes(40, seed=4)
    images = torch.zeros(len(scenes), 3, 64, 64)
    right = model_card.judge_accuracy(Reader(scenes), scenes, images)
    assert right.to_dict() == {"shape": 1.0, "colour": 1.0, "count": 1.0, "relation": 1.0}


def test_an_object_that_is_not_found_counts_as_wrong():
    scenes = model_card.fresh_scenes(40, seed=4)
    images = torch.zeros(len(scenes), 3, 64, 64)
    right = model_card.judge_accuracy(Reader(scenes, blind=True), scenes, images)
    assert right["count"] == right["relation"] == 0
    things = sum(len(scene.things) for scene in scenes)
    assert right["shape"] <= (things - len(scenes)) / things + 1e-9
    assert right["colour"] == right["shape"]


@pytest.mark.parametrize(("swap", "share"), [(False, 1.0), (True, 0.75)])
def test_retrieval_counts_the_right_ones_in_both_directions(swap, share, monkeypatch):
    monkeypatch.setattr(model_card, "tokenize", lambda tokenizer, texts: texts)
    assert model_card.retrieval(Names(8, swap), None, seed=0, count=8) == (share, share)


def test_the_card_says_what_was_measured(tmp_path):
    attributes = ["shape", "colour", "count", "relation"]
    cases = [("unseen", "drawn"), ("held out", "reconstructed")]
    accuracy = pd.DataFrame(
        [[0.991, 0.992, 0.993, 0.994], [0.961, 0.962, 0.963, 0.964]],
        index=pd.MultiIndex.from_tuples(cases),
        columns=attributes,
    )
    scores = pd.DataFrame({"unseen": np.linspace(0.9, 0.7, 6)}, index=list(TASKS))
    scores["held out"] = scores.unseen / 2
    card = model_card.write(
        tmp_path, {False: 34.56, True: 33.21}, accuracy, (0.975, 0.985), 3.5, scores, 150
    )
    text = card.read_text()
    assert card == tmp_path / "README.md"
    for number in ("34.6 dB", "33.2 dB", "guidance_scale=3.5", "97.5 %", "98.5 %"):
        assert number in text
    assert "| unseen scenes, drawn | 99.1 | 99.2 | 99.3 | 99.4 |" in text
    assert "| held out scenes, reconstructed | 96.1 | 96.2 | 96.3 | 96.4 |" in text
    assert "150 images" in text
    assert "at most 0.08 to either side" in text  # Wilson's interval of a half, of 150
    assert f"| {list(TASKS)[0]} | 0.900 | 0.450 |" in text
