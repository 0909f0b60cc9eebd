"""Notebooks as documents: their parameters, their digest, and what makes an executed one good.

papermill alone lets pass what a build must not (each was seen, and each has a test): a cell that
calls `sys.exit(0)` ends the run with status 0, an unknown parameter is only a warning, and types
of parameters are guessed. An executed notebook therefore becomes a product only after `check`.
"""

__all__ = [
    "NotebookError",
    "check",
    "declared_parameters",
    "normalise",
    "read",
    "source_digest",
    "typed_parameters",
    "write",
]

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from bf_lib.atomic import write_atomically
from bf_lib.paths import ROOT

VOLATILE = ("ExecuteTime", "collapsed", "execution", "papermill", "scrolled")  # of a cell
STAMP = "bitsfusion"  # our own key in a rendered notebook's metadata

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_LINK_UP = re.compile(r"(\]\(|(?:src|href)=\")(\.\./)")
_LINK_RENDERED = re.compile(r"(\]\(|(?:src|href)=\")rendered/")


class NotebookError(RuntimeError):
    """A notebook cannot be run, or was not run completely."""


def read(path: Path) -> NotebookNode:
    """Reads a notebook."""
    return nbformat.read(path, as_version=4)


def write(nb: NotebookNode, path: Path) -> None:
    """Writes a notebook, completely or not at all."""
    nbformat.validate(nb)
    write_atomically(path, (nbformat.writes(nb).rstrip("\n") + "\n").encode())


def is_tagged(cell: NotebookNode, tag: str) -> bool:
    """Whether a cell has a tag."""
    return tag in cell.metadata.get("tags", [])


def source_digest(nb: NotebookNode) -> str:
    """Returns a digest of what its author wrote: the kind and source of each cell."""
    cells = [(c.cell_type, c.source) for c in nb.cells if not is_tagged(c, "injected-parameters")]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def declared_parameters(nb: NotebookNode) -> dict[str, object]:
    """Returns names and defaults from the cell tagged `parameters`, which holds only literals."""
    cells = [cell for cell in nb.cells if is_tagged(cell, "parameters")]
    if len(cells) != 1:
        raise NotebookError(f"one cell must be tagged `parameters`, found {len(cells)}")
    declared = {}
    for statement in ast.parse(cells[0].source).body:
        try:
            (target,) = statement.targets
            declared[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, ValueError):
            line = ast.unparse(statement)
            raise NotebookError(f"parameters are lines `name = literal`, found: {line}") from None
    return declared


def typed_parameters(nb: NotebookNode, given: Mapping[str, str]) -> dict[str, object]:
    """Returns parameters given as text, each with the type of its default in the notebook.

    Arguments:
        nb: The source notebook.
        given: Values by name. Where the default is None or a list, the text is a Python literal;
            where it is None, what is no literal is text: an address, a folder.
    """
    declared = declared_parameters(nb)
    if unknown := sorted(set(given) - set(declared)):
        raise NotebookError(f"unknown parameters {unknown}; it declares {sorted(declared)}")
    return {name: _typed(name, text, declared[name]) for name, text in given.items()}


def _typed(name: str, text: str, default: object) -> object:
    kind = type(default)
    if kind is str:
        return text
    mistake = NotebookError(f"parameter {name} must be a Python {kind.__name__}, got {text!r}")
    try:
        value = kind(text) if kind in (int, float) else ast.literal_eval(text)
    except (SyntaxError, ValueError):
        if default is None:
            return text
        raise mistake from None
    if default is not None and type(value) is not kind:
        raise mistake
    return value


def check(nb: NotebookNode, source: NotebookNode) -> None:
    """Raises unless every cell of an executed notebook ran, in order, without an error.

    Arguments:
        nb: The executed notebook as papermill left it.
        source: The notebook it was made from.
    """
    code = [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]
    if missing := [i for i, cell in enumerate(code, 1) if cell.execution_count is None]:
        raise NotebookError(f"code cells {missing} never ran (sys.exit in a cell?)")
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        raise NotebookError(f"cells did not run once each from the top: execution counts {counts}")
    if errors := [out.ename for out in _outputs(code) if out.output_type == "error"]:
        raise NotebookError(f"cells ended in errors: {errors}")
    passed = nb.metadata.get("papermill", {}).get("parameters", {})
    if unknown := sorted(set(passed) - set(declared_parameters(source))):
        raise NotebookError(f"parameters were passed that it does not declare: {unknown}")


def normalise(nb: NotebookNode, source: NotebookNode) -> None:
    """Strips what differs from run to run in place, and stamps what the notebook was run from.

    Times, hosts and random ids go, so that an unchanged study renders to the same bytes. Widget
    state goes too: GitHub refuses a notebook that has it in part. Relative links are deepened by
    one folder, because the rendered copy lies in `notebooks/rendered/`.
    """
    nb.metadata.pop("widgets", None)
    parameters = nb.metadata.pop("papermill", {}).get("parameters", {})
    nb.metadata[STAMP] = {"parameters": parameters, "source_sha256": source_digest(source)}
    for cell in nb.cells:
        if is_tagged(cell, "injected-parameters"):
            cell.id = "injected-parameters"
        for key in VOLATILE:
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]  # papermill adds empty ones
        if cell.cell_type == "markdown":
            cell.source = _deepen(cell.source)
    for output in _outputs(nb.cells):
        _clean(output)


def _outputs(cells: Iterable[NotebookNode]) -> Iterator[NotebookNode]:
    for cell in cells:
        yield from cell.get("outputs", [])


def _deepen(markdown: str) -> str:
    return _LINK_RENDERED.sub(r"\1", _LINK_UP.sub(r"\1../\2", markdown))


def _clean(output: NotebookNode) -> None:
    """Removes memory addresses and the place of the repository from an output's text."""
    if "text" in output:
        output.text = _portable(output.text)
    data = output.get("data", {})
    for kind in ("text/plain", "text/html", "text/markdown"):
        if kind in data:
            data[kind] = _portable(data[kind])


def _portable(text: str) -> str:
    return _ADDRESS.sub("", text).replace(f"{ROOT}/", "").replace(str(ROOT), ".")
