"""Trains the embedded model and its judges from nothing: `python -m bf_lib.make_mini`.

`make mini` calls it. Each training goes on from its last checkpoint, so a kill at any moment costs
some minutes, and one that has finished is not repeated.
"""

__all__ = ["main", "training_logs", "training_table", "trainings"]

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pandas as pd

from bf_lib import train_judges, train_mini, train_text
from bf_lib.atomic import write_atomically
from bf_lib.paths import ROOT
from bf_lib.train_judges import CLIP_PLAN, SCENE_PLAN, ClipTask, SceneTask
from bf_lib.train_mini import (
    ROUNDS,
    VAE_PLAN,
    GeneratorTask,
    VaeTask,
    round_folder,
    training_latents,
)
from bf_lib.train_text import TEXT_PLAN, ReadingTask
from bf_lib.training import Plan, Task, fit
from bf_lib.training_data import training_images


def trainings(folder: Path) -> dict[str, tuple[Callable[[], Task], Plan]]:
    """Returns what is trained, by the name of its folder, in the order in which it must be."""
    rounds = {
        round_folder(folder, number).name: (partial(GeneratorTask, folder, number), part.plan)
        for number, part in enumerate(ROUNDS)
    }
    return {
        "vae": (partial(VaeTask, folder), VAE_PLAN),
        "text_encoder": (ReadingTask, TEXT_PLAN),
        **rounds,
        "scene_judge": (SceneTask, SCENE_PLAN),
        "clip_judge": (ClipTask, CLIP_PLAN),
    }


def main(folder: Path, target: Path) -> None:
    """Trains all, and writes weights and logs.

    Arguments:
        folder: Where the checkpoints are.
        target: Where the model, its judges and the logs of the trainings are written.
    """
    parts = trainings(folder)
    training_images(folder)  # once, before each process of a training asks for them
    for name, (task, plan) in parts.items():
        fit(task, plan, folder / name, processes=2, cpu=True)
        if name == "vae":
            training_latents(folder)  # likewise
    train_mini.export(folder, target)
    train_text.export_reader(folder / "text_encoder", target / "judges")
    train_judges.export(folder, target / "judges")
    for name in parts:
        log = (folder / name / "log.csv").read_bytes()
        write_atomically(target / "training" / f"{name}.csv", log)


def training_logs(target: Path) -> dict[str, pd.DataFrame]:
    """Returns the logs that ship with a model, by training, in the order of the trainings."""
    paths = {name: target / "training" / f"{name}.csv" for name in trainings(target)}
    return {name: pd.read_csv(path) for name, path in paths.items() if path.exists()}


def training_table(logs: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Returns the length and rate of each training, and its time by its log, if there is one."""
    rows = []
    for name, (_, plan) in trainings(Path()).items():
        seconds = logs[name].seconds_per_step.median() if name in logs else math.nan
        rows.append(
            {
                "training": name.replace("_", " "),
                "steps": plan.steps,
                "batch": plan.batch,
                "highest rate": plan.lr,
                "s/step": round(seconds, 2),
                "hours": round(seconds * plan.steps / 3600, 2),
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    sys.exit(main(ROOT / "build" / "train_mini", ROOT / "data" / "mini"))
