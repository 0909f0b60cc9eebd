"""The order of the trainings of `mini`, and what is written when they are done."""

import shutil

import pandas as pd
import pytest
import torch
from conftest import with_few_scenes
from safetensors.torch import save_file

from bf_lib import make_mini
from bf_lib.judges import SceneJudge, load_clip_judge, load_scene_judge, new_clip
from bf_lib.mini import new_unet, new_vae
from bf_lib.models import load_pipeline
from bf_lib.train_mini import ROUNDS
from bf_lib.train_text import load_reader, new_reader
from bf_lib.training_data import new_tokenizer


def untrained(name):
    tokenizer = new_tokenizer()
    if name.startswith("unet"):
        return new_unet()
    return {
        "vae": new_vae,
        "text_encoder": lambda: new_reader(tokenizer),
        "scene_judge": SceneJudge,
        "clip_judge": lambda: new_clip(len(tokenizer)),
    }[name]()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folders of trainings in which each part got random weights, and their order."""
    order, folder = [], tmp_path_factory.mktemp("finished")

    def fit(make, plan, folder, processes, cpu):
        assert (processes, cpu) == (2, True)  # the same training on every machine
        order.append((folder.name, plan))
        torch.manual_seed(len(order))
        state = {f"ema/{k}": p.detach() for k, p in untrained(folder.name).named_parameters()}
        folder.mkdir(parents=True)
        save_file(state, folder / "checkpoint.safetensors", {"state": "{}"})
        log = pd.DataFrame({"step": [plan.steps], "loss": [1.0], "seconds_per_step": [2.0]})
        log.to_csv(folder / "log.csv", index=False)

    with pytest.MonkeyPatch.context() as patch:
        with_few_scenes(patch)
        patch.setattr(make_mini, "fit", fit)
        make_mini.main(folder / "work", folder / "mini")
    return folder, order


def test_what_a_training_starts_from_is_trained_before_it(finished):
    _, order = finished
    names = [name for name, _ in order]
    rounds = [f"unet_{number + 1}" for number in range(len(ROUNDS))]
    assert names == ["vae", "text_encoder", *rounds, "scene_judge", "clip_judge"]
    assert [plan for name, plan in order if name in rounds] == [part.plan for part in ROUNDS]


def test_all_that_the_notebook_reads_is_written(finished):
    folder, _ = finished
    pipe = load_pipeline(folder / "mini")
    last = {f"ema/{k}": v.float() for k, v in pipe.unet.state_dict().items()}
    torch.manual_seed(2 + len(ROUNDS))  # as the last round's
    for name, wanted in new_unet().named_parameters():
        assert torch.equal(last[f"ema/{name}"], wanted.half().float())
    load_scene_judge(folder / "mini")
    load_clip_judge(folder / "mini")
    reader = load_reader(folder / "mini" / "judges" / "reader.safetensors")
    assert reader.in_features == pipe.text_encoder.config.hidden_size


def test_times_are_those_of_the_logs_that_were_kept(finished, tmp_path):
    folder, order = finished
    shutil.copytree(folder / "mini" / "training", tmp_path / "training")
    (tmp_path / "training" / "vae.csv").unlink()
    logs = make_mini.training_logs(tmp_path)
    assert list(logs) == [name for name, _ in order][1:]
    table = make_mini.training_table(logs).set_index("training")
    assert table.steps.tolist() == [plan.steps for _, plan in order]
    assert table.hours.isna().tolist() == [True] + [False] * (len(order) - 1)
    assert table.hours["unet 1"] == round(ROUNDS[0].plan.steps * 2 / 3600, 2)
