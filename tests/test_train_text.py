"""What the text encoder of `mini` is taught to read."""

import torch
from safetensors.torch import save_file

from bf_lib import train_text
from bf_lib.mini import tokenize
from bf_lib.scenes import BACKGROUNDS, COLOURS, HELD_COLOURS, RELATIONS, SHAPES, Scene, Thing
from bf_lib.train_text import ReadingTask, load_text_encoder, meaning, new_reader, said
from bf_lib.training_data import new_tokenizer

OF_OBJECT = 5  # answers: number, shape, colour, side, size
NOTHING = [0] * OF_OBJECT


def thing(shape, colour, size=""):
    return Thing(shape, colour, 32, 32, 10, size=size)


def shape(name):
    return 1 + SHAPES.index(name)


def colour(name):
    return 1 + list(COLOURS).index(name)


def side(name):
    return 1 + list(RELATIONS).index(name)


def test_everything_that_is_said_is_an_answer():
    scene = Scene((thing("star", "red", "large"),), "teal", "single")
    answers = said(scene, "a picture of a large red star on teal")
    assert answers[:OF_OBJECT] == [1, shape("star"), colour("red"), 0, 2]
    assert answers[OF_OBJECT:-1] == NOTHING
    assert answers[-1] == 1 + list(BACKGROUNDS).index("teal")


def test_what_a_caption_leaves_out_is_answered_by_nothing():
    scene = Scene((thing("star", "red", "large"),), "teal", "single")
    assert said(scene, "a star") == [1, shape("star"), 0, 0, 0, *NOTHING, 0]
    # the size of an object of the usual size has no word
    usual = Scene((thing("star", "red"),), "teal", "single")
    assert said(usual, "a star") == said(scene, "a star")


def test_objects_are_told_in_the_order_in_which_they_are_named():
    scene = Scene((thing("star", "red"), thing("moon", "blue")), "sand", "relation", "above")
    star, moon = [1, shape("star"), 0, side("above"), 0], [1, shape("moon"), 0, side("below"), 0]
    assert said(scene, "a star on top of a moon") == [*star, *moon, 0]
    assert said(scene, "a moon below a star") == [*moon, *star, 0]


def test_captions_that_no_image_tells_apart_mean_the_same():
    scene = Scene((thing("star", "red"), thing("moon", "blue")), "sand", "relation", "above")
    same = ("a star above a moon", "a moon below a star")
    assert meaning(scene, same[0]) == meaning(scene, same[1])
    others = ("a red star above a moon", "a star above a moon on sand")
    assert len({meaning(scene, text) for text in (same[0], *others)}) == 3


def test_equal_objects_are_counted():
    scene = Scene((thing("cross", "pink"),) * 3, "gray", "count")
    assert said(scene, "three pink crosses") == [
        *(3, shape("cross"), colour("pink"), 0, 0),
        *NOTHING,
        0,
    ]


def test_the_words_of_shapes_begin_no_other_word():
    """`said` finds an object in a caption by the beginning of its word."""
    words = {text.removesuffix("</w>") for text in new_tokenizer().get_vocab()}
    for name in SHAPES:
        plural = name + ("es" if name == "cross" else "s")
        found = {word for word in words if word.startswith(name)}
        assert found <= {name, plural}


def test_a_few_steps_lower_the_loss(monkeypatch):
    monkeypatch.setattr(train_text, "READ", 50)
    torch.manual_seed(0)
    task = ReadingTask()
    optimizer = torch.optim.AdamW(task.model.parameters(), 3e-3)
    losses = []
    for step in range(20):
        scalars = task.loss(step, 64, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        scalars["loss"].backward()
        optimizer.step()
        losses.append(scalars["loss"].item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_reader_looks_at_the_end_of_the_text_and_after_it_only(monkeypatch):
    monkeypatch.setattr(train_text, "READ", 4)
    task = ReadingTask()
    states = []
    task.model["text_encoder"].register_forward_hook(
        lambda *a: states.append(a[2].last_hidden_state) or states[-1].retain_grad()
    )
    task.loss(0, 6, torch.Generator().manual_seed(0))["loss"].backward()
    chosen = torch.randint(len(task.tokens), (6,), generator=torch.Generator().manual_seed(0))
    after = task.tokens[chosen] == task.end
    used = states[0].grad.abs().sum(-1) > 0
    assert torch.equal(used, after)


def test_the_trained_encoder_is_loaded_without_its_reader(tmp_path):
    tokenizer = new_tokenizer()
    model = new_reader(tokenizer)
    state = {f"ema/{name}": p.detach() for name, p in model.named_parameters()}
    save_file(state, tmp_path / "checkpoint.safetensors", {"state": "{}"})
    loaded = load_text_encoder(tmp_path, tokenizer)
    tokens = tokenize(tokenizer, ["two red stars"])
    with torch.no_grad():
        want = model["text_encoder"].eval()(tokens).last_hidden_state
        assert torch.equal(loaded(tokens).last_hidden_state, want)
    assert not loaded.training


def test_captions_of_combinations_without_images_are_read_too(monkeypatch):
    monkeypatch.setattr(train_text, "READ", 200)
    task = ReadingTask()
    held = [f"{colour} {shape}" for colour, shape in HELD_COLOURS]
    texts = new_tokenizer().batch_decode(task.tokens, skip_special_tokens=True)
    assert 5 < sum(any(words in text for words in held) for text in texts) < 60


def test_one_wrong_answer_is_a_caption_not_read(tmp_path):
    """A reader that always answers what "a star" says has read such captions and no others."""
    tokenizer = new_tokenizer()
    scene = Scene((thing("star", "red"),), "teal", "single")
    model = new_reader(tokenizer)
    answers = said(scene, "a star")
    with torch.no_grad():
        model["reader"].weight.zero_()
        parts = model["reader"].bias.split([len(q) for q in train_text._QUESTIONS])
        for part, answer in zip(parts, answers, strict=True):
            part.copy_(torch.eye(len(part))[answer])
    state = {f"ema/{name}": p.detach() for name, p in model.named_parameters()}
    save_file(state, tmp_path / "checkpoint.safetensors", {"state": "{}"})
    train_text.export_reader(tmp_path, tmp_path / "judges")
    reader = train_text.load_reader(tmp_path / "judges" / "reader.safetensors")
    encoder = load_text_encoder(tmp_path, tokenizer)
    texts = ["a star", "a red star", "there is a star", "a star on teal"]
    assert train_text.reads(encoder, reader, tokenizer, [scene] * 4, texts) == 0.5
