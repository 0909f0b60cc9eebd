"""What a step of Stage I costs, beside its parts (BitsFusion, §4.2)."""

__all__ = ["step_costs"]

import copy
import time
from collections.abc import Callable
from statistics import median

import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

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
        Columns what ("teacher, forward", "plain fine-tuning" and "Stage I"), seconds, and kept_mb:
        what is kept from the forward pass for the one back, beside the parameters.
    """
    plain = copy.deepcopy(teaching.teacher).requires_grad_(True)
    generator = torch.Generator()

    drawn = teaching.draw(size, generator.manual_seed(0))

    def of_teacher() -> None:  # of examples that the student's part of the step has drawn
        with torch.no_grad():
            predicted(teaching.teacher, drawn)

    def fine_tuning() -> Tensor:
        batch = teaching.draw(size, generator.manual_seed(0))
        return noise_loss(predicted(plain, batch), batch.noise)

    def stage_one() -> Tensor:
        return teaching.loss(0, size, generator.manual_seed(0))["loss"]

    steps = {
        "teacher, forward": (of_teacher, None),
        "plain fine-tuning": (fine_tuning, plain),
        "Stage I": (stage_one, teaching.model),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, (loss, model) in steps.items():
            took = _timed(loss, model, teaching.device)
            if turn:  # the first is slower than those after it
                seconds[name].append(took)
    return pd.DataFrame(
        {
            "what": list(steps),
            "seconds": [median(values) for values in seconds.values()],
            "kept_mb": [_kept_bytes(loss, model) / 1e6 for loss, model in steps.values()],
        }
    )


def _timed(
    loss: Callable[[], Tensor | None], model: nn.Module | None, device: torch.device
) -> float:
    started = time.perf_counter()
    found = loss()
    if model is not None:
        found.backward()
        model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _kept_bytes(loss: Callable[[], Tensor | None], model: nn.Module | None) -> int:
    """Returns the bytes of all that autograd keeps, each piece of memory once."""
    if model is None:
        return 0
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with saved_tensors_hooks(keep, lambda value: value):
        loss()
    return sum(kept.values())
