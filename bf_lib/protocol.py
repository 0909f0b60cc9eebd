"""What a study looks at: which prompts and layers, and the sweep over them."""

__all__ = [
    "optimum_of",
    "spread",
    "study_estimate",
    "study_exam",
    "study_examples",
    "study_layers",
    "study_plan",
    "study_prompts",
    "study_setting",
    "study_sweep",
    "study_trials",
    "training_captions",
    "trials_of",
    "with_training",
]

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from bf_lib.allocation import extended
from bf_lib.curriculum import FIRST, SECOND, Setting
from bf_lib.evaluation import challenges
from bf_lib.examples import folder_examples, scene_examples
from bf_lib.exams import Exam, Student
from bf_lib.layers import Layer, list_layers
from bf_lib.paths import ROOT
from bf_lib.recipe import Recipe
from bf_lib.recipe_study import Choices, by_optimum, error_table, weight_error_table
from bf_lib.sampling import Sampler
from bf_lib.scenes import caption, sample_scene
from bf_lib.sensitivity.estimates import Estimate
from bf_lib.sensitivity.sweep import Sweep
from bf_lib.sensitivity.trained import TrainedSweep, Training
from bf_lib.sizes import size_report
from bf_lib.study import Study
from bf_lib.training_data import HELD_OUT, SCENES
from bf_lib.training_plan import Plan
from bf_lib.trials import Trials


def study_prompts(study: Study, seed: int) -> list[str]:
    """Returns the prompts that a study compares images by.

    For `mini` they are captions of scenes that are drawn anew from the training combinations; the
    language is small, so that some captions were also trained on, with other scenes. For any
    other model they are the first of the 100 PartiPrompts in `data/prompts` (App. B takes 100).

    Arguments:
        study: The study, which says how many prompts.
        seed: Another seed gives other captions; PartiPrompts are always the same.
    """
    if study.model != "mini":
        table = pd.read_csv(ROOT / "data" / "prompts" / "parti100.csv", dtype=str)
        if study.prompts > len(table):
            raise ValueError(f"there are {len(table)} PartiPrompts, not {study.prompts}")
        return table.prompt.head(study.prompts).tolist()
    rng = np.random.default_rng((7, 1, seed))
    return [caption(sample_scene(rng), rng) for _ in range(study.prompts)]


def study_layers(study: Study, layers: Sequence[Layer]) -> list[Layer]:
    """Returns the layers that a study sweeps: all, or a few spread over depth and roles."""
    return list(layers) if study.layers is None else spread(layers, study.layers)


def spread(layers: Sequence[Layer], count: int) -> list[Layer]:
    """Returns some of the layers, spread over depth, of every role before any role twice."""
    if count >= len(layers):
        return list(layers)
    chosen: list[Layer] = []
    for place in np.linspace(0, len(layers) - 1, count):
        roles = {layer.role for layer in chosen}
        fresh = [layer for layer in layers if layer not in chosen and layer.role not in roles]
        left = fresh or [layer for layer in layers if layer not in chosen]
        chosen.append(min(left, key=lambda layer: abs(layer.depth - layers[round(place)].depth)))
    return sorted(chosen, key=lambda layer: layer.depth)


def training_captions(count: int, seed: int, other_than: Sequence[str]) -> list[str]:
    """Returns captions to train candidates on: of drawn scenes, for any model.

    Arguments:
        count: How many.
        seed: Another seed gives others.
        other_than: Prompts that must not be trained on.
    """
    rng = np.random.default_rng((7, 2, seed))
    found: list[str] = []
    while len(found) < count:
        text = caption(sample_scene(rng), rng)
        if text not in other_than:
            found.append(text)
    return found


def study_sweep(
    study: Study, prompts: Sequence[str], layers: Sequence[Layer], seed: int = 0
) -> Sweep:
    """Returns the sweep of a study, with the seeds 0, 1, 2, ... for seed 0, then the next."""
    n = len(prompts)
    return Sweep(
        model=study.model,
        prompts=tuple(prompts),
        seeds=tuple(range(seed * n, (seed + 1) * n)),
        sampler=Sampler(steps=study.steps, guidance=study.guidance, batch=study.batch),
        bits=study.bits,
        layers=tuple(layer.name for layer in layers),
        metrics="mini" if study.model == "mini" else "sd15",
        threads=study.threads,
        dtype=study.dtype,
    )


def with_training(study: Study, sweep: Sweep, layers: Sequence[Layer], seed: int) -> TrainedSweep:
    """Returns the sweep of some layers whose candidates are trained before they are scored."""
    captions = training_captions(2 * study.prompts, seed, sweep.prompts)
    training = Training(tuple(captions), study.trained_steps, study.batch, study.trained_lr)
    given = {field.name: getattr(sweep, field.name) for field in fields(sweep)}
    chosen = tuple(layer.name for layer in layers)
    return TrainedSweep(**given | {"layers": chosen}, training=training)


def study_trials(study: Study, recipes: Mapping[str, Recipe], seed: int) -> Trials:
    """Returns the trials of recipes by images that no sensitivity was measured on.

    For `mini` the prompts are challenges, so that its scene judge can say whether images show what
    they ask for. SD-v1.5 has the PartiPrompts of the sweep again, with other seeds.

    Arguments:
        study: The study, which says how many challenges.
        recipes: By their names.
        seed: That of the study; challenges of other seeds than these are left for evaluation.
    """
    judged = (study.challenges, 100 + seed) if study.model == "mini" else None
    asked = [c.prompt for c in challenges(*judged)] if judged else study_prompts(study, seed)
    return trials_of(study_sweep(study, asked, [], seed + 1), recipes, judged)


def trials_of(
    sweep: Sweep, recipes: Mapping[str, Recipe], judged: tuple[int, int] | None = None
) -> Trials:
    """Returns the trials of recipes by the prompts and seeds of a sweep."""
    named = ((name, tuple(recipe.levels.items())) for name, recipe in recipes.items())
    return Trials(sweep, tuple(named), judged)


def study_estimate(
    study: Study, sweep: Sweep, method: str, prompts: int, projections: int
) -> Estimate:
    """Returns the estimate by the first prompts of a sweep, of all that it sweeps.

    Arguments:
        study: The study, which says how many prompts at once.
        sweep: Its prompts and seeds should be others than those of the sweep it is compared with.
        method: One of `sensitivity.METHODS`.
        prompts: How many of its prompts.
        projections: How many for each prompt.
    """
    shared = ("model", "bits", "layers", "threads", "dtype")
    return Estimate(
        prompts=sweep.prompts[:prompts],
        seeds=sweep.seeds[:prompts],
        sampler=replace(sweep.sampler, batch=study.estimate_batch),
        method=method,
        projections=projections,
        **{name: getattr(sweep, name) for name in shared},
    )


def study_exam(study: Study, students: Sequence[Student], seed: int) -> Exam:
    """Returns the exam of students beside full precision.

    For `mini` by challenges that chose nothing. SD-v1.5 has the PartiPrompts of the sweep again,
    with other seeds.

    Arguments:
        study: The study, which says how many challenges.
        students: Packed UNets.
        seed: That of the study; its challenges are others than those of `study_trials`.
    """
    judged = (study.examined, 400 + seed) if study.model == "mini" else None
    asked = [c.prompt for c in challenges(*judged)] if judged else study_prompts(study, seed)
    return Exam(study_sweep(study, asked, [], seed + 3), (), judged, tuple(students))


def optimum_of(
    bits: float, unet: UNet2DConditionModel, estimates: pd.DataFrame, timesteps: int
) -> Recipe:
    """Returns the recipe with the least sum of estimated errors in so many stored bits.

    Arguments:
        bits: For each parameter of the UNet.
        unet: The UNet.
        estimates: Columns name, levels and score, as notebook 03 has them.
        timesteps: How many time-steps' features are stored.

    Raises:
        ImpossibleBudget: If there is no recipe so small.
    """
    layers = list_layers(unet)
    errors = extended(error_table(estimates, "score", layers), weight_error_table(unet, layers))
    choices = Choices.of(unet, layers, errors, timesteps)
    parameters = size_report(unet, None, timesteps).parameters
    return by_optimum(choices, int(bits * parameters / 8))[0]


def study_examples(
    study: Study,
    pipe: StableDiffusionPipeline,
    folder: Path,
    images: str | Path | None = None,
    held_out: bool = False,
) -> Path:
    """Returns the file of what students learn from, which is made if it is missing.

    Arguments:
        study: The study, which says how many.
        pipe: Its model.
        folder: Where the file is kept.
        images: A folder of images, as `folder_examples` takes it; None is scenes, for `mini`.
        held_out: Whether scenes are others, which nothing is trained on; not of images.

    Raises:
        ValueError: If there are no images for another model than `mini`, if images should be held
            out, or if there are not so many scenes.
    """
    if images is not None and held_out:
        raise ValueError("which images are held out is not known: give a folder of these alone")
    if study.examples > SCENES:
        raise ValueError(f"there are {SCENES} scenes to learn from, not {study.examples}")
    if images is not None:
        return folder_examples(pipe, Path(images), folder)
    if study.model != "mini":
        raise ValueError(f"{study.model} learns from images: give a folder of them")
    count, first = study.examples, 0
    if held_out:
        count, first = min(HELD_OUT, count), SCENES
    return scene_examples(study.model, count, folder, first, processes=study.workers or 1)


def study_plan(study: Study, seed: int, stage: int) -> Plan:
    """Returns how a student of the study is taught in Stage I or II, as the ablation's are."""
    return (FIRST, SECOND)[stage - 1].plan(study_setting(study), seed, stage - 1)


def study_setting(study: Study) -> Setting:
    """Returns what trainings of the study share."""
    return Setting(
        model=study.model,
        scenes=study.examples,
        steps=study.first_steps,
        fine_tuning_steps=study.second_steps,
        batch=study.student_batch,
        accumulate=study.student_parts,
        precision=study.student_precision,
        lr=study.first_lr,
        fine_tuning_lr=study.second_lr,
        decay=study.decay,
        save_every=study.student_save_every,
    )
