"""Students: UNets whose rounded weights are trained."""

__all__ = ["quantize", "with_parametrized_weights"]

import copy
from collections.abc import Callable, Iterable, Mapping

from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bf_lib.fakequant import balanced
from bf_lib.packed_weights import SCALES
from bf_lib.recipe import Recipe
from bf_lib.timecache import cache_time_features_

TRAINED_AT = range(1000)  # the time-steps of SD's noise schedule
Timesteps = Iterable[float] | Tensor | None


def quantize(
    unet: UNet2DConditionModel,
    recipe: Recipe | Mapping[str, int],
    timesteps: Timesteps = TRAINED_AT,
    scales: str = "alternating",
) -> UNet2DConditionModel:
    """Returns a trainable copy of a UNet that computes with rounded weights (BitsFusion, §4.1).

    It is of the same class, and diffusers runs it as it runs the original; its rounded layers are
    of a class that torch's parametrizations make of theirs. All its parameters are trained:
    weights, through a straight-through estimator, scales, biases and norms. Its time features are
    those of the original, as they are stored, and are not trained. It is saved by `save_packed`;
    what its own `save_pretrained` would write, of trained numbers, no UNet reads.

    Arguments:
        unet: The original.
        recipe: The levels of each layer.
        timesteps: The time-steps at which the student can be trained and run, whose features are
            cached; `pack_student` keeps some of them. None keeps the time layers instead.
        scales: How scales are searched for: "alternating", as in the paper (Eq. 5), "optimal" or
            "minmax".

    Returns:
        The student, in float32, with `recipe` as an attribute.

    Raises:
        RecipeError: If the recipe is not one for this UNet.
        ValueError: If scales are not one of these, or a weight is NaN or infinite; it says which
            layer it is.
    """
    if scales not in SCALES:
        raise ValueError(f"scales must be one of {sorted(SCALES)}, got {scales!r}")
    recipe = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
    recipe.check(unet)

    def rounded(name: str, weight: Tensor) -> nn.Module:
        levels = recipe.levels[name]
        return balanced(SCALES[scales](weight, levels), levels)

    student = with_parametrized_weights(unet, recipe.levels, rounded, timesteps)
    student.recipe = recipe
    return student


def with_parametrized_weights(
    unet: UNet2DConditionModel,
    layers: Iterable[str],
    parametrization: Callable[[str, Tensor], nn.Module],
    timesteps: Timesteps = TRAINED_AT,
) -> UNet2DConditionModel:
    """Returns a trainable copy of a UNet, some of whose weights are what a module makes of them.

    Arguments:
        unet: The original.
        layers: The names of the layers.
        parametrization: Makes such a module from the name of a layer and its weight.
        timesteps: As in `quantize`.

    Raises:
        ValueError: If one cannot be made of a weight; it says which layer it is.
    """
    student = copy.deepcopy(unet).float().requires_grad_(True)
    if timesteps is not None:
        cache_time_features_(student, timesteps)
    for name in layers:
        layer = student.get_submodule(name)
        try:
            module = parametrization(name, layer.weight.detach())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        parametrize.register_parametrization(layer, "weight", module)
    return student
