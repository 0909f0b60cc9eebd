"""Time features that are computed once, instead of at each step (BitsFusion, §4.1 and App. C).

What a ResBlock takes from the time-step t is its own projection of one embedding of t,

    F_t = W act(e(t)) + b,

which depends on nothing else. So for the few time-steps of a sampler the features are computed
once, and both e and all the projections are removed: in SD-v1.5, 27.9 M weights of which 50 steps
need 1.0 M numbers. The UNet then reads its features from the cache inside its ordinary forward
pass, whoever calls it. It knows no other time-steps: an unknown one is an error.

A cached UNet passes on, where there was the embedding, the place of the time-step in the cache as
a one-hot vector. Activations on the way keep its largest element the largest, so that nothing of
the blocks changes but the layer that was the projection.
"""

__all__ = [
    "TimeFeatures",
    "UncachedStep",
    "cache_time_features_",
    "cached_time_features",
    "install_time_features_",
    "sampling_steps",
    "time_features",
    "unknown_features",
]

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn

# What else a UNet may add to the embedding of the time-step, by its configuration.
OTHER_INPUTS = (
    "class_embed_type",
    "addition_embed_type",
    "time_cond_proj_dim",
    "num_class_embeds",
)

LISTED = 50  # time-steps that an error names


class UncachedStep(ValueError):
    """The UNet was asked for a time-step whose features are not in its cache."""


@dataclass(frozen=True, slots=True, eq=False)
class TimeFeatures:
    """What each ResBlock takes from each of some time-steps."""

    timesteps: Tensor  # (steps,), float32, rising
    features: dict[str, Tensor]  # name of a ResBlock's projection -> (steps, width)

    @property
    def numbers(self) -> int:
        """How many numbers are stored: steps times the sum of widths."""
        return sum(values.numel() for values in self.features.values())

    def joined(self, other: Self) -> Self:
        """Returns the features of both, those of `self` where both have a time-step.

        Raises:
            ValueError: If the two are of different UNets, or of different precision.
        """
        ours, theirs = self.features, other.features
        if {n: v.shape[1:] for n, v in ours.items()} != {
            n: v.shape[1:] for n, v in theirs.items()
        }:
            raise ValueError("these are time features of UNets with different layers")
        kinds = {v.dtype for v in [*ours.values(), *theirs.values()]}
        if len(kinds) > 1:
            raise ValueError(f"time features differ in type: {sorted(map(str, kinds))}")
        fresh = ~torch.isin(other.timesteps, self.timesteps)
        timesteps, order = torch.cat([self.timesteps, other.timesteps[fresh]]).sort()
        both = {name: torch.cat([ours[name], theirs[name][fresh]])[order] for name in ours}
        return type(self)(timesteps, both)

    def at(self, timesteps: Iterable[float] | Tensor) -> Self:
        """Returns the features of some of the time-steps, each once.

        Raises:
            UncachedStep: If there are none of one of them.
        """
        wanted = torch.as_tensor([float(t) for t in timesteps]).unique().to(self.timesteps)
        if not torch.isin(wanted, self.timesteps).all():
            missing = wanted[~torch.isin(wanted, self.timesteps)].tolist()
            raise UncachedStep(_not_cached(missing, self.timesteps.tolist()))
        kept = torch.isin(self.timesteps, wanted)
        some = {name: values[kept] for name, values in self.features.items()}
        return type(self)(self.timesteps[kept], some)


def sampling_steps(scheduler: SchedulerMixin, steps: int) -> Tensor:
    """Returns the time-steps at which a scheduler calls the UNet, each once, with shape (n,).

    The scheduler is copied. PNDM calls the UNet twice for one of its time-steps, and some
    schedulers for time-steps in between, so n may be other than the number of steps.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.float().unique()


@torch.no_grad()
def time_features(
    unet: UNet2DConditionModel,
    timesteps: Iterable[float] | Tensor,
    dtype: torch.dtype = torch.float16,
) -> TimeFeatures:
    """Computes what each ResBlock takes from each time-step.

    Arguments:
        unet: The UNet, with its time layers; whatever its precision, these compute in float32.
        timesteps: The time-steps; for several samplers, those of all of them.
        dtype: What the features are stored in. The paper counts 16 bits for each (App. H);
            float16 keeps 11 significant bits of a value, float32 all.

    Raises:
        ValueError: If there are no time-steps; or if the embedding depends on more than them, as
            with SDXL's sizes and with class labels.
    """
    if others := [name for name in OTHER_INPUTS if unet.config.get(name) is not None]:
        raise ValueError(f"time features also depend on other inputs of this UNet: {others}")
    if cached_time_features(unet) is not None:
        raise ValueError("the UNet has no time layers any more: its time features are cached")
    wanted = torch.as_tensor([float(t) for t in timesteps]).unique()
    if len(wanted) == 0:
        raise ValueError("there are no time-steps to cache")
    blocks = dict(_projecting(unet))
    # Copies: what a product rounds to depends on where its factors lie in memory, and those that
    # are mapped from a file lie elsewhere.
    embedding = copy.deepcopy(unet.time_embedding).float()
    projections = {n: copy.deepcopy(block.time_emb_proj).float() for n, block in blocks.items()}
    rows = [_features_of(unet, embedding, blocks, projections, t) for t in wanted]
    features = {name: torch.stack([row[name] for row in rows]).to(dtype) for name in blocks}
    if broken := [name for name, values in features.items() if not values.isfinite().all()]:
        raise ValueError(f"time features of {broken[0]} are NaN or infinite as {dtype}")
    return TimeFeatures(wanted, features)


def unknown_features(
    unet: UNet2DConditionModel, count: int, wide: Collection[str] = ()
) -> TimeFeatures:
    """Returns the shapes of features of so many time-steps, on the meta device.

    Arguments:
        unet: The UNet, with its time layers.
        count: How many time-steps.
        wide: The buffers of features, by their names, that are float32 and not float16.
    """
    features = {
        name: torch.empty(
            count,
            block.time_emb_proj.out_features,
            device="meta",
            dtype=torch.float32 if f"{name}.features" in wide else torch.float16,
        )
        for name, block in _projecting(unet)
    }
    return TimeFeatures(torch.empty(count, device="meta"), features)


def install_time_features_(unet: UNet2DConditionModel, known: TimeFeatures) -> None:
    """Makes a UNet read its time features from a cache, and removes its time layers.

    Arguments:
        unet: The UNet, changed in place; one that has a cache gets this one instead.
        known: The features, of a UNet with the same time layers.
    """
    blocks = dict(_projecting(unet))
    if blocks.keys() != known.features.keys():
        raise ValueError("these are time features of a UNet with other layers")
    device = next(unet.parameters()).device
    unet.time_proj = StepLookup(known.timesteps.to(device))
    unet.time_embedding = Passed()
    for name, block in blocks.items():
        block.time_emb_proj = CachedProjection(known.features[name].to(device))


def cache_time_features_(
    unet: UNet2DConditionModel,
    timesteps: Iterable[float] | Tensor,
    dtype: torch.dtype = torch.float16,
) -> TimeFeatures:
    """Replaces the time layers of a UNet by what `time_features` returns for some time-steps.

    Returns:
        What is now in the cache.
    """
    known = time_features(unet, timesteps, dtype)
    install_time_features_(unet, known)
    return known


def cached_time_features(unet: UNet2DConditionModel) -> TimeFeatures | None:
    """Returns what is in a UNet's cache, or None if it has none."""
    if not isinstance(unet.time_proj, StepLookup):
        return None
    features = {name: block.time_emb_proj.features for name, block in _projecting(unet)}
    return TimeFeatures(unet.time_proj.timesteps, features)


# ---- the modules of a cached UNet


class StepLookup(nn.Module):
    """Stands for the sinusoids: returns the places of time-steps in the cache."""

    def __init__(self, timesteps: Tensor) -> None:
        super().__init__()
        # As integers, since `unet.half()` would round a float buffer: 999.5 to bfloat16's 1000.
        self.register_buffer("timesteps_as_int32", timesteps.float().view(torch.int32))

    @property
    def timesteps(self) -> Tensor:
        """The time-steps in the cache, with shape (steps,), float32, rising."""
        return self.timesteps_as_int32.view(torch.float32)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Returns one-hot vectors with shape (n, steps) for time-steps with shape (n,)."""
        found = timesteps[:, None].float() == self.timesteps
        if torch.compiler.is_compiling():  # a compiled graph cannot make a message of values
            torch._assert_async(found.any(dim=1).all(), "a time-step is not in the cache")
        elif not found.any(dim=1).all():
            missing = timesteps[~found.any(dim=1)].unique().tolist()
            raise UncachedStep(_not_cached(missing, self.timesteps.tolist()))
        return found.float()


class Passed(nn.Module):
    """Stands for the embedding: hands on what it is given."""

    def forward(self, places: Tensor, condition: None = None) -> Tensor:
        """Returns the one-hot vectors."""
        return places


class CachedProjection(nn.Module):
    """Stands for a ResBlock's projection: looks up its features."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)

    def forward(self, places: Tensor) -> Tensor:
        """Returns the features with shape (n, width) for vectors whose largest is the place."""
        return self.features[places.argmax(dim=1)].to(places.dtype)


# ---- helpers


def _projecting(unet: UNet2DConditionModel) -> list[tuple[str, nn.Module]]:
    """Lists the blocks that take time features, by the names of their projections."""
    blocks = [
        (f"{name}.time_emb_proj", module)
        for name, module in unet.named_modules()
        if getattr(module, "time_emb_proj", None) is not None
    ]
    return blocks


def _features_of(
    unet: UNet2DConditionModel,
    embedding: nn.Module,
    blocks: Mapping[str, nn.Module],
    projections: Mapping[str, nn.Module],
    timestep: Tensor,
) -> dict[str, Tensor]:
    """Computes each block's features of one time-step as the forward pass does: shape (width,)."""
    x = torch.empty(1, device=unet.device)
    embedded = embedding(unet.get_time_embed(x, timestep.to(unet.device)))
    if unet.time_embed_act is not None:
        embedded = unet.time_embed_act(embedded)
    return {
        name: projections[name](embedded if block.skip_time_act else block.nonlinearity(embedded))[
            0
        ]
        for name, block in blocks.items()
    }


def _not_cached(missing: list[float], known: list[float]) -> str:
    """Says which time-steps are not there, which are, and how to add one."""
    listed = ", ".join(f"{t:g}" for t in known[:LISTED]) + ", ..." * (len(known) > LISTED)
    return (
        f"time-steps {', '.join(f'{t:g}' for t in missing)} are not in the cache, which has "
        f"{len(known)}: {listed}. To add some, compute them with the UNet that still has its time "
        "layers: install_time_features_(unet, cached_time_features(unet).joined("
        "time_features(full_unet, timesteps)))"
    )
