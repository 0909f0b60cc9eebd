"""Exams: packed UNets, drawn and judged beside the model that they come from.

Each draws the same prompts from the same seeds as full precision does, so differences are those
of pairs. Rows are those of `bf_lib.trials`, whose tables and intervals they go to.
"""

__all__ = ["Exam", "Student", "folder_digest"]

import hashlib
from dataclasses import dataclass
from pathlib import Path

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from bf_lib import trials
from bf_lib.packed_unets import load_packed
from bf_lib.trials import FULL, Trials


@dataclass(frozen=True, slots=True)
class Student:
    """A packed UNet, or full precision, which has no folder."""

    name: str
    folder: str | None = None
    digest: str = ""  # of its files, so that rows are not those of another one

    @property
    def label(self) -> tuple[str, str]:
        """What to call its work."""
        return "student", self.name

    @classmethod
    def of(cls, name: str, folder: Path) -> "Student":
        """Returns the student in a folder as it is now."""
        return cls(name, str(folder), folder_digest(folder))


def folder_digest(folder: Path) -> str:
    """Returns a digest of the files of a packed UNet."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Exam(Trials):
    """All that the rows of an exam depend on: a job for `bf_lib.jobs`, of students not recipes."""

    students: tuple[Student, ...] = ()

    def __post_init__(self) -> None:
        Trials.__post_init__(self)
        names = [FULL, *(student.name for student in self.students)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"students must have names of their own: {twice}")

    def tasks(self, unet: nn.Module) -> list[Student]:
        """Lists full precision, and then the students."""
        return [Student(FULL), *self.students]

    def bench(self, pipe: StableDiffusionPipeline, reference: Tensor | None = None) -> "Bench":
        """Returns what examines students, with the images of full precision drawn.

        Arguments:
            pipe: The model.
            reference: These images, if they were drawn before.
        """
        return Bench(self, pipe, reference)


class Bench(trials.Bench):
    """A loaded model and what its images, and those of students, are judged by."""

    def score(self, task: Student) -> dict:
        """Returns the row of a student: metrics by prompt, and whether each challenge was passed.

        Raises:
            CheckpointError: If the checkpoint is damaged.
            ValueError: If it is not the one that the exam was made for, or an image is NaN.
        """
        if task.folder is None:
            return self.examined(self.images.pipe.unet, task)
        if folder_digest(Path(task.folder)) != task.digest:
            raise ValueError(f"{task.folder} was changed since the exam was made")
        dtype = self.images.pipe.unet.dtype
        return self.examined(load_packed(task.folder, "dense", torch_dtype=dtype), task)

    def examined(self, unet: UNet2DConditionModel, task: Student) -> dict:
        """Returns the row of a UNet in place of that of the model."""
        pipe = self.images.pipe
        full, self.recipes[task.name] = pipe.unet, {}  # nothing of it is quantized any more
        try:
            pipe.unet = unet.to(full.device)
            return super().score(task)
        finally:
            pipe.unet = full
