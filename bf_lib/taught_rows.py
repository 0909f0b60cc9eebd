"""Rows of an ablation: a file for each finished row and seed, made in the pieces a night allows.

Each process teaches and examines a row by itself, with one thread, since that is faster than to
share a row. A row that was killed goes on from its last checkpoint, and rows whose first stages
are the same share them. A finished one is a JSON file with all that was found for each prompt, and
with the settings that it was made with: it is done as long as these are those of the row, whatever
else changed.
"""

__all__ = ["Ablation", "RowsFailed", "effort_of", "exam_of", "record_of", "state_of"]

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from filelock import FileLock
from safetensors.torch import load_file, save_file

from bf_lib.atomic import write_atomically
from bf_lib.curriculum import Row, Setting, Stage
from bf_lib.evaluation import challenges
from bf_lib.examples import Examples, scene_examples
from bf_lib.exams import Bench, Exam, Student
from bf_lib.forms import as_stored
from bf_lib.models import fingerprint, load_pipeline
from bf_lib.packed_unets import pack_student, save_packed
from bf_lib.processes import end_with_parent, make_deterministic
from bf_lib.provenance import code_version, versions
from bf_lib.reconstruction import Reconstruction
from bf_lib.sampling import generate_in_processes
from bf_lib.sensitivity.sweep import Sweep
from bf_lib.teaching import Teaching, example_losses
from bf_lib.timecache import cached_time_features, sampling_steps
from bf_lib.times import uniform
from bf_lib.training import TrainingFailed, train
from bf_lib.training_data import SCENES, new_file
from bf_lib.training_state import load_ema

DIGITS = 6  # that are kept of a number
HELD_OUT = 512  # scenes that neither the model nor a student was trained on


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

    def packed(self, row: Row, seed: int) -> Path:
        """Returns where a row's student is kept, packed, if its grids are balanced."""
        return self.work / "students" / self.file(row, seed).stem

    def stage_folder(self, row: Row, seed: int, number: int) -> Path:
        """Returns where a stage of a row is taught, which depends on what it is taught with."""
        stages, setting = row.stages[: number + 1], row.setting(self.setting)
        examples = Path("examples")  # wherever they are
        made = {
            "form": asdict(row.form),
            "plans": [asdict(stage.plan(setting, seed, n)) for n, stage in enumerate(stages)],
            "lessons": [asdict(stage.lesson(setting, examples)) for stage in stages],
        }
        return self.work / f"stage{number + 1}-{_digest(made)}"

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

    def held_out(self, processes: int = 1) -> Path:
        """Returns the file of scenes by which what is not the paper's can be chosen."""
        count = min(HELD_OUT, self.setting.scenes)
        return scene_examples(self.setting.model, count, self.work, SCENES, processes)

    def reference(self, processes: int = 1) -> Path:
        """Returns the file of full precision's images, which are drawn if it is missing."""
        sweep = exam_of(self.setting).sweep
        model = fingerprint(load_pipeline(sweep.model).components.values())
        file = self.work / f"reference-{_digest([model, asdict(sweep)])}.safetensors"
        if not file.exists():
            asked = sweep.prompts, sweep.seeds, sweep.sampler
            images = generate_in_processes(sweep.model, *asked, processes)
            with new_file(file) as new:
                save_file({"images": images}, new)
        return file

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
        self.held_out(processes=workers)
        self.reference(processes=workers)
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
    setting = row.setting(ablation.setting)
    plans = [asdict(stage.plan(setting, seed, n)) for n, stage in enumerate(row.stages)]
    shared = asdict(ablation.setting)
    for field in fields(ablation.setting):
        if field.metadata.get("later") and shared[field.name] == field.default:
            del shared[field.name]
    said = {"setting": shared, "row": asdict(row), "seed": seed, "plans": plans}
    del said["row"]["seeds"]
    return json.loads(json.dumps(_shortened(said)))


def effort_of(ablation: Ablation, row: Row, seed: int) -> float:
    """Returns about how much work a row is, in evaluations of the UNet for one sample.

    A training step is some four of the teacher's and the student's, and an image two for each step
    of the sampler.
    """
    setting = row.setting(ablation.setting)
    plans = [stage.plan(setting, seed, n) for n, stage in enumerate(row.stages)]
    drawn = len(exam_of(setting).sweep.prompts) * setting.sampler.steps
    return 4 * sum(plan.steps * plan.batch for plan in plans) + 2 * drawn


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def _shortened(value: object) -> object:
    if isinstance(value, dict):
        return {name: _shortened(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        if len(value) > 100:
            return _digest(value)
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


_process: tuple[Ablation, Bench, dict[str, object]] | None = None


def _start(ablation: Ablation) -> None:
    global _process
    end_with_parent()
    os.environ["BF_HEADLESS"] = "1"  # the bars of several processes would overwrite each other
    os.environ.pop("BF_PROGRESS", None)
    make_deterministic(1)
    code = code_version()  # now, since what is imported stays when the files change
    reference = load_file(ablation.reference())["images"]
    bench = exam_of(ablation.setting).bench(load_pipeline(ablation.setting.model), reference)
    _process = ablation, bench, code


def exam_of(setting: Setting) -> Exam:
    """Returns the exam that all rows take."""
    prompts = tuple(challenge.prompt for challenge in challenges(*setting.asked))
    seeds = tuple(range(len(prompts)))
    sweep = Sweep(setting.model, prompts, seeds, setting.sampler)
    return Exam(sweep, (), setting.asked)


def _make(row: Row, seed: int) -> float:
    """Teaches and examines a row, and writes its file; returns the minutes that it took."""
    ablation, bench, code = _process
    started = time.monotonic()
    student = taught(ablation, row, seed)
    steps = sampling_steps(bench.images.pipe.scheduler, ablation.setting.sampler.steps)
    held_out = held_out_error(ablation, student)
    coded = coded_bytes(student, steps, ablation.packed(row, seed))
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
        "held_out": held_out,
        "losses": _last_losses(ablation, row, seed),
        "minutes": round(minutes, 1),  # of this piece, if it was interrupted
        "code": code,
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


def _last_losses(ablation: Ablation, row: Row, seed: int) -> list[dict[str, float]]:
    """Returns the last row of each stage's log: means of losses, and the seconds of a step."""
    logs = [ablation.stage_folder(row, seed, n) / "log.csv" for n in range(len(row.stages))]
    return [pd.read_csv(log).iloc[-1].to_dict() for log in logs]


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


def held_out_error(ablation: Ablation, student: UNet2DConditionModel) -> float:
    """Returns the error of a student's noise beside the teacher's, of scenes that are held out.

    It is Eq. 6 at uniform time-steps, a tenth of the captions being left out.
    """
    lesson = Stage(density=tuple(uniform().tolist())).lesson(ablation.setting, ablation.held_out())
    teaching = Teaching(lambda _: student, lesson)
    count = min(HELD_OUT, ablation.setting.scenes)
    errors = example_losses(teaching, student, count, teacher=teaching.teacher)
    return float(f"{sum(errors) / len(errors):.{DIGITS}g}")


def coded_bytes(student: UNet2DConditionModel, steps: torch.Tensor, folder: Path) -> int | None:
    """Saves a student of balanced grids, entropy-coded; returns its bytes, or None for others.

    Arguments:
        student: A student of any form.
        steps: The time-steps whose features are kept, if they are cached.
        folder: Where it is saved.
    """
    if getattr(student, "recipe", None) is None:
        return None
    kept = None if cached_time_features(student) is None else steps
    save_packed(pack_student(student, kept, "zstd"), folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
