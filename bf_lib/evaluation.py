"""The scene benchmark: six tasks in the manner of GenEval, scored by the scene judge.

Ghosh et al., "GenEval", 2023 (https://arxiv.org/abs/2310.11513) ask a detector whether the objects
that a prompt names are in the image, with the right count, colour and place. The same six
tasks are asked here of drawn scenes, with prompts from the training combinations or from those
that were held out.
"""

__all__ = ["TASKS", "Challenge", "challenges", "interval", "passes", "score"]

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from bf_lib.judges import Seen
from bf_lib.scenes import Scene, Thing, describe, relation_of, sample_scene

# task -> the kind of scene it is asked about
TASKS = {
    "single object": "single",
    "two objects": "pair",
    "counting": "count",
    "colours": "single",
    "position": "relation",
    "colour attribution": "pair",
}
_COLOURED = ("colours", "colour attribution")  # tasks whose prompts name colours, held out or not


@dataclass(frozen=True, slots=True)
class Challenge:
    """A prompt, and the scene whose objects must be found in its image."""

    task: str
    prompt: str
    scene: Scene
    coloured: bool  # whether the prompt names the colours; if so, they are judged

    def names(self, wanted: Thing, seen: Seen) -> bool:
        """Whether an object seen is what the prompt says of an object of the scene."""
        colour = not self.coloured or seen.colour == wanted.colour
        return seen.shape == wanted.shape and colour


def challenges(count: int, seed: int, held_out: bool = False) -> list[Challenge]:
    """Draws `count` challenges of each task.

    Arguments:
        count: How many of each task.
        seed: Different seeds draw anew: one to choose settings, one to report. Where prompts are
            few (8 of single objects, 20 of counts, 48 of two objects), they draw the same ones.
        held_out: Whether to ask for combinations that were kept out of training. Their prompts
            always name the colours, which are then judged in every task: many a combination is
            held out by its colour alone.
    """
    rng = np.random.default_rng((2, seed, held_out))
    asked = []
    for task, kind in TASKS.items():
        for _ in range(count):
            scene = sample_scene(rng, kind, held_out)
            while kind == "count" and len(scene.things) == 1:
                scene = sample_scene(rng, kind, held_out)
            coloured = held_out or task in _COLOURED
            asked.append(Challenge(task, describe(scene, coloured), scene, coloured))
    return asked


def passes(challenge: Challenge, seen: Sequence[Seen]) -> bool:
    """Tells whether the objects seen in an image are what its prompt says."""
    wanted = challenge.scene.things
    found = [[s for s in seen if challenge.names(w, s)] for w in wanted]
    if challenge.task == "counting":
        alike = [s for s in seen if s.shape == wanted[0].shape]
        return len(found[0]) == len(alike) == len(wanted)
    if not all(found):
        return False
    if challenge.task != "position":
        return True
    # As GenEval does, the most confident object of each kind stands for it.
    a, b = (max(each, key=lambda s: s.heat) for each in found)
    return relation_of((a.x, a.y), (b.x, b.y)) == challenge.scene.relation


def score(asked: Sequence[Challenge], seen: Sequence[Sequence[Seen]]) -> pd.Series:
    """Returns the share of challenges passed, by task in the order of `TASKS`."""
    rows = [(c.task, passes(c, s)) for c, s in zip(asked, seen, strict=True)]
    table = pd.DataFrame(rows, columns=["task", "passed"])
    return table.groupby("task").passed.mean().reindex(list(TASKS))


def interval(share: float, count: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a share of `count` independent challenges."""
    found = binomtest(round(share * count), count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)
