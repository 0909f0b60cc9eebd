"""What the rows of the ablation are: forms of students, and the stages that they are taught in.

A row is taught with the same examples, batches and rates as all others; what it is about is in its
form and in its stages (BitsFusion, §4.2 and Tables 4 to 7).
"""

__all__ = [
    "ETAS",
    "FIRST",
    "FRONTIER",
    "ONE_SEED",
    "RULED",
    "SECOND",
    "Row",
    "Setting",
    "Stage",
    "ablation_rows",
    "frontier_name",
    "result_rows",
]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bf_lib.forms import Form
from bf_lib.recipe import Recipe
from bf_lib.reconstruction import Reconstruction
from bf_lib.sampling import Sampler
from bf_lib.teaching import Lesson
from bf_lib.times import beta, uniform
from bf_lib.training import Plan

FRONTIER = (1.83, 2.0, 2.3, 3.0, 4.0)  # stored bits of students of both stages
ETAS = (0.0, 0.3, 0.5)  # of the paper's Table 5
RULED = 2.0  # stored bits of recipes by these; at more, there is little to be seen
STAGES = 2  # at most
LATER = {"later": True}
# Groups of points along a line, of values of the paper's, and of what it does not say.
ONE_SEED = ("frontier", "one seed", "choices")
# Weights of a rate term, in half a Stage I more, by stored bits.
RATES = {1.83: (0.0, 0.001, 0.003), 2.0: (0.0, 0.001, 0.003, 0.01)}


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
            save_every=100,
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


def ablation_rows(recipes: Mapping[str, Recipe], measured: Sequence[float]) -> list[Row]:
    """Returns the rows: the paper's in its order, the controls, the baselines, and the frontier.

    The paper's rows have its bits and its rule. At these `mini` has all but nothing left to learn,
    so what is asked about training is asked of 3 levels everywhere, which break it.

    Arguments:
        recipes: By name: "3" and "5", all layers with so many levels; "optimum" of notebook 06, of
            1.99 paper bits, and "rule", the paper's, as large; "optimum as large as 5" and "rule
            as large as 5"; "eta 0" and so on by `ETAS`; and optima by their stored bits, as
            `frontier_name` says.
        measured: The density of time-steps that is fitted to a measured error (Eq. 9).
    """
    forms = {name: Form(levels=tuple(recipe.levels.items())) for name, recipe in recipes.items()}
    base = Stage(feature_weight=0.0, density=tuple(uniform().tolist()))
    features = replace(base, feature_weight=0.01)
    first, second = FIRST, SECOND
    three, five, rule = forms["3"], forms["5"], forms["rule"]
    plain = Form(kind="plain", scales="minmax", cached=False)
    paper = {
        "QAT-Base": (plain, (base,)),
        "+ balance": (replace(five, scales="minmax", cached=False), (base,)),
        "+ alternating scales": (replace(five, cached=False), (base,)),
        "+ mixed precision": (replace(rule, cached=False), (base,)),
        "+ caching alone": (five, (base,)),
        "+ mixed precision and caching": (rule, (base,)),
        "+ feature distillation": (rule, (features,)),
        "+ time-step sampling": (rule, (first,)),
        "+ Stage II": (rule, (first, second)),
    }
    ends = {
        "full precision": (Form(kind="full"), ()),
        "full precision, Stage II": (Form(kind="full"), (second,)),
        "3 levels, not trained": (three, ()),
        "paper's rule, not trained": (rule, ()),
        "paper's rule, optimal scales, not trained": (replace(rule, scales="optimal"), ()),
        "optimum, not trained": (forms["optimum"], ()),
    }
    grids = {
        "plain, 4 levels": (replace(plain, scales="alternating", cached=True), (first,)),
        "half-shifted, 4 levels": (Form(kind="half-shifted"), (first,)),
        "3 levels": (three, (first,)),
        "5 levels": (five, (first,)),
        "optimum": (forms["optimum"], (first,)),
        "optimum, as large as 5 levels": (forms["optimum as large as 5"], (first,)),
        "paper's rule, as large as 5 levels": (forms["rule as large as 5"], (first,)),
    }
    training = {
        "no features": (replace(first, feature_weight=0.0),),
        "uniform times": (features,),
        "times by measured error": (replace(first, density=tuple(measured)),),
        "captions never dropped": (replace(first, dropped=0.0),),
        "guided output distilled": (replace(first, objective="guided"),),
        "noise predicted in Stage I": (replace(first, objective="noise"),),
        "Stage I as long as both": (replace(first, share=1.5),),
        "Stage II": (first, second),
    }
    training = {f"3 levels, {name}": (three, stages) for name, stages in training.items()}
    # At 3 levels alternating scales are all but optimal, so they are compared at more.
    training["paper's rule, optimal scales"] = replace(rule, scales="optimal"), (first,)
    baselines = {
        "LoRA, 2 bits": (Form(kind="lora"), (replace(base, objective="guided"),)),
        "palettes, 2 bits": (Form(kind="palette"), ()),
        "palettes, 2 bits, trained": (Form(kind="palette"), (first,)),
        "reconstruction, 4 bits": (Reconstruction(), ()),
    }
    optima = {f"{bits:g} bits": forms[frontier_name(bits)] for bits in FRONTIER}
    frontier = {f"{name}, not trained": (form, ()) for name, form in optima.items()}
    frontier |= {name: (form, (first, second)) for name, form in optima.items()}
    for bits, weights in RATES.items():
        for weight in weights:
            stages = first, replace(first, share=0.5, rate_weight=weight)
            frontier[f"{bits:g} bits, rate {weight:g}"] = forms[frontier_name(bits)], stages
    values = {
        **{f"lambda {w:g}": replace(first, feature_weight=w) for w in (0.1, 1.0)},
        **{f"alpha {a:g}": replace(first, density=tuple(beta(a).tolist())) for a in (1.5, 2.0)},
        # Guidance of 4 counts an error without the caption three quarters of one with it.
        "captions dropped 0.4": replace(first, dropped=0.4),
    }
    single = {f"3 levels, {name}": (three, (stage,)) for name, stage in values.items()}
    choices = {
        "3 levels, rate 1e-3": ("lr", 1e-3),
        "3 levels, rate 1e-4": ("lr", 1e-4),
        "3 levels, scales as fast as weights": ("scale_rate", 1.0),
        "3 levels, features not relative": ("relative", False),
        "3 levels, errors not squared": ("squared", False),
        "3 levels, weights not averaged": ("ema", 0.0),
    }
    single |= {f"eta {eta:g}": (forms[f"eta {eta:g}"], (first,)) for eta in ETAS}
    groups = {"paper": paper, "ends": ends, "grids": grids, "training": training}
    groups |= {"baseline": baselines, "frontier": frontier, "one seed": single}
    rows = [
        _row(name, group, form, stages)
        for group, entries in groups.items()
        for name, (form, stages) in entries.items()
    ]
    rows += [
        replace(_row(name, "choices", three, (first,)), changed=(change,))
        for name, change in choices.items()
    ]
    # At the paper's rate, the rates of so few steps of Stage II add up to a 74th of Stage I's; in
    # the paper, to two and a half times as much. So it is here at the rate of Stage I as well.
    faster = {
        ("paper", "+ Stage II at 3e-4"): (rule, (first, second)),
        ("ends", "full precision, Stage II at 3e-4"): (Form(kind="full"), (second,)),
        ("training", "3 levels, Stage II at 3e-4"): (three, (first, second)),
    }
    rows += [
        replace(_row(name, group, form, stages), changed=(("fine_tuning_lr", 3e-4),))
        for (group, name), (form, stages) in faster.items()
    ]
    others = (
        ("QAT-Base, scales as fast as weights", plain, (base,), ("scale_rate", 1.0)),
        ("LoRA, 2 bits, as fast as weights", *baselines["LoRA, 2 bits"], ("low_rank_rate", 1.0)),
    )
    return rows + [
        replace(_row(name, "choices", form, tuple(stages)), changed=(change,))
        for name, form, stages, change in others
    ]


def result_rows(recipes: Mapping[str, Recipe]) -> list[Row]:
    """Returns the rows of the result: two students beside full precision.

    That of 1.99 paper bits is taught as long as notebooks 08 and 09 teach. The smallest has more
    to learn, and its first stage is four times as long, at a third of the rate: as long as rates
    do not fall, the loss stays at a level that is lower for the lower one.

    Arguments:
        recipes: As of `ablation_rows`.
    """
    longer, slower = replace(FIRST, share=4.0), (("lr", 1e-4),)
    sizes = {
        "1.99 paper bits": (
            "optimum",
            {"not trained": (), "Stage I": (FIRST,), "Stage II": (FIRST, SECOND)},
        ),
        "smallest": (
            frontier_name(FRONTIER[0]),
            {"not trained": (), "Stage I": (longer,), "Stage II": (longer, SECOND)},
        ),
    }
    rows = [_row("full precision", "result", Form(kind="full"), ())]
    for size, (recipe, taught) in sizes.items():
        form = Form(levels=tuple(recipes[recipe].levels.items()))
        for name, stages in taught.items():
            changed = slower if longer in stages else ()
            rows.append(replace(_row(f"{size}, {name}", "result", form, stages), changed=changed))
    return rows


def _row(name: str, group: str, form: Form | Reconstruction, stages: Sequence[Stage]) -> Row:
    # Without chance there is nothing that a seed would change.
    one = group in ONE_SEED or is_certain(form, stages)
    return Row(name=name, group=group, form=form, stages=stages, seeds=(0,) if one else (0, 1, 2))


def is_certain(form: Form | Reconstruction, stages: Sequence[Stage]) -> bool:
    """Whether a student is the same for each seed."""
    return isinstance(form, Form) and not stages


def frontier_name(bits: float) -> str:
    """Returns what the recipe of so many stored bits is called."""
    return f"optimum of {bits:g} bits"
