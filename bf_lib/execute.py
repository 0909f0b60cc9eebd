"""Run one notebook for make: `python -m bf_lib.execute SOURCE BUILD [name=value ...]`.

Leaves in the build folder a log, the notebook as far as it ran, and, only when all went well, the
rendered copy and last of all the stamp that make looks at. Whatever an earlier run left is removed
first, so that nothing of a failed or interrupted run looks finished.
"""

__all__ = ["Products", "execute", "main"]

import hashlib
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TextIO

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from bf_lib import nb
from bf_lib.atomic import DiskFull, write_atomically
from bf_lib.paths import ROOT, display_path, runs_folder
from bf_lib.progress import duration, relayed

TAIL = 25  # lines of the log that a failure shows

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Products:
    """The files that a run of one notebook leaves in the build folder."""

    stamp: Path  # what make looks at; written last
    rendered: Path
    run: Path  # the notebook as far as it ran
    log: Path
    progress: Path

    @classmethod
    def of(cls, source: Path, build: Path) -> Self:
        """Returns the files of a notebook, by its name."""
        stem = build.resolve() / source.stem
        return cls(
            stamp=stem.with_suffix(".done"),
            rendered=build.resolve() / "rendered" / source.name,
            run=stem.with_suffix(".run.ipynb"),
            log=stem.with_suffix(".log"),
            progress=stem.with_suffix(".progress"),
        )

    def remove(self) -> None:
        """Removes what an earlier run left, the stamp first."""
        for path in (self.stamp, self.rendered, self.run, self.log, self.progress):
            path.unlink(missing_ok=True)


def execute(source: Path, build: Path, given: Mapping[str, str]) -> None:
    """Runs a notebook and, when it ran completely, writes its rendered copy and its stamp.

    The stamp holds the digests of what the notebook wrote, by path.

    Arguments:
        source: The notebook.
        build: The folder of stamps and logs of one preset.
        given: Values of parameters by name, as text; those of a single notebook as
            "notebook.name".
    """
    given = _given_to(source, given)
    products = Products.of(source, build)
    products.remove()
    original = nb.read(source)
    parameters = nb.typed_parameters(original, given)
    start = time.time()
    label = f"[{build.name}] {source.stem}"
    with _redirected(products.log) as terminal:
        print(label, file=terminal, flush=True)
        with relayed(products.progress, terminal, prefix=f"{label}: "):
            executed = _papermill(source, products, parameters)
        nb.check(executed, original)
        nb.normalise(executed, original)
        nb.write(executed, products.rendered)
        write_atomically(products.stamp, _written(source, build).encode())
        os.utime(products.stamp, (start, start))  # what was edited meanwhile is newer than it
        print(f"{label}: done in {duration(time.time() - start)}", file=terminal, flush=True)


def _pairs(arguments: Sequence[str]) -> dict[str, str]:
    """Returns values by name from "name=value", each of which may be given once."""
    given: dict[str, str] = {}
    for name, _, text in (pair.partition("=") for pair in arguments):
        if name in given:
            raise nb.NotebookError(
                f"parameter {name} is given twice: PRESET= and SEED= set theirs"
            )
        given[name] = text
    return given


def _given_to(source: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Returns the parameters that are meant for a notebook, by their own names."""
    meant = {}
    for name, text in given.items():
        notebook, _, short = name.rpartition(".")
        if notebook and not source.with_name(f"{notebook}.ipynb").exists():
            raise nb.NotebookError(f"parameter {name}: there is no notebook {notebook}")
        if notebook in ("", source.stem):
            meant[short] = text
    return meant


def _written(source: Path, build: Path) -> str:
    """Returns digest and path of all that a notebook says it wrote, one a line."""
    record = runs_folder(build.name, source.stem) / "render.json"
    names = json.loads(record.read_bytes())["artifacts"] if record.exists() else []
    return "".join(f"{_digest(ROOT / name)} {name}\n" for name in names)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _papermill(
    source: Path,
    products: Products,
    parameters: Mapping[str, object],
) -> nb.NotebookNode:
    """Runs a notebook in a fresh kernel, in its own folder as Jupyter does."""
    os.environ["BF_HEADLESS"] = "1"
    # What other systems say when they are imported, if they are installed, is of no notebook.
    os.environ.setdefault("TORCH_LOGS", "-torch.utils._pytree")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ["BF_PROGRESS"] = str(products.progress)
    try:
        return papermill.execute_notebook(
            source.resolve(),
            products.run,
            parameters=dict(parameters),
            kernel_name="python3",  # whatever kernel it was last saved with
            language="python",
            cwd=source.parent.resolve(),
            progress_bar=False,
            log_output=True,
        )
    except PapermillExecutionError as err:
        print(_ANSI.sub("", "\n".join(err.traceback)), flush=True)
        raise nb.NotebookError(f"cell [{err.exec_count}]: {err.ename}: {err.evalue}") from err
    except DeadKernelError as err:
        raise nb.NotebookError("its kernel died (killed, out of memory or interrupted)") from err


@contextmanager
def _redirected(log: Path) -> Iterator[TextIO]:
    """Sends what this process and its kernel print to a log, and yields the terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    with log.open("w", encoding="utf-8") as file, os.fdopen(os.dup(1), "w") as terminal:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        logging.basicConfig(
            stream=sys.stderr, level=logging.INFO, format="%(message)s", force=True
        )
        try:
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, original in enumerate(kept, 1):
                os.dup2(original, number)
                os.close(original)


def main(arguments: list[str]) -> int:
    """Runs the notebook that the command line names; returns the exit status."""
    source, build = Path(arguments[0]), Path(arguments[1])
    try:
        execute(source, build, _pairs(arguments[2:]))
    except KeyboardInterrupt:
        print(f"{source}: interrupted", file=sys.stderr)
        return 130
    except Exception as err:
        if not isinstance(err, nb.NotebookError | DiskFull):  # a kernel that does not start, say
            traceback.print_exc()
        print(_failure(source, Products.of(source, build), err), file=sys.stderr)
        return 1
    return 0


def _failure(source: Path, products: Products, err: Exception) -> str:
    """Returns what went wrong, the end of the log before it, where to look, and the name last."""
    lines = []
    if products.log.exists():
        tail = products.log.read_text(encoding="utf-8").splitlines()[-TAIL:]
        lines += [*(f"    {line}" for line in tail), f"log: {display_path(products.log)}"]
    if products.run.exists():
        lines.append(f"the notebook as far as it ran: {display_path(products.run)}")
    return "\n".join([*lines, f"{source} FAILED: {err}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
