"""What a step of Stage I costs, beside its parts (BitsFusion, §4.2)."""

__all__ = ["step_costs"]

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bf_lib.distillation import noise_loss
from bf_lib.noising import predicted
from bf_lib.teaching import Teaching
from bf_lib.timing import medians_in_turns

STATES = 4  # beside a parameter: its gradient, two moments, and an average


def step_costs(
    teaching: Teaching, size: int, repeats: int = 5, precision: str = "no"
) -> pd.DataFrame:
    """Times steps of a student, of its teacher, and of a plain copy of it, in turns.

    Optimizers, and averages of weights, are left out: they are the same for both that are trained.

    Arguments:
        teaching: The student and its teacher.
        size: Samples of a step; of a batch that is taken in parts, those of one.
        repeats: Of each; medians are reported.
        precision: Of the forward pass, as in `Plan`.

    Returns:
        Columns what ("teacher, forward", "plain fine-tuning" and "Stage I"), seconds, kept_mb:
        what is kept from the forward pass for the one back, beside the parameters, and state_mb:
        the parameters, and of what is trained also the gradients, AdamW's two moments and the
        average of weights; the teacher's are not counted twice.
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
    cast = partial(_cast, teaching.device, precision)
    runs = {name: partial(_step, *step, cast) for name, step in steps.items()}
    done = partial(_synchronize, teaching.device)
    medians_in_turns(runs, 1, done)  # the first is slower than those after it
    seconds = medians_in_turns(runs, repeats, done)
    return pd.DataFrame(
        {
            "what": list(steps),
            "seconds": list(seconds.values()),
            "kept_mb": [_kept_bytes(loss, model, cast) / 1e6 for loss, model in steps.values()],
            "state_mb": [_state_bytes(model, teaching) / 1e6 for _, model in steps.values()],
        }
    )


Cast = Callable[[], AbstractContextManager]


def _cast(device: torch.device, precision: str) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _step(loss: Callable[[], Tensor | None], model: nn.Module | None, cast: Cast) -> None:
    with cast():
        found = loss()
    if model is not None:
        found.backward()
        model.zero_grad(set_to_none=True)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _state_bytes(model: nn.Module | None, teaching: Teaching) -> int:
    """Returns the bytes that are there between steps."""
    if model is None:
        return sum(p.nbytes for p in teaching.teacher.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return sum(p.nbytes for p in model.parameters()) + STATES * trained


def _kept_bytes(loss: Callable[[], Tensor | None], model: nn.Module | None, cast: Cast) -> int:
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

    with saved_tensors_hooks(keep, lambda value: value), cast():
        loss()
    return sum(kept.values())
