import pytest

from bf_lib.study import PRESETS, Study


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_resolve(preset):
    study = Study.of(preset)
    assert study.preset == preset
    assert study.bits == (1, 2, 3)
    assert study.threads == 1


def test_presets_are_the_sizes_of_the_design():
    smoke, mini, paper = (Study.of(preset) for preset in ("smoke", "mini", "sd15"))
    assert smoke.model == mini.model == "mini"
    assert (smoke.prompts, smoke.steps, smoke.layers) == (2, 2, 6)
    assert (mini.prompts, mini.layers, mini.workers) == (32, None, 2)
    assert (paper.prompts, paper.steps, paper.guidance) == (100, 50, 7.5)
    assert (mini.repeats, mini.repeat_layers, mini.trained_layers) == (3, 30, 24)


def test_overrides():
    study = Study.of("mini", steps=20, bits=[2], guidance=None)
    assert (study.steps, study.bits, study.guidance) == (20, (2,), Study.of("mini").guidance)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"stepps": 4}, "stepps"),
        ({"steps": 0}, "steps must be an integer from 1 up, got 0"),
        ({"prompts": 2.5}, "prompts must be an integer from 1 up, got 2.5"),
        ({"batch": True}, "batch must be an integer"),
        ({"layers": -1}, "layers must be an integer"),
        ({"guidance": 0.5}, "guidance must be at least 1, got 0.5"),
        ({"guidance": float("nan")}, "guidance"),
        ({"bits": ()}, "bits"),
        ({"bits": (0,)}, "bits"),
        ({"bits": (2, 2)}, "bits must differ"),
        ({"trained_steps": 0}, "trained_steps must be an integer from 1 up, got 0"),
        ({"trained_lr": 0.0}, "trained_lr must be in"),
        ({"decay": 1.5}, "decay must be in"),
        ({"dtype": "int8"}, "dtype must be one of .* got 'int8'"),
    ],
)
def test_bad_sizes_are_refused(overrides, said):
    with pytest.raises(ValueError, match=said):
        Study.of("mini", **overrides)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="'tiny'"):
        Study.of("tiny")
