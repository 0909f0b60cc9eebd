import json
import sys
from types import ModuleType

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import bf_lib.run
from bf_lib import figures
from bf_lib.artifacts import MissingArtifact
from bf_lib.run import Run


def lines(rows, colour, sizes):
    figure, axes = plt.subplots()
    axes.plot(rows.x, rows.y, color=colour, linewidth=sizes[0])
    return figure


@pytest.fixture(autouse=True)
def toy_plots(monkeypatch):
    """A module of `bf_lib` with one plotting function."""
    module = ModuleType("bf_lib.toy_plots")
    module.lines = lines
    monkeypatch.setattr(lines, "__module__", module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture(autouse=True)
def restored():
    """Puts back what starting a run changes for the whole process."""
    threads = torch.get_num_threads()
    with plt.rc_context(), plt.ioff():
        plt.switch_backend("agg")
        yield
    plt.close("all")
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("BF_HEADLESS", "1")
    return Run.start("03_toy", "mini", 7, root=tmp_path, steps=4, guidance=None)


ROWS = pd.DataFrame({"x": [0.0, 1.0], "y": [0.5, 0.25]})
CALL = {"caption": "Two points.", "tables": {"rows": "03_toy/rows"}}


def test_start_says_what_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BF_HEADLESS", "1")
    headless = Run.start("03_toy", "mini", 7, root=tmp_path, steps=4).banner()
    said = ("preset **mini**", "model `mini`", "device", "1 thread", "seed 7", "steps = 4")
    assert all(part in headless for part in said)
    assert "commit" not in headless  # or each commit would change every rendered notebook
    monkeypatch.delenv("BF_HEADLESS")
    assert "commit" in Run.start("03_toy", "mini", 7, root=tmp_path).banner()


def test_start_makes_runs_repeatable(run):
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == run.study.threads == 1
    assert (run.study.steps, run.seed, run.parameters) == (4, 7, {"steps": 4})
    again = torch.Generator().manual_seed(7)
    assert torch.equal(torch.rand(3, generator=run.generator), torch.rand(3, generator=again))


def test_start_refuses_what_is_unknown(tmp_path):
    with pytest.raises(ValueError, match="'minni'"):
        Run.start("03_toy", "minni", 0, root=tmp_path)
    with pytest.raises(ValueError, match="stepps"):
        Run.start("03_toy", "mini", 0, root=tmp_path, stepps=4)


def test_results_are_kept_under_the_notebooks_own_name(run, tmp_path):
    run.save_table(ROWS, "rows")
    run.save_json({"a": 1}, "record")
    run.save_tensors({"w": torch.ones(2)}, "weights")
    assert run.folder == tmp_path / "data/runs/mini/03_toy"
    pd.testing.assert_frame_equal(run.load_table("03_toy", "rows"), ROWS)
    assert run.load_json("03_toy", "record") == {"a": 1}
    assert torch.equal(run.load_tensors("03_toy", "weights")["w"], torch.ones(2))
    with pytest.raises(AssertionError, match="would lie outside"):
        run.save_table(ROWS, "../01_other/rows")
    with pytest.raises(ValueError, match="wrote .*rows.csv already"):
        run.save_json({}, "rows")  # would share its sidecar


def test_what_was_read_is_recorded(run):
    run.save_table(ROWS, "rows")
    run.load_table("03_toy", "rows")
    run.save_json(1, "after")
    sidecar = json.loads((run.folder / "after.meta.json").read_text())
    assert list(sidecar["inputs"]) == ["03_toy/rows.csv"]
    assert sidecar["study"]["steps"] == 4 and sidecar["parameters"] == {"steps": 4}


def test_a_missing_input_names_its_notebook(run):
    with pytest.raises(MissingArtifact, match="run notebook 01_other, or `make reproduce"):
        run.load_table("01_other", "rows")


def test_what_changes_from_run_to_run_is_apart(run):
    run.save_table(ROWS, "rows")
    run.finish()
    record = json.loads((run.folder / "render.json").read_text())
    assert record["artifacts"] == [
        *("data/runs/mini/03_toy/claims.json", "data/runs/mini/03_toy/rows.csv")
    ]
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"cpu", "threads", "ram_gb"} <= set(record["machine"])
    assert {"commit", "dirty"} == set(record["code"])


def test_a_figure_of_tables_is_shown_and_drawn_again_to_the_same_bytes(
    run, tmp_path, capsys, monkeypatch
):
    run.save_table(ROWS, "rows")
    shown = []
    monkeypatch.setattr(bf_lib.run, "display", lambda *what, **_: shown.extend(what))
    run.save_figure(lines, "lines", **CALL, colour="C1", sizes=(2, 3))
    assert not plt.get_fignums()  # or the cell would show it again
    assert isinstance(shown[0], Figure) and shown[1].data == f"*{CALL['caption']}*"
    saved = {path: path.read_bytes() for path in (tmp_path / "figures/mini").iterdir()}
    assert {path.name for path in saved} == {
        f"03_toy-lines.{kind}" for kind in ("png", "svg", "json")
    }
    for path in saved:
        if path.suffix != ".json":
            path.unlink()
    assert figures.main("mini", tmp_path) == 0
    assert {path: path.read_bytes() for path in saved} == saved
    assert "figures/mini/03_toy-lines.png" in capsys.readouterr().out


def test_a_drawn_figure_is_kept_but_not_drawn_again(run, tmp_path, capsys):
    strip, _ = plt.subplots()
    run.save_figure(strip, "strip", caption="Images.")
    before = (tmp_path / "figures/mini/03_toy-strip.png").read_bytes()
    assert figures.main("mini", tmp_path) == 0
    assert (tmp_path / "figures/mini/03_toy-strip.png").read_bytes() == before
    assert "kept" in capsys.readouterr().out


def test_only_what_can_be_found_again_is_called(run):
    run.save_table(ROWS, "rows")
    with pytest.raises(ValueError, match="pass a function of bf_lib"):
        run.save_figure(lambda rows: None, "lines", **CALL)
    with pytest.raises(ValueError, match="takes no tables"):
        run.save_figure(Figure(), "lines", **CALL)
    with pytest.raises(ValueError, match="cannot hold a Figure"):
        run.save_figure(lines, "lines", **CALL, colour=Figure(), sizes=(1,))


def test_figures_before_any_run(tmp_path, capsys):
    assert figures.main("mini", tmp_path) == 1
    assert "make reproduce PRESET=mini" in capsys.readouterr().err
