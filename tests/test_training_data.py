"""The scenes, captions, images and words that `mini` is trained on."""

import numpy as np
import pytest

from bf_lib import training_data
from bf_lib.drawing import draw
from bf_lib.mini import TOKENS, tokenize
from bf_lib.scenes import COLOURS, is_held_out
from bf_lib.training_data import (
    CAPTIONS,
    new_tokenizer,
    training_captions,
    training_images,
    training_scene,
)


def test_no_training_scene_is_held_out_and_each_is_its_index():
    scenes = [training_scene(i) for i in range(50)]
    assert not any(is_held_out(scene) for scene in scenes)
    assert scenes == [training_scene(i) for i in range(50)]
    assert len(set(scenes)) == 50


def test_captions_are_of_their_scene_and_three_quarters_name_the_colours():
    named = []
    for i in range(200):
        captions = training_captions(i)
        assert len(captions) == CAPTIONS
        assert captions == training_captions(i)
        shapes = {thing.shape for thing in training_scene(i).things}
        assert all(shape in text for text in captions for shape in shapes)
        named += [bool(set(text.split()) & set(COLOURS)) for text in captions]
    assert np.mean(named) == pytest.approx(0.75, abs=0.05)


def test_every_word_is_one_token_and_every_caption_fits():
    tokenizer = new_tokenizer()
    for i in range(4000, 4200):  # captions that the tokenizer was not made from
        for text in training_captions(i):
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


def test_scenes_are_drawn_once_and_again_when_they_change(tmp_path, monkeypatch, few):
    images = training_images(tmp_path)
    np.testing.assert_array_equal(images[5], draw(training_scene(5)))
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    training_images(tmp_path)
    assert file.stat().st_mtime_ns == written
    real = training_data.training_scene
    monkeypatch.setattr(training_data, "training_scene", lambda i: real(i + 100))
    changed = training_images(tmp_path)
    np.testing.assert_array_equal(changed[5], draw(real(105)))
    monkeypatch.setattr(training_data, "library_digest", lambda _: "code that draws otherwise")
    training_images(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
