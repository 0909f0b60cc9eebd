"""Loads thousands of damaged checkpoints: `make fuzz`, or `python tests/fuzz_checkpoint.py COUNT`.

Each must end in a `CheckpointError`, or in the very model that was saved: soon, and in little
memory. Where the digests are made to fit, it may also be another model, but nothing else.
"""

import argparse
import faulthandler
import json
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging
from safetensors import safe_open
from safetensors.torch import save

from bf_lib.checkpoint import CheckpointError, config_digest, tensor_digest
from bf_lib.layers import list_layers
from bf_lib.packed_config import BitsFusionConfig
from bf_lib.packed_unets import load_packed, pack_
from bf_lib.recipe import Recipe

SLOW = 20.0  # seconds that no file may take
MEMORY = 1 << 30  # bytes of addresses, beside those that torch has taken
TOKENS = ("0", "-1", "1e309", "null", "[]", "{}", '"', "\\", "99999999999999999999", "NaN", "true")


def small_checkpoint(folder: Path, compress: str | None, shards: bool = False) -> None:
    """Saves a packed UNet of few layers, in one file or in several."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(4, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=4,
        attention_head_dim=2,
    )
    levels = {layer.name: (3, 5, 9, 257)[n % 4] for n, layer in enumerate(list_layers(unet))}
    pack_(unet, BitsFusionConfig(Recipe(levels), timesteps=[1], compress=compress))
    unet.save_pretrained(folder, max_shard_size="8KB" if shards else "10GB")


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Returns some bytes with one to three accidents."""
    for _ in range(rng.randint(1, 3)):
        head = rng.random() < 0.5  # most of what may mislead a reader is at the beginning
        place = rng.randrange(min(len(data), 4096) if head else len(data)) if data else 0
        match rng.randrange(8):
            case 0:
                data = data[:place]
            case 1:
                data = (
                    data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
                )
            case 2:
                data = data[:place] + rng.randbytes(rng.randint(1, 16)) + data[place:]
            case 3:
                data = data[:place] + rng.randbytes(8) + data[place + 8 :]
            case 4:
                data = rng.randrange(1 << rng.randrange(1, 64)).to_bytes(8, "little") + data[8:]
            case 5:
                end = place + rng.randint(1, 400)
                other = rng.randrange(len(data))
                data = data[:place] + data[other : other + end - place] + data[end:]
            case 6:
                data = data[:place] + rng.choice(TOKENS).encode() + data[place + 1 :]
            case _:
                digits = [n for n, c in enumerate(data[:200_000]) if 48 <= c < 58]
                if digits:
                    at = rng.choice(digits)
                    data = data[:at] + str(rng.randrange(10**6)).encode() + data[at + 1 :]
        data = data or b"\0"
    return data


def changed_config(path: Path, rng: random.Random) -> tuple[bytes, bytes]:
    """Returns a config.json with one other value, and weights whose header says so, too."""
    values = json.loads((path.parent / "config.json").read_bytes())
    name = rng.choice(sorted(values))
    values[name] = rng.choice(
        [
            None,
            0,
            -1,
            1,
            10**9,
            1e30,
            True,
            "x",
            [],
            {},
            [0],
            [10**6] * 4,
            [4000] * 4,
            ["x"] * 2,
            {"a": [1]},
        ]
    )
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said = json.loads(file.metadata()["bitsfusion"])
    said["config"] = config_digest(values)
    header = {"format": "pt", "bitsfusion": json.dumps(said)}
    return json.dumps(values).encode(), save(tensors, header)


def rewritten(path: Path, rng: random.Random) -> bytes:
    """Returns a file with other tensors or another header, whose digests fit all the same."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said = json.loads(file.metadata()["bitsfusion"])
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    kind = rng.choice([torch.uint8, torch.int16, torch.int64, torch.float16, torch.float32])
    match rng.randrange(7):
        case 0:
            tensors[name] = torch.zeros(rng.randrange(100), dtype=kind)
        case 1:
            tensors[name] = value.flatten().view(torch.uint8).clone()
            tensors[name][rng.randrange(len(tensors[name]))] = rng.randrange(256)
            tensors[name] = tensors[name].view(value.dtype).view(value.shape)
        case 2:
            tensors[name] = torch.full_like(value, rng.choice([0, -1, 127]))
        case 3:
            del tensors[name]
        case 4:
            tensors[rng.choice(["x", "../x", "conv_in.weight", name + ".x"])] = value.clone()
        case 5:
            layer = rng.choice(sorted(said["levels"]))
            said["levels"][layer] = rng.choice(
                [3, 5, 7, 9, 17, 255, 65535, 2, -3, 10**30 + 1, "3"]
            )
            said["recipe"] = ""
        case _:
            key = rng.choice(sorted(said))
            said[key] = rng.choice([None, 0, 2, -1, 10**18, "", "zstd", "x", [], {}, {"x": 3}])
    said["tensors"] = {n: tensor_digest(t) for n, t in tensors.items()}
    return save(tensors, {"format": "pt", "bitsfusion": json.dumps(said)})


def state_of(unet: torch.nn.Module) -> tuple[str, dict[str, torch.Tensor]]:
    """Returns all that a UNet computes with."""
    said = {n: v for n, v in unet.config.items() if not n.startswith("_")}
    said.pop("quantization_config")
    return json.dumps(said, sort_keys=True), unet.state_dict()


def changed(folder: Path, rng: random.Random, meant: bool) -> dict[str, bytes]:
    """Returns files of a checkpoint that are not what they were.

    Arguments:
        folder: The checkpoint.
        rng: What to draw from.
        meant: Whether it is no accident: then digests fit.
    """
    names = sorted(path.name for path in folder.iterdir())
    name = "config.json" if rng.random() < 0.25 else rng.choice([n for n in names if n[0] == "d"])
    weights = [n for n in names if n.endswith(".safetensors")]
    if meant and name == "config.json" and len(weights) == 1:
        config, data = changed_config(folder / weights[0], rng)
        return {name: config, weights[0]: data}
    if meant and name in weights:
        return {name: rewritten(folder / name, rng)}
    return {name: damaged((folder / name).read_bytes(), rng)}


def fuzz(folder: Path, count: int, seed: int, seconds: float = float("inf")) -> Counter:
    """Loads damaged copies of the checkpoint in a folder, and counts how that ended.

    Most are loaded by `load_packed`, and accidents to weights sometimes by diffusers alone, whose
    errors are its own.

    Raises:
        AssertionError: If one is loaded as another model, ends in another error, or takes long.
    """
    rng = random.Random(seed)
    logging.set_verbosity(logging.CRITICAL)
    said, state = state_of(load_packed(folder))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    ended = Counter()
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as place:
        for n in range(count):
            if time.monotonic() > deadline:
                break
            meant = rng.random() < 0.5  # not an accident, but someone who wants to deceive
            others = changed(folder, rng, meant)
            for name, content in (files | others).items():
                (Path(place) / name).write_bytes(content)
            plain = not meant and "config.json" not in others and rng.random() < 0.2
            started = time.monotonic()
            faulthandler.dump_traceback_later(10 * SLOW, exit=True)
            try:
                load = UNet2DConditionModel.from_pretrained if plain else load_packed
                ours, values = state_of(load(place))
            except CheckpointError as error:
                reason = str(error).replace(f"{place}: ", "").replace(f"{place}/", "")
                ended[re.sub(r"['\d].*", "...", reason)[:60]] += 1
            except Exception as error:
                if plain and not isinstance(error, MemoryError):
                    ended[f"of diffusers alone: {type(error).__name__}"] += 1
                    faulthandler.cancel_dump_traceback_later()
                    continue
                shutil.copytree(place, folder.parent / f"failed-{seed}-{n}", dirs_exist_ok=True)
                raise AssertionError(f"case {n} of seed {seed}: {error!r}") from error
            else:
                same = state.keys() == values.keys()
                same = same and all(torch.equal(state[k], values[k]) for k in state)
                # Whoever makes digests fit can make any model.
                assert (same and ours == said) or meant, (
                    f"case {n} of seed {seed} loads as another model"
                )
                ended["loaded"] += 1
            faulthandler.cancel_dump_traceback_later()
            taken = time.monotonic() - started
            assert taken < SLOW, f"case {n} of seed {seed} takes {taken:.0f} s"
    return ended


def main() -> int:
    """Fuzzes all kinds of checkpoint, and reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1800)
    options = parser.parse_args()
    torch.set_num_threads(1)
    taken = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    short, kinds = False, [(None, False), ("zstd", False), (None, True)]
    with tempfile.TemporaryDirectory() as place:
        for compress, shards in kinds:
            folder = Path(place) / f"{compress}-{shards}"
            small_checkpoint(folder, compress, shards)
            started = time.monotonic()
            part = -(-options.count // len(kinds))
            ended = fuzz(folder, part, options.seed, options.seconds / len(kinds))
            short |= ended.total() < part
            print(
                f"compress={compress}, {'several files' if shards else 'one file'}: "
                f"{ended.total():,} damaged checkpoints in "
                f"{time.monotonic() - started:.0f} s; {ended['loaded']:,} were loaded, being "
                "what was saved or made to fit, the others were refused"
            )
            for reason, number in ended.most_common(12):
                print(f"  {number:6,} {reason}")
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
