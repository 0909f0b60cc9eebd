"""Where things are: one place, resolved from the repository's root and never from the cwd.

Everything a notebook writes lies under its own name, so that two notebooks run side by side never
write the same file:

    data/runs/<preset>/<NN_name>/      tables, records and tensors
    figures/<preset>/<NN_name>-*       figures
"""

__all__ = ["ROOT", "display_path", "figures_folder", "runs_folder"]

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def runs_folder(preset: str, notebook: str, root: Path = ROOT) -> Path:
    """Returns the folder of a notebook's tables, records and tensors."""
    return root / "data" / "runs" / preset / notebook


def figures_folder(preset: str, root: Path = ROOT) -> Path:
    """Returns the folder of a preset's figures."""
    return root / "figures" / preset


def display_path(path: Path, root: Path = ROOT) -> str:
    """Returns a path as a reader should see it: relative to the repository, alike everywhere."""
    path, root = path.resolve(), root.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
