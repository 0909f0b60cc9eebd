"""Packed UNets in diffusers: the same numbers, however they are packed, saved and loaded."""

import copy
import json
import math
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import PipelineQuantizationConfig, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.quantizers import auto
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from toys import WIDTH, toy_pipeline, toy_unet

import bf_lib
from bf_lib import packed_model
from bf_lib.checkpoint import LEFT, CheckpointError
from bf_lib.grids import alternating_scale, fake_quantize
from bf_lib.layers import TIMED, all_layers, get_layer, list_layers
from bf_lib.packed_config import BitsFusionConfig
from bf_lib.packed_layers import packed_layers, set_residency
from bf_lib.packed_model import PackedModel
from bf_lib.packed_unets import load_packed, pack_, save_packed
from bf_lib.packed_weights import stored_scale
from bf_lib.recipe import Recipe, RecipeError
from bf_lib.sizes import size_report
from bf_lib.timecache import (
    cache_time_features_,
    cached_time_features,
    install_time_features_,
    time_features,
)

STEPS = (1.0, 500.0, 999.0)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def full():
    return toy_unet()


@pytest.fixture(scope="module")
def recipe(full):
    levels = (3, 5, 9, 17, 33, 65, 129)
    mixed = {layer.name: levels[n % 7] for n, layer in enumerate(list_layers(full))}
    return Recipe(mixed | {"conv_in": 257, "conv_out": 257}, {"rule": "by turns"})


@pytest.fixture(scope="module")
def config(recipe):
    return BitsFusionConfig(recipe, timesteps=STEPS, source="toy")


@pytest.fixture(scope="module")
def saved(full, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    full.save_pretrained(folder / "full")
    save_packed(full, folder / "packed", config)
    return folder


@pytest.fixture(scope="module")
def asked():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 7, WIDTH, generator=generator)
    return {"sample": x, "timestep": torch.tensor([500, 1]), "encoder_hidden_states": text}


@torch.no_grad()
def answer(unet, asked):
    return unet(**asked, return_dict=False)[0]


@pytest.fixture(scope="module")
def expected(full, recipe, asked):
    """What the UNet answers with weights that are rounded and remain what they were."""
    unet = copy.deepcopy(full)
    cache_time_features_(unet, STEPS)
    with torch.no_grad():
        for name, levels in recipe.levels.items():
            weight = get_layer(unet, name).weight
            scale = stored_scale(alternating_scale(weight, levels))
            weight.copy_(fake_quantize(weight, scale, levels))
        packed = {f"{name}.weight" for name in recipe.levels}
        for name, value in unet.named_parameters():
            if name not in packed:
                value.copy_(value.half())
    return answer(unet, asked)


def header_of(folder):
    with safe_open(Path(folder) / WEIGHTS, "pt") as file:
        return json.loads(file.metadata()["bitsfusion"])


# ---- the same numbers


def test_save_and_load_give_what_was_rounded(saved, asked, expected, full):
    unet = UNet2DConditionModel.from_pretrained(saved / "packed")
    assert torch.equal(answer(unet, asked), expected)
    assert len(packed_layers(unet)) == 258
    assert not torch.equal(answer(full, asked), expected)


def test_loading_misses_and_leaves_nothing(saved):
    for options in ({}, {"quantization_config": BitsFusionConfig(Recipe(every(3)))}):
        folder = saved / ("full" if options else "packed")
        load = UNet2DConditionModel.from_pretrained
        unet, info = load(folder, output_loading_info=True, **options)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "error_msgs"))
        assert not any(value.is_meta for value in [*unet.parameters(), *unet.buffers()])


def every(levels):
    return {layer.name: levels for layer in list_layers(toy_unet())}


def test_packing_while_loading_is_the_same(saved, config, tmp_path, asked, expected):
    load = UNet2DConditionModel.from_pretrained
    unet = load(saved / "full", quantization_config=config)
    assert torch.equal(answer(unet, asked), expected)
    unet.save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(saved / "packed")


def content(folder):
    """All that is in a file of weights; safetensors writes its metadata in any order."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said = file.metadata()
    return said, {n: (t.dtype, t.tolist()) for n, t in tensors.items()}


def test_a_second_save_is_the_same_file(saved, tmp_path):
    UNet2DConditionModel.from_pretrained(saved / "packed").save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(saved / "packed")


def test_a_compressed_checkpoint_is_the_same_model(saved, tmp_path, asked, expected, recipe):
    unet = UNet2DConditionModel.from_pretrained(saved / "packed")
    unet.save_pretrained(tmp_path / "zstd", compress="zstd")
    assert header_of(tmp_path / "zstd")["compress"] == "zstd"
    with safe_open(tmp_path / "zstd" / WEIGHTS, "pt") as file:
        names = set(file.keys())
    assert {f"{name}.zstd" for name in recipe.levels} <= names
    again = UNet2DConditionModel.from_pretrained(tmp_path / "zstd")
    assert torch.equal(answer(again, asked), expected)
    again.save_pretrained(tmp_path / "third")  # stays compressed
    assert header_of(tmp_path / "third")["compress"] == "zstd"


def test_shards_are_the_same_model(saved, tmp_path, asked, expected):
    unet = UNet2DConditionModel.from_pretrained(saved / "packed")
    unet.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    again = load_packed(tmp_path / "many")
    assert torch.equal(answer(again, asked), expected)
    unet.save_pretrained(tmp_path / "many")  # the shards go
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 1
    assert torch.equal(answer(load_packed(tmp_path / "many"), asked), expected)


@pytest.mark.parametrize("residency", ["packed", "dense", 200_000, 0])
def test_residency_changes_no_number(saved, asked, expected, residency):
    unet = load_packed(saved / "packed", residency)
    for _ in range(2):
        assert torch.equal(answer(unet, asked), expected)
    kept = [m for m in packed_layers(unet).values() if m.__dict__.get("kept") is not None]
    size = sum(layer.kept.nbytes for layer in kept)
    if residency == "dense":
        assert len(kept) == 258
    else:
        assert size <= (0 if residency == "packed" else residency)
        assert bool(kept) == (residency == 200_000)
        others = [m for m in packed_layers(unet).values() if m not in kept]
        smallest = min(math.prod(layer.shape) for layer in others)
        assert all(math.prod(layer.shape) <= smallest for layer in kept)
    set_residency(unet, "packed")
    room = next(iter(packed_layers(unet).values())).room.nbytes
    held = sum(value.nbytes for value in [*unet.buffers(), *unet.parameters()])
    assert unet.get_memory_footprint() == held + room
    assert (room == 0) == (residency == "dense")


@pytest.fixture(params=["loaded", "packed in place", "packed while loading"])
def unet(request, saved, full, config):
    """A packed UNet, however it came to be."""
    load = UNet2DConditionModel.from_pretrained
    match request.param:
        case "loaded":
            return load(saved / "packed")
        case "packed in place":
            unet = copy.deepcopy(full)
            pack_(unet, config)
            return unet
        case _:
            return load(saved / "full", quantization_config=config)


def test_copies_are_the_same(unet, saved, asked, expected, tmp_path):
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(answer(twin, asked), expected)
        assert isinstance(twin, PackedModel)
        twin.save_pretrained(tmp_path)
        assert content(tmp_path) == content(saved / "packed")


def test_a_layer_compiles_whole(saved):
    unet = UNet2DConditionModel.from_pretrained(saved / "packed")
    conv = unet.down_blocks[0].resnets[0].conv1
    x = torch.randn(1, 8, 8, 8)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), conv(x))


@pytest.mark.parametrize("where", ["cpu", "auto"])
def test_a_device_map_is_followed(saved, asked, expected, where):
    unet = UNet2DConditionModel.from_pretrained(saved / "packed", device_map=where)
    assert torch.equal(answer(unet, asked), expected)


# ---- pipelines


def test_a_pipeline_holds_a_packed_unet(saved, tmp_path):
    pipe = toy_pipeline()
    pipe.save_pretrained(tmp_path / "full")
    recipe = BitsFusionConfig(Recipe(every(9)))
    load = StableDiffusionPipeline.from_pretrained
    options = {"safety_checker": None, "feature_extractor": None}
    mapped = PipelineQuantizationConfig(quant_mapping={"unet": recipe})
    packed = load(tmp_path / "full", quantization_config=mapped, **options)
    assert isinstance(packed.unet, PackedModel)
    packed.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed", **options)
    images = [draw(p) for p in (packed, again, pipe)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_a_pipeline_names_the_method_by_part_and_not_by_backend():
    """`quant_backend` is of methods that transformers knows too, which this is not."""
    with pytest.raises(ValueError, match="quant_backend=bitsfusion was not found"):
        PipelineQuantizationConfig(
            quant_backend="bitsfusion", quant_kwargs={"recipe": Recipe(every(9))}
        )


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a", num_inference_steps=2, generator=generator, output_type="latent").images


# ---- the traps of diffusers' quantizers


def test_the_method_has_a_name_and_a_configuration_prints(config):
    assert config.quant_method.value == config.quant_method == "bitsfusion"
    assert "bitsfusion" in repr(config)


def test_scales_survive_a_bfloat16_load(saved, tmp_path):
    load = UNet2DConditionModel.from_pretrained
    unet = load(saved / "packed", torch_dtype=torch.bfloat16)
    x = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
    text = torch.randn(1, 7, WIDTH, dtype=torch.bfloat16)
    assert unet(x, 500, encoder_hidden_states=text).sample.dtype == torch.bfloat16
    unet.save_pretrained(tmp_path / "again")
    first_layers = packed_layers(load(saved / "packed"))
    for name, layer in packed_layers(load(tmp_path / "again")).items():
        first = first_layers[name]
        assert torch.equal(layer.scale, first.scale) and torch.equal(layer.words, first.words)
        assert torch.equal(layer.weight, first.weight)


def test_what_diffusers_refuses_of_quantized_models(saved):
    unet = UNet2DConditionModel.from_pretrained(saved / "packed")
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        UNet2DConditionModel.from_pretrained(saved / "packed", low_cpu_mem_usage=False)
    for cast in (lambda: unet.to(torch.float16), unet.half, unet.float):
        with pytest.raises(ValueError, match="quantized"):
            cast()


def test_parameters_and_bytes_are_counted(saved, full):
    unet = UNet2DConditionModel.from_pretrained(saved / "packed")
    time = sum(
        parameter.numel() for name, parameter in full.named_parameters() if "time_emb" in name
    )
    assert unet.num_parameters() == full.num_parameters() - time
    held = sum(value.nbytes for value in [*unet.parameters(), *unet.buffers()])
    assert unet.get_memory_footprint() == held < full.get_memory_footprint() / 4


def test_every_layer_is_packed_or_listed_with_a_reason(saved, full, recipe, tmp_path):
    header = header_of(saved / "packed")
    names = {layer.name for layer in all_layers(full)}
    assert len(names) == 282 and header["levels"].keys() | header["left"].keys() == names
    assert header["levels"] == dict(recipe.levels)
    assert set(header["left"].values()) == {TIMED}
    save_packed(full, tmp_path, BitsFusionConfig(Recipe(every(3))))
    left = header_of(tmp_path)["left"]
    assert {"conv_in", "conv_out"} < left.keys() and len(left) == 26
    assert header["source"] == "toy" and header["made"]["rule"] == "by turns"


def test_dequantized_is_an_ordinary_model(saved, asked, expected, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(saved / "packed").dequantize()
    assert type(unet) is UNet2DConditionModel and not packed_layers(unet)
    assert torch.equal(answer(unet, asked), expected)
    unet.half()


def test_a_lora_trains_runs_and_is_not_fused(saved, asked, expected):
    unet = UNet2DConditionModel.from_pretrained(saved / "packed")
    targets = ["to_q", "to_v", "conv1", "conv_shortcut"]
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    assert not torch.equal(answer(unet, asked), expected)
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    unet.train()
    unet(**asked, return_dict=False)[0].square().mean().backward()
    grads = [p.grad for p in trained.values()]
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert sum(bool(g.abs().sum() > 0) for g in grads) > len(grads) / 2
    with pytest.raises(NotImplementedError, match="dequantize"):
        unet.fuse_lora()
    unet.delete_adapters("default")
    assert torch.equal(answer(unet.eval(), asked), expected)


def test_a_pipeline_does_not_fuse_a_lora(saved):
    pipe = toy_pipeline()
    pack_(pipe.unet, BitsFusionConfig(Recipe(every(3))))
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(NotImplementedError, match="cannot take up a LoRA"):
        pipe.fuse_lora(components=["unet"])


def test_pushing_to_the_hub_uploads_what_was_saved(saved, tmp_path, monkeypatch):
    sent = {}

    def upload(self, folder, repo_id, **options):
        sent[repo_id] = {path.name for path in Path(folder).iterdir()}, options["token"]

    monkeypatch.setattr(UNet2DConditionModel, "_upload_folder", upload)
    made = SimpleNamespace(repo_id="me/toy")
    monkeypatch.setattr(packed_model, "create_repo", lambda *_, **__: made)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("a card"))
    for name in ("load_or_create_model_card", "populate_model_card"):
        monkeypatch.setattr(packed_model, name, lambda *_, **__: card)
    unet = UNet2DConditionModel.from_pretrained(saved / "packed")
    options = {"compress": "zstd", "max_shard_size": "100KB", "variant": "fp16", "token": "t"}
    unet.save_pretrained(tmp_path / "toy", push_to_hub=True, **options)
    names, token = sent["me/toy"]
    assert names == {path.name for path in (tmp_path / "toy").iterdir()} and token == "t"
    assert len([name for name in names if ".fp16-0" in name]) > 2


# ---- configurations


def test_the_method_is_known_and_the_public_names_work(saved):
    assert "bitsfusion" in auto.AUTO_QUANTIZER_MAPPING
    assert bf_lib.load_packed is load_packed and bf_lib.save_packed is save_packed
    assert bf_lib.BitsFusionConfig is BitsFusionConfig


def test_what_cannot_be_packed_is_refused(full, saved):
    with pytest.raises(RecipeError, match="missing"):
        pack_(copy.deepcopy(full), BitsFusionConfig(Recipe({"conv_in": 3})))
    load = UNet2DConditionModel.from_pretrained
    with pytest.raises(ValueError, match="give BitsFusionConfig a recipe"):
        load(saved / "full", quantization_config=BitsFusionConfig())
    with pytest.raises(ValueError, match="scales must be"):
        BitsFusionConfig(scales="best")
    with pytest.raises(ValueError, match="features must be"):
        BitsFusionConfig(features="int8")
    with pytest.raises(CheckpointError, match="format 7"):
        BitsFusionConfig(format=7)
    with pytest.raises(ValueError, match="compress must be"):
        BitsFusionConfig(compress="lzma")
    with pytest.raises(ValueError, match="timesteps are those to cache"):
        BitsFusionConfig(timesteps=50)
    with pytest.raises(ValueError, match="give BitsFusionConfig a recipe"):
        pack_(copy.deepcopy(full), BitsFusionConfig())
    with pytest.raises(ValueError, match="packed already"):
        save_packed(load_packed(saved / "packed"), saved, BitsFusionConfig(Recipe(every(3))))
    with pytest.raises(ValueError, match="this UNet is packed"):
        size_report(load_packed(saved / "packed"))
    broken = copy.deepcopy(full)
    with torch.no_grad():
        broken.conv_in.weight[0, 0, 0, 0] = torch.nan
    everything = Recipe(every(3) | {"conv_in": 3})
    with pytest.raises(ValueError, match="conv_in: weights are NaN"):
        pack_(broken, BitsFusionConfig(everything))


# ---- what may come before and after


def test_weights_on_a_grid_of_known_scales_stay_what_they_are(full, asked, tmp_path):
    """Trained scales are not those that a search finds: here only some codes are in use."""
    unet = copy.deepcopy(full).half().float()
    generator = torch.Generator().manual_seed(0)
    scales = {}
    with torch.no_grad():
        for layer in list_layers(unet):
            weight = get_layer(unet, layer.name).weight
            shape = (len(weight), *[1] * (weight.ndim - 1))
            scales[layer.name] = stored_scale(0.01 + 0.02 * torch.rand(shape, generator=generator))
            codes = torch.randint(-3, 4, weight.shape, generator=generator)
            weight.copy_(codes * scales[layer.name])
    expected = answer(unet, asked)
    pack_(unet, BitsFusionConfig(Recipe(every(9))), scales)
    assert torch.equal(answer(unet, asked), expected)
    unet.save_pretrained(tmp_path)
    assert torch.equal(answer(load_packed(tmp_path), asked), expected)


def test_features_may_be_cached_before_or_added_after(full, tmp_path, asked):
    unet = copy.deepcopy(full)
    cache_time_features_(unet, STEPS)
    save_packed(unet, tmp_path / "before", BitsFusionConfig(Recipe(every(5))))
    save_packed(full, tmp_path / "at once", BitsFusionConfig(Recipe(every(5)), timesteps=STEPS))
    assert content(tmp_path / "before")[1] == content(tmp_path / "at once")[1]
    unet = load_packed(tmp_path / "before")
    more = cached_time_features(unet).joined(time_features(full, [250]))
    install_time_features_(unet, more)
    unet.save_pretrained(tmp_path / "after")
    again = load_packed(tmp_path / "after")
    assert len(cached_time_features(again).timesteps) == 4
    assert torch.equal(answer(again, asked), answer(unet, asked))


def test_packing_in_bfloat16_is_the_same(saved, config, asked):
    load = UNet2DConditionModel.from_pretrained
    ours = load(saved / "full", quantization_config=config, torch_dtype=torch.bfloat16)
    theirs = load(saved / "packed", torch_dtype=torch.bfloat16)
    first, second = ours.state_dict(), theirs.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_adapters_are_not_saved_among_packed_weights(saved, tmp_path, asked, expected):
    unet = UNet2DConditionModel.from_pretrained(saved / "packed")
    unet.save_pretrained(tmp_path)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="has adapters"):
        unet.save_pretrained(tmp_path)
    unet.delete_adapters("default")
    unet.save_pretrained(tmp_path)
    assert torch.equal(answer(load_packed(tmp_path), asked), expected)


def test_dequantized_models_are_saved(full, tmp_path, asked):
    unet = copy.deepcopy(full)
    pack_(unet, BitsFusionConfig(Recipe(every(5))))
    expected = answer(unet, asked)
    unet.dequantize().save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert not packed_layers(again)
    first, second = unet.state_dict(), again.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(answer(again, asked), expected)


def test_a_missing_tensor_is_an_error_of_from_pretrained(saved, tmp_path):
    folder = Path(shutil.copytree(saved / "packed", tmp_path / "unet"))
    with safe_open(folder / WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said = file.metadata()
    del tensors["conv_in.words"]
    save_file(tensors, folder / WEIGHTS, said)
    with pytest.raises(CheckpointError, match="missing or unknown tensors: conv_in.words"):
        UNet2DConditionModel.from_pretrained(folder)


def test_an_upload_that_fails_leaves_the_files(saved, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")

    unet = UNet2DConditionModel.from_pretrained(saved / "packed")
    monkeypatch.setattr(packed_model, "create_repo", offline)
    with pytest.raises(ConnectionError):
        unet.save_pretrained(tmp_path / "toy", push_to_hub=True)
    load_packed(tmp_path / "toy")


def test_kept_weights_follow_what_is_loaded_and_may_be_trained_with(saved, full, config, asked):
    other = toy_unet(seed=1)
    pack_(other, config)
    unet = load_packed(saved / "packed", "dense")
    with torch.inference_mode():
        unet(**asked)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    unet(**asked).sample.square().mean().backward()
    unet.delete_adapters("default")
    unet = load_packed(saved / "packed", "dense")
    answer(unet, asked)
    unet.load_state_dict(other.state_dict())
    assert torch.equal(answer(unet, asked), answer(other, asked))


def test_a_variant_stands_beside_what_is_there(saved, full, tmp_path, asked, expected):
    unet = UNet2DConditionModel.from_pretrained(saved / "packed")
    unet.save_pretrained(tmp_path)
    other = copy.deepcopy(full)
    pack_(other, BitsFusionConfig(Recipe(every(3)), timesteps=STEPS))
    other.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    other.save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    files = len(list(tmp_path.glob("*.safetensors")))
    assert files > 2
    for load in (load_packed, UNet2DConditionModel.from_pretrained):
        assert torch.equal(answer(load(tmp_path), asked), expected)
        again = load(tmp_path, variant="fp16")
        assert torch.equal(answer(again, asked), answer(other, asked))
    unet.save_pretrained(tmp_path, variant="fp16")  # the shards of this variant go
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert torch.equal(answer(load_packed(tmp_path, variant="fp16"), asked), expected)


@pytest.mark.parametrize("residency", ["packed", "dense"])
def test_a_lora_is_not_merged_into_packed_weights(saved, residency, asked, expected):
    unet = load_packed(saved / "packed", residency)
    assert torch.equal(answer(unet, asked), expected)
    targets = ["to_q", "conv1"]
    wrapped = get_peft_model(unet, LoraConfig(target_modules=targets, init_lora_weights=False))
    with pytest.raises(NotImplementedError, match="cannot be overwritten"):
        wrapped.merge_and_unload()
    assert torch.equal(answer(load_packed(saved / "packed"), asked), expected)


def test_features_in_float32_come_back(full, recipe, tmp_path, asked):
    unet = copy.deepcopy(full)
    config = BitsFusionConfig(recipe, timesteps=STEPS, features="float32")
    pack_(unet, config)
    unet.save_pretrained(tmp_path / "first")
    for load in (load_packed, UNet2DConditionModel.from_pretrained):
        again = load(tmp_path / "first")
        known = cached_time_features(again)
        assert {values.dtype for values in known.features.values()} == {torch.float32}
        assert torch.equal(answer(again, asked), answer(unet, asked))
    again.save_pretrained(tmp_path / "second")
    assert content(tmp_path / "second") == content(tmp_path / "first")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packing_while_loading_gives_the_same_features(full, recipe, tmp_path, dtype):
    """Also of an original in half precision, and wherever its weights lie in memory."""
    unet = copy.deepcopy(full).to(dtype)
    unet.save_pretrained(tmp_path / "full")
    config = BitsFusionConfig(recipe, timesteps=range(0, 1000, 20))
    pack_(unet, config)
    load = UNet2DConditionModel.from_pretrained
    again = load(tmp_path / "full", quantization_config=config, torch_dtype=dtype)
    first, second = unet.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_layers_that_were_added_are_not_saved_in_silence(saved, tmp_path):
    unet = load_packed(saved / "packed")
    unet.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"added or renamed since it was packed: \['extra.bias'"):
        unet.save_pretrained(tmp_path)


def test_a_compressed_checkpoint_becomes_a_plain_one(saved, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(saved / "packed")
    unet.save_pretrained(tmp_path / "zstd", compress="zstd")
    load_packed(tmp_path / "zstd").save_pretrained(tmp_path / "plain", compress=None)
    assert content(tmp_path / "plain") == content(saved / "packed")


def test_a_whole_unet_compiles(saved, asked, expected):
    unet = load_packed(saved / "packed")
    compiled = torch.compile(unet, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(**asked, return_dict=False)[0], expected)


def test_gradient_checkpointing_changes_no_gradient(saved, asked):
    grads = []
    for checkpointed in (False, True):
        unet = UNet2DConditionModel.from_pretrained(saved / "packed").train()
        if checkpointed:
            unet.enable_gradient_checkpointing()
        x = asked["sample"].clone().requires_grad_()
        unet(**asked | {"sample": x}).sample.square().mean().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_layers_decode_in_one_place_that_is_their_models_own(saved, asked, expected):
    unet = UNet2DConditionModel.from_pretrained(saved / "packed")
    twin = copy.deepcopy(unet)
    rooms = [{id(layer.room) for layer in packed_layers(m).values()} for m in (unet, twin)]
    assert [len(ids) for ids in rooms] == [1, 1] and rooms[0] != rooms[1]
    with torch.inference_mode():  # and then in the other mode
        assert torch.equal(unet(**asked, return_dict=False)[0], expected)
    room = next(iter(packed_layers(unet).values())).room
    place = room.of(1).data_ptr()
    assert torch.equal(answer(unet, asked), expected)
    assert room.of(1).data_ptr() == place
    for layer in packed_layers(unet).values():
        assert torch.equal(layer.lent_weight(), layer.weight)  # in grad mode
        with torch.no_grad():
            assert torch.equal(layer.lent_weight(), layer.weight)


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_scales_too_small_for_float16_are_kept_in_float32(full, tmp_path, compress, asked):
    unet = copy.deepcopy(full)
    name = list_layers(unet)[3].name
    with torch.no_grad():
        get_layer(unet, name).weight.mul_(1e-6)
        unet.conv_norm_out.bias[0] = 1e6
    unet.save_pretrained(tmp_path / "full")
    config = BitsFusionConfig(Recipe(every(5)), compress=compress)
    save_packed(unet, tmp_path / "packed", config)
    wide = header_of(tmp_path / "packed")["wide"]
    assert wide.keys() == {f"{name}.scale", "conv_norm_out.bias"}
    assert "float16 is too coarse" in wide[f"{name}.scale"]
    load = UNet2DConditionModel.from_pretrained
    ours = [load_packed(tmp_path / "packed"), load(tmp_path / "full", quantization_config=config)]
    weight = get_layer(unet, name).weight
    expected = fake_quantize(weight, alternating_scale(weight, 5), 5)
    for unet in ours:
        assert get_layer(unet, name).scale.dtype == torch.int32
        assert torch.equal(get_layer(unet, name).weight, expected)
        assert unet.conv_norm_out.bias[0] == 1e6
        unet.save_pretrained(tmp_path / "again")
        assert content(tmp_path / "again") == content(tmp_path / "packed")


def test_packed_layers_say_why_time_layers_are_left(full, tmp_path):
    save_packed(full, tmp_path, BitsFusionConfig(Recipe(every(3))))
    left = header_of(tmp_path)["left"]
    assert left["time_embedding.linear_1"] == LEFT and left["conv_in"] == "first layer"


def test_features_without_time_layers_are_only_saved_packed(saved, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(saved / "packed").dequantize()
    with pytest.raises(ValueError, match="save it before"):
        unet.save_pretrained(tmp_path)


def test_a_disk_is_no_place_for_packed_layers(saved, tmp_path):
    with pytest.raises(ValueError, match="put them on the CPU"):
        UNet2DConditionModel.from_pretrained(
            saved / "packed", device_map={"": "disk"}, offload_folder=tmp_path
        )


def test_data_parallel_training_sends_no_packed_weights(saved, asked, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(saved / "packed")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    ignored = set(unet._ddp_params_and_buffers_to_ignore)
    assert {name for name, _ in unet.named_buffers() if name.endswith((".words", ".scale"))} <= (
        ignored
    )
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(unet)
        assert parallel.parameters_to_ignore == ignored
        parallel(**asked).sample.square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in unet.parameters() if p.requires_grad)
