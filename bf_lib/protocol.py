"""What a study looks at: which prompts and layers, and the sweep over them."""

__all__ = ["study_layers", "study_prompts", "study_sweep"]

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bf_lib.layers import Layer
from bf_lib.paths import ROOT
from bf_lib.sampling import Sampler
from bf_lib.scenes import caption, sample_scene
from bf_lib.sensitivity.sweep import Sweep
from bf_lib.study import Study


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
    if study.layers is None or study.layers >= len(layers):
        return list(layers)
    chosen: list[Layer] = []
    for place in np.linspace(0, len(layers) - 1, study.layers):
        roles = {layer.role for layer in chosen}
        fresh = [layer for layer in layers if layer not in chosen and layer.role not in roles]
        left = fresh or [layer for layer in layers if layer not in chosen]
        chosen.append(min(left, key=lambda layer: abs(layer.depth - place)))
    return sorted(chosen, key=lambda layer: layer.depth)


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
