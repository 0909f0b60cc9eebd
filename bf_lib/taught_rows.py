"""Rows of an ablation: what they are, and the files of those that are finished.

A row is a form of student, the stages it is taught in, and the seeds of its trainings. A finished
one is a JSON file with all that was found for each prompt, and with the settings that it was made
with: it is done as long as these are those of the row, whatever else changed.
`bf_lib.row_teaching` makes them.
"""

__all__ = ["Ablation", "digest_of", "effort_of", "exam_of", "record_of", "settings_of", "state_of"]

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd

from bf_lib.curriculum import Row, Setting
from bf_lib.evaluation import challenges
from bf_lib.exams import Exam
from bf_lib.sensitivity.sweep import Sweep


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
        return self.work / f"stage{number + 1}-{digest_of(made)}"

    def table(self) -> pd.DataFrame:
        """Returns columns row, group, seed, state ("done", "left" or "of other settings")."""
        return pd.DataFrame(
            {"row": row.name, "group": row.group, "seed": seed, "state": state_of(self, row, seed)}
            for row, seed in self.tasks()
        )


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


def digest_of(value: object) -> str:
    """Returns 16 digits that tell settings apart; what JSON has no form for counts by its text."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


def _shortened(value: object) -> object:
    if isinstance(value, dict):
        return {name: _shortened(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        if len(value) > 100:
            return digest_of(value)
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


def exam_of(setting: Setting) -> Exam:
    """Returns the exam that all rows take."""
    prompts = tuple(challenge.prompt for challenge in challenges(*setting.asked))
    seeds = tuple(range(len(prompts)))
    sweep = Sweep(setting.model, prompts, seeds, setting.sampler)
    return Exam(sweep, (), setting.asked)
