import matplotlib.pyplot as plt
import pytest

from bf_lib import explore as module
from bf_lib.explore import explore


@pytest.fixture
def shown(monkeypatch):
    """What is displayed, in order."""
    seen = []
    monkeypatch.setattr(module, "display", seen.append)
    return seen


def draw(layer, bits):
    return f"{layer} at {bits}"


def test_headless_draws_the_first_choice_once(monkeypatch, shown):
    monkeypatch.setenv("BF_HEADLESS", "1")
    explore(draw, layer=["conv", "linear"], bits=(1, 2, 3))
    assert shown == ["conv at 1"]


def test_live_has_controls_with_every_choice(monkeypatch, shown):
    controls = {}
    monkeypatch.setattr(
        module, "interact", lambda show, **given: controls.update(given, show=show)
    )
    explore(draw, layer=["conv", "linear"], bits=(1, 2, 3))
    assert tuple(controls["layer"].options) == ("conv", "linear")
    assert tuple(controls["bits"].options) == (1, 2, 3)  # not a slider from 1 to 2 in steps of 3
    controls["show"](layer="linear", bits=3)
    assert shown == ["linear at 3"]


def test_a_figure_is_shown_once(monkeypatch, shown):
    monkeypatch.setenv("BF_HEADLESS", "1")
    explore(lambda size: plt.figure(figsize=(size, size)), size=[1])
    assert len(shown) == 1 and not plt.get_fignums()


def test_nothing_to_choose_from():
    with pytest.raises(ValueError, match=r"\['layer'\]"):
        explore(draw, layer=[], bits=[1])
