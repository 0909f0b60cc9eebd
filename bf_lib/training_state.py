"""What a training goes on from after a kill: weights, their averages, moments, and the step."""

__all__ = ["TrainingState", "averages", "load_ema"]

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, eq=False)
class TrainingState:
    """The state of a training in memory, and its checkpoint on disk."""

    folder: Path
    made: dict  # what the training is: its plan, processes, and losses before any step
    names: tuple[str, ...]
    params: tuple[nn.Parameter, ...]
    ema: list[Tensor]  # averages of `params`
    optimizer: torch.optim.Optimizer  # AdamW

    def save(self, step: int) -> None:
        """Writes the checkpoint after so many steps; that of another training is kept beside."""
        tensors = {}
        for name, param, average in zip(self.names, self.params, self.ema, strict=True):
            moments = self.optimizer.state[param]
            tensors |= {
                f"now/{name}": param.detach(),
                f"ema/{name}": average,
                f"mean/{name}": moments["exp_avg"],
                f"square/{name}": moments["exp_avg_sq"],
            }
        meta = {"state": json.dumps(self.made | {"step": step})}
        # Written beside and renamed: a kill leaves the old checkpoint or the new one, and between
        # the two renames that of another training as `replaced`.
        new, checkpoint = self.folder / "new.safetensors", self.folder / CHECKPOINT
        save_file({name: value.contiguous() for name, value in tensors.items()}, new, meta)
        if step <= self.made["plan"]["save_every"] and checkpoint.exists():
            checkpoint.replace(self.folder / "replaced.safetensors")
        new.replace(checkpoint)

    @torch.no_grad()
    def restore(self, reduce: Callable[[Tensor, str], Tensor]) -> int:
        """Loads the checkpoint; returns the next step, 0 where there is none of this training.

        Each process reads it, so those of all machines must see one folder.

        Arguments:
            reduce: Takes a tensor of each process, and "mean"; see `accelerate`.
        """
        path = self.folder / CHECKPOINT
        tensors, saved = _read(path) if path.exists() else ({}, {"step": 0})
        step = saved.pop("step")
        # All go on or none: of losses that differ in a last digit, each could judge differently.
        # And all ask, also one that has no checkpoint, for which the others would wait.
        same = torch.tensor([float(_same(saved, self.made))], device=self.params[0].device)
        if float(reduce(same, "mean")) < 1:
            return 0
        for name, param, average in zip(self.names, self.params, self.ema, strict=True):
            param.copy_(tensors[f"now/{name}"])
            average.copy_(tensors[f"ema/{name}"])
            self.optimizer.state[param] = {
                "step": torch.tensor(float(step), device=param.device),  # as fused AdamW has it
                "exp_avg": tensors[f"mean/{name}"].to(param.device, copy=True),
                "exp_avg_sq": tensors[f"square/{name}"].to(param.device, copy=True),
            }
        return step


def load_ema(model: nn.Module, folder: Path) -> nn.Module:
    """Loads the averaged weights of the checkpoint in `folder` into a module of its kind.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If its weights have other names.
    """
    state = averages(folder)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    if missing := sorted(wanted - set(state)):
        raise ValueError(f"{folder} holds no weights for {missing[:5]}")
    if unexpected := sorted(set(state) - wanted):
        raise ValueError(f"{folder} holds weights of another model: {unexpected[:5]}")
    model.load_state_dict(state, strict=False)  # buffers are not saved
    return model


def averages(folder: Path) -> dict[str, Tensor]:
    """Returns the averaged weights of the checkpoint in `folder`, by name.

    Raises:
        FileNotFoundError: If there is none.
    """
    if not (folder / CHECKPOINT).exists():
        raise FileNotFoundError(f"no training is in {folder}, or none that got to a checkpoint")
    tensors, _ = _read(folder / CHECKPOINT)
    return {name[4:]: value for name, value in tensors.items() if name.startswith("ema/")}


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["state"])


def _same(saved: dict, made: dict) -> bool:
    """Whether two trainings are one: another processor may change the last digits of a loss."""
    known, losses = saved.pop("untrained", {}), made["untrained"]
    rest = {name: value for name, value in made.items() if name != "untrained"}
    return (
        saved == rest
        and known.keys() == losses.keys()
        and all(math.isclose(known[name], losses[name], rel_tol=1e-4) for name in known)
    )
