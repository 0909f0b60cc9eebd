"""Compare fresh results with the committed ones: `python -m bf_lib.verify PRESET`.

Numbers are compared one by one within tolerances, because torch promises no identity across
machines and versions; everything else must be equal. What a figure of numbers shows is compared
through the table it is drawn from; pixels, which depend on fonts, and sampled images are not.

Only what notebooks wrote here counts as fresh: each stamp in `build/PRESET` holds the digests of
its notebook's results, and a result that is no longer that is named and not compared.
"""

__all__ = ["Difference", "Tolerance", "compare", "flatten", "main"]

import csv
import hashlib
import io
import json
import math
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bf_lib.paths import ROOT


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a fresh number may be from the committed one."""

    rtol: float
    atol: float

    def allows(self, committed: float, fresh: float) -> bool:
        """Whether two numbers agree; nothing but itself agrees with one that is not finite."""
        if math.isfinite(committed) and math.isfinite(fresh):
            return abs(fresh - committed) <= self.atol + self.rtol * abs(committed)
        return str(committed) == str(fresh)


# ---- the tolerances, all of them ---------------------------------------------------------------

# Wide enough for another processor, whose float32 sums differ in the last bits and whose samples
# differ by what sampling makes of that; far below the differences that the study is about.
DEFAULT = Tolerance(rtol=1e-3, atol=1e-6)

# By column of a table or key of a record, wherever it occurs.
BY_NAME = {
    # Another processor rounds some values of an image to the other side. Where images hardly
    # change, these few are all that differs: up to 0.7 dB were seen at 88 dB, 0.05 at 65.
    "psnr": Tolerance(rtol=1e-2, atol=0.05),
    "mse": Tolerance(rtol=1e-2, atol=1e-3),
    "rmse": Tolerance(rtol=1e-2, atol=1e-3),
    "clip": Tolerance(rtol=0.0, atol=5e-4),
    "clip_drop": Tolerance(rtol=0.0, atol=5e-4),  # a difference of near equals
    "perceptual": Tolerance(rtol=1e-2, atol=1e-4),
    # of bootstrap samples in which a role leads, which turns on near equals
    "share_of_resamples": Tolerance(rtol=0.0, atol=0.05),
    # correlations over layers, and the ends of their intervals
    "pearson": Tolerance(rtol=0.0, atol=0.01),
    "pearson_without": Tolerance(rtol=0.0, atol=0.01),
    "spearman": Tolerance(rtol=0.0, atol=0.01),
    "pull": Tolerance(rtol=0.0, atol=0.01),
    "icc": Tolerance(rtol=0.0, atol=0.01),
    "ours": Tolerance(rtol=0.0, atol=0.01),
    "observed": Tolerance(rtol=0.0, atol=0.01),
    "corrected": Tolerance(rtol=0.0, atol=0.03),  # of a quotient of small numbers
    "ceiling": Tolerance(rtol=0.0, atol=0.01),
    "low": Tolerance(rtol=0.0, atol=0.03),
    "high": Tolerance(rtol=0.0, atol=0.03),
    # of candidates that were trained, whose steps add up what differs in the last bits
    "mse_trained": Tolerance(rtol=5e-2, atol=1e-3),
    "rmse_trained": Tolerance(rtol=5e-2, atol=1e-3),
    "clip_drop_trained": Tolerance(rtol=0.0, atol=1e-3),
    "noise_mse_before": Tolerance(rtol=1e-2, atol=1e-9),
    "noise_mse_after": Tolerance(rtol=5e-2, atol=1e-9),
    "taken": Tolerance(rtol=0.0, atol=0.02),
    "error": Tolerance(rtol=1e-2, atol=1e-4),
    # of whole recipes
    "predicted": Tolerance(rtol=1e-2, atol=1e-3),
    "mse_sweep": Tolerance(rtol=1e-2, atol=1e-3),
    "scene": Tolerance(rtol=0.0, atol=0.03),  # two of 72 images
    # of cached time features: last bits of sums
    "latents": Tolerance(rtol=0.0, atol=1e-3),
    "changed": Tolerance(rtol=0.0, atol=0.01),
    # of claims, which are computed from any of these
    "value": Tolerance(rtol=1e-2, atol=5e-4),
    "interval": Tolerance(rtol=1e-2, atol=5e-4),
}

# What may differ without the result being another: digests say that some byte differs, which the
# numbers then say better; captions may hold rounded numbers; times are the machine's.
IGNORED = frozenset(
    {
        *("caption", "content", "inputs", "seconds", "seconds_per_step", "wall_s", "workers"),
        *("pack_s", "save_s", "load_s", "step_s", "full_step_s", "packed_s", "dense_s", "full_s"),
        *("packed_over_full", "dense_over_full", "resident_mb"),
        *("codes_per_s", "weights_per_s", "written_per_s"),
    }
)

# Which of two layers that are nearly equal gets a level more is decided by the last bits; what the
# recipe predicts and what it does to images is compared. What others store is compared where they
# are installed, by whoever reads the table.
NOT_COMPARED = ("recipe.json", "peers.csv", "peers_shape.csv")

REPORTED = 20  # differences that are listed


# ---- comparison --------------------------------------------------------------------------------

Leaf = str | float | None  # booleans compare as text


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that does not agree."""

    place: str  # file and row or key
    committed: Leaf
    fresh: Leaf

    @property
    def size(self) -> float:
        """How far apart, relative to the committed value; infinite for what is not two numbers."""
        if isinstance(self.committed, float) and isinstance(self.fresh, float):
            return abs(self.fresh - self.committed) / max(abs(self.committed), 1e-12)
        return math.inf


def flatten(name: str, data: bytes) -> dict[str, Leaf]:
    """Returns the values of a CSV or JSON file by their place in it."""
    if name.endswith(".csv"):
        rows = csv.DictReader(io.StringIO(data.decode()))
        return {
            f"row {number}/{column}": _number(text)
            for number, row in enumerate(rows, 1)
            for column, text in row.items()
            if column not in IGNORED
        }
    return dict(_leaves(json.loads(data), ""))


def _leaves(value: object, place: str) -> Iterator[tuple[str, Leaf]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in IGNORED:
                yield from _leaves(item, f"{place}/{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{place}/{index}")
    elif isinstance(value, bool) or value is None:
        yield place, str(value)
    else:
        yield place, _number(value)


def _number(value: object) -> Leaf:
    try:
        return float(value)
    except ValueError:
        return value


def compare(name: str, committed: bytes, fresh: bytes) -> tuple[int, list[Difference]]:
    """Compares two versions of a file; returns how many values, and those that do not agree."""
    old, new = flatten(name, committed), flatten(name, fresh)
    places = old | new
    differences = [
        Difference(f"{name} {place}".replace(" /", " "), old.get(place), new.get(place))
        for place in places
        if not _agree(_name_of(place), old.get(place), new.get(place))
    ]
    return len(places), differences


def _name_of(place: str) -> str:
    """Returns the column or key of a value; of one in a list, the list's."""
    return next((part for part in reversed(place.split("/")) if not part.isdigit()), "")


def _agree(column: str, committed: Leaf, fresh: Leaf) -> bool:
    if isinstance(committed, float) and isinstance(fresh, float):
        return BY_NAME.get(column, DEFAULT).allows(committed, fresh)
    return committed == fresh


# ---- git and the report ------------------------------------------------------------------------


def committed_files(preset: str, root: Path) -> list[str]:
    """Returns the committed results of a preset that hold values, by path."""
    folders = (f"data/runs/{preset}", f"figures/{preset}")
    names = _git(root, "ls-tree", "-r", "--name-only", "HEAD", "--", *folders).decode().split("\n")
    left = ("render.json", *NOT_COMPARED)
    return [n for n in names if n.endswith((".csv", ".json")) and n.split("/")[-1] not in left]


def _git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True).stdout


def written_files(preset: str, root: Path) -> dict[str, dict[str, str]]:
    """Returns the digests of the results by path, by notebook that has a stamp here."""
    stamps = sorted((root / "build" / preset).glob("*.done"))
    lines = {stamp.stem: stamp.read_text().splitlines() for stamp in stamps}
    return {
        notebook: {name: digest for digest, _, name in (line.partition(" ") for line in written)}
        for notebook, written in lines.items()
    }


def _notebook_of(name: str) -> str:
    """Returns the notebook of a committed result, from its path."""
    folder, _, file = name.rpartition("/")
    return folder.rpartition("/")[2] if name.startswith("data/") else file.partition("-")[0]


def _is_changed(root: Path, name: str, digest: str) -> bool:
    path = root / name
    return not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest


def _is_orphan(name: str, written: Collection[str]) -> bool:
    """Whether no notebook writes a file any more, so that comparing it would say nothing."""
    stem = name.removesuffix(".json").removesuffix(".csv").removesuffix(".meta")
    kinds = (".csv", ".json", ".safetensors", ".png")
    return not any(f"{stem}{kind}" in written for kind in kinds)


def _uncommitted(written: Mapping[str, Mapping[str, str]], names: Sequence[str]) -> list[str]:
    """Returns the values that were written here but not committed with others of their notebook.

    A figure counts by its sidecar; tensors are never committed.
    """
    notebooks = {_notebook_of(name) for name in names}
    found = [name for notebook in notebooks for name in written.get(notebook, ())]
    by_sidecar = [name.removesuffix(".png") + ".json" for name in found if name.endswith(".png")]
    values = [n for n in found if n.endswith((".csv", ".json")) and not n.endswith(NOT_COMPARED)]
    return sorted({*values, *by_sidecar} - set(names))


def main(preset: str, root: Path = ROOT) -> int:
    """Compares all committed results of a preset with the fresh ones; returns the exit status."""
    try:
        names = committed_files(preset, root)
    except (FileNotFoundError, subprocess.CalledProcessError):
        print("nothing to compare with: this is not a git checkout with a commit", file=sys.stderr)
        return 1
    if not names:
        print(f"nothing is committed for preset {preset}", file=sys.stderr)
        return 1
    written = written_files(preset, root)
    if not written:
        print(f"no notebook was run here: make reproduce PRESET={preset}", file=sys.stderr)
        return 1
    changed = {
        name
        for results in written.values()
        for name, digest in results.items()
        if _is_changed(root, name, digest)
    }
    problems = [f"{name}: not what its notebook wrote here" for name in sorted(changed)]
    problems += [f"{name}: written here, not committed" for name in _uncommitted(written, names)]
    compared, values, differences = 0, 0, []
    for name in names:
        results = written.get(_notebook_of(name))
        if results is None or name in changed:
            continue
        if _is_orphan(name, results):
            problems.append(f"{name}: no notebook writes it any more")
        elif not (root / name).exists():
            problems.append(f"{name}: missing")
        else:
            committed = _git(root, "show", f"HEAD:{name}")
            count, found = compare(name, committed, (root / name).read_bytes())
            compared, values, differences = compared + 1, values + count, differences + found
    others = sorted({_notebook_of(name) for name in names} - written.keys())
    print(
        f"{preset}: {values} values in {compared} committed files compared with what was run here"
    )
    _report(compared, others, problems, differences)
    if not compared and not problems:
        print("  none of the committed values were recomputed here", file=sys.stderr)
        return 1
    return 1 if problems or differences else 0


def _report(
    compared: int,
    others: Sequence[str],
    problems: Sequence[str],
    differences: Sequence[Difference],
) -> None:
    if others:
        print(f"  not run here, so not compared: {', '.join(others)}")
    for problem in problems:
        print(f"  {problem}")
    worst = sorted(differences, key=lambda difference: -difference.size)
    for d in worst[:REPORTED]:
        print(f"  {d.place}: committed {d.committed}, now {d.fresh}  (relative {d.size:.2g})")
    if len(worst) > REPORTED:
        print(f"  ... and {len(worst) - REPORTED} more")
    verdict = f"{len(differences)} values differ, {len(problems)} files are not comparable"
    if differences or problems:
        print(verdict)
    elif compared:
        print("all agree within the tolerances")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
