"""Damaged, mixed-up and hostile checkpoints end in one error; a save that fails leaves the old."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from diffusers import UNet2DConditionModel
from fuzz_checkpoint import fuzz, small_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from toys import toy_unet

from bf_lib.atomic import DiskFull
from bf_lib.checkpoint import (
    CheckpointError,
    Header,
    config_digest,
    levels_digest,
    tensor_digest,
)
from bf_lib.checkpoint_files import checked, replaced_at_once
from bf_lib.layers import list_layers
from bf_lib.packed_config import BitsFusionConfig
from bf_lib.packed_unets import load_packed, pack_, save_packed
from bf_lib.recipe import Recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    unet = toy_unet()
    levels = {layer.name: (3, 5, 9)[n % 3] for n, layer in enumerate(list_layers(unet))}
    for compress in (None, "zstd"):
        config = BitsFusionConfig(Recipe(levels), timesteps=[1, 500], compress=compress)
        save_packed(unet, folder / str(compress), config)
    return folder


@pytest.fixture(params=["None", "zstd"])
def folder(originals, tmp_path, request):
    return Path(shutil.copytree(originals / request.param, tmp_path / "unet"))


def read(folder):
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def rewrite(folder, tensors=None, header=None, digests=True):
    """Writes a checkpoint with other tensors or another header, its digests made to fit."""
    old, metadata = read(folder)
    tensors = old if tensors is None else tensors
    said = json.loads(metadata["bitsfusion"]) | (header or {})
    if digests:
        said["tensors"] = {name: tensor_digest(value) for name, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt", "bitsfusion": json.dumps(said)})


def refused(folder, match):
    with pytest.raises(CheckpointError, match=match):
        load_packed(folder)


def test_a_checkpoint_is_what_it_says(folder):
    header = checked(folder)
    assert header.timesteps == 2 and len(header.levels) == 256
    assert header.recipe == levels_digest(header.levels)
    load_packed(folder)


# ---- damage


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_file_that_is_cut_off(folder, share):
    path = folder / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(folder, "not a safetensors file")


def test_a_flipped_bit_in_each_kind_of_tensor(folder):
    path = folder / WEIGHTS
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + length])
    endings = (".words", ".zstd", ".scale", ".bias", ".features", "_as_int32", "norm1.weight")
    for ending in endings:
        name = next((name for name in entries if name.endswith(ending)), None)
        if name is None:
            continue
        place = 8 + length + entries[name]["data_offsets"][0]
        damaged = bytearray(data)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        refused(folder, f"{name}.* is damaged")


def test_tensors_that_changed_places(folder):
    tensors, _ = read(folder)
    one, two = (n for n in tensors if n.endswith("attn1.to_q.scale") and "down_blocks.0" in n)
    tensors[one], tensors[two] = tensors[two], tensors[one]
    rewrite(folder, tensors, digests=False)
    refused(folder, "is damaged")


def test_a_config_of_another_model(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"norm_eps": 1e-05', '"norm_eps": 1e-02'))
    refused(folder, "config.json is not the one")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "cannot be read"),
        ("[]", "holds no object"),
        ("[" * 100_000, "cannot be read"),
        ("{}", "no packed checkpoint"),
        ('{"quantization_config": {"quant_method": "gguf"}}', "no packed checkpoint"),
    ],
)
def test_a_config_that_is_none(folder, text, match):
    (folder / "config.json").write_text(text)
    refused(folder, match)


def test_what_is_not_there(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    refused(folder, f"{WEIGHTS} is not there")
    refused(tmp_path / "nowhere", "config.json is not there")


# ---- headers and tensors that fit their digests, and make no sense


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"format": 2}, "format 2 is not known"),
        ({"compress": "lzma"}, "compress must be"),
        ({"levels": []}, "wrong type: .'levels'"),
        ({"levels": {"conv_in": 4}}, "4 levels, not an odd"),
        ({"levels": {"conv_in": 10**9 + 1}}, "no layer has more than"),
        ({"levels": {"conv_in": 3}}, "not those that the recipe's digest is of"),
        ({"levels": {"nowhere": 3}, "recipe": ""}, "no layers .'nowhere'"),
        ({"timesteps": 0}, "at least one time-step"),
        ({"timesteps": 10**12}, "at least one time-step"),
        ({"timesteps": 3}, "does not fit"),
        ({"timesteps": "2"}, "wrong type"),
        ({"unheard": 1}, "no header of a packed checkpoint"),
    ],
)
def test_headers_that_make_no_sense(folder, header, match):
    rewrite(folder, header=header)
    refused(folder, match)


def test_a_header_that_is_none(folder):
    tensors, _ = read(folder)
    for metadata in (None, {"bitsfusion": "{"}, {"bitsfusion": "[1]"}, {"bitsfusion": "null"}):
        save_file(tensors, folder / WEIGHTS, metadata)
        refused(folder, "no header of a packed checkpoint")


def test_tensors_that_do_not_belong(folder):
    tensors, _ = read(folder)
    name = next(name for name in tensors if name.endswith(".scale"))
    for changed, match in (
        ({n: t for n, t in tensors.items() if n != name}, "missing or unknown"),
        (tensors | {"../../etc/passwd": torch.zeros(1)}, "missing or unknown"),
        (tensors | {name: tensors[name][:-1].clone()}, "does not fit"),
        (tensors | {name: tensors[name].to(torch.int32)}, "does not fit"),
        (tensors | {name: torch.zeros_like(tensors[name])}, "not positive"),
        (tensors | {name: tensors[name] | 0x7C00}, "not positive"),
    ):
        rewrite(folder, changed)
        refused(folder, match)


def test_codes_that_are_none(folder):
    tensors, metadata = read(folder)
    levels = json.loads(metadata["bitsfusion"])["levels"]
    layer = next(name for name, count in levels.items() if count == 3)
    name = next(n for n in (f"{layer}.words", f"{layer}.zstd") if n in tensors)
    rewrite(folder, tensors | {name: torch.full_like(tensors[name], 255)})
    refused(folder, "no words of its levels|cannot be decoded")


@pytest.mark.parametrize("name", ["../unet.safetensors", "/etc/passwd", "x.bin", 3, []])
def test_an_index_that_leads_elsewhere(folder, name):
    (folder / WEIGHTS).rename(folder / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": name}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    refused(folder, "its index names")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers_per_block", 10**6),
        ("block_out_channels", [10**9] * 4),
        ("block_out_channels", [320] * 1000),
        ("cross_attention_dim", 10**12),
        ("down_block_types", ["NoBlock"] * 4),
        ("norm_num_groups", 0),
        ("in_channels", -4),
        ("transformer_layers_per_block", [[100_000], [1], [1], [1]]),
        ("transformer_layers_per_block", [[4000], [1], [1], [1]]),
        ("reverse_transformer_layers_per_block", [65536, 1, 1, 1]),
        ("block_out_channels", [65536, 65536, 65536, 65536]),
    ],
)
def test_configurations_out_of_all_reason(folder, name, value):
    config = json.loads((folder / "config.json").read_text()) | {name: value}
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder, header={"config": config_digest(config)})
    started = time.monotonic()
    refused(folder, f"{name}|makes no UNet|of some|too many weights|so large a UNet")
    assert time.monotonic() - started < 10


def test_a_pipe_is_no_file(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    refused(folder, "config.json is not there")


def test_few_bytes_do_not_become_many(folder):
    """Frames of zeros, as large as a configuration makes them."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"block_out_channels": [512, 1024, 2048, 2048]}
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder, header={"config": config_digest(config)})
    refused(folder, "cannot hold so large a UNet")


def test_words_of_another_type_are_refused_by_diffusers_too(folder):
    tensors, _ = read(folder)
    name = next(n for n in tensors if n.endswith((".words", ".zstd")))
    rewrite(folder, tensors | {name: tensors[name].to(torch.float32)})
    with pytest.raises(CheckpointError, match="does not fit"):
        UNet2DConditionModel.from_pretrained(folder)
    refused(folder, "does not fit")


def test_files_of_two_checkpoints(folder, tmp_path):
    first = load_packed(folder)
    first.save_pretrained(tmp_path / "first", max_shard_size="100KB")
    other = toy_unet(seed=1)
    pack_(
        other, BitsFusionConfig(Recipe(dict(first.hf_quantizer.header.levels)), timesteps=[1, 500])
    )
    other.save_pretrained(tmp_path / "second", max_shard_size="100KB")
    shards = [sorted((tmp_path / part).glob("*.safetensors"))[1] for part in ("first", "second")]
    shutil.copy(shards[1], shards[0])
    refused(tmp_path / "first", "different checkpoints")


def test_headers_come_back():
    header = Header(levels={"a": 3}, timesteps=2, compress="zstd", made={"x": [1]}, source="é")
    assert Header.of(header.metadata()) == header


# ---- saving


def test_an_index_goes_before_a_file(folder, tmp_path):
    """As in diffusers: where both are there, what is checked is what is loaded."""
    other = toy_unet(seed=1)
    levels = dict(load_packed(folder).hf_quantizer.header.levels)
    pack_(other, BitsFusionConfig(Recipe(levels), timesteps=[1, 500]))
    other.save_pretrained(tmp_path / "other", max_shard_size="100KB")
    for path in (tmp_path / "other").iterdir():
        shutil.copy(path, folder / path.name)
    first, second = load_packed(folder).state_dict(), other.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def kill_after(moved, monkeypatch):
    """Ends a save after so many renames; returns the list of those that it began."""
    replace, begun = Path.replace, []

    def killed(path, target):
        begun.append(path)
        if len(begun) > moved:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    return begun


@pytest.mark.parametrize("moved", range(8))
def test_a_kill_between_renames_of_shards_leaves_one_of_two(folder, moved, monkeypatch):
    other, first = toy_unet(seed=1), load_packed(folder)
    levels = dict(first.hf_quantizer.header.levels)
    pack_(other, BitsFusionConfig(Recipe(levels), timesteps=[1, 500]))
    first.save_pretrained(folder, max_shard_size="100KB")
    before, wanted = first.state_dict(), other.state_dict()
    count = kill_after(moved, monkeypatch)
    with contextlib.suppress(KeyboardInterrupt):
        other.save_pretrained(folder, max_shard_size="100KB")
    after = load_packed(folder).state_dict()
    ended = len(count) <= moved
    for name in before:
        assert torch.equal(after[name], (wanted if ended else before)[name])
    monkeypatch.undo()
    other.save_pretrained(folder, max_shard_size="100KB")
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    kept = {path.name for path in folder.glob("*.safetensors")}
    assert kept - {WEIGHTS} == set(index["weight_map"].values())


def test_two_saves_at_once_do_not_disturb_each_other(folder):
    unet = load_packed(folder)
    with replaced_at_once(folder) as outer:
        (outer / "note.txt").write_text("first")
        unet.save_pretrained(folder)
        assert (outer / "note.txt").exists()
    assert (folder / "note.txt").read_text() == "first"
    load_packed(folder)


@pytest.mark.parametrize("moved", [0, 1])
def test_a_kill_between_two_renames_leaves_one_of_two(folder, moved, monkeypatch):
    """Of one UNet: the file of the weights is moved last, and config.json stays what it was."""
    other = toy_unet(seed=1)
    levels = dict(load_packed(folder).hf_quantizer.header.levels)
    pack_(other, BitsFusionConfig(Recipe(levels), timesteps=[1, 500]))
    before = load_packed(folder).state_dict()
    kill_after(moved, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(folder)
    after = load_packed(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    monkeypatch.undo()
    other.save_pretrained(folder)
    assert not list(folder.glob(".partial*"))
    assert torch.equal(load_packed(folder).state_dict()["conv_in.weight"], other.conv_in.weight)


def test_a_full_disk_leaves_the_old_checkpoint(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    unet = load_packed(folder)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DiskFull, match="nothing was overwritten"):
        unet.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


KILLED = """
import os, signal, sys
from bf_lib.packed_unets import load_packed
import safetensors.torch

unet = load_packed(sys.argv[1])
write = safetensors.torch.save_file

def cut_off(tensors, path, metadata=None):
    write(tensors, path, metadata=metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)

safetensors.torch.save_file = cut_off
unet.save_pretrained(sys.argv[1])
"""


def test_a_kill_leaves_the_old_checkpoint(originals, tmp_path):
    folder = Path(shutil.copytree(originals / "None", tmp_path / "unet"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = subprocess.run([sys.executable, "-c", KILLED, folder], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert {name: (folder / name).read_bytes() for name in before} == before
    load_packed(folder).save_pretrained(folder)  # and tidies up
    assert {path.name for path in folder.iterdir()} == before.keys()


# ---- the format


def test_a_reader_written_from_the_format_reads_the_same_weights(folder):
    """By the words of FORMAT.md, in whole numbers of Python: none of the library's own code."""
    unet = load_packed(folder)
    data = (folder / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    said = json.loads(entries.pop("__metadata__")["bitsfusion"])
    assert entries.keys() == said["tensors"].keys()

    def stored(name):
        first, last = entries[name]["data_offsets"]
        return data[start + first : start + last]

    for layer in list(said["levels"])[:12]:
        levels, weight = said["levels"][layer], unet.get_submodule(layer).weight
        count = weight.numel()
        if said["compress"]:
            per = max(n for n in range(1, 9) if levels**n <= 256)
            numbers = list(zstandard.ZstdDecompressor().decompress(stored(f"{layer}.zstd")))
        else:
            size, fields, bits, per = {3: (1, 1, 8, 5), 5: (8, 9, 7, 3), 9: (2, 1, 16, 5)}[levels]
            content = stored(f"{layer}.words")
            words = [
                int.from_bytes(content[n : n + size], "little")
                for n in range(0, len(content), size)
            ]
            numbers = [w >> f * bits & 2**bits - 1 for f in range(fields) for w in words]
        digits = [number // levels**p % levels for p in range(per) for number in numbers]
        codes = np.array(digits[:count], np.float32) - (levels - 1) // 2
        scale = np.frombuffer(stored(f"{layer}.scale"), "<f2").astype(np.float32)
        expected = codes.reshape(len(scale), -1) * scale[:, None]
        assert np.array_equal(expected, weight.detach().flatten(1).numpy())
        name = next(n for n in (f"{layer}.zstd", f"{layer}.words") if n in entries)
        kinds = {"U8": "uint8", "I16": "int16", "I64": "int64"}
        shape = entries[name]["shape"]
        text = f"torch.{kinds[entries[name]['dtype']]}({shape[0]},)".encode()
        digest = hashlib.blake2b(text + stored(name), digest_size=8).hexdigest()
        assert digest == said["tensors"][name]


def test_the_digests_of_the_format(folder):
    header = json.loads(read(folder)[1]["bitsfusion"])
    text = json.dumps(header["levels"], sort_keys=True)
    assert header["recipe"] == hashlib.sha256(text.encode()).hexdigest()
    config = json.loads((folder / "config.json").read_text())
    config = {n: v for n, v in config.items() if n[0] != "_" and n != "quantization_config"}
    text = json.dumps(config, sort_keys=True)
    assert header["config"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("compress, shards", [(None, False), ("zstd", False), (None, True)])
def test_damaged_files_at_random(compress, shards, tmp_path):
    small_checkpoint(tmp_path / "small", compress, shards)
    assert (len(list((tmp_path / "small").glob("*.safetensors"))) > 1) == shards
    ended = fuzz(tmp_path / "small", count=100, seed=0)
    assert ended.total() == 100 and ended["loaded"] < 40
