"""Which rows the ablation has, and the result (BitsFusion, Tables 3 to 7)."""

__all__ = [
    "ETAS",
    "FRONTIER",
    "ONE_SEED",
    "RULED",
    "ablation_rows",
    "frontier_name",
    "result_rows",
]

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bf_lib.curriculum import FIRST, SECOND, Row, Stage, is_certain
from bf_lib.forms import Form
from bf_lib.recipe import Recipe
from bf_lib.reconstruction import Reconstruction
from bf_lib.times import beta, uniform

FRONTIER = (1.83, 2.0, 2.3, 3.0, 4.0)  # stored bits of students of both stages
ETAS = (0.0, 0.3, 0.5)  # of the paper's Table 5
RULED = 2.0  # stored bits of recipes by these; at more, there is little to be seen
# Groups of points along a line, of values of the paper's, and of what it does not say.
ONE_SEED = ("frontier", "one seed", "choices")
# Weights of a rate term, in half a Stage I more, by stored bits.
RATES = {1.83: (0.0, 0.001, 0.003), 2.0: (0.0, 0.001, 0.003, 0.01)}


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
    do not fall, the loss stays at a level that is lower for the lower one. That it becomes smaller
    still, the length of its codes is part of the loss of another 1,000 steps, with a weight of
    .001. Another weight, of one training, was added when its first scores were known.

    Arguments:
        recipes: As of `ablation_rows`.
    """
    longer, slower = replace(FIRST, share=4.0), (("lr", 1e-4),)
    rated = {w: (longer, replace(FIRST, rate_weight=w)) for w in (0.0003, 0.001)}
    others = {f"with a rate term of {w:g}": stages for w, stages in rated.items() if w != 0.001}
    students = {"not trained": (), "Stage I": (FIRST,), "Stage II": (FIRST, SECOND)}
    smallest = {"not trained": (), "Stage I": (longer,), "Stage II": (longer, SECOND)}
    smallest |= {"with a rate term": rated[0.001], **others}
    sizes = {
        "1.99 paper bits": (recipes["optimum"], students),
        "smallest": (recipes[frontier_name(FRONTIER[0])], smallest),
    }
    rows = [_row("full precision", "result", Form(kind="full"), ())]
    for size, (recipe, taught) in sizes.items():
        form = Form(levels=tuple(recipe.levels.items()))
        for name, stages in taught.items():
            row = _row(f"{size}, {name}", "result", form, stages)
            row = replace(row, changed=slower if longer in stages else ())
            rows.append(replace(row, seeds=(0,)) if name in others else row)
    return rows


def _row(name: str, group: str, form: Form | Reconstruction, stages: Sequence[Stage]) -> Row:
    # Without chance there is nothing that a seed would change.
    one = group in ONE_SEED or is_certain(form, stages)
    return Row(name=name, group=group, form=form, stages=stages, seeds=(0,) if one else (0, 1, 2))


def frontier_name(bits: float) -> str:
    """Returns what the recipe of so many stored bits is called."""
    return f"optimum of {bits:g} bits"
