"""Loading of pipelines, and the layers of UNets that are not SD-v1.5's."""

import errno
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.utils import httpx
from toys import UNET, toy_pipeline

from bf_lib.layers import all_layers, get_layer, layer_table, list_layers
from bf_lib.models import MODELS, REVISIONS, ModelNotFound, load_pipeline, meta_unet
from bf_lib.packed_layers import packed_layers
from bf_lib.paths import ROOT

# Diffusers turns tensors into arrays in a way that NumPy 2 will not know for ever.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a pipeline."""
    folder = tmp_path_factory.mktemp("toy")
    toy_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and nothing in the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


def test_a_folder_loads_as_it_was_saved(saved, capfd):
    pipe, kept = load_pipeline(saved), toy_pipeline()
    assert isinstance(pipe, StableDiffusionPipeline)
    assert pipe.safety_checker is None
    assert type(pipe.scheduler) is type(kept.scheduler)
    settings = {k: v for k, v in kept.scheduler.config.items() if not k.startswith("_")}
    assert settings == {k: pipe.scheduler.config[k] for k in settings}
    for name in ("unet", "vae", "text_encoder"):
        one, other = getattr(pipe, name).state_dict(), getattr(kept, name).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert not getattr(pipe, name).training
    pipe("a", num_inference_steps=1, output_type="latent")
    assert capfd.readouterr() == ("", "")  # no bars


def test_a_folder_may_be_given_as_text_and_loads_in_the_type_asked_for(saved):
    pipe = load_pipeline(str(saved), dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16


def test_names_stand_for_folders(saved, monkeypatch):
    monkeypatch.setitem(MODELS, "mini", saved)
    assert load_pipeline("mini").unet.config.sample_size == UNET["sample_size"]


def run_code_of(page: str) -> dict:
    """Runs the indented lines of a page, and returns the names that they give to things."""
    code = [line.removeprefix("    ") for line in page.splitlines() if line.startswith("    ")]
    names: dict = {}
    exec("\n".join(code), names)
    return names


def test_the_readme_shows_code_that_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it saves files
    names = run_code_of((ROOT / "README.md").read_text().partition("## The library")[2])
    assert names["codes"].shape == names["weight"].shape
    assert set(names["codes"].unique().tolist()) == {-1, 0, 1}
    assert names["report"].stored_bits == pytest.approx(2.0344, abs=1e-4)
    size = sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    assert size < 5e6 and packed_layers(names["unet"])


def test_the_model_card_of_mini_shows_code_that_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    # with the types that diffusers chooses, not load_pipeline
    names = run_code_of((MODELS["mini"] / "README.md").read_text())
    (image,) = names["images"]
    assert np.asarray(image).shape == (64, 64, 3) and np.asarray(image).std() > 10


def test_a_missing_folder_is_named(tmp_path):
    for model in (tmp_path / "nowhere", str(tmp_path / "nowhere"), tmp_path):
        with pytest.raises(ModelNotFound, match=r"model_index.json in .*give a folder"):
            load_pipeline(model)


def test_a_missing_mini_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "mini", tmp_path)
    with pytest.raises(ModelNotFound, match="make mini"):
        load_pipeline("mini")


def test_a_folder_without_weights_is_named(saved, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in saved.rglob("*"):
        target = folder / path.relative_to(saved)
        if path.is_dir():
            target.mkdir()
        elif path.suffix != ".safetensors":
            target.write_bytes(path.read_bytes())
    with pytest.raises(ModelNotFound, match="looked for safetensors files in .*copy"):
        load_pipeline(folder)


@pytest.mark.parametrize("local_files_only", [True, False])
def test_a_hub_id_that_is_not_to_be_had_is_named(offline, local_files_only):
    where = "the local cache" if local_files_only else "the local cache and the hub"
    message = f"'sd15': looked for .* in {MODELS['sd15']} in {where}.*hf download {MODELS['sd15']}"
    with pytest.raises(ModelNotFound, match=message):
        load_pipeline("sd15", local_files_only=local_files_only)
    with pytest.raises(ModelNotFound, match="hf download someone/something"):
        load_pipeline("someone/something", local_files_only=local_files_only)


@pytest.mark.parametrize("local_files_only", [True, False])
def test_whether_only_local_files_serve_is_passed_on(monkeypatch, local_files_only):
    given = {}

    def from_pretrained(source, **options):
        given.update(options)
        raise OSError

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(ModelNotFound):
        load_pipeline("sd15", local_files_only=local_files_only)
    assert given["local_files_only"] is local_files_only


@pytest.mark.parametrize("error", [httpx.ProxyError("403 Forbidden"), httpx.ConnectTimeout("")])
def test_a_network_that_refuses_is_a_missing_model(monkeypatch, error):
    def from_pretrained(source, **options):
        raise error

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(ModelNotFound, match="hf download"):
        load_pipeline("sd15")


def test_the_name_of_a_hub_model_stands_for_one_commit(monkeypatch):
    given = []

    def from_pretrained(source, **options):
        given.append(options["revision"])
        raise OSError

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", from_pretrained)
    for model, revision in (("sd15", None), ("sd15", "fp16"), ("someone/something", None)):
        with pytest.raises(ModelNotFound):
            load_pipeline(model, revision=revision)
    assert given == [REVISIONS[MODELS["sd15"]], "fp16", None]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_or_broken_disk_is_not_called_a_missing_model(monkeypatch, number):
    def from_pretrained(source, **options):
        raise OSError(number, "no space left")

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(OSError, match="no space left") as caught:
        load_pipeline("sd15")
    assert not isinstance(caught.value, ModelNotFound)


def test_a_truncated_file_of_weights_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "cut")
    weights = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelNotFound, match="looked for safetensors files in .*cut"):
        load_pipeline(tmp_path / "cut")


def test_a_path_is_a_folder_though_a_model_has_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match="model_index.json in mini"):
        load_pipeline(Path("mini"))


# What sets SD2, SDXL and others apart from SD-v1.5, at toy widths.
OTHERS = {
    "SD2": UNET | {"use_linear_projection": True, "attention_head_dim": (2, 4, 4, 4)},
    "SDXL": UNET
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16, 32),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 40,
    },
    "classes": UNET | {"class_embed_type": "timestep", "encoder_hid_dim": 12},
    "DeepFloyd": UNET
    | {
        "down_block_types": ("AttnDownBlock2D",) * 3 + ("ResnetDownsampleBlock2D",),
        "up_block_types": ("ResnetUpsampleBlock2D",) + ("SimpleCrossAttnUpBlock2D",) * 3,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_unets_are_all_listed(name):
    unet = meta_unet(OTHERS[name])
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    names = [name for name, module in unet.named_modules() if isinstance(module, kinds)]
    layers = all_layers(unet)
    assert sorted(layer.name for layer in layers) == sorted(names)
    assert [layer.depth for layer in list_layers(unet)] == list(range(len(list_layers(unet))))
    assert layer_table(layers).role.str.fullmatch(r"[a-z].*\w").all()


@pytest.mark.parametrize("name", ["SD2", "SDXL", "classes"])
def test_layers_of_other_unets_are_listed_in_the_order_they_run(name):
    unet = meta_unet(OTHERS[name]).to_empty(device="cpu").eval()
    ran = []
    for layer in all_layers(unet):
        get_layer(unet, layer.name).register_forward_hook(
            lambda *_, name=layer.name: ran.append(name)
        )
    with torch.no_grad():
        unet(
            torch.zeros(1, 4, 8, 8),
            torch.tensor(5),
            torch.zeros(1, 3, OTHERS[name].get("encoder_hid_dim", 16)),
            class_labels=torch.tensor([1]),
            added_cond_kwargs={"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)},
        )
    assert ran == [layer.name for layer in all_layers(unet)]


def test_layer_table_has_a_row_a_layer():
    layers = list_layers(meta_unet(UNET))
    table = layer_table(layers)
    assert table.name.tolist() == [layer.name for layer in layers]
    assert table.params.sum() == sum(layer.params for layer in layers)
    assert table.out_channels.tolist() == [layer.shape[0] for layer in layers]
