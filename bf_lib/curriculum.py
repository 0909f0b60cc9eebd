"""What the rows of the ablation are: forms of students, and the stages that they are taught in.

A row is taught with the same examples, batches and rates as all others; what it is about is in its
form and in its stages (BitsFusion, §4.2 and Tables 4 to 7).
"""

__all__ = ["Row", "Setting", "Stage", "ablation_rows"]

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bf_lib.forms import Form
from bf_lib.recipe import Recipe
from bf_lib.sampling import Sampler
from bf_lib.teaching import Lesson
from bf_lib.times import beta, uniform
from bf_lib.training import Plan


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows share."""

    model: str = "mini"
    scenes: int = 20_000  # examples
    steps: int = 300  # of Stage I
    more_steps: int = 150  # of Stage II
    batch: int = 16
    lr: float = 5e-4
    scale_rate: float = 1.0  # learning rate of scales, times the others'
    relative: bool = True  # whether features of a block count relative to the teacher's
    asked: tuple[int, int] = (128, 200)  # challenges of each task, and their seed
    sampler: Sampler = Sampler(steps=8, guidance=4.0, batch=16)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One of the stages that a student is taught in."""

    objective: str = "distillation"
    share: float = 1.0  # of the setting's steps of Stage I, or of Stage II for "noise"
    feature_weight: float = 0.01  # lambda; the paper's
    dropped: float = 0.1  # of the captions
    density: tuple[float, ...] = tuple(beta(3.0).tolist())  # of time-steps; the paper's

    def plan(self, setting: Setting, seed: int) -> Plan:
        """Returns how long and how fast it is taught."""
        steps = setting.more_steps if self.objective == "noise" else setting.steps
        return Plan(
            steps=max(1, round(self.share * steps)),
            batch=setting.batch,
            lr=setting.lr,
            warmup=20,
            ema=0.99,
            weight_decay=0.0,
            rates=(("log_scale", setting.scale_rate),),
            save_every=100,
            seed=seed,
        )

    def lesson(self, setting: Setting, examples: Path) -> Lesson:
        """Returns what is taught."""
        return Lesson(
            model=setting.model,
            examples=examples,
            density=self.density,
            objective=self.objective,
            feature_weight=self.feature_weight,
            relative=setting.relative,
            dropped=self.dropped,
            guidance=setting.sampler.guidance,
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the ablation."""

    name: str
    group: str
    form: Form
    stages: tuple[Stage, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)


def ablation_rows(recipes: Mapping[str, Recipe]) -> list[Row]:
    """Returns the rows: the paper's in its order, then the controls, then the baselines.

    Arguments:
        recipes: By name: "mixed", the one of the study; "3" and "5", all layers with so many
            levels; "mixed as large as 5"; and by the paper's rule, "eta 0", "eta 0.3", "eta 0.5".
    """
    levels = {name: tuple(recipe.levels.items()) for name, recipe in recipes.items()}
    base = Stage(feature_weight=0.0, density=tuple(uniform().tolist()))
    features = replace(base, feature_weight=0.01)
    first, second = Stage(), Stage(objective="noise")
    mixed, five = Form(levels=levels["mixed"]), Form(levels=levels["5"])
    plain = Form(kind="plain", scales="minmax", cached=False)
    paper = {
        "QAT-Base": (plain, (base,)),
        "+ balance": (replace(five, scales="minmax", cached=False), (base,)),
        "+ alternating scales": (replace(five, cached=False), (base,)),
        "+ mixed precision": (replace(mixed, cached=False), (base,)),
        "+ caching alone": (five, (base,)),
        "+ mixed precision and caching": (mixed, (base,)),
        "+ feature distillation": (mixed, (features,)),
        "+ time-step sampling": (mixed, (first,)),
        "+ Stage II": (mixed, (first, second)),
    }
    controls = {
        "full precision": (Form(kind="full"), ()),
        "not trained": (mixed, ()),
        "Stage I as long as both": (mixed, (replace(first, share=1.5),)),
        "plain, 4 levels": (replace(plain, scales="alternating", cached=True), (first,)),
        "half-shifted, 4 levels": (Form(kind="half-shifted"), (first,)),
        "balanced, 3 levels": (Form(levels=levels["3"]), (first,)),
        "balanced, 5 levels": (five, (first,)),
        "mixed, as large as 5 levels": (Form(levels=levels["mixed as large as 5"]), (first,)),
        "optimal scales": (replace(mixed, scales="optimal"), (first,)),
        "captions never dropped": (mixed, (replace(first, dropped=0.0),)),
        "guided output distilled": (mixed, (replace(first, objective="guided"),)),
        "noise predicted in Stage I": (mixed, (replace(second, share=2.0),)),
        "full precision, Stage II": (Form(kind="full"), (second,)),
    }
    baselines = {
        "LoRA, 2 bits": (Form(kind="lora"), (replace(base, objective="guided"),)),
        "palettes, 2 bits": (Form(kind="palette"), ()),
        "palettes, 2 bits, trained": (Form(kind="palette"), (first,)),
    }
    single = {
        **{f"lambda {w:g}": (mixed, (replace(first, feature_weight=w),)) for w in (0.1, 1.0)},
        **{
            f"alpha {a:g}": (mixed, (replace(first, density=tuple(beta(a).tolist())),))
            for a in (1.5, 2.0)
        },
        **{f"eta {e:g}": (Form(levels=levels[f"eta {e:g}"]), (first,)) for e in (0.0, 0.3, 0.5)},
    }
    groups = {"paper": paper, "control": controls, "baseline": baselines, "one seed": single}
    return [
        Row(
            name=name,
            group=group,
            form=form,
            stages=stages,
            # Without training there is nothing that a seed would change.
            seeds=(0,) if group == "one seed" or not stages else (0, 1, 2),
        )
        for group, entries in groups.items()
        for name, (form, stages) in entries.items()
    ]
