"""The gates between a notebook and a build product, each tried with the real make."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bf_lib.paths import ROOT

COUNT = "with open('../ran.log', 'a') as file:\n    file.write('{name}\\n')"
WAIT = """import os, time
with open("../started.new", "w") as file:
    file.write(str(os.getpid()))
os.rename("../started.new", "../started")
time.sleep(60)"""


@pytest.fixture
def project(tmp_path):
    """A copy of the machinery, without notebooks and without an environment of its own."""
    shutil.copytree(ROOT / "bf_lib", tmp_path / "bf_lib", ignore=shutil.ignore_patterns("__py*"))
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def command(*arguments: str) -> list[str]:
    return ["make", f"PY={sys.executable}", *arguments]


def make(project: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=project, capture_output=True, text=True)


def finished(project: Path) -> set[str]:
    build = project / "build"
    return {path.name for path in [*build.glob("*/*.done"), *build.glob("*/rendered/*")]}


def test_each_gate_fails_make_and_names_the_notebook(project, write_notebook):
    cells = {
        "05_raises": "1 / 0",
        "06_exits": "import sys\nsys.exit(0)",
        "07_dies": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    }
    for name, cell in cells.items():
        write_notebook(project / f"notebooks/{name}.ipynb", "print('so far so good')", cell, "1")
    write_notebook(
        project / "notebooks/08_mistyped.ipynb", parameters='presets = "mini"\nseed = 0'
    )

    result = make(project, "-k", "-j2", "reproduce")

    assert result.returncode != 0
    assert not finished(project)
    for name in [*cells, "08_mistyped"]:
        assert f"notebooks/{name}.ipynb FAILED" in result.stderr
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "so far so good" in result.stderr  # the end of the log
    assert "build/mini/05_raises.run.ipynb" in result.stderr
    assert "never ran (sys.exit" in result.stderr
    assert "kernel died" in result.stderr
    assert "unknown parameters ['preset']; it declares ['presets', 'seed']" in result.stderr


def test_a_mistyped_parameter_fails_before_anything_runs(project, write_notebook):
    write_notebook(project / "notebooks/01_unet_anatomy.ipynb", COUNT.format(name="01"))
    result = make(project, "reproduce", "PARAMS=stepps=4")
    assert result.returncode != 0
    assert "01_unet_anatomy.ipynb FAILED: unknown parameters ['stepps']" in result.stderr
    assert not (project / "ran.log").exists()
    assert not finished(project)


def test_the_graph_settles_and_follows_changes(project, write_notebook):
    def ran() -> list[str]:
        lines = (project / "ran.log").read_text().split()
        (project / "ran.log").write_text("")
        return lines

    for name in ("01_unet_anatomy", "03_sensitivity", "90_train_mini"):
        write_notebook(project / f"notebooks/{name}.ipynb", COUNT.format(name=name[:2]))
    upstream = project / "notebooks/01_unet_anatomy.ipynb"
    with (project / "Makefile").open("a") as makefile:
        makefile.write("\n$(B)/03_sensitivity.done: $(B)/01_unet_anatomy.done\n")

    assert make(project, "-j2", "reproduce").returncode == 0
    assert ran() == ["01", "03"]  # in the order of what reads what, and without 90
    assert finished(project) == {
        *("01_unet_anatomy.done", "03_sensitivity.done"),
        *("01_unet_anatomy.ipynb", "03_sensitivity.ipynb"),
    }

    second = make(project, "-j2", "reproduce")
    assert (second.returncode, second.stdout + second.stderr) == (0, "")

    write_notebook(project / "notebooks/03_sensitivity.ipynb", COUNT.format(name="03 again"))
    assert make(project, "reproduce").returncode == 0
    assert ran() == ["03", "again"]

    with (project / "bf_lib/paths.py").open("a") as library:
        library.write("\n")
    assert make(project, "-j2", "reproduce").returncode == 0
    assert ran() == ["01", "03", "again"]
    assert make(project, "-j2", "reproduce").returncode == 0
    assert ran() == []

    write_notebook(upstream, "raise ValueError('broken')")
    assert make(project, "-k", "-j2", "reproduce").returncode != 0
    assert ran() == []  # what depends on a failed notebook does not run
    assert "01_unet_anatomy.done" not in finished(project)


def test_what_is_edited_during_a_run_is_not_missed(project, write_notebook):
    edit = """from pathlib import Path
ran = Path("../ran.log")
if not ran.exists():
    Path("../bf_lib/paths.py").touch()
with ran.open("a") as file:
    file.write("once ")"""
    write_notebook(project / "notebooks/00_overview.ipynb", edit)
    for count in (1, 2, 2):  # the second run sees the edit, and there is nothing left for a third
        assert make(project, "reproduce").returncode == 0
        assert (project / "ran.log").read_text().split() == ["once"] * count


def test_an_interrupted_run_leaves_nothing_that_looks_finished(project, write_notebook):
    write_notebook(project / "notebooks/02_grids_and_scales.ipynb", WAIT)
    process = subprocess.Popen(
        command("reproduce"),
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that the interrupt reaches make and its children, as Ctrl-C
    )
    deadline = time.monotonic() + 240
    while not (project / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    kernel = int((project / "started").read_text())
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=240)

    assert process.returncode != 0
    assert not finished(project)
    assert "02_grids_and_scales.ipynb" in output and "interrupted" in output
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)


def test_training_and_measuring_the_model_are_targets_of_their_own(project, write_notebook):
    write_notebook(project / "notebooks/90_train_mini.ipynb", COUNT.format(name="90"))
    plans = {goal: make(project, "--dry-run", goal) for goal in ("reproduce", "card", "mini")}
    assert all(plan.returncode == 0 for plan in plans.values())
    measured = {goal: "90_train_mini.ipynb" in plan.stdout for goal, plan in plans.items()}
    assert measured == {"reproduce": False, "card": True, "mini": True}
    trained = {goal: "bf_lib.make_mini" in plan.stdout for goal, plan in plans.items()}
    assert trained == {"reproduce": False, "card": False, "mini": True}


def test_the_model_is_measured_after_each_training(project, write_notebook):
    """Training is replaced by a file that says it happened; the rest is the real Makefile."""
    write_notebook(project / "notebooks/90_train_mini.ipynb", COUNT.format(name="90"))
    stand_in = COUNT.format(name="trained").replace("../", "")
    (project / "bf_lib/make_mini.py").write_text(stand_in)
    (project / "build/train_mini").mkdir(parents=True)
    for _ in range(2):  # the second time there is nothing to do
        result = make(project, "-j2", "mini")
        assert result.returncode == 0, result.stderr
        assert (project / "ran.log").read_text().split() == ["trained", "90"]
    assert make(project, "card").returncode == 0
    assert (project / "ran.log").read_text().split() == ["trained", "90"]


def test_a_preset_is_given_once(project, write_notebook):
    write_notebook(project / "notebooks/01_unet_anatomy.ipynb", COUNT.format(name="01"))
    result = make(project, "reproduce", "PARAMS=preset=smoke")
    assert result.returncode != 0
    assert "01_unet_anatomy.ipynb FAILED: parameter preset is given twice" in result.stderr
    assert not (project / "ran.log").exists()


@pytest.mark.parametrize(
    ("goals", "first", "second"),
    [
        (("site", "render"), "notebooks/rendered/", "bf_lib.site"),
        (("figures", "reproduce"), "01_unet_anatomy.ipynb", "bf_lib.figures"),
        (("reproduce", "mini"), "bf_lib.make_mini", "01_unet_anatomy.ipynb"),
        (("reproduce", "mini"), "bf_lib.make_mini", "90_train_mini.ipynb"),
    ],
)
def test_goals_take_turns(project, write_notebook, goals, first, second):
    for name in ("01_unet_anatomy", "90_train_mini"):
        write_notebook(project / f"notebooks/{name}.ipynb", COUNT.format(name=name))
    plan = make(project, "--dry-run", *goals).stdout
    assert plan.index(first) < plan.index(second)


def test_help_is_the_default(project):
    assert "make reproduce" in make(project).stdout
