"""What the rows of a sweep say, as tables over candidates."""

__all__ = ["leading_roles", "per_prompt", "table"]

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bf_lib.grids import levels_of_bits
from bf_lib.layers import Layer


def table(rows: Iterable[Mapping], layers: Sequence[Layer]) -> pd.DataFrame:
    """Returns the candidates in order of layers and bits, with each metric averaged over prompts.

    The CLIP drop is the score of the full-precision images less the candidate's: positive where
    quantization loses something.

    Arguments:
        rows: What `jobs.run_job` yields for a `Sweep`, in any order.
        layers: The layers of the UNet, for what is known of them.

    Returns:
        Columns layer, role, block, depth, params, bits, levels, mse (squared units of 0..255),
        rmse (the mean of its root), psnr (dB), perceptual, clip, clip_drop, weight_mse (relative
        squared error), and of candidates that were trained, noise_mse_before and noise_mse_after
        (on held-out samples).

    Raises:
        ValueError: If the row of the full-precision model is missing.
    """
    found = {(row["layer"], row["bits"]): row for row in rows}
    if (None, None) not in found:
        raise ValueError("the rows lack that of the full-precision model")
    reference = np.array(found.pop((None, None))["clip"])
    known = {layer.name: layer for layer in layers}
    records = []
    for (name, bits), row in found.items():
        layer, levels = known[name], levels_of_bits(bits)
        records.append(
            {
                "layer": name,
                "role": layer.role,
                "block": layer.block,
                "depth": layer.depth,
                "params": layer.params,
                "bits": bits,
                "levels": levels,
                "mse": np.mean(row["mse"]),
                "rmse": np.mean(np.sqrt(row["mse"])),
                "psnr": np.mean(row["psnr"]),
                "perceptual": np.mean(row["perceptual"]),
                "clip": np.mean(row["clip"]),
                "clip_drop": np.mean(reference - row["clip"]),
            }
            | {name: value for name, value in row.items() if isinstance(value, float)}
        )
    return pd.DataFrame(records).sort_values(["depth", "bits"], ignore_index=True)


def leading_roles(
    frame: pd.DataFrame, values: Tensor, resamples: int = 1000, seed: int = 0
) -> pd.Series:
    """Returns how often each role has the largest median over its layers.

    The prompts are drawn anew, with replacement, for each of the resamples: a role that leads in
    nearly all of them does not lead by the choice of prompts.

    Arguments:
        frame: Rows of `table` of one bit-width.
        values: A metric of each row and prompt, with shape (rows, prompts).
        resamples: How many bootstrap samples.
        seed: Of the samples.
    """
    prompts = values.shape[1]
    chosen = np.random.default_rng(seed).integers(prompts, size=(resamples, prompts))
    means = pd.DataFrame(values.numpy()[:, chosen].mean(axis=2), index=frame.role.to_numpy())
    return means.groupby(level=0).median().idxmax().value_counts(normalize=True)


def per_prompt(rows: Iterable[Mapping], frame: pd.DataFrame) -> dict[str, Tensor]:
    """Returns each metric of each candidate and prompt, with shape (candidates, prompts).

    The candidates are in the order of `frame`.
    """
    found = {(row["layer"], row["bits"]): row for row in rows}
    order = [found[key] for key in zip(frame.layer, frame.bits, strict=True)]
    tensors = {
        name: torch.tensor([row[name] for row in order], dtype=torch.float64)
        for name in ("mse", "psnr", "perceptual", "clip")
    }
    reference = torch.tensor(found[None, None]["clip"], dtype=torch.float64)
    return tensors | {"clip_drop": reference - tensors["clip"]}
