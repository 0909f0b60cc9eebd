"""How a UNet is to be packed, in the words of diffusers."""

__all__ = ["BitsFusionConfig"]

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor

from bf_lib.checkpoint import COMPRESSIONS, FORMAT, KEY, CheckpointError
from bf_lib.packed_weights import SCALES, packed_weight
from bf_lib.recipe import Recipe
from bf_lib.timecache import cache_time_features_


class Method(str, Enum):  # noqa: UP042 - diffusers asks for a `value`, and compares with text
    """The name of the method, as diffusers wants it."""

    BITSFUSION = KEY


class BitsFusionConfig(QuantizationConfigMixin):
    """How a UNet is to be packed: `from_pretrained(folder, quantization_config=...)`.

    What a packed checkpoint was made with is in its own header; its config.json only says that it
    is one.

    Arguments:
        recipe: The levels of each layer; None for a checkpoint that is packed already.
        timesteps: The time-steps whose features are cached in place of the time layers, for
            example `sampling_steps(scheduler, 50)`; None keeps the time layers.
        scales: "alternating", as the paper takes them, "optimal" or "minmax".
        features: What time features are stored in: "float16" or "float32".
        compress: None, or "zstd" to save fewer bytes, entropy-coded.
        source: What the model is called in the header.
    """

    def __init__(
        self,
        recipe: Recipe | Mapping[str, int] | None = None,
        *,
        timesteps: Sequence[float] | Tensor | None = None,
        scales: str = "alternating",
        features: str = "float16",
        compress: str | None = None,
        source: str = "",
        quant_method: str = KEY,
        format: int = FORMAT,
    ) -> None:
        if quant_method != KEY or format != FORMAT:
            raise CheckpointError(f"{quant_method!r} of format {format!r} is not known")
        if scales not in SCALES:
            raise ValueError(f"scales must be one of {sorted(SCALES)}, got {scales!r}")
        if features not in ("float16", "float32"):
            raise ValueError(f"features must be 'float16' or 'float32', got {features!r}")
        if compress not in COMPRESSIONS:
            raise ValueError(f"compress must be None or 'zstd', got {compress!r}")
        if isinstance(timesteps, int | float):
            raise ValueError("timesteps are those to cache, as `sampling_steps` lists them")
        is_recipe = isinstance(recipe, Recipe) or recipe is None
        self.quant_method = Method.BITSFUSION
        self.recipe = recipe if is_recipe else Recipe(recipe)
        self.timesteps = None if timesteps is None else [float(t) for t in timesteps]
        self.scales, self.features, self.compress, self.source = scales, features, compress, source

    def stored(self, name: str, value: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Returns what is stored of a parameter of the original, by its names.

        Arguments:
            name: Of the parameter.
            value: The parameter.
            scale: The scales of a weight that is packed, if they are known.

        Raises:
            ValueError: If a weight cannot be packed; it says which layer it is.
        """
        layer = name.removesuffix(".weight")
        levels = self.recipe.levels.get(layer)
        if levels is None or layer == name:
            return {name: rounded(value)}
        try:
            packed = packed_weight(value, levels, self.scales if scale is None else scale)
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from error
        return dict(zip((f"{layer}.words", f"{layer}.scale"), packed, strict=True))

    def cache_(self, unet: UNet2DConditionModel) -> None:
        """Replaces the time layers of a UNet by cached features, if there are to be any."""
        if self.timesteps is not None:
            cache_time_features_(unet, self.timesteps, getattr(torch, self.features))

    def to_dict(self) -> dict[str, Any]:
        """Returns what config.json says: that it is packed, and in which format."""
        return {"quant_method": KEY, "format": FORMAT}

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the same; diffusers asks for it when it prints a configuration."""
        return self.to_dict()


def rounded(value: Tensor) -> Tensor:
    """Rounds to float16, in its own type, unless it is too large for that."""
    half = value.to(torch.float16).to(value.dtype)
    return half if half.isfinite().all() else value
