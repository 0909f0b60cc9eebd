"""Makes rows of an ablation, in the pieces a night allows.

Each process teaches and examines a row by itself, with one thread, since that is faster than to
share a row. A row that was killed goes on from its last checkpoint, and rows whose first stages
are the same share them.
"""

__all__ = ["RowsFailed", "reference_images", "teach_rows"]

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from diffusers import UNet2DConditionModel
from filelock import FileLock
from safetensors.torch import load_file, save_file

from bf_lib.atomic import write_atomically
from bf_lib.curriculum import Row, Stage
from bf_lib.examples import Examples, scene_examples
from bf_lib.exams import Bench, Student
from bf_lib.forms import as_stored
from bf_lib.models import fingerprint, load_pipeline
from bf_lib.packed_unets import pack_student, save_packed
from bf_lib.processes import end_with_parent, make_deterministic, starter
from bf_lib.provenance import code_version, versions
from bf_lib.reconstruction import Reconstruction
from bf_lib.sampling import generate_in_processes
from bf_lib.taught_rows import Ablation, digest_of, exam_of, settings_of, state_of
from bf_lib.teaching import Teaching, example_losses
from bf_lib.timecache import cached_time_features, sampling_steps
from bf_lib.times import uniform
from bf_lib.training import TrainingFailed, train
from bf_lib.training_data import HELD_OUT, SCENES, new_file
from bf_lib.training_state import load_ema

DIGITS = 6  # that are kept of a number


class RowsFailed(RuntimeError):
    """Rows have no result; says which, and why."""


def teach_rows(ablation: Ablation, workers: int = 2) -> Iterator[tuple[Row, int, float]]:
    """Makes the rows that are left; yields each, and its minutes, as soon as it is on file.

    Arguments:
        ablation: Whose rows.
        workers: Processes.

    Raises:
        RowsFailed: When all others are done, if rows have no result: a training that is not
            finite any more, or images that are not.
    """
    left = [(r, s) for r, s in ablation.tasks() if state_of(ablation, r, s) != "done"]
    if not left:
        return
    examples_of(ablation, workers)
    held_out_of(ablation, workers)
    reference_images(ablation, workers)
    pool, failed = ProcessPoolExecutor(workers, starter(__name__), _start, (ablation,)), []
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


def examples_of(ablation: Ablation, processes: int = 1) -> Path:
    """Returns the file of what all rows learn from, which is made if it is missing."""
    setting = ablation.setting
    return scene_examples(setting.model, setting.scenes, ablation.work, processes=processes)


def held_out_of(ablation: Ablation, processes: int = 1) -> Path:
    """Returns the file of scenes by which what is not the paper's can be chosen."""
    setting = ablation.setting
    count = min(HELD_OUT, setting.scenes)
    return scene_examples(setting.model, count, ablation.work, SCENES, processes)


def reference_images(ablation: Ablation, processes: int = 1) -> Path:
    """Returns the file of full precision's images, which are drawn if it is missing."""
    sweep = exam_of(ablation.setting).sweep
    model = fingerprint(load_pipeline(sweep.model).components.values())
    file = ablation.work / f"reference-{digest_of([model, asdict(sweep)])}.safetensors"
    if not file.exists():
        asked = sweep.prompts, sweep.seeds, sweep.sampler
        images = generate_in_processes(sweep.model, *asked, processes)
        with new_file(file) as new:
            save_file({"images": images}, new)
    return file


# ---- what processes do


_process: tuple[Ablation, Bench, dict[str, object]] | None = None


def _start(ablation: Ablation) -> None:
    global _process
    end_with_parent()
    os.environ["BF_HEADLESS"] = "1"  # the bars of several processes would overwrite each other
    os.environ.pop("BF_PROGRESS", None)
    make_deterministic(1)
    code = code_version()  # now, since what is imported stays when the files change
    reference = load_file(reference_images(ablation))["images"]
    bench = exam_of(ablation.setting).bench(load_pipeline(ablation.setting.model), reference)
    _process = ablation, bench, code


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
    examples = examples_of(ablation)
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
    lesson = Stage(density=tuple(uniform().tolist())).lesson(
        ablation.setting, held_out_of(ablation)
    )
    teaching = Teaching(lambda teacher: student.to(teacher.device), lesson)
    count = min(HELD_OUT, ablation.setting.scenes)
    errors = example_losses(teaching, student, count, teacher=teaching.teacher)
    student.cpu()  # where it is examined
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
