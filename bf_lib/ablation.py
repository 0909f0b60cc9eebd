"""The ablation of the study: what it takes of the notebooks before, and the command that makes it.

    python -m bf_lib.ablation --rows result   # goes on with what is left of it
    python -m bf_lib.ablation --list          # says what is done and what is left of "mini"

Rows are files, see `bf_lib.taught_rows`; `bf_lib.row_teaching` makes them.
"""

__all__ = ["SETTINGS", "SHIPPED", "ship", "study_ablation", "study_recipes"]

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from diffusers import UNet2DConditionModel

from bf_lib import recipe_study
from bf_lib.ablation_rows import ETAS, FRONTIER, RULED, ablation_rows, frontier_name, result_rows
from bf_lib.allocation import extended
from bf_lib.artifacts import load_json, load_table
from bf_lib.atomic import write_atomically
from bf_lib.curriculum import Setting
from bf_lib.layers import list_layers
from bf_lib.models import fingerprint, load_pipeline
from bf_lib.paths import ROOT, runs_folder
from bf_lib.progress import duration
from bf_lib.protocol import study_setting
from bf_lib.recipe import Recipe
from bf_lib.recipe_study import Choices, by_optimum, by_rule, error_table
from bf_lib.row_teaching import teach_rows
from bf_lib.sampling import Sampler
from bf_lib.sizes import size_report
from bf_lib.study import Study
from bf_lib.taught_rows import Ablation, effort_of, exam_of, state_of
from bf_lib.timecache import sampling_steps

SETTINGS = {
    "mini": Setting(),
    # At least as long as notebooks 08 and 09 teach, which have one student.
    "result": replace(study_setting(Study.of("mini")), asked=(512, 500)),
    "smoke": Setting(
        scenes=8,
        steps=1,
        fine_tuning_steps=1,
        batch=2,
        asked=(1, 200),
        sampler=Sampler(steps=2, guidance=4.0, batch=2),
    ),
}

# What of the result is kept packed, where it is found by a user: the students of the first seed.
SHIPPED = {"mini-stage1": "smallest, Stage I", "mini-stage2": "smallest, Stage II"}


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
    drops = error_table(load_table(folder / "sensitivity.csv"), "clip_drop", layers)[9]

    def rule(size: int, eta: float = 0.3) -> Recipe:
        return by_rule(swept, size, eta, drops)

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
        | {"rule": rule(as_large["optimum"]), "rule as large as 5": rule(as_large["5"])}
        | {f"eta {e:g}": rule(int(RULED * parameters / 8), e) for e in ETAS}
    )


def study_ablation(name: str) -> Ablation:
    """Returns one of the ablations of `SETTINGS`; "result" has rows of its own.

    What it takes of the study is kept, so that finished rows stay what they are when the study is
    run again.

    Raises:
        ValueError: If the model or its judges are not those that finished rows are of.
    """
    setting, folder = SETTINGS[name], ROOT / "data" / "ablation"
    kept = folder / "inputs.json"
    pipe = load_pipeline(setting.model)
    model = fingerprint([*pipe.components.values(), *exam_of(setting).judges()])
    if not kept.exists():
        steps = len(sampling_steps(pipe.scheduler, setting.sampler.steps))
        levels = {n: dict(recipe.levels) for n, recipe in study_recipes(pipe.unet, steps).items()}
        measured = load_json(runs_folder("mini", "08_stage1_distillation") / "fitted_density.json")
        found = {"model": model, "levels": levels, "measured_density": measured}
        write_atomically(kept, json.dumps(found, indent=0).encode())
    inputs = json.loads(kept.read_text())
    if inputs["model"] != model:
        raise ValueError(f"rows in {folder} are of another model or other judges: move it away")
    recipes = {recipe: Recipe(levels) for recipe, levels in inputs["levels"].items()}
    if name == "result":
        rows = result_rows(recipes)
    else:
        rows = ablation_rows(recipes, inputs["measured_density"])
    return Ablation(setting, tuple(rows), folder / name, ROOT / "build" / "ablation" / name)


def ship(ablation: Ablation, shipped: Mapping[str, str], folder: Path) -> None:
    """Copies packed students of the first seed; says which were not made on this machine.

    Arguments:
        ablation: Whose rows.
        shipped: The name of a student's folder -> that of its row.
        folder: Where to.
    """
    rows = {row.name: row for row in ablation.rows}
    for name, row in shipped.items():
        packed = ablation.packed(rows[row], 0)
        if state_of(ablation, rows[row], 0) == "done" and packed.exists():
            shutil.copytree(packed, folder / name, dirs_exist_ok=True)
        else:
            print(f"{folder / name} stays as it is: {row}, seed 0, was not taught here")


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
    left = [task for task in ablation.tasks() if state_of(ablation, *task) != "done"]
    efforts = [effort_of(ablation, *task) for task in left]
    minutes, done, rest = 0.0, 0.0, sum(efforts)
    for count, (row, seed, took) in enumerate(teach_rows(ablation, given.workers), 1):
        effort = effort_of(ablation, row, seed)
        minutes, done, rest = minutes + took, done + effort, rest - effort
        seconds = 60 * rest * minutes / done / given.workers
        more = f"{len(left) - count} left, about {duration(seconds)}"
        print(f"{row.name}, seed {seed}: {took:.1f} min; {more}", flush=True)
    if given.rows == "result":
        ship(ablation, SHIPPED, ROOT / "data" / "checkpoints")
    return 0


if __name__ == "__main__":
    sys.exit(main())
