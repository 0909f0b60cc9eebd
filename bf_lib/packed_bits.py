"""How many bits a code takes, by how it is stored, and how few it could take."""

__all__ = ["code_costs", "entropy", "layer_costs"]

import math
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from bf_lib.entropy import compressed
from bf_lib.grids import optimal_scale, quantize
from bf_lib.packed_layers import packed_layers
from bf_lib.packing import unpack, word


def code_costs(levels: Sequence[int], count: int = 1 << 20) -> pd.DataFrame:
    """Says how many bits a code takes, by how it is stored.

    Returns:
        Columns levels; log2, the least if all codes were equally frequent; words, as packed here;
        fields, a whole number of bits each; and zstd and entropy, of the codes of Gaussian weights
        with the scale of least error: as stored here, and the least that any code takes.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, count, generator=generator)
    rows = []
    for number in levels:
        codes = quantize(weight, optimal_scale(weight, number), number).codes
        coded = 8 * compressed(codes, number).nbytes / count
        fields = (number - 1).bit_length()
        words = word(number).bits_per_code
        rows.append((number, math.log2(number), words, fields, coded, entropy(codes)))
    return pd.DataFrame(rows, columns=["levels", "log2", "words", "fields", "zstd", "entropy"])


def layer_costs(unet: nn.Module) -> pd.DataFrame:
    """Says how many bits a code of each packed layer takes, by how it is stored.

    Returns:
        Columns name, levels, weights, log2, words, zstd and entropy, as in `code_costs`.
    """
    rows = []
    for name, layer in packed_layers(unet).items():
        count, levels = math.prod(layer.shape), layer.levels
        codes = unpack(layer.words, levels, count)
        sizes = (layer.words.nbytes, compressed(codes, levels).nbytes)
        bits = (math.log2(levels), *(8 * size / count for size in sizes), entropy(codes))
        rows.append((name, levels, count, *bits))
    columns = ["name", "levels", "weights", "log2", "words", "zstd", "entropy"]
    return pd.DataFrame(rows, columns=columns)


def entropy(codes: Tensor) -> float:
    """Returns the entropy of the frequencies of codes, in bits: what no lossless code beats."""
    flat = codes.flatten().long()
    shares = torch.bincount(flat - flat.min()).double() / len(flat)
    return float(-(shares * shares.clamp_min(1e-300).log2()).sum())
