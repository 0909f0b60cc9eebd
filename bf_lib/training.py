"""A small training loop: data-parallel over processes, resumable, the same result after a kill.

Every random choice is drawn from a generator that is seeded by a digest of (seed, process, step):
of a longer seed, torch's on the CPU would look at 32 bits alone. So a run that was killed and
resumed on the same machines from its last checkpoint ends with the same weights as one that was
not. On CPU two single-thread processes do about 1.3 times the work of one with two threads; each
draws its own part of the batch, so their number is part of what a training is.

Processes, devices and precision are those of `accelerate`: `fit` starts processes on this machine,
one for each GPU where there are any, and `train` is one of them, also of a script under
`accelerate launch` on several machines (not tried on more than this one).
"""

__all__ = ["Plan", "Task", "TrainingFailed", "fit", "train"]

import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from torch import Tensor, nn

from bf_lib.processes import (
    USE_CPU,
    end_with_parent,
    make_deterministic,
    own_device,
    starter,
)
from bf_lib.progress import progress
from bf_lib.training_log import TrainingLog
from bf_lib.training_plan import Plan
from bf_lib.training_state import TrainingState


class TrainingFailed(FloatingPointError):
    """A loss or a gradient is not finite; says at which step, and in which layer first."""


class Task(Protocol):
    """What is trained: a module, and the loss of one part of a batch.

    Only its parameters that require gradients are trained and saved; nothing else may change. What
    a training is, beside its plan, its parameters' names and its losses before any step, can be
    said in an attribute `identity` that JSON can hold.
    """

    model: nn.Module

    def loss(self, step: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns named scalars for `size` samples drawn with `generator`; "loss" is minimised."""


def fit(
    make: Callable[[], Task],
    plan: Plan,
    folder: Path,
    processes: int | None = None,
    threads: int = 1,
    cpu: bool = False,
) -> None:
    """Trains in processes, from the last checkpoint in `folder` where there is one.

    It must be one of the same plan and task. The task is recognised by what it says of itself, by
    the names of what is trained, and by its losses before any training, so that a changed model,
    loss or caption starts over; the checkpoint of another training is kept beside, as `replaced`.

    Arguments:
        make: Builds the task; called once in each process, so it must be picklable.
        plan: The length and rates of the training.
        folder: Where `checkpoint.safetensors` and `log.csv` are kept.
        processes: How many processes share each batch; `plan.batch` must be a multiple. By
            default one for each CUDA device as far as these can share it, or two on the CPU.
        threads: Threads of each process.
        cpu: Whether CUDA devices are left alone, for tasks whose tensors are on the CPU.

    Raises:
        ProcessRaisedException: With the error of the process that failed first.
        ValueError: If processes outnumber the CUDA devices, or cannot share a batch.
    """
    gpus = 0 if cpu else torch.cuda.device_count()
    processes = processes or (plan.largest(gpus) if gpus else 2)
    if gpus and processes > gpus:  # NCCL joins no two processes on one device
        raise ValueError(f"{processes} processes need a CUDA device each; there are {gpus}")
    plan.shares(processes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    method = starter(__name__).get_start_method()
    arguments = (processes, port, threads, gpus == 0, make, plan, folder)
    mp.start_processes(_started, arguments, nprocs=processes, start_method=method)


def _started(
    rank: int,
    world: int,
    port: int,
    threads: int,
    cpu: bool,
    make: Callable[[], Task],
    plan: Plan,
    folder: Path,
) -> None:
    end_with_parent()
    torch.set_num_threads(threads)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    place |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": threads}
    place[USE_CPU] = cpu
    os.environ |= {name: str(value) for name, value in place.items()}
    train(make, plan, folder)


def train(make: Callable[[], Task], plan: Plan, folder: Path) -> None:
    """Trains in this process, one of those that `accelerate` knows of, or the only one.

    Arguments:
        make, plan, folder: As in `fit`; a folder that the processes of all machines see.

    Raises:
        TrainingFailed: If a loss or gradient is not finite; the last checkpoint stays.
    """
    make_deterministic(torch.get_num_threads())
    device = own_device()
    accelerator = Accelerator(mixed_precision=plan.precision)
    world, rank = accelerator.num_processes, accelerator.process_index
    parts_each, size = plan.shares(world)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)  # the same initial weights in each process
    task = make()
    task.model.to(device).train()
    trained = [(n, p) for n, p in task.model.named_parameters() if p.requires_grad]
    names, params = zip(*trained, strict=True)
    made = {"plan": asdict(plan), "processes": world, "untrained": _losses(task, plan.seed)}
    made |= {"names": names, "identity": getattr(task, "identity", None)}
    made = json.loads(json.dumps(made))  # tuples become lists
    ema = [p.detach().clone() for p in params]
    # Gradients of deep layers can be below its epsilon of 1e-8: these move less than their rate.
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in trained if plan.factor(n) == factor], "factor": factor}
            for factor in dict.fromkeys(plan.factor(name) for name in names)
        ],
        plan.lr,
        betas=(0.9, 0.99),
        weight_decay=plan.weight_decay,
        fused=True,
    )
    state = TrainingState(folder, made, names, params, ema, optimizer)
    first = state.restore(accelerator.reduce)
    main = accelerator.is_main_process
    log = TrainingLog(folder / "log.csv", first, plan.steps) if main else None
    steps = range(first, plan.steps)
    for step in progress(steps, desc=f"train {folder.name}") if log else steps:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step) * group["factor"]
        places = range(step * parts_each, (step + 1) * parts_each)
        seeds = [seed_of(plan.seed, rank, place) for place in places]
        optimizer.zero_grad(set_to_none=False)
        parts = []
        for seed in seeds:
            torch.manual_seed(seed)  # of dropout, if the model has any
            with accelerator.autocast():
                scalars = task.loss(step, size, torch.Generator().manual_seed(seed))
            (scalars["loss"] / parts_each).backward()
            parts.append({name: value.detach() for name, value in scalars.items()})
        if unused := [name for name, p in trained if p.grad is None]:
            raise ValueError(f"the loss does not depend on {unused[:5]}: freeze what is not used")
        mine = nn.utils.get_total_norm([p.grad for p in params]).isfinite()
        _average_gradients(accelerator, params)
        norm = nn.utils.get_total_norm([p.grad for p in params])
        if not torch.isfinite(norm):  # before clipping, which would make all of them NaN
            if mine:  # another process is at fault, and names the layer
                accelerator.wait_for_everyone()
            with accelerator.autocast():
                where = _first_broken(task, step, size, seeds, trained)
            raise TrainingFailed(f"the gradient is not finite at step {step}: {where}")
        nn.utils.clip_grads_with_norm_(params, plan.clip, norm)
        optimizer.step()
        keep = min(plan.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - keep)
        if log:
            means = {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}
            log.add(step, plan.rate(step), means)
            if (step + 1) % plan.save_every == 0 or step + 1 == plan.steps:
                state.save(step + 1)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def seed_of(seed: int, rank: int, step: int) -> int:
    """Returns the seed of what a process draws in a step, of 32 bits."""
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0])


@torch.no_grad()
def _losses(task: Task, seed: int) -> dict[str, float]:
    """Returns the losses of a small batch, the same in each process."""
    scalars = task.loss(0, 8, torch.Generator().manual_seed(seed))
    return {name: float(value) for name, value in scalars.items()}


def _average_gradients(accelerator: Accelerator, params: tuple[nn.Parameter, ...]) -> None:
    if accelerator.num_processes == 1:
        return
    flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in params]), "mean")
    parts = flat.split([p.numel() for p in params])
    torch._foreach_copy_(
        [p.grad for p in params], [f.view_as(p) for f, p in zip(parts, params, strict=True)]
    )


@torch.no_grad()
def _first_broken(
    task: Task,
    step: int,
    size: int,
    seeds: Sequence[int],
    trained: Sequence[tuple[str, nn.Parameter]],
) -> str:
    """Says where something that is not finite comes from: repeats a step and looks at each layer.

    A forward pass meets it first in the layer at fault. Where it has only finite numbers, the
    gradient met it first in one of the layers whose gradients are not finite, which are named
    from the last.
    """
    broken: list[str] = []

    def look(name: str, out: object) -> None:
        parts = out if isinstance(out, tuple) else [out]
        if not all(p.isfinite().all() for p in parts if isinstance(p, Tensor)):
            broken.append(name)

    hooks = [  # of which those of inner modules are called before those around them
        module.register_forward_hook(lambda _, __, out, name=name: look(name, out))
        for name, module in task.model.named_modules()
    ]
    try:
        for seed in seeds:
            task.loss(step, size, torch.Generator().manual_seed(seed))
    finally:
        for hook in hooks:
            hook.remove()
    if broken:
        name = broken[0].split(".parametrizations")[0]
        return f"the first that is not is the output of {name or 'the model'}"
    names = [name for name, p in reversed(trained) if not p.grad.isfinite().all()]
    if not names:
        return "all outputs and gradients are, but together these are too large"
    return f"all outputs are, but not the gradients of {', '.join(names[:3])}"
