"""Packed UNets in diffusers: `from_pretrained` and `save_pretrained`, as of any other model.

After `import bf_lib`, diffusers knows the quantization method "bitsfusion". A folder of a packed
UNet is loaded by `from_pretrained(folder)`; a folder of an ordinary one, with
`quantization_config=BitsFusionConfig(recipe=...)`, is packed while it is loaded.
"""

__all__ = ["BitsFusionQuantizer", "first_header"]

from math import prod
from pathlib import Path

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from bf_lib.checkpoint import KEY, Header, decoded, encoded, left_out
from bf_lib.checkpoint_files import checked_files, config_of
from bf_lib.layers import all_layers
from bf_lib.models import meta_unet
from bf_lib.packed_config import BitsFusionConfig
from bf_lib.packed_layers import packed_layers, prepare_
from bf_lib.packed_model import dequantized_, packed_class
from bf_lib.timecache import cached_time_features


class BitsFusionQuantizer(DiffusersQuantizer):
    """Loads and saves packed UNets, and packs plain ones while they are loaded."""

    use_keep_in_fp32_modules = False
    is_serializable = True
    is_trainable = True  # adapters are; packed weights are not

    def __init__(self, quantization_config: BitsFusionConfig, **kwargs: object) -> None:
        super().__init__(quantization_config, **kwargs)
        self.header: Header | None = None
        self.names: set[str] = set()  # of all tensors of the model that is saved
        self.weights: dict[str, int] = {}  # how many each packed layer has
        self.scales: dict[str, nn.Module] = {}  # while a model is packed: name -> layer
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

    def update_device_map(self, device_map: object) -> object:
        """Refuses a disk: packed weights are small, and are buffers, which stay in memory."""
        if isinstance(device_map, dict) and "disk" in map(str, device_map.values()):
            raise ValueError("packed layers cannot be offloaded to disk: put them on the CPU")
        return device_map

    def maybe_update_loaded_keys(self, loaded_keys: list[str], files: list[str]) -> list[str]:
        """Reads the header of a checkpoint, and returns the names that its tensors will have."""
        if self.pre_quantized:
            paths = [Path(file) for file in files]
            self.header = checked_files(config_of(paths[0].parent), paths)
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
            self.header = first_header(model, self.quantization_config)
        prepare_(model, levels, timesteps, self.header.wide)
        layers = packed_layers(model)
        self.weights = {name: prod(layer.shape) for name, layer in layers.items()}
        self.scales = {f"{name}.scale": layer for name, layer in layers.items()}
        model.__class__ = packed_class(type(model))

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors of the model from those of a file, packed or not."""
        if self.pre_quantized:
            return decoded(state_dict, self.header, self.weights)
        state = {}
        for name, value in state_dict.items():
            as_it_is = name in self.unrounded
            state |= {name: value} if as_it_is else self.quantization_config.stored(name, value)
        for name in state.keys() & self.scales.keys():
            # What is loaded gets the type of what is there; that of scales is known only now.
            self.scales[name].scale = torch.empty_like(state[name], device="meta")
        return state

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: object) -> None:
        dtype = model.dtype  # for which diffusers walks over all modules
        for layer in packed_layers(model).values():
            layer.compute_dtype = dtype
        if not self.pre_quantized:
            self.quantization_config.cache_(model)
            if self.dtype is not None:
                nn.Module.to(model, self.dtype)
        self.pre_quantized, self.scales = True, {}

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the tensors to write, and the header."""
        if not safe_serialization:
            raise ValueError("packed models are saved as safetensors only")
        # PEFT leaves its wrappers when adapters are deleted.
        state = {name.replace(".base_layer.", "."): value for name, value in state_dict.items()}
        if wrong := sorted(state.keys() ^ self.names):
            raise ValueError(f"layers were added or renamed since it was packed: {wrong[:3]}")
        written, header = encoded(state, self.header, self.weights)
        return written, header.metadata()

    def _dequantize(self, model: nn.Module) -> nn.Module:
        return dequantized_(model)


def first_header(unet: nn.Module, config: BitsFusionConfig) -> Header:
    """Returns the header of a UNet that is about to be packed, as far as it is known."""
    known = cached_time_features(unet) is not None  # the layers of the original are asked for
    layers = all_layers(meta_unet(unet.config) if known else unet)
    return Header(
        levels=dict(config.recipe.levels),
        left=left_out(layers, config.recipe.levels, known or config.timesteps is not None),
        compress=config.compress,
        made=dict(config.recipe.made) | {"scales": config.scales},
        source=config.source,
    )


# In place of what stood for them: diffusers compares the classes of configurations.
auto.AUTO_QUANTIZER_MAPPING[KEY] = BitsFusionQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[KEY] = BitsFusionConfig
