"""Packing, saving and loading UNets, in a call each."""

__all__ = ["load_packed", "pack_", "pack_student", "save_packed"]

import copy
import ctypes
import gc
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

from diffusers import UNet2DConditionModel
from torch import Tensor

from bf_lib.checkpoint_files import checked
from bf_lib.diffusers_quantizer import BitsFusionQuantizer, first_header
from bf_lib.fakequant import bake_weights_, fake_quantizers
from bf_lib.packed_config import BitsFusionConfig
from bf_lib.packed_layers import Room, pack_layer_, packed_layers, set_residency
from bf_lib.packed_model import PackedModel, packed_class
from bf_lib.timecache import cached_time_features, install_time_features_

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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
        scales: Scales that are known, by layer, with shape (out, 1, ...), in place of those that
            would be searched for: weights that lie on the grid of their scale stay what they are,
            bit for bit. They take 16 bits each where all of a layer are values of float16, else
            32; `packed_weights.stored_scale` makes them so.

    Raises:
        RecipeError: If the recipe is not one for this UNet.
        ValueError: If it cannot be packed. What is wrong with a weight shows when its turn comes:
            the UNet is then packed in part, and of no use.
    """
    if isinstance(unet, PackedModel) or getattr(unet, "peft_config", None):
        raise ValueError(
            "the UNet is packed already, or has adapters: `dequantize()`, or delete them"
        )
    if config.recipe is None:
        raise ValueError("to pack a UNet, give BitsFusionConfig a recipe")
    config.recipe.check(unet)
    quantizer = BitsFusionQuantizer(config, pre_quantized=True)
    quantizer.header = first_header(unet, config)
    config.cache_(unet)
    modules, known, room = dict(unet.named_modules()), scales or {}, Room()
    for name, parameter in list(unet.named_parameters()):
        layer = name.removesuffix(".weight")
        stored = config.stored(name, parameter.detach(), known.get(layer))
        if name in stored:
            parameter.data.copy_(stored[name])
        else:
            pack_layer_(modules[layer], config.recipe.levels[layer], *stored.values(), room)
    quantizer.weights = {name: prod(m.shape) for name, m in packed_layers(unet).items()}
    unet.__class__ = packed_class(type(unet))
    unet.hf_quantizer, unet.is_quantized = quantizer, True
    unet.quantization_method = config.quant_method
    unet.register_to_config(quantization_config=config)


def pack_student(
    student: UNet2DConditionModel,
    timesteps: Iterable[float] | Tensor | None = None,
    compress: str | None = None,
    source: str = "",
) -> UNet2DConditionModel:
    """Returns a student as a packed UNet, ready to be saved; the student stays as it is.

    Codes and scales are those that the student computes with. Biases and norms are rounded to
    float16, in which they are stored.

    Arguments:
        student: What `quantize` made, trained or not.
        timesteps: The time-steps whose features are kept, for example those of
            `sampling_steps(scheduler, 50)`; by default all that the student has.
        compress: None, or "zstd" to save fewer bytes, entropy-coded.
        source: What the model is called in the header.

    Raises:
        UncachedStep: If the student has no features of a time-step.
        ValueError: If it is not what `quantize` made, as of other grids.
    """
    if not hasattr(student, "recipe"):
        raise ValueError("only students that `quantize` made are packed: grids must be balanced")
    unet = copy.deepcopy(student).requires_grad_(False)
    unet.register_to_config(_name_or_path=source)  # not a folder of the machine it was made on
    scales = {name: quantizer.scale for name, quantizer in fake_quantizers(unet).items()}
    bake_weights_(unet)
    if timesteps is not None:
        install_time_features_(unet, cached_time_features(unet).at(timesteps))
    pack_(unet, BitsFusionConfig(student.recipe, compress=compress, source=source), scales)
    header = unet.hf_quantizer.header
    unet.hf_quantizer.header = replace(header, made=dict(header.made) | {"scales": "trained"})
    return unet


def save_packed(
    unet: UNet2DConditionModel, folder: str | Path, config: BitsFusionConfig | None = None
) -> None:
    """Saves a UNet packed; the UNet itself stays as it is.

    Arguments:
        unet: A UNet that is packed already, a student, or one to pack.
        folder: Where to.
        config: How to pack it, if it is neither packed nor a student.
    """
    if fake_quantizers(unet):
        unet = pack_student(unet)
    elif config is not None:
        unet = copy.deepcopy(unet)
        pack_(unet, config)
    unet.save_pretrained(folder)


def load_packed(
    folder: str | Path, residency: str | int = "packed", subfolder: str = "", **kwargs: object
) -> UNet2DConditionModel:
    """Loads a packed UNet after a look at all that its files say of themselves.

    Arguments:
        folder: A folder in which a packed UNet was saved, or a hub id.
        residency: "packed", "dense", or bytes: see `packed_layers.set_residency`.
        subfolder: Where in the folder it is: "unet" in that of a pipeline.
        kwargs: Others of `from_pretrained`, such as `torch_dtype`, `variant` and `device_map`.

    Raises:
        CheckpointError: If the checkpoint is damaged, or not one.
    """
    from_hub = isinstance(folder, str) and HUB_ID.fullmatch(folder) and not Path(folder).is_dir()
    if not from_hub:  # what comes from a hub is looked through when it is there
        checked(Path(folder) / subfolder, kwargs.get("variant"))
    options = {"subfolder": subfolder} if subfolder else {}
    unet = UNet2DConditionModel.from_pretrained(folder, **options, **kwargs)
    set_residency(unet, residency)
    _give_back()
    return unet


def _give_back() -> None:
    """Gives back to the system what was freed while loading, which glibc would keep."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
