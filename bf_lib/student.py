"""Students: UNets whose rounded weights are trained."""

__all__ = ["quantize"]

import copy
from collections.abc import Iterable, Mapping

from diffusers import UNet2DConditionModel
from torch import Tensor

from bf_lib.fakequant import attach_fake_quantizer_
from bf_lib.packed_weights import SCALES
from bf_lib.recipe import Recipe
from bf_lib.timecache import cache_time_features_

TRAINED_AT = range(1000)  # the time-steps of SD's noise schedule


def quantize(
    unet: UNet2DConditionModel,
    recipe: Recipe | Mapping[str, int],
    timesteps: Iterable[float] | Tensor | None = TRAINED_AT,
    scales: str = "alternating",
) -> UNet2DConditionModel:
    """Returns a trainable copy of a UNet that computes with rounded weights (BitsFusion, §4.1).

    It is of the same class, and diffusers runs it as it runs the original. All its parameters are
    trained: weights, through a straight-through estimator, scales, biases and norms. Its time
    features are those of the original, as they are stored, and are not trained.

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
        ValueError: If a weight is NaN or infinite; it says which layer it is.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
    recipe.check(unet)
    student = copy.deepcopy(unet).float().requires_grad_(True)
    if timesteps is not None:
        cache_time_features_(student, timesteps)
    for name, levels in recipe.levels.items():
        layer = student.get_submodule(name)
        try:
            scale = SCALES[scales](layer.weight.detach(), levels)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        attach_fake_quantizer_(layer, levels, scale)
    student.recipe = recipe
    return student
