"""GGUF files and palettes: weights of few bits that are decoded on load into an ordinary UNet."""

__all__ = [
    "load_gguf",
    "load_palettes",
    "palette_of",
    "store_gguf",
    "store_palettes",
]

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bf_lib.layers import all_layers
from bf_lib.models import meta_unet

GGUF_FILE, PALETTE_FILE = "unet.gguf", "palettes.safetensors"
SHIFTS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)  # of the four indices in a byte


# ---- palettes


def palette_of(weight: Tensor, size: int = 4, rounds: int = 1000) -> tuple[Tensor, Tensor]:
    """Finds a palette by k-means, starting from quantiles.

    Each value is the mean of the weights that have it, and each weight has the nearest value.

    Arguments:
        weight: The weights, with shape (*).
        size: The number of values.
        rounds: After which it ends in any case; a few dozen are common.

    Returns:
        The values in float64, ascending, with shape (size,), and their indices in uint8, with
        shape (*).
    """
    ordered = weight.detach().double().flatten().sort().values
    sums = nn.functional.pad(ordered.cumsum(0), (1, 0))
    palette = ordered[(2 * torch.arange(size) + 1) * len(ordered) // (2 * size)]
    bounds = None
    for _ in range(rounds):
        edges = torch.searchsorted(ordered, _midpoints(palette))
        moved = torch.cat([torch.tensor([0]), edges, torch.tensor([len(ordered)])])
        if bounds is not None and torch.equal(moved, bounds):
            break
        bounds, counts = moved, moved.diff()
        # A value that no weight has stays where it is.
        palette = torch.where(counts > 0, sums[bounds].diff() / counts.clamp_min(1), palette)
    return palette, torch.bucketize(weight.detach().double(), _midpoints(palette)).to(torch.uint8)


def _midpoints(palette: Tensor) -> Tensor:
    return (palette[1:] + palette[:-1]) / 2


def store_palettes(unet: UNet2DConditionModel, folder: Path) -> None:
    """Writes indices of 2 bits into palettes of float16, and all else as float16."""
    state = {name: value.half() for name, value in unet.state_dict().items()}
    for layer in all_layers(unet):
        palette, indices = palette_of(unet.get_submodule(layer.name).weight)
        padded = nn.functional.pad(indices.flatten(), (0, -indices.numel() % 4))
        del state[f"{layer.name}.weight"]
        state[f"{layer.name}.palette"] = palette.half()
        state[f"{layer.name}.indices"] = (padded.view(-1, 4) << SHIFTS).sum(1, dtype=torch.uint8)
    unet.save_config(folder)
    save_file(state, folder / PALETTE_FILE)


def load_palettes(folder: Path) -> UNet2DConditionModel:
    """Looks up the weights, in float32."""
    values = load_file(folder / PALETTE_FILE)
    unet = meta_unet(UNet2DConditionModel.load_config(folder))
    for layer in all_layers(unet):
        packed, palette = (values.pop(f"{layer.name}.{part}") for part in ("indices", "palette"))
        indices = (packed[:, None] >> SHIFTS & 3).flatten()[: layer.params]
        values[f"{layer.name}.weight"] = palette.float()[indices.int()]
    return _dense(folder, values)


# ---- GGUF


def store_gguf(unet: UNet2DConditionModel, folder: Path, kind: str, rearranged: bool) -> None:
    """Calls quantize and the writer of the package."""
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    number = GGMLQuantizationType[kind]
    layers = {f"{layer.name}.weight" for layer in all_layers(unet)}
    unet.save_config(folder)
    writer = GGUFWriter(folder / GGUF_FILE, "sd1")
    for name, value in unet.state_dict().items():
        if rearranged and name in layers and value.shape[-1] % 256 and value.numel() % 256 == 0:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(value.shape))
            value = value.reshape(-1, 256)
        if name in layers and value.shape[-1] % 256 == 0:
            writer.add_tensor(name, quantize(value.numpy(), number), raw_dtype=number)
        else:
            writer.add_tensor(name, value.half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_gguf(folder: Path) -> UNet2DConditionModel:
    """Calls the reader and dequantize of the package."""
    from gguf import GGUFReader, dequantize

    stored = GGUFReader(folder / GGUF_FILE).tensors
    values = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type)) for t in stored}
    return _dense(folder, values)


def _dense(folder: Path, values: dict[str, Tensor]) -> UNet2DConditionModel:
    """Builds an ordinary UNet in float32 of tensors that may have other shapes."""
    unet = meta_unet(UNet2DConditionModel.load_config(folder))
    shapes = {name: value.shape for name, value in unet.state_dict().items()}
    state = {name: value.float().reshape(shapes[name]) for name, value in values.items()}
    unet.load_state_dict(state, assign=True)
    return unet.eval()
