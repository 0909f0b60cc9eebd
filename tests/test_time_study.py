"""What caching changes, and sets of layers of equal weight."""

import pytest
from toys import toy_pipeline

from bf_lib.layers import list_layers
from bf_lib.models import meta_unet, mini_unet_config
from bf_lib.sampling import Sampler, encode_prompts
from bf_lib.time_study import SCHEDULERS, caching_differences, sets_like


def test_all_schedulers_draw_from_one_cache():
    pipe = toy_pipeline()
    embeds = encode_prompts(pipe, ["a", "b"])
    table = caching_differences(pipe, embeds, (0, 1), Sampler(steps=3, guidance=2.0))
    assert list(table.scheduler) == [*SCHEDULERS] * 2
    exact, rounded = (table[table.features == kind] for kind in ("float32", "float16"))
    assert exact.latents.max() < 1e-4
    assert 0 < rounded.latents.max() < 0.05
    assert table.set_index(["scheduler", "features"]).steps["PNDM", "float32"] == 3


def test_sets_have_the_weights_they_should():
    layers = list_layers(meta_unet(mini_unet_config()))
    sets = sets_like(layers, 500_000, 5, seed=0)
    for chosen in sets:
        assert sum(layer.params for layer in chosen) == pytest.approx(500_000, rel=0.01)
        assert len(set(chosen)) == len(chosen)
    assert sets == sets_like(layers, 500_000, 5, seed=0)
    assert len({tuple(layer.name for layer in chosen) for chosen in sets}) == 5
