"""The study's sizes, by preset: the same code runs at each, only these numbers change.

`smoke` and `mini` run the embedded model in `data/mini` on a laptop's CPU, offline; `sd15` is the
paper's own scale (App. B: SD-v1.5, 256 layers at 1, 2 and 3 bits, 100 prompts). Its trainings
have the paper's steps, rates and density of time-steps, but Stage II has batches of 256 instead
of 1024, and what the paper does not say is as on `mini`: the rates of scales, the average of
weights, clipping, how features are weighted (see `bf_lib.curriculum`).
"""

__all__ = ["PRESETS", "Study"]

from dataclasses import dataclass, fields
from typing import Self

DTYPES = ("float32", "bfloat16", "float16")
COUNTS = (
    *("prompts", "steps", "batch", "threads"),
    *("repeats", "repeat_layers", "trained_layers", "trained_steps", "estimate_batch"),
    *("challenges", "random_recipes", "recipe_sizes", "timed_threads", "peers"),
    *("examples", "student_batch", "student_parts", "student_save_every"),
    *("first_steps", "second_steps", "examined"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """The sizes of one run of the study."""

    preset: str
    model: str  # name in models.MODELS, folder or hub id
    prompts: int  # prompts of the sweep, each with one fixed seed
    steps: int  # sampler steps
    guidance: float  # classifier-free guidance scale; 1 is none
    batch: int  # prompts per forward pass; guidance doubles it
    bits: tuple[int, ...] = (1, 2, 3)  # the paper's b bits, that is 2**b + 1 levels
    layers: int | None = None  # how many layers to sweep, spread over the UNet; None is all 256
    workers: int | None = None  # processes that share the sweep; None is one for each device
    threads: int = 1  # per process; float sums depend on it, so it is never left to the machine
    dtype: str = "float32"
    repeats: int = 3  # sweeps of some layers with other prompts and seeds
    repeat_layers: int = 30  # how many layers they take
    trained_layers: int = 24  # how many layers are also fine-tuned before they are scored
    trained_steps: int = 48  # of that training
    trained_lr: float = 1e-3  # of the layer alone; the paper gives none
    estimate_batch: int = 4  # prompts of an estimate at once: their activations are kept
    challenges: int = 10  # of each of six tasks, for `mini`: what recipes are judged by
    random_recipes: int = 20  # beside which the others are seen, at each of two sizes
    recipe_sizes: int = 6  # sizes at which recipes are compared, the smallest first
    shape_widths: tuple[int, ...] = (320, 640, 1280, 1280)  # SD-v1.5's, of Gaussian weights
    timed_threads: int = 2  # of a process in which packed checkpoints are timed
    student_bits: float | None = None  # stored; of the optimum to train, or notebook 06's recipe
    examples: int = 20_000  # that a student learns from
    student_batch: int = 16
    student_parts: int = 1  # of a batch, one after the other, which takes less memory
    student_precision: str = "no"  # of forward passes in training: that of weights, or "bf16"
    student_save_every: int = 100  # steps between checkpoints
    first_lr: float = 1e-5  # of Stage I, at most; the paper's
    first_steps: int = 20_000  # of Stage I; the paper's
    second_steps: int = 50_000  # of Stage II; the paper's
    second_lr: float = 1e-5  # of Stage II, at most; the paper's
    decay: float = 0.0  # share of each stage, at its end, in which rates fall; none in the paper
    examined: int = 128  # challenges of each task that a student is examined by
    peers: int = 99  # how many other systems store the same UNets, if they are installed

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {self.preset!r}")
        for name in COUNTS:
            _require_count(name, getattr(self, name))
        for name in ("layers", "workers"):
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name))
        if not self.guidance >= 1:
            raise ValueError(f"guidance must be at least 1, got {self.guidance!r}")
        if not self.bits or any(type(b) is not int or b < 1 for b in self.bits):
            raise ValueError(f"bits must be one or more integers from 1 up, got {self.bits!r}")
        if len(set(self.bits)) < len(self.bits):
            raise ValueError(f"bits must differ from each other, got {self.bits!r}")
        for name in ("trained_lr", "first_lr", "second_lr"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be in (0, 1), got {getattr(self, name)!r}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {self.decay!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")

    @classmethod
    def of(cls, preset: str, **overrides: object) -> Self:
        """Returns the sizes of a preset, with single fields overridden.

        Arguments:
            preset: One of `smoke`, `mini` and `sd15`.
            overrides: Fields by name. None keeps the preset's value, which is how a notebook's
                parameter says that it was not given.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
        known = {field.name for field in fields(cls)} - {"preset"}
        if unknown := sorted(set(overrides) - known):
            raise ValueError(f"no such field of a study: {unknown}; there are {sorted(known)}")
        given = {name: value for name, value in overrides.items() if value is not None}
        if "bits" in given:
            given["bits"] = tuple(given["bits"])
        return cls(preset=preset, **(PRESETS[preset] | given))


def _require_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an integer from 1 up, got {value!r}")


_MINI = {
    "model": "mini",
    "prompts": 32,
    "steps": 8,
    "guidance": 4.0,  # notebook 90: from 3 to 7 the images fit their prompts equally well
    "batch": 16,
    "workers": 2,
    "student_bits": 1.83,  # 1.60 paper bits; at 1.99 there is hardly anything to be learnt back
    "first_lr": 3e-4,
    "first_steps": 1000,
    "second_steps": 500,
    "decay": 0.5,
}

PRESETS: dict[str, dict[str, object]] = {
    "smoke": _MINI
    | {"prompts": 2, "steps": 2, "batch": 2, "layers": 6, "workers": 1}
    | {"repeats": 2, "repeat_layers": 3, "trained_layers": 2, "trained_steps": 2}
    | {"challenges": 1, "random_recipes": 2, "recipe_sizes": 2}
    | {"shape_widths": (32, 64, 128, 128), "timed_threads": 1, "peers": 1}
    | {"examples": 8, "student_batch": 2, "first_steps": 2, "second_steps": 2, "examined": 1},
    "mini": _MINI,
    "sd15": {
        "model": "sd15",
        "prompts": 100,  # App. B
        "steps": 50,  # the paper's default sampler; App. B does not say
        "guidance": 7.5,  # as in Table 3; App. B does not say
        "batch": 4,
        "trained_lr": 1e-5,  # the paper's, for its two stages
        "estimate_batch": 1,
        "student_batch": 256,  # the paper's, of Stage I; its Stage II has 1024
        "student_parts": 64,
        "student_precision": "bf16",
        "student_save_every": 1000,  # a checkpoint has 13 GB
    },
}
