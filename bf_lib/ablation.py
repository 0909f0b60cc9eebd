"""The ablation: a file for each finished row and seed, made in the pieces that a night allows.

    python -m bf_lib.ablation --rows result   # goes on with what is left of it
    python -m bf_lib.ablation --list          # says what is done and what is left of "mini"

Each process teaches and examines a row by itself, with one thread, since that is faster than to
share a row. A row that was killed goes on from its last checkpoint, and rows whose first stages
are the same share them. A finished one is a JSON file
with all that was found for each prompt, and with the settings that it was made with: it is done as
long as these are those of the row, whatever else changed.
"""

__all__ = ["Ablation", "RowsFailed", "record_of", "state_of"]

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from filelock import FileLock

from bf_lib import recipe_study
from bf_lib.allocation import extended
from bf_lib.artifacts import load_json, load_table
from bf_lib.atomic import write_atomically
from bf_lib.curriculum import (
    FRONTIER,
    Row,
    Setting,
    ablation_rows,
    frontier_name,
    result_rows,
)
from bf_lib.evaluation import challenges
from bf_lib.examples import Examples, scene_examples
from bf_lib.exams import Bench, Exam, Student
from bf_lib.forms import as_stored
from bf_lib.layers import list_layers
from bf_lib.models import load_pipeline
from bf_lib.packed_unets import pack_student, save_packed
from bf_lib.paths import ROOT, runs_folder
from bf_lib.processes import end_with_parent, make_deterministic
from bf_lib.progress import duration
from bf_lib.protocol import study_setting
from bf_lib.provenance import versions
from bf_lib.recipe import Recipe
from bf_lib.recipe_study import Choices, by_optimum, by_rule, error_table
from bf_lib.reconstruction import Reconstruction
from bf_lib.sampling import Sampler
from bf_lib.sensitivity.sweep import Sweep
from bf_lib.sizes import size_report
from bf_lib.study import Study
from bf_lib.teaching import Teaching
from bf_lib.timecache import cached_time_features, sampling_steps
from bf_lib.training import TrainingFailed, train
from bf_lib.training_state import load_ema

DIGITS = 6  # that are kept of a number
SETTINGS = {
    "mini": Setting(),
    # As long as notebooks 08 and 09 teach, which have one student.
    "result": replace(study_setting(Study.of("mini")), asked=(512, 300)),
    "smoke": Setting(
        scenes=8,
        steps=1,
        fine_tuning_steps=1,
        batch=2,
        asked=(1, 200),
        sampler=Sampler(steps=2, guidance=4.0, batch=2),
    ),
}


class RowsFailed(RuntimeError):
    """Rows have no result; says which, and why."""


@dataclass(frozen=True)
class Ablation:
    """Rows in a setting, and where they are kept."""

    setting: Setting
    rows: tuple[Row, ...]
    folder: Path  # of finished rows
    work: Path  # of what is not finished: examples, checkpoints

    def tasks(self) -> list[tuple[Row, int]]:
        """Lists rows and seeds: all rows of the first seed, then those of the next.

        Of these, rows of one stage come before those of two, which may begin with what they left.
        """
        found = [(row, seed) for row in self.rows for seed in row.seeds]
        return sorted(found, key=lambda task: (task[1], len(task[0].stages)))

    def file(self, row: Row, seed: int) -> Path:
        """Returns where a finished row is, or will be."""
        name = "".join(c if c.isalnum() or c == "." else "-" for c in row.name.lower())
        return self.folder / f"{row.group.replace(' ', '-')}--{name.strip('-')}--{seed}.json"

    def stage_folder(self, row: Row, seed: int, number: int) -> Path:
        """Returns where a stage of a row is taught, which depends on what it is taught with."""
        stages, setting = row.stages[: number + 1], row.setting(self.setting)
        examples = Path("examples")  # wherever they are
        made = {
            "form": asdict(row.form),
            "plans": [asdict(stage.plan(setting, seed, n)) for n, stage in enumerate(stages)],
            "lessons": [asdict(stage.lesson(setting, examples)) for stage in stages],
        }
        digest = hashlib.sha256(json.dumps(made, default=str).encode()).hexdigest()[:16]
        return self.work / f"stage{number + 1}-{digest}"

    def table(self) -> pd.DataFrame:
        """Returns columns row, group, seed, state ("done", "left" or "of other settings")."""
        return pd.DataFrame(
            {"row": row.name, "group": row.group, "seed": seed, "state": state_of(self, row, seed)}
            for row, seed in self.tasks()
        )

    def examples(self, processes: int = 1) -> Path:
        """Returns the file of what all rows learn from, which is made if it is missing."""
        return scene_examples(
            self.setting.model, self.setting.scenes, self.work, processes=processes
        )

    def run(self, workers: int = 2) -> Iterator[tuple[Row, int, float]]:
        """Makes the rows that are left; yields each, and its minutes, as soon as it is on file.

        Raises:
            RowsFailed: When all others are done, if rows have no result: a training that is not
                finite any more, or images that are not.
        """
        left = [(r, s) for r, s in self.tasks() if state_of(self, r, s) != "done"]
        if not left:
            return
        self.examples(processes=workers)
        context = get_context("forkserver" if sys.platform == "linux" else "spawn")
        context.set_forkserver_preload([__name__])
        pool, failed = ProcessPoolExecutor(workers, context, _start, (self,)), []
        try:
            futures = {pool.submit(_make, row, seed): (row, seed) for row, seed in left}
            for future in as_completed(futures):
                row, seed = futures[future]
                try:
                    minutes = future.result()
                except (TrainingFailed, ValueError) as error:
                    failed.append(f"{row.name}, seed {seed}: {error}")
                else:
                    yield row, seed, minutes
        finally:
            pool.shutdown(cancel_futures=True)
        if failed:
            raise RowsFailed("\n".join([f"{len(failed)} rows have no result:", *failed]))


def settings_of(ablation: Ablation, row: Row, seed: int) -> dict:
    """Returns what a row was, or is to be, made with; long lists by their digests."""
    said = {"setting": asdict(ablation.setting), "row": asdict(row), "seed": seed}
    del said["row"]["seeds"]
    return json.loads(json.dumps(_shortened(said)))


def _shortened(value: object) -> object:
    if isinstance(value, dict):
        return {name: _shortened(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        if len(value) > 100:
            return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
        return [_shortened(item) for item in value]
    return value


def state_of(ablation: Ablation, row: Row, seed: int) -> str:
    """Returns "done", "left", or "of other settings" for a file that is none of this row."""
    file = ablation.file(row, seed)
    if not file.exists():
        return "left"
    same = json.loads(file.read_text())["settings"] == settings_of(ablation, row, seed)
    return "done" if same else "of other settings"


def record_of(ablation: Ablation, row: Row, seed: int) -> dict:
    """Reads a finished row."""
    return json.loads(ablation.file(row, seed).read_text())


# ---- what processes do


_process: tuple[Ablation, Bench] | None = None


def _start(ablation: Ablation) -> None:
    global _process
    end_with_parent()
    make_deterministic(1)
    _process = ablation, exam_of(ablation.setting).bench(load_pipeline(ablation.setting.model))


def exam_of(setting: Setting) -> Exam:
    """Returns the exam that all rows take."""
    prompts = tuple(challenge.prompt for challenge in challenges(*setting.asked))
    seeds = tuple(range(len(prompts)))
    sweep = Sweep(setting.model, prompts, seeds, setting.sampler)
    return Exam(sweep, (), setting.asked)


def _make(row: Row, seed: int) -> float:
    """Teaches and examines a row, and writes its file; returns the minutes that it took."""
    ablation, bench = _process
    started = time.monotonic()
    student = taught(ablation, row, seed)
    steps = sampling_steps(bench.images.pipe.scheduler, ablation.setting.sampler.steps)
    coded = coded_bytes(student, steps)
    found = bench.examined(as_stored(student, steps), Student(row.name))
    size = row.form.size(bench.images.pipe.unet, len(steps))
    minutes = (time.monotonic() - started) / 60
    record = {
        "settings": settings_of(ablation, row, seed),
        "stored_mb": size.stored_bytes / 1e6,
        "stored_bits": size.stored_bits,
        "paper_bits": size.paper_bits,
        "coded_mb": None if coded is None else coded / 1e6,
        "coded_bits": None if coded is None else 8 * coded / size.parameters,
        "minutes": round(minutes, 1),
        "versions": versions(),
        "found": {name: _rounded(value) for name, value in found.items()},
    }
    write_atomically(ablation.file(row, seed), json.dumps(record).encode())
    _tidy(ablation, row, seed)
    return minutes


def _tidy(ablation: Ablation, row: Row, seed: int) -> None:
    """Removes the checkpoints of a finished row that no other row is to begin with."""
    left = [task for task in ablation.tasks() if state_of(ablation, *task) != "done"]
    needed = {ablation.stage_folder(*task, n) for task in left for n in range(len(task[0].stages))}
    for number in range(len(row.stages)):
        folder = ablation.stage_folder(row, seed, number)
        if folder not in needed:
            shutil.rmtree(folder, ignore_errors=True)


def _rounded(value: object) -> object:
    if isinstance(value, list) and value and isinstance(value[0], float):
        return [float(f"{item:.{DIGITS}g}") for item in value]
    return value


def taught(ablation: Ablation, row: Row, seed: int) -> UNet2DConditionModel:
    """Returns the student of a row after its stages, with averaged weights."""
    setting, start = row.setting(ablation.setting), None
    examples = ablation.examples()
    if isinstance(row.form, Reconstruction):
        captions = Examples.load(examples).captions[: row.form.inputs]
        pipe = load_pipeline(setting.model)
        return row.form(pipe, [phrasings[0] for phrasings in captions], setting.sampler, seed)
    for number, stage in enumerate(row.stages):
        folder = ablation.stage_folder(row, seed, number)
        lesson = stage.lesson(setting, examples)

        def make(lesson: object = lesson, start: Path | None = start) -> Teaching:
            return Teaching(row.form, lesson, start)

        with FileLock(folder.with_suffix(".lock")):  # another row may begin with the same stage
            train(make, stage.plan(setting, seed, number), folder)
        start = folder
    first = row.stages[0].plan(setting, seed).seed if row.stages else seed
    torch.manual_seed(first)  # as in training, for forms that begin with random numbers
    student = row.form(load_pipeline(setting.model).unet)
    return student if start is None else load_ema(student, start)


def coded_bytes(student: UNet2DConditionModel, steps: torch.Tensor) -> int | None:
    """Returns the bytes of the entropy-coded file of a student of balanced grids, else None.

    Arguments:
        student: A student of any form.
        steps: The time-steps whose features are kept, if they are cached.
    """
    if getattr(student, "recipe", None) is None:
        return None
    kept = None if cached_time_features(student) is None else steps
    with TemporaryDirectory() as folder:
        save_packed(pack_student(student, kept, "zstd"), folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


# ---- the ablation of the study


def study_recipes(unet: UNet2DConditionModel, steps: int) -> dict[str, Recipe]:
    """Returns the recipes of the ablation: notebook 06's for `mini`, and others of its size.

    Arguments:
        unet: The UNet.
        steps: How many time-steps' features are stored.
    """
    folder = runs_folder("mini", "03_sensitivity")
    layers = list_layers(unet)
    weight_errors = recipe_study.weight_error_table(unet, layers)

    def choices(table: str, column: str) -> Choices:
        errors = error_table(load_table(folder / f"{table}.csv"), column, layers)
        return Choices.of(unet, layers, extended(errors, weight_errors), steps)

    estimated, swept = choices("estimated", "score"), choices("sensitivity", "mse")
    same = {str(n): recipe_study.uniform(estimated, n) for n in (3, 5)}
    optimum = Recipe.load(runs_folder("mini", "06_bit_allocation") / "recipe.json")
    parameters = size_report(unet, None, steps).parameters
    as_large = {
        name: size_report(unet, recipe, steps).stored_bytes
        for name, recipe in {"5": same["5"], "optimum": optimum}.items()
    }
    sizes = {"optimum as large as 5": as_large["5"]}
    sizes |= {frontier_name(bits): int(bits * parameters / 8) for bits in FRONTIER}
    return (
        same
        | {"optimum": optimum}
        | {name: by_optimum(estimated, size)[0] for name, size in sizes.items()}
        | {f"eta {e:g}": by_rule(swept, as_large["optimum"], e) for e in (0.0, 0.3, 0.5)}
    )


def study_ablation(name: str) -> Ablation:
    """Returns one of the ablations of `SETTINGS`; "result" has rows of its own.

    What it takes of the study is kept, so that finished rows stay what they are when the study is
    run again.
    """
    setting, folder = SETTINGS[name], ROOT / "data" / "ablation"
    kept = folder / "inputs.json"
    if not kept.exists():
        pipe = load_pipeline(setting.model)
        steps = len(sampling_steps(pipe.scheduler, setting.sampler.steps))
        levels = {n: dict(recipe.levels) for n, recipe in study_recipes(pipe.unet, steps).items()}
        measured = load_json(runs_folder("mini", "08_stage1_distillation") / "fitted_density.json")
        found = {"levels": levels, "measured_density": measured}
        write_atomically(kept, json.dumps(found, indent=0).encode())
    inputs = json.loads(kept.read_text())
    recipes = {recipe: Recipe(levels) for recipe, levels in inputs["levels"].items()}
    if name == "result":
        rows = result_rows(recipes)
    else:
        rows = ablation_rows(recipes, inputs["measured_density"])
    return Ablation(setting, tuple(rows), folder / name, ROOT / "build" / "ablation" / name)


def main() -> int:
    """Makes what is left, or lists it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", choices=sorted(SETTINGS), default="mini")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="say what is done and what is left")
    given = parser.parse_args()
    ablation = study_ablation(given.rows)
    table = ablation.table()
    print(table.to_string(index=False) if given.list else table.state.value_counts().to_string())
    if given.list:
        return 0
    left, minutes = int((table.state != "done").sum()), 0.0
    for done, (row, seed, took) in enumerate(ablation.run(given.workers), 1):
        minutes += took
        rest = (left - done) * minutes / done / given.workers
        more = f"{left - done} left, about {duration(60 * rest)}"
        print(f"{row.name}, seed {seed}: {took:.1f} min; {more}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
