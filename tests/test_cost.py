"""Costs that are told beforehand, against operations that are counted while they happen."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from toys import TOKENS, UNET, toy_pipeline

from bf_lib.models import sd15_unet_config
from bf_lib.sampling import Sampler
from bf_lib.sensitivity import METHODS, Estimate
from bf_lib.sensitivity.cost import (
    counted,
    estimate_flops,
    plan,
    sd15_vae_config,
    seconds_per_evaluation,
    sweep_flops,
)
from bf_lib.sensitivity.estimates import Portion
from bf_lib.study import Study


class Flops(TorchDispatchMode):
    """Counts what is computed inside, forward and backward."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


@pytest.fixture(scope="module")
def pipe():
    return toy_pipeline()


@pytest.fixture(scope="module")
def cost(pipe):
    return counted(UNET, pipe.vae.config, TOKENS)


CASES = [
    ("image gradient", 1, (1, 2, 3)),
    ("image gradient", 3, (1, 2)),
    ("noise gradient", 3, (1, 2, 3)),
    ("single step", 1, (1,)),
]
assert {case[0] for case in CASES} == set(METHODS)


@pytest.mark.parametrize(("method", "projections", "bits"), CASES)
def test_an_estimate_costs_what_was_told(pipe, cost, method, projections, bits):
    sampler = Sampler(steps=2, guidance=2.0, batch=2)
    prompts = ("a star", "a ring")
    job = Estimate("", prompts, (0, 1), sampler, method, projections, bits)
    bench = job.bench(pipe)
    with sdpa_kernel(SDPBackend.MATH), Flops() as flops:
        bench.score(Portion(0, 2))
    told = estimate_flops(cost, method, 2, sampler, len(bits), projections)
    assert told == pytest.approx(flops.total, rel=0.03)


def test_a_sweep_costs_what_its_images_do(cost):
    sampler = Sampler(steps=5, guidance=3.0)
    told = sweep_flops(cost, prompts=7, sampler=sampler, bits=3)
    assert told == 769 * 7 * (10 * cost.forward + cost.decode)
    alone = sweep_flops(cost, prompts=7, sampler=Sampler(steps=5, guidance=1.0), bits=3)
    assert alone == 769 * 7 * (5 * cost.forward + cost.decode)


def test_the_costs_of_sd15():
    cost = counted(sd15_unet_config(), sd15_vae_config(), tokens=77)
    assert cost.layers == 256
    assert cost.forward == pytest.approx(0.80e12, rel=0.02)  # 0.40 T multiplications
    assert cost.linear < cost.forward < cost.backward < 1.3 * cost.forward
    assert 0.4 < cost.rest / cost.forward < 0.7
    table = plan(Study.of("sd15"), cost, seconds=0.02, gpus=4).set_index("work")
    # 769 candidates, 100 images, 50 guided steps; the decoder comes on top
    assert table.evaluations["sweep"] == pytest.approx(769 * 100 * 100, rel=0.04)
    assert table.hours["sweep"] == pytest.approx(table.evaluations["sweep"] * 0.02 / 4 / 3600)
    assert table.petaflop["sweep"] == pytest.approx(
        table.evaluations["sweep"] * cost.forward / 1e15
    )
    assert table.evaluations["estimate"] / table.evaluations["sweep"] < 1e-3


def test_an_evaluation_is_timed(pipe):
    text = torch.randn(1, TOKENS, 16)
    assert 0 < seconds_per_evaluation(pipe, text, rows=2, rounds=1) < 10
