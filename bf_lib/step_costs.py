"""What a step of Stage I costs, beside its parts (BitsFusion, §4.2)."""

__all__ = ["step_costs"]

import copy
import time
from collections.abc import Callable
from statistics import median

import pandas as pd
import torch
from torch import nn

from bf_lib.distillation import noise_loss
from bf_lib.teaching import Teaching, predicted


def step_costs(teaching: Teaching, size: int, repeats: int = 5) -> pd.DataFrame:
    """Times steps of a student, of its teacher, and of a plain copy of it, in turns.

    Optimizers are left out: they are the same for all.

    Arguments:
        teaching: The student and its teacher.
        size: Samples of a step.
        repeats: Of each; medians are reported.

    Returns:
        Columns what ("teacher, forward", "plain fine-tuning", "Stage I" and "Stage I / sum of the
        others") and value (seconds, and the quotient).
    """
    plain = copy.deepcopy(teaching.teacher).requires_grad_(True)
    generator = torch.Generator()

    def forward() -> None:
        with torch.no_grad():
            predicted(teaching.teacher, teaching.draw(size, generator.manual_seed(0)))

    def fine_tune() -> None:
        batch = teaching.draw(size, generator.manual_seed(0))
        noise_loss(predicted(plain, batch), batch.noise).backward()
        _forget(plain)

    def stage_one() -> None:
        teaching.loss(0, size, generator.manual_seed(0))["loss"].backward()
        _forget(teaching.model)

    steps = {"teacher, forward": forward, "plain fine-tuning": fine_tune, "Stage I": stage_one}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            took = _timed(step, teaching.device)
            if turn:  # the first is slower than those after it
                seconds[name].append(took)
    found = {name: median(values) for name, values in seconds.items()}
    whole, *parts = found["Stage I"], found["teacher, forward"], found["plain fine-tuning"]
    found["Stage I / sum of the others"] = whole / sum(parts)
    return pd.DataFrame({"what": list(found), "value": list(found.values())})


def _timed(step: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _forget(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None
