"""Making the environment: with conda, without, and after an interruption."""

import os
import re
import shutil
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bf_lib.paths import ROOT

# Stands for a python: notes what it is asked for, and makes a copy of itself as a new environment.
# It is fit for use when `pip` lies beside it. While there is a file `refuse`, it fails to install,
# as if interrupted.
PYTHON = """#!/bin/sh
case "$*" in
    *"import pip"*) test -e "$(dirname "$0")/pip" ;;
    *"-m venv"*) mkdir -p "$3/bin"; touch "$3/pyvenv.cfg" "$3/bin/pip"; cp "$0" "$3/bin/python" ;;
    *"-m pip"*) echo "pip $*" >> calls; test ! -e refuse ;;
esac
"""
CONDA = """#!/bin/sh
echo "conda $*" >> calls
mkdir -p .venv/bin .venv/conda-meta
touch .venv/bin/pip
cp "$(dirname "$0")/python3.11" .venv/bin/python
"""
CREATE = "conda env create --yes -p .venv -f environment.yml"
PIP = "pip -m pip install -c constraints.txt -e .[dev]"


@pytest.fixture
def project(tmp_path):
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    add_program(tmp_path, "python3.11", PYTHON)
    add_program(tmp_path, "pip", "")
    for name in ("cp", "dirname", "mkdir", "rm", "touch"):  # and no conda that may be beside them
        (tmp_path / "programs" / name).symlink_to(shutil.which(name))
    return tmp_path


def add_program(project, name, script):
    path = project / "programs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)


def make_env(project, *arguments):
    """Runs `make env` with the programs of the project only; returns its status and the calls."""
    surroundings = {"PATH": f"{project}/programs"}
    command = [shutil.which("make"), "env", *arguments]
    status = subprocess.run(command, cwd=project, env=surroundings, capture_output=True).returncode
    calls = (project / "calls").read_text().splitlines() if (project / "calls").exists() else []
    (project / "calls").unlink(missing_ok=True)
    return status, calls


def test_without_conda_it_is_a_venv(project):
    assert make_env(project) == (0, [PIP])
    assert (project / ".venv/.installed").exists()
    assert make_env(project) == (0, [])  # nothing left to do


def test_with_conda_it_is_a_conda_environment(project):
    add_program(project, "mamba", CONDA)
    assert make_env(project) == (0, [CREATE, PIP])


def test_a_conda_that_fails_is_left_for_a_venv(project):
    add_program(project, "conda", CONDA + "exit 1\n")
    assert make_env(project) == (0, [CREATE, PIP])
    assert not (project / ".venv/conda-meta").exists()
    assert (project / ".venv/pyvenv.cfg").exists()


def test_conda_can_be_turned_off(project):
    add_program(project, "conda", CONDA)
    assert make_env(project, "CONDA=") == (0, [PIP])


def test_another_python_serves_when_3_11_is_missing(project):
    (project / "programs/python3.11").rename(project / "programs/python3.12")
    assert make_env(project) == (0, [PIP])


def test_without_a_fit_python_it_says_so(project):
    (project / "programs/pip").unlink()
    assert make_env(project) == (2, [])
    assert not (project / ".venv/.installed").exists()


def test_an_environment_of_an_old_python_is_made_again(project):
    make_env(project)
    (project / ".venv/bin/pip").unlink()  # what makes it fit
    (project / ".venv/.installed").unlink()
    assert make_env(project) == (0, [PIP])
    assert (project / ".venv/bin/pip").exists()


def test_an_interrupted_install_is_completed(project):
    (project / "refuse").touch()
    assert make_env(project) == (2, [PIP])
    assert not (project / ".venv/.installed").exists()
    (project / "refuse").unlink()
    assert make_env(project) == (0, [PIP])


@pytest.mark.parametrize("half", ["pyvenv.cfg", "conda-meta/history"])
def test_half_an_environment_is_made_again(project, half):
    left_over = project / ".venv" / half
    left_over.parent.mkdir(parents=True)
    left_over.touch()
    assert make_env(project) == (0, [PIP])
    assert not (project / ".venv/conda-meta").exists()


def test_a_folder_that_is_no_environment_is_left_alone(project):
    (project / ".venv").mkdir()
    (project / ".venv/precious").touch()
    make_env(project)
    assert (project / ".venv/precious").exists()


def test_changed_requirements_are_installed(project):
    make_env(project)
    stamp = project / ".venv/.installed"
    newer = stamp.stat().st_mtime + 10
    os.utime(project / "constraints.txt", (newer, newer))
    assert make_env(project) == (0, [PIP])


# ---- requirements ------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    return dict(line.split("==") for line in lines)


def test_every_requirement_is_pinned_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = pins()
    extras = project["optional-dependencies"]
    assert set(extras["cluster"]) <= set(extras["dev"]), "the tests use a cluster"
    for line in project["dependencies"] + extras["dev"] + extras["peers"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), line
