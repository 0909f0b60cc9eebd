"""The scene benchmark: six tasks in the manner of GenEval, scored by the scene judge.

Ghosh et al., "GenEval", 2023 (https://arxiv.org/abs/2310.11513) ask a detector whether the objects
that a prompt names are in the image, with the right count, colour and place. The same six
tasks are asked here of drawn scenes, with prompts from the training combinations or from those
that were held out.
"""

__all__ = ["TASKS", "Challenge", "challenges", "passes", "score"]

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bf_lib.judges import Seen
from bf_lib.scenes import Scene, describe, relation_of, sample_scene

# task -> the kind of scene it is asked about
TASKS = {
    "single object": "single",
    "two objects": "pair",
    "counting": "count",
    "colours": "single",
    "position": "relation",
    "colour attribution": "pair",
}
_COLOURED = ("colours", "colour attribution")


@dataclass(frozen=True, slots=True)
class Challenge:
    """A prompt, and the scene whose objects must be found in its image."""

    task: str
    prompt: str
    scene: Scene
    held_out: bool


def challenges(count: int, seed: int, held_out: bool = False) -> list[Challenge]:
    """Draws `count` challenges of each task.

    Arguments:
        count: How many of each task.
        seed: Different seeds give different challenges: one to choose settings, one to report.
        held_out: Whether to ask for combinations that were kept out of training. Their prompts
            always name the colours: "a blue star" also for the task of a single object.
    """
    rng = np.random.default_rng((2, seed, held_out))
    asked = []
    for task, kind in TASKS.items():
        for _ in range(count):
            scene = sample_scene(rng, kind, held_out)
            while kind == "count" and len(scene.things) == 1:
                scene = sample_scene(rng, kind, held_out)
            prompt = describe(scene, colour=held_out or task in _COLOURED)
            asked.append(Challenge(task, prompt, scene, held_out))
    return asked


def passes(challenge: Challenge, seen: Sequence[Seen]) -> bool:
    """Tells whether the objects seen in an image meet the challenge of its prompt."""
    wanted = challenge.scene.things
    if challenge.task == "counting":
        return sum(thing.shape == wanted[0].shape for thing in seen) == len(wanted)
    coloured = challenge.task in _COLOURED
    found = [
        [s for s in seen if s.shape == w.shape and (not coloured or s.colour == w.colour)]
        for w in wanted
    ]
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
