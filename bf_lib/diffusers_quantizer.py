"""Packed UNets in diffusers: `from_pretrained` and `save_pretrained`, as of any other model.

After `import bf_lib`, diffusers knows the quantization method "bitsfusion". A folder of a packed
UNet is loaded by `from_pretrained(folder)`; a folder of an ordinary one, with
`quantization_config=BitsFusionConfig(recipe=...)`, is packed while it is loaded.
"""

__all__ = [
    "BitsFusionConfig",
    "BitsFusionQuantizer",
    "PackedModel",
    "load_packed",
    "pack_",
    "save_packed",
]

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from bf_lib.checkpoint import (
    FORMAT,
    KEY,
    CheckpointError,
    Header,
    config_digest,
    decoded,
    encoded,
    read_header,
)
from bf_lib.checkpoint_files import checked, config_of, replaced_at_once
from bf_lib.grids import alternating_scale, optimal_scale
from bf_lib.layers import all_layers
from bf_lib.packed_layers import (
    half_scale,
    pack_layer_,
    packed_layers,
    packed_weight,
    prepare_,
    set_residency,
    unpack_layer_,
)
from bf_lib.recipe import Recipe
from bf_lib.sizes import LEFT
from bf_lib.timecache import cache_time_features_, cached_time_features

UNCHANGED = "unchanged"
SCALES = {"alternating": alternating_scale, "optimal": optimal_scale}


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
        scales: "alternating", as the paper takes them, or "optimal".
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
        is_recipe = isinstance(recipe, Recipe) or recipe is None
        self.quant_method = Method.BITSFUSION
        self.recipe = recipe if is_recipe else Recipe(recipe)
        self.timesteps = None if timesteps is None else [float(t) for t in timesteps]
        self.scales, self.features, self.compress, self.source = scales, features, compress, source

    def to_dict(self) -> dict[str, Any]:
        """Returns what config.json says: that it is packed, and in which format."""
        return {"quant_method": KEY, "format": FORMAT}

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the same; diffusers asks for it when it prints a configuration."""
        return self.to_dict()


class PackedModel:
    """What a packed UNet does otherwise than a plain one; mixed into its class."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        compress: str | None = UNCHANGED,
        **kwargs: object,
    ) -> None:
        """Saves as diffusers does, but all at once: see `checkpoint_files.replaced_at_once`.

        Arguments:
            save_directory: The folder.
            is_main_process, save_function, safe_serialization, variant, max_shard_size: As in
                diffusers.
            push_to_hub: Whether to upload it as well, when it is saved.
            compress: "zstd" or None; by default as the model was loaded or packed.
            kwargs: Those of `push_to_hub`.
        """
        if getattr(self, "peft_config", None):
            raise ValueError(
                "the model has adapters: save them with `save_lora_adapter`, and delete them with "
                "`delete_adapters` before the packed weights are saved"
            )
        quantizer, known = self.hf_quantizer, cached_time_features(self)
        header = quantizer.header
        quantizer.header = replace(
            header,
            config=config_digest(json.loads(self.to_json_string())),
            timesteps=None if known is None else len(known.timesteps),
            compress=header.compress if compress == UNCHANGED else compress,
        )
        try:
            with replaced_at_once(save_directory) as place:
                super().save_pretrained(
                    str(place),
                    is_main_process=is_main_process,
                    save_function=save_function,
                    safe_serialization=safe_serialization,
                    variant=variant,
                    max_shard_size=max_shard_size,
                )
        finally:
            quantizer.header = header
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Makes copies and pickles find the class, which no module has by its name."""
        _, _, *rest = super().__reduce_ex__(protocol)
        return (_blank, (type(self).__bases__[1],), *rest)

    def fuse_lora(self, *args: object, **kwargs: object) -> None:
        """Refuses: a sum of weights and a LoRA has no place on a grid of a few levels."""
        raise NotImplementedError(
            "packed weights cannot take up a LoRA: use it unfused, or call `dequantize()` first"
        )

    def num_parameters(
        self, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int:
        """Returns the number of parameters; each packed weight counts as one."""
        packed = sum(prod(layer.shape) for layer in packed_layers(self).values())
        others = super().num_parameters(only_trainable, exclude_embeddings)
        return others + (0 if only_trainable else packed)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Returns the bytes of all tensors that the model holds, decoded weights among them."""
        kept = (layer.__dict__.get("kept") for layer in packed_layers(self).values())
        held = super().get_memory_footprint(return_buffers)
        return held + sum(weight.nbytes for weight in kept if weight is not None)


@cache
def packed_class(kind: type) -> type:
    """Returns the class of packed models of a class, which goes by the same name."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (PackedModel, kind), names | {"__doc__": kind.__doc__})


def _blank(kind: type) -> nn.Module:
    """Returns a packed model of a class, for its state to be filled in."""
    packed = packed_class(kind)
    return packed.__new__(packed)


class BitsFusionQuantizer(DiffusersQuantizer):
    """Loads and saves packed UNets, and packs plain ones while they are loaded."""

    use_keep_in_fp32_modules = False
    is_serializable = True
    is_trainable = True  # adapters are; packed weights are not

    def __init__(self, quantization_config: BitsFusionConfig, **kwargs: object) -> None:
        super().__init__(quantization_config, **kwargs)
        self.header: Header | None = None
        self.weights: dict[str, int] = {}  # how many each packed layer has
        self.unrounded: tuple[str, ...] = ()  # parameters that are needed for time features only
        self.dtype: torch.dtype | None = None  # that a model is packed for
        recipe = quantization_config.recipe
        if not self.pre_quantized and recipe is None:
            raise ValueError("to pack a model while it is loaded, give BitsFusionConfig a recipe")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Packs in float32, whatever the model is to compute in."""
        if self.pre_quantized:
            return torch_dtype
        self.dtype = torch_dtype
        return torch.float32

    def maybe_update_loaded_keys(self, loaded_keys: list[str], files: list[str]) -> list[str]:
        """Reads the header of a checkpoint, and returns the names that its tensors will have."""
        if self.pre_quantized:
            self.header = read_header(files)
            if wrong := sorted(set(loaded_keys) ^ set(self.header.tensors)):
                raise CheckpointError(f"missing or unknown tensors: {', '.join(wrong[:5])}")
            if config_digest(config_of(Path(files[0]).parent)) != self.header.config:
                raise CheckpointError("config.json is not the one that the weights are of")
            frames = {f"{layer}.zstd": [f"{layer}.words"] for layer in self.header.levels}
            return [new for key in loaded_keys for new in frames.get(key, [key])]
        if self.quantization_config.timesteps is not None:
            self.unrounded = tuple(key for key in loaded_keys if "time_emb" in key)
        levels = self.quantization_config.recipe.levels
        made = {f"{layer}.weight": [f"{layer}.words", f"{layer}.scale"] for layer in levels}
        return [new for key in loaded_keys for new in made.get(key, [key])]

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: object) -> None:
        if self.pre_quantized:
            levels, timesteps = self.header.levels, self.header.timesteps
        else:
            self.quantization_config.recipe.check(model)
            levels, timesteps = self.quantization_config.recipe.levels, None
            self.header = _header(model, self.quantization_config)
        prepare_(model, levels, timesteps)
        self.weights = {name: prod(m.shape) for name, m in packed_layers(model).items()}
        model.__class__ = packed_class(type(model))

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors of the model from those of a file, packed or not."""
        if self.pre_quantized:
            return decoded(state_dict, self.header, self.weights)
        state = {}
        for name, value in state_dict.items():
            layer = name.removesuffix(".weight")
            levels = self.quantization_config.recipe.levels.get(layer)
            if name in self.unrounded:
                state[name] = value
            elif levels is None or layer == name:
                state[name] = _rounded(value)
            else:
                packed = _packed(layer, value, levels, self.quantization_config.scales)
                state[f"{layer}.words"], state[f"{layer}.scale"] = packed
        return state

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: object) -> None:
        for layer in packed_layers(model).values():
            layer.compute_dtype = model.dtype
        if not self.pre_quantized:
            if self.quantization_config.timesteps is not None:
                _cache_(model, self.quantization_config)
            if self.dtype is not None:
                nn.Module.to(model, self.dtype)
        self.pre_quantized = True

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the tensors to write, and the header."""
        if not safe_serialization:
            raise ValueError("packed models are saved as safetensors only")
        # PEFT leaves its wrappers when adapters are deleted.
        state = {name.replace(".base_layer.", "."): value for name, value in state_dict.items()}
        if missing := [n for n in self.header.levels if f"{n}.words" not in state]:
            raise ValueError(f"{missing[0]!r} is not where it was packed: a layer was renamed")
        written, header = encoded(state, self.header, self.weights)
        return written, header.metadata()

    def _dequantize(self, model: nn.Module) -> nn.Module:
        for layer in packed_layers(model).values():
            unpack_layer_(layer)
        model.__class__ = type(model).__bases__[1]
        said = {n: v for n, v in model.config.items() if n != "quantization_config"}
        model._internal_dict = FrozenDict(said)
        return model


# ---- packing and saving


def pack_(
    unet: UNet2DConditionModel,
    config: BitsFusionConfig,
    scales: Mapping[str, Tensor] | None = None,
) -> None:
    """Packs a UNet in place, exactly as `from_pretrained` with this configuration would.

    All parameters that are not packed are rounded to float16, which is what they are stored in.

    Arguments:
        unet: The UNet.
        config: How to pack it.
        scales: Scales that are known, by layer, with shape (out, 1, ...) and values of float16, in
            place of those that would be searched for: weights that lie on the grid of their scale
            stay what they are, bit for bit.

    Raises:
        RecipeError: If the recipe is not one for this UNet.
    """
    config.recipe.check(unet)
    quantizer = BitsFusionQuantizer(config, pre_quantized=True)
    quantizer.header = _header(unet, config)
    if config.timesteps is not None:
        _cache_(unet, config)
    modules, known = dict(unet.named_modules()), scales or {}
    for name, levels in config.recipe.levels.items():
        weight = modules[name].weight.detach()
        packed = _packed(name, weight, levels, known.get(name, config.scales))
        pack_layer_(modules[name], levels, *packed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(_rounded(parameter))
    quantizer.weights = {name: prod(m.shape) for name, m in packed_layers(unet).items()}
    unet.__class__ = packed_class(type(unet))
    unet.hf_quantizer, unet.is_quantized = quantizer, True
    unet.quantization_method = config.quant_method
    unet.register_to_config(quantization_config=config)


def save_packed(
    unet: UNet2DConditionModel, folder: str | Path, config: BitsFusionConfig | None = None
) -> None:
    """Saves a UNet packed; the UNet itself stays as it is.

    Arguments:
        unet: A UNet that is packed already, or one to pack.
        folder: Where to.
        config: How to pack it.
    """

    if config is not None:
        unet = copy.deepcopy(unet)
        pack_(unet, config)
    unet.save_pretrained(folder)


def load_packed(
    folder: str | Path, residency: str | int = "packed", subfolder: str = "", **kwargs: object
) -> UNet2DConditionModel:
    """Loads a packed UNet after a look at all that its files say of themselves.

    Arguments:
        folder: A folder in which a packed UNet was saved.
        residency: "packed", "dense", or bytes: see `packed_layers.set_residency`.
        subfolder: Where in the folder it is: "unet" in that of a pipeline.
        kwargs: Others of `from_pretrained`, such as `torch_dtype` and `device_map`.

    Raises:
        CheckpointError: If the checkpoint is damaged, or not one.
    """
    folder = Path(folder) / subfolder
    checked(folder)
    unet = UNet2DConditionModel.from_pretrained(folder, **kwargs)
    set_residency(unet, residency)
    return unet


def _header(unet: nn.Module, config: BitsFusionConfig) -> Header:
    levels = config.recipe.levels
    left = {
        layer.name: layer.excluded or LEFT
        for layer in all_layers(unet)
        if layer.name not in levels
    }
    made = dict(config.recipe.made) | {"scales": config.scales}
    return Header(
        levels=dict(levels), left=left, compress=config.compress, made=made, source=config.source
    )


def _packed(name: str, weight: Tensor, levels: int, scale: Tensor | str) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    try:
        if isinstance(scale, str):
            scale = half_scale(SCALES[scale](weight, levels))
        return packed_weight(weight, levels, scale)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _rounded(value: Tensor) -> Tensor:
    """Rounds to float16, in its own type, unless it is too large for that."""
    half = value.to(torch.float16).to(value.dtype)
    return half if half.isfinite().all() else value


def _cache_(unet: UNet2DConditionModel, config: BitsFusionConfig) -> None:
    cache_time_features_(unet, config.timesteps, getattr(torch, config.features))


# In place of what stood for them: diffusers compares the classes of configurations.
auto.AUTO_QUANTIZER_MAPPING[KEY] = BitsFusionQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[KEY] = BitsFusionConfig
