import nbformat
import pytest

from bf_lib import nb
from bf_lib.nb import NotebookError
from bf_lib.paths import ROOT

new = nbformat.v4


@pytest.fixture
def source(tmp_path, write_notebook):
    return nb.read(write_notebook(tmp_path / "01_toy.ipynb", "a = 1", "a + 1"))


def executed(source, **parameters):
    """What papermill makes of a notebook when all goes well."""
    run = nb.nbformat.from_dict(source.copy())
    run.cells = [nb.nbformat.from_dict(cell.copy()) for cell in source.cells]
    injected = new.new_code_cell("seed = 1", metadata={"tags": ["injected-parameters"]})
    run.cells.insert(2, injected)
    for count, cell in enumerate([c for c in run.cells if c.cell_type == "code"], 1):
        cell.execution_count = count
        cell.metadata = nbformat.from_dict({**cell.metadata, "papermill": {"duration": 1.0}})
    run.metadata["papermill"] = {"parameters": parameters, "start_time": "now"}
    run.metadata["widgets"] = {"state": {}}
    return run


def test_declared_parameters(source):
    assert nb.declared_parameters(source) == {"preset": "mini", "seed": 0, "steps": None}


@pytest.mark.parametrize(
    "line", ["seed = int('0')", "import os", "a = b = 1", "a += 1", "a.b = 1"]
)
def test_parameters_are_literals(tmp_path, write_notebook, line):
    path = write_notebook(tmp_path / "toy.ipynb", parameters=line)
    with pytest.raises(NotebookError, match="name = literal"):
        nb.declared_parameters(nb.read(path))


def test_exactly_one_cell_of_parameters(source):
    source.cells.append(source.cells[1])
    with pytest.raises(NotebookError, match="found 2"):
        nb.declared_parameters(source)
    source.cells = source.cells[:1]
    with pytest.raises(NotebookError, match="found 0"):
        nb.declared_parameters(source)


def test_parameters_take_the_type_of_their_default(tmp_path, write_notebook):
    lines = "name = 'x'\ncount = 1\nscale = 1.0\nflag = True\nlayers = [1]\nother = None"
    toy = nb.read(write_notebook(tmp_path / "toy.ipynb", parameters=lines))
    given = {
        "name": "123e456",  # which papermill's own guess makes infinity
        "count": "7",
        "scale": "2",
        "flag": "False",
        "layers": "[1, 2]",
        "other": "'text'",
    }
    addresses = {"other": "tcp://host:8786"}
    assert nb.typed_parameters(toy, addresses) == addresses
    assert nb.typed_parameters(toy, given) == {
        "name": "123e456",
        "count": 7,
        "scale": 2.0,
        "flag": False,
        "layers": [1, 2],
        "other": "text",
    }


@pytest.mark.parametrize(
    ("default", "text", "said"),
    [
        ("1", "1.5", "Python int, got '1.5'"),
        ("1.0", "fast", "Python float, got 'fast'"),
        ("True", "false", "Python bool, got 'false'"),
        ("True", "1", "Python bool, got '1'"),
        ("[1]", "(1, 2)", r"Python list, got '\(1, 2\)'"),
    ],
)
def test_parameters_of_another_type_are_refused(tmp_path, write_notebook, default, text, said):
    toy = nb.read(write_notebook(tmp_path / "toy.ipynb", parameters=f"value = {default}"))
    with pytest.raises(NotebookError, match=said):
        nb.typed_parameters(toy, {"value": text})


def test_unknown_parameters_are_refused(source):
    with pytest.raises(NotebookError, match=r"unknown parameters \['sede'\].*preset"):
        nb.typed_parameters(source, {"sede": "1"})


def test_a_complete_run_passes(source):
    nb.check(executed(source, seed=1), source)


def test_each_way_of_being_incomplete_is_found(source):
    def broken(change, **parameters):
        run = executed(source, **parameters)
        change(run)
        return run

    def skip(run):
        run.cells[-1].execution_count = None

    def reorder(run):
        run.cells[-1].execution_count, run.cells[-2].execution_count = 3, 4

    def fail(run):
        run.cells[-1].outputs = [
            new.new_output("error", ename="KeyError", evalue="", traceback=[])
        ]

    said_of = {skip: r"cells \[4\] never ran", reorder: "counts", fail: "KeyError"}
    for change, said in said_of.items():
        with pytest.raises(NotebookError, match=said):
            nb.check(broken(change), source)
    with pytest.raises(NotebookError, match="sede"):
        nb.check(executed(source, sede=1), source)


def test_normalised_runs_are_equal_byte_for_byte(source, tmp_path):
    runs = [executed(source, seed=1) for _ in range(2)]
    for address, run in enumerate(runs):
        shown = {"text/plain": f"<Figure at 0x{address}f>", "text/html": f"<b>{ROOT}/data</b>"}
        run.cells[-1].outputs = [
            new.new_output("stream", text=f"<object at 0x{address}a> in {ROOT}/data/x"),
            new.new_output("display_data", data=shown),
        ]
        nb.normalise(run, source)
        nb.write(run, tmp_path / f"{address}.ipynb")
    assert (tmp_path / "0.ipynb").read_bytes() == (tmp_path / "1.ipynb").read_bytes()
    text = (tmp_path / "0.ipynb").read_text()
    assert "0x" not in text and str(ROOT) not in text
    assert "widgets" not in runs[0].metadata and "papermill" not in text
    assert runs[0].metadata["bitsfusion"] == {
        "parameters": {"seed": 1},
        "source_sha256": nb.source_digest(source),
    }


def test_links_follow_the_rendered_copy(source):
    source.cells[
        0
    ].source = (
        '[a](../data/mini/README.md) [b](02_x.ipynb) [c](rendered/03_y.ipynb) <img src="../f.png">'
    )
    run = executed(source)
    nb.normalise(run, source)
    assert run.cells[0].source == (
        '[a](../../data/mini/README.md) [b](02_x.ipynb) [c](03_y.ipynb) <img src="../../f.png">'
    )


def test_digest_is_of_what_was_written(source):
    digest = nb.source_digest(source)
    assert nb.source_digest(executed(source)) == digest  # outputs and injected cells do not count
    source.cells[-1].source += "  # changed"
    assert nb.source_digest(source) != digest
