"""The judges: what the shipped ones read off drawings, and what they are trained towards."""

import numpy as np
import pytest
import torch
from torch import nn

from bf_lib.drawing import draw_many
from bf_lib.judges import CELL, SceneJudge, load_clip_judge, load_scene_judge, read_scenes
from bf_lib.mini import TOKENS, to_float, tokenize
from bf_lib.model_card import retrieval
from bf_lib.models import MODELS
from bf_lib.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE, sample_medley, sample_scene
from bf_lib.train_judges import ClipTask, SceneTask, _distort, _targets

SIDE = SIZE // CELL


class Painted(nn.Module):
    """A judge that sees given scenes, whatever the image."""

    def __init__(self, scenes):
        super().__init__()
        self.cells = torch.full((len(scenes), 3 + len(SHAPES) + len(COLOURS), SIDE, SIDE), -9.0)
        heat, (n, y, x), look = _targets(scenes)
        self.cells[:, 0] = torch.logit(heat.clamp(1e-4, 1 - 1e-4))
        self.cells[n, 1:3, y, x] = look[:, :2]
        for row, i, j, (shape, colour) in zip(n, y, x, look[:, 2:].long(), strict=True):
            self.cells[row, 3 + shape, i, j] = 9.0
            self.cells[row, 3 + len(SHAPES) + colour, i, j] = 9.0

    def forward(self, images):
        return self.cells[: len(images)], torch.zeros(len(images), len(BACKGROUNDS))


def some_scenes(count, seed=0):
    rng = np.random.default_rng((70, seed))
    return [sample_scene(rng) if i % 2 else sample_medley(rng) for i in range(count)]


def test_a_perfect_map_of_cells_is_read_as_the_scene():
    scenes = some_scenes(60)
    read = read_scenes(Painted(scenes), torch.zeros(len(scenes), 3, SIZE, SIZE))
    for scene, seen in zip(scenes, read, strict=True):
        found = sorted((s.shape, s.colour, s.x, s.y) for s in seen)
        wanted = sorted((t.shape, t.colour, t.x, t.y) for t in scene.things)
        assert [f[:2] for f in found] == [w[:2] for w in wanted]
        for f, w in zip(found, wanted, strict=True):
            assert f[2:] == pytest.approx(w[2:], abs=1e-3)


def test_objects_come_most_confident_first():
    judge = Painted(some_scenes(1, seed=3))
    judge.cells[0, 0] = -9.0
    judge.cells[0, 0, 2, 2], judge.cells[0, 0, 10, 10] = 1.0, 3.0
    (seen,) = read_scenes(judge, torch.zeros(1, 3, SIZE, SIZE))
    assert [s.heat for s in seen] == pytest.approx([1 / (1 + np.exp(-3)), 1 / (1 + np.exp(-1))])


def test_the_shipped_scene_judge_reads_drawings_but_not_blank_ones():
    judge = load_scene_judge(MODELS["mini"])
    scenes = some_scenes(80, seed=1)
    read = read_scenes(judge, to_float(draw_many(scenes)))
    same = [
        sorted((t.shape, t.colour) for t in scene.things)
        == sorted((s.shape, s.colour) for s in seen)
        for scene, seen in zip(scenes, read, strict=True)
    ]
    assert np.mean(same) > 0.9
    assert read_scenes(judge, torch.zeros(1, 3, SIZE, SIZE)) == [[]]


def test_images_are_judged_one_by_one():
    judge = SceneJudge().eval()
    nn.init.constant_(judge.head.bias[:1], 0.0)  # untrained, it sees something everywhere
    images = to_float(draw_many(some_scenes(3)))
    together = read_scenes(judge, images)
    assert any(together)
    apart = [seen for image in images for seen in read_scenes(judge, image[None])]
    for a, b in zip(together, apart, strict=True):
        assert [(s.shape, s.colour) for s in a] == [(s.shape, s.colour) for s in b]


def test_the_shipped_clip_judge_picks_the_right_caption_and_image():
    clip, tokenizer = load_clip_judge(MODELS["mini"])
    to_text, to_image = retrieval(clip, tokenizer, seed=1)  # the model card has seed 0
    assert min(to_text, to_image) > 0.92


def test_the_clip_judge_embeds_texts_at_unit_length():
    clip, tokenizer = load_clip_judge(MODELS["mini"])
    tokens = tokenize(tokenizer, ["a red star", "three blue rings above a moon"])
    assert tokens.shape == (2, TOKENS)
    with torch.inference_mode():
        text = clip.encode_text(tokens, normalize=True)
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))


def test_bent_and_softened_objects_stay_where_they_are():
    scenes = [sample_scene(np.random.default_rng(i), "single") for i in range(20)]
    images = torch.full((20, 3, SIZE, SIZE), -1.0)
    for image, scene in zip(images, scenes, strict=True):
        thing = scene.things[0]
        y, x = int(thing.y), int(thing.x)
        image[:, y - 6 : y + 7, x - 6 : x + 7] = 1.0
    bent = _distort(images, torch.Generator().manual_seed(0))
    assert torch.equal(bent, _distort(images, torch.Generator().manual_seed(0)))
    assert bent.min() >= -1 - 1e-5 and bent.max() <= 1 + 1e-5
    line = torch.arange(SIZE).float()
    for before, after in zip(images, bent, strict=True):
        assert not torch.equal(before, after)
        for dim in (1, 2):
            mass = [(image[0] + 1).sum(dim - 1) for image in (before, after)]
            centres = [float((m * line).sum() / m.sum()) for m in mass]
            assert centres[0] == pytest.approx(centres[1], abs=3)
            assert float(mass[1].sum() / mass[0].sum()) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("make", [SceneTask, ClipTask])
def test_a_few_steps_lower_the_loss_of_a_judge(make):
    torch.manual_seed(0)
    task = make()
    optimizer = torch.optim.AdamW(task.model.parameters(), 2e-3)
    losses = []
    for _ in range(10):
        scalars = task.loss(0, 8, torch.Generator().manual_seed(0))  # the same scenes each time
        optimizer.zero_grad()
        scalars["loss"].backward()
        optimizer.step()
        losses.append(scalars["loss"].item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in task.model.parameters())
