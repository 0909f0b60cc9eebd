"""What holds for every notebook, read from the files; `make smoke` is what runs them."""

import re
from pathlib import Path

import pytest

from bf_lib import nb
from bf_lib.paths import ROOT

EXPECTED = {
    *("00_overview", "01_unet_anatomy", "02_grids_and_scales", "03_sensitivity"),
    *("04_metric_correlation", "05_time_features", "06_bit_allocation"),
    *("07_packed_checkpoint", "08_stage1_distillation", "09_stage2_finetuning"),
    "10_ablation",
    "90_train_mini",
}
SOURCES = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
RENDERED = sorted((ROOT / "notebooks" / "rendered").glob("*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "data").glob("**/*.md"))]

LONGEST_CELL = 15  # lines of code; what is longer belongs in bf_lib
LARGEST_COPY = 2_000_000  # bytes; GitHub stops showing notebooks somewhat above
BANNED = {
    "sys.path": "bf_lib is installed",
    "pip install": "the environment is made by make",
    'filterwarnings("ignore"': "a warning is to be understood",
    "filterwarnings('ignore'": "a warning is to be understood",
    "BF_HEADLESS": "a notebook is the same live and rendered",
}
ABSOLUTE = re.compile(r"(?<![\w./])/(?:home|Users|root|tmp|var|opt|mnt|private|usr|work)/")
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
NOTEBOOK_NAME = re.compile(r"[\"'](\d\d_\w+)(?:/\w+)?[\"']")

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
each_copy = pytest.mark.parametrize("path", RENDERED, ids=lambda path: path.stem)


def code_of(path: Path) -> list[str]:
    return [cell.source for cell in nb.read(path).cells if cell.cell_type == "code"]


def edges() -> dict[str, set[str]]:
    """What the Makefile says each notebook reads of others."""
    lines = re.findall(
        r"^\$\(B\)/(\w+)\.done: ((?:\$\(B\)/\w+\.done ?)+)$", MAKEFILE, re.MULTILINE
    )
    return {name: set(re.findall(r"/(\w+)\.done", reads)) for name, reads in lines}


MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_notebooks_are_there():
    assert {path.stem for path in SOURCES} >= EXPECTED


def test_every_notebook_has_a_rendered_copy_and_none_is_left_over():
    assert {path.name for path in RENDERED} == {path.name for path in SOURCES}


# ---- sources -----------------------------------------------------------------------------------


@each_source
def test_a_source_has_no_outputs(path):
    for cell in nb.read(path).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell.id


@each_source
def test_a_source_declares_its_preset_and_seed(path):
    declared = nb.declared_parameters(nb.read(path))
    assert declared["preset"] == "mini" and declared["seed"] == 0
    overrides = set(declared) - {"preset", "seed"}
    assert all(declared[name] is None for name in overrides), "the preset is what gives sizes"


@each_source
def test_a_source_runs_in_any_environment(path):
    assert nb.read(path).metadata.kernelspec.name == "python3"


@each_source
def test_cells_have_names_of_their_own(path):
    ids = [cell.id for cell in nb.read(path).cells]
    assert len(set(ids)) == len(ids)
    for name in ids:
        assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name), name
        assert not re.fullmatch(r"[0-9a-f]{8}", name), f"{name} is a random id"


@each_source
def test_cells_are_short_and_keep_to_the_rules(path):
    for source in code_of(path):
        assert len(source.splitlines()) <= LONGEST_CELL, source
        for text, why in BANNED.items():
            assert text not in source, why


@each_source
def test_a_notebook_writes_under_its_own_name(path):
    code = code_of(path)
    assert f'Run.start("{path.stem}"' in "\n".join(code)
    assert "run.finish()" in code[-1], "without it claims are neither written nor held"


@each_source
def test_the_makefile_knows_what_a_notebook_reads(path):
    reads = set(NOTEBOOK_NAME.findall("\n".join(code_of(path)))) - {path.stem}
    assert reads <= edges().get(path.stem, set())


# ---- rendered copies ---------------------------------------------------------------------------


@each_copy
def test_a_copy_was_run_from_its_source_as_it_is(path):
    source, copy = nb.read(path.parent.parent / path.name), nb.read(path)
    stamp = copy.metadata.bitsfusion
    assert stamp.source_sha256 == nb.source_digest(source), "its source changed: make render"
    assert stamp.parameters == {"preset": "mini", "seed": 0}
    nb.check(copy, source)
    nb.normalise(source, source)  # whose links are then those of a copy
    shown = [cell for cell in copy.cells if not nb.is_tagged(cell, "injected-parameters")]
    assert [cell.source for cell in shown] == [cell.source for cell in source.cells]


@each_copy
def test_a_copy_shows_everywhere(path):
    assert path.stat().st_size < LARGEST_COPY
    copy = nb.read(path)
    assert "widgets" not in copy.metadata  # GitHub calls a notebook with half of them invalid
    for cell in copy.cells:
        for output in cell.get("outputs", []):
            kinds = set(output.get("data", {}))
            assert not {kind for kind in kinds if "javascript" in kind or "widget" in kind}


@each_copy
def test_a_copy_names_no_place_on_a_machine(path):
    for cell in nb.read(path).cells:
        for output in cell.get("outputs", []):
            texts = [output.get("text", "")]
            texts += [v for kind, v in output.get("data", {}).items() if kind.startswith("text/")]
            for text in texts:
                assert not ABSOLUTE.search(text), text


# ---- links -------------------------------------------------------------------------------------


def links(text: str) -> list[str]:
    found = [first or second for first, second in LINK.findall(text)]
    return [link.partition("#")[0] for link in found if not re.match(r"[a-z]+:|#", link)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(path):
    missing = [link for link in links(path.read_text()) if not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize(
    "path", [*SOURCES, *RENDERED], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_links_of_a_notebook_lead_somewhere(path):
    text = "\n".join(cell.source for cell in nb.read(path).cells if cell.cell_type == "markdown")
    missing = [link for link in links(text) if not (path.parent / link).exists()]
    assert not missing
