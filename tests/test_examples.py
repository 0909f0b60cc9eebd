"""Examples to train on: what is encoded, what is drawn, and what comes back from files."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from toys import toy_pipeline

from bf_lib import examples
from bf_lib.drawing import draw
from bf_lib.examples import Examples, encoded, folder_examples, scene_examples
from bf_lib.mini import to_float
from bf_lib.models import load_pipeline
from bf_lib.training_data import training_captions, training_scene


def some(count: int = 5) -> Examples:
    """The mean of each is its number, and the variance next to nothing."""
    mean = torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 2, 3, 3)
    captions = tuple((f"{i}a", f"{i}b") for i in range(count))
    return Examples(torch.cat([mean, torch.full_like(mean, -30)], 1).half(), captions, 0.5)


def test_latents_and_captions_belong_together():
    latents, captions = some().draw(200, torch.Generator().manual_seed(0))
    assert latents.shape == (200, 2, 3, 3) and latents.dtype == torch.float32
    torch.testing.assert_close(
        latents[:, 0, 0, 0], torch.tensor([0.5 * int(c[0]) for c in captions])
    )
    assert set(captions) == {f"{i}{letter}" for i in range(5) for letter in "ab"}


def test_latents_are_drawn_from_their_distribution():
    wide = Examples(
        torch.cat([torch.ones(1, 1, 50, 50), torch.full((1, 1, 50, 50), 4.0).log()], 1),
        (("",),),
        3.0,
    )
    latents, _ = wide.draw(4, torch.Generator().manual_seed(0))
    assert latents.mean().item() == pytest.approx(3, abs=0.2)
    assert latents.std().item() == pytest.approx(6, abs=0.2)


def test_files_keep_all(tmp_path):
    some().save(tmp_path / "new" / "some.safetensors")
    loaded = Examples.load(tmp_path / "new" / "some.safetensors")
    assert torch.equal(loaded.moments, some().moments)
    assert loaded.captions == some().captions and loaded.scale == 0.5


def test_captions_are_not_in_the_header_whose_length_is_limited(tmp_path):
    moments = torch.zeros(100, 2, 1, 1).half()
    Examples(moments, (("é" * 1000,),) * 100, 1.0).save(tmp_path / "some.safetensors")
    with (tmp_path / "some.safetensors").open("rb") as file:
        assert int.from_bytes(file.read(8), "little") < 1000
    assert Examples.load(tmp_path / "some.safetensors").captions == (("é" * 1000,),) * 100


def test_scenes_are_encoded_once_with_their_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "SHARE", 2)
    found = Examples.load(scene_examples("mini", 3, tmp_path, first=10))
    vae = load_pipeline("mini").vae
    images = np.stack([draw(training_scene(i)) for i in (10, 11, 12)])
    with torch.no_grad():
        wanted = vae.encode(to_float(images)).latent_dist
    torch.testing.assert_close(found.moments[:, :4].float(), wanted.mean, rtol=2e-3, atol=2e-3)
    assert found.captions[1] == tuple(training_captions(11))
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    again = Examples.load(scene_examples("mini", 3, tmp_path, first=10))
    assert torch.equal(again.moments, found.moments) and file.stat().st_mtime_ns == before


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("a.png", (40, 20, 3)), ("b.png", (16, 16, 3))):
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(tmp_path / name)
    table = pd.DataFrame({"file_name": ["b.png", "a.png"], "text": ["square", "tall"]})
    table.to_csv(tmp_path / "metadata.csv", index=False)
    return tmp_path


def test_a_folder_of_images_is_cut_to_squares_and_encoded(photos):
    pipe = toy_pipeline()
    found = Examples.load(folder_examples(pipe, photos, photos / "kept"))
    assert found.captions == (("square",), ("tall",)) and found.moments.shape == (2, 8, 8, 8)
    image = np.asarray(Image.open(photos / "b.png"))
    wanted = encoded(pipe.vae, image[None])
    torch.testing.assert_close(found.moments[:1], wanted, rtol=2e-3, atol=2e-3)


def test_images_of_a_folder_are_encoded_once_and_others_anew(photos, tmp_path):
    pipe, kept = toy_pipeline(), tmp_path / "kept"
    file = folder_examples(pipe, photos, kept)
    before = file.stat().st_mtime_ns
    assert folder_examples(pipe, photos, kept) == file and file.stat().st_mtime_ns == before
    table = pd.DataFrame({"file_name": ["b.png", "a.png"], "text": ["None", ""]})
    table.to_csv(photos / "metadata.csv", index=False)
    renamed = folder_examples(pipe, photos, kept)
    assert Examples.load(renamed).captions == (("None",), ("",))  # as they are, not NaN
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(photos / "b.png")
    redrawn = folder_examples(pipe, photos, kept)
    assert not torch.equal(Examples.load(redrawn).moments, Examples.load(renamed).moments)
    smaller = folder_examples(pipe, photos, kept, size=8)
    assert len({file, renamed, redrawn, smaller}) == len(list(kept.iterdir())) == 4


def test_a_folder_without_what_is_needed_is_refused(photos):
    pipe = toy_pipeline()
    pd.DataFrame({"file_name": ["a.png"]}).to_csv(photos / "metadata.csv", index=False)
    with pytest.raises(ValueError, match="no column 'text'"):
        folder_examples(pipe, photos, photos / "kept.safetensors")
    pd.DataFrame({"file_name": [], "text": []}).to_csv(photos / "metadata.csv", index=False)
    with pytest.raises(ValueError, match="no rows"):
        folder_examples(pipe, photos, photos / "kept.safetensors")
    (photos / "metadata.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata\.csv"):
        folder_examples(pipe, photos, photos / "kept.safetensors")
