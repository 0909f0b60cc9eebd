"""How long and how fast something is trained."""

__all__ = ["Plan"]

from contextlib import suppress
from dataclasses import dataclass

from bf_lib.training_log import LOGGED

# Of the forward pass. There is no float16, whose small gradients would need a factor.
PRECISIONS = ("no", "bf16")


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train."""

    steps: int
    batch: int  # over all processes
    lr: float
    warmup: int = 100  # steps of linear warm-up
    decay: float = 0.5  # share of the steps, at the end, in which the rate falls linearly to zero
    ema: float = 0.999
    weight_decay: float = 0.01
    clip: float = 1.0  # largest gradient norm
    rates: tuple[tuple[str, float], ...] = ()  # end of a parameter's name, factor of its rate
    accumulate: int = 1  # parts of a batch, one after the other as far as processes do not share
    precision: str = "no"  # of the forward pass: "no" is that of the weights, or "bf16"
    seed: int = 0
    save_every: int = 200  # steps; a multiple of `LOGGED`, so that no row is cut by a kill

    def __post_init__(self) -> None:
        wanted = {
            "steps": self.steps >= 1,
            "batch": self.batch >= 1,
            "accumulate": self.accumulate >= 1,
            "save_every": self.save_every >= 1 and self.save_every % LOGGED == 0,
            "decay": 0 <= self.decay <= 1,
            "ema": 0 <= self.ema < 1,
            "lr": self.lr > 0,
            "clip": self.clip > 0,
            "precision": self.precision in PRECISIONS,
        }
        wrong = [f"{name}={getattr(self, name)!r}" for name, good in wanted.items() if not good]
        if wrong:
            raise ValueError(f"impossible training plan: {', '.join(wrong)}")

    def rate(self, step: int) -> float:
        """Returns the learning rate at a step."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        falling = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.lr * min(rising, falling)

    def factor(self, name: str) -> float:
        """Returns by what the learning rate of a parameter is multiplied."""
        return next((factor for end, factor in self.rates if name.endswith(end)), 1.0)

    def shares(self, processes: int) -> tuple[int, int]:
        """Returns in how many parts each process takes its share of a batch, and their size.

        Raises:
            ValueError: If they cannot be of one size.
        """
        parts = max(1, self.accumulate // processes)
        size, rest = divmod(self.batch, processes * parts)
        if rest:
            raise ValueError(
                f"a batch of {self.batch} cannot be shared by {processes} processes, each of "
                f"which takes {parts} parts of one size (accumulate={self.accumulate})"
            )
        return parts, size

    def largest(self, processes: int) -> int:
        """Returns how many of so many processes can share a batch; 1 if no number of them can."""
        for count in range(processes, 1, -1):
            with suppress(ValueError):
                self.shares(count)
                return count
        return 1
