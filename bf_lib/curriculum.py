"""What a row of the ablation is: a form of student, and the stages that it is taught in.

A row is taught with the same examples, batches and rates as all others; what it is about is in its
form and in its stages (BitsFusion, §4.2).
"""

__all__ = ["FIRST", "SECOND", "Row", "Setting", "Stage", "is_certain"]

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bf_lib.forms import Form
from bf_lib.reconstruction import Reconstruction
from bf_lib.sampling import Sampler
from bf_lib.teaching import Lesson
from bf_lib.times import beta
from bf_lib.training_plan import Plan

STAGES = 2  # at most
LATER = {"later": True}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows share."""

    model: str = "mini"
    scenes: int = 20_000  # examples
    steps: int = 200  # of Stage I
    fine_tuning_steps: int = 100  # of Stage II
    batch: int = 16
    accumulate: int = 1  # parts of a batch, one after the other
    precision: str = "no"  # of the forward pass: that of the weights, or "bf16"
    lr: float = 3e-4  # of Stage I, which the paper has a hundred times as long, at 1e-5
    fine_tuning_lr: float = 1e-5  # of Stage II; the paper's
    scale_rate: float = 10.0  # learning rate of scales, which are shares, times the others'
    low_rank_rate: float = 10.0  # likewise of products of low rank, in "lora"
    ema: float = 0.99  # decay of the average of weights that is kept; 0 keeps the last
    relative: bool = True  # whether features of a block count relative to the teacher's
    # Rows that were finished before there were these are as if they had their defaults.
    squared: bool = field(default=True, metadata=LATER)  # errors, or their roots
    warmup: int = field(default=50, metadata=LATER)  # steps
    decay: float = field(default=0.5, metadata=LATER)  # share of steps, in which the rate falls
    save_every: int = field(default=100, metadata=LATER)  # steps
    asked: tuple[int, int] = (128, 200)  # challenges of each task, and their seed
    sampler: Sampler = Sampler(steps=8, guidance=4.0, batch=16)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One of the stages that a student is taught in."""

    objective: str = "distillation"
    fine_tuning: bool = False  # whether it is as long and as fast as Stage II
    share: float = 1.0  # of the steps that the setting has for it
    feature_weight: float = 0.01  # lambda; the paper's
    rate_weight: float = 0.0  # of the bits of an entropy-coded code
    dropped: float = 0.1  # of the captions
    density: tuple[float, ...] = tuple(beta(3.0).tolist())  # of time-steps; the paper's

    def plan(self, setting: Setting, seed: int, number: int = 0) -> Plan:
        """Returns how long and how fast it is taught, as the first stage or as a later one."""
        steps, lr = setting.steps, setting.lr
        if self.fine_tuning:
            steps, lr = setting.fine_tuning_steps, setting.fine_tuning_lr
        return Plan(
            steps=max(1, round(self.share * steps)),
            batch=setting.batch,
            accumulate=setting.accumulate,
            precision=setting.precision,
            lr=lr,
            warmup=setting.warmup,
            decay=setting.decay,
            ema=setting.ema,
            weight_decay=0.0,
            rates=(
                ("log_scale", setting.scale_rate),
                (".down", setting.low_rank_rate),
                (".up", setting.low_rank_rate),
            ),
            save_every=setting.save_every,
            # Each stage draws other numbers, and Stage II the same whatever came before it.
            seed=STAGES * seed + max(number, int(self.fine_tuning)),
        )

    def lesson(self, setting: Setting, examples: Path) -> Lesson:
        """Returns what is taught."""
        return Lesson(
            model=setting.model,
            examples=examples,
            density=self.density,
            objective=self.objective,
            feature_weight=self.feature_weight,
            rate_weight=self.rate_weight,
            relative=setting.relative,
            squared=setting.squared,
            dropped=self.dropped,
            guidance=setting.sampler.guidance,
        )


FIRST, SECOND = Stage(), Stage(objective="noise", fine_tuning=True)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the ablation."""

    name: str
    group: str
    form: Form | Reconstruction
    stages: tuple[Stage, ...] = ()
    changed: tuple[tuple[str, float], ...] = ()  # of the setting, for this row alone
    seeds: tuple[int, ...] = (0, 1, 2)

    def setting(self, shared: Setting) -> Setting:
        """Returns the setting of this row."""
        return replace(shared, **dict(self.changed))


def is_certain(form: Form | Reconstruction, stages: Sequence[Stage]) -> bool:
    """Whether a student is the same for each seed."""
    return isinstance(form, Form) and not stages
