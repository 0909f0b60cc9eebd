"""What a result is said to come from."""

import subprocess

from bf_lib import provenance
from bf_lib.paths import ROOT
from bf_lib.provenance import code_version, imported_files, library_digest


def names(module):
    return {path.relative_to(ROOT / "bf_lib").as_posix() for path in imported_files(module)}


def test_imports_are_followed_through_files_and_packages():
    sweep = names(ROOT / "bf_lib" / "sensitivity" / "sweep.py")
    assert {"sensitivity/sweep.py", "sensitivity/candidates.py"} <= sweep
    assert {"grids.py", "scale_search.py", "sampling.py", "judges.py"} <= sweep
    plots = names(ROOT / "bf_lib" / "figures.py") | names(
        ROOT / "bf_lib" / "plots" / "__init__.py"
    )
    assert {"plots/sensitivity.py", "plots/families.py", "pictures.py"} <= plots


def test_a_sweep_does_not_depend_on_how_its_model_was_trained_or_is_drawn():
    """Nor on who shares it, and on what a study asks for beside it."""
    sweep = names(ROOT / "bf_lib" / "sensitivity" / "sweep.py")
    assert not sweep & {"training.py", "train_mini.py", "train_judges.py", "plots/__init__.py"}
    assert not sweep & {"jobs.py", "cluster.py", "study.py", "protocol.py"}


def test_every_form_of_import_is_seen(tmp_path, monkeypatch):
    library = tmp_path / "bf_lib"
    (library / "part").mkdir(parents=True)
    for name, code in {
        "a.py": "from bf_lib import b\nfrom bf_lib.part import thing\nimport os\n",
        "b.py": "def f():\n    from bf_lib.c import x\n",
        "c.py": "x = 1\n",
        "part/__init__.py": "from bf_lib.part.inner import thing\n",
        "part/inner.py": "from json import loads\nthing = 1\n",
        "unused.py": "",
    }.items():
        (library / name).write_text(code)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    found = {p.relative_to(library).as_posix() for p in imported_files(library / "a.py")}
    assert found == {"a.py", "b.py", "c.py", "part/__init__.py", "part/inner.py"}

    everything, part = library_digest(), library_digest([library / "a.py", library / "b.py"])
    (library / "unused.py").write_text("y = 2\n")
    assert library_digest() != everything
    assert library_digest([library / "b.py", library / "a.py"]) == part
    (library / "b.py").rename(library / "d.py")
    assert library_digest([library / "a.py", library / "d.py"]) != part


def test_changes_since_the_commit_are_told(tmp_path):
    assert code_version(tmp_path) == {"commit": None, "dirty": None}

    def git(*arguments):
        options = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(
            ["git", *options, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    version = code_version(tmp_path)
    assert len(version["commit"]) == 12
    assert version["dirty"] is False
    (tmp_path / "new").write_text("untracked files do not count")
    assert code_version(tmp_path)["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert code_version(tmp_path)["dirty"] is True
