"""The GPU path as far as a CPU can test it: copies of fake CUDA tensors, graphs and gradients of
torch.compile, and the cost model's formulas against counted FLOPs.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
from conftest import ROOT, randomize
from functorch.compile import min_cut_rematerialization_partition, nop
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import sample
import stdit
import train
from stdit import BLOCKS, MODELS, STDiT, STDiTConfig, set_up_scaling

sys.path.insert(0, str(ROOT / "benchmarks"))
import cost_model  # noqa: E402
import speed  # noqa: E402

MODES = ("none", "selective", "full")  # of activation checkpointing


class Copies(TorchDispatchMode):
    """Counts copies between devices for which the CPU waits, and reads of values from the GPU."""

    def __init__(self):
        super().__init__()
        self.blocking = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten._to_copy.default and not (kwargs or {}).get("non_blocking"):
            if args[0].device.type != out.device.type:
                self.blocking.append(tuple(out.shape))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.blocking.append("item")
        return out


def test_the_training_loss_never_waits_for_the_gpu(monkeypatch):
    """Fake tensors on cuda:0 run without a GPU. In the first step the tables of positions are
    copied, later ones copy the batch alone, from pinned memory, and read nothing back.
    """
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    caches = stdit.spatial_pos_embed, stdit.temporal_pos_embed
    for cache in caches:
        cache.cache_clear()
    batch = torch.zeros(2, 4, 8, 8, 8), torch.zeros(2, 16, 64), torch.ones(2, 16).bool()
    batch += torch.tensor([3, 700]), torch.zeros(2, 4, 8, 8, 8), torch.tensor([True, False])
    copies = []
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        with torch.device("cuda:0"):
            model = STDiT(MODELS["toy"])
        schedule = sample.TRAIN_SCHEDULE.to("cuda:0")
        config = train.PRESETS["toy"]
        run = SimpleNamespace(model=model, ddp_model=model, config=config, schedule=schedule)
        for _ in range(2):
            with Copies() as recorder:
                on_gpu = [train.to_device(fake.from_tensor(v), "cuda:0") for v in batch]
                losses = train.training_loss(run, *on_gpu)
            copies.append(recorder.blocking)
    for cache in caches:  # they hold fake tensors now
        cache.cache_clear()
    assert losses.device.type == "cuda" and losses.shape == (3,)
    assert [sorted(c) for c in copies] == [[(1, 8, 1, 128), (16, 128)], []]


# --------------------------------------------------------------------------------------- compiled
def inductor_without_code(graph, inputs):
    """Inductor as far as its partitioner, which decides what is kept and what is recomputed."""

    def partition(joint, joint_inputs, **options):
        joint_graph_passes(joint)
        return min_cut_rematerialization_partition(joint, joint_inputs, "inductor", **options)

    return aot_autograd(fw_compiler=nop, partition_fn=partition)(graph, inputs)


def compile_with(monkeypatch, backend):
    def compile_block(block):
        block.compile(dynamic=False, backend=backend)

    monkeypatch.setattr(stdit, "compile_block", compile_block)


def gradients(model, T):
    """The gradients of a model with a width of 32 on two clips of T frames."""
    torch.manual_seed(1)
    x, y = torch.randn(2, 4, T, 4, 4), torch.randn(2, 120, 24)
    mask = torch.rand(2, 120) < 0.7
    model.zero_grad()
    (model(x, torch.tensor([3, 700]), y, mask) - 1).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def check_compiled(variant, mode):
    """Compares with eager blocks without checkpointing, and counts graphs."""
    torch._dynamo.reset()
    counters.clear()
    config = STDiTConfig(depth=3, hidden_size=32, num_heads=4, caption_channels=24, variant=variant)
    expected = gradients(randomize(STDiT(config)), 3)
    model = randomize(STDiT(config))
    set_up_scaling(model, mode, compile=True)
    found = gradients(model, 3)
    for name, grad in found.items():
        error = (grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, f"{name} is off by {error:.2g}"  # fp32, sums in another order
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    return model


CASES = [
    pytest.param(v, m, marks=[] if v == "sequential" or m == "full" else pytest.mark.slow)
    for v in BLOCKS
    for m in MODES
]


@pytest.mark.parametrize("variant, mode", CASES)
def test_compiled_blocks_share_two_graphs_and_have_the_gradients_of_eager_ones(
    variant, mode, monkeypatch
):
    """One graph with a temporal position, one without, for any depth; none is cut in two. (With a
    position of 0.0 in place of None full checkpointing ended in an AssertionError there.)
    """
    compile_with(monkeypatch, inductor_without_code if mode == "full" else "eager")
    check_compiled(variant, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", BLOCKS)
def test_inductor_gives_the_gradients_of_eager_blocks(variant, mode):
    """The whole compiler, as far as the CPU's g++; a GPU's is checked by speed.py --check."""
    if not speed.has_compiler():
        pytest.skip("g++ or Python.h is missing")
    check_compiled(variant, mode)


def test_mix_order_reduction_is_off_where_blocks_are_compiled(monkeypatch):
    """With it torch 2.14.1 loses gradients on GPUs, see compile_block."""
    options = torch._inductor.config.triton
    monkeypatch.setattr(options, "mix_order_reduction", True)
    set_up_scaling(STDiT(MODELS["toy"]), "full")
    assert options.mix_order_reduction
    set_up_scaling(STDiT(MODELS["toy"]), compile=True)
    assert not options.mix_order_reduction


@pytest.mark.slow
def test_images_and_videos_each_have_two_graphs(monkeypatch):
    """28 blocks must not reach torch.compile's limit of recompilations, 8."""
    torch._dynamo.reset()
    counters.clear()
    compile_with(monkeypatch, "eager")
    config = STDiTConfig(depth=12, hidden_size=32, num_heads=4, caption_channels=24)
    model = randomize(STDiT(config))
    set_up_scaling(model, "full", compile=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for T in (1, 3):
            gradients(model, T)
    assert counters["stats"]["unique_graphs"] == 4


# -------------------------------------------------------------------------- cost model, sampling
@pytest.mark.parametrize("preset", ["16x256x256", "64x512x512"])
def test_the_cost_model_counts_the_flops_of_the_blocks(preset):
    c = train.PRESETS[preset]
    config = MODELS["STDiT-XL/2"]
    side = c.size // 8
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        y = torch.empty(1, config.caption_length, config.caption_channels)
        STDiT(config)(torch.empty(1, 4, c.frames, side, side), torch.empty(1), y)
    # embedders and the final layer, which the model leaves out, are below 1% of the whole
    assert 0 <= counter.get_total_flops() / sum(cost_model.flops(preset)) - 1 < 0.01


def test_sampling_draws_noise_only_for_ddpm(monkeypatch):
    drawn = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: drawn.append(1) or randn(*a, **k))
    model = randomize(STDiT(STDiTConfig(depth=1, hidden_size=32, num_heads=4, caption_channels=24)))
    y, mask = torch.zeros(1, 120, 24), torch.ones(1, 120, dtype=torch.bool)
    counts = {}
    for name in sample.SAMPLERS:
        drawn.clear()
        sample.sample_latents(model, y, mask, (4, 1, 4, 4), [("test", 0)], 4, 1, sampler=name)
        counts[name] = len(drawn)
    assert counts == {"ddpm": 4, "ddim": 1, "dpm": 1}  # ddpm: not in its last step


def test_the_projection_is_calculated_for_every_stage(capsys, monkeypatch):
    monkeypatch.setattr(speed, "preset_memory", lambda preset, mode, sp: 1.0)  # takes a minute
    speed.project()
    rows = [line for line in capsys.readouterr().out.splitlines() if "GPUs |" in line]
    shares = [float(row.split("|")[-3]) for row in rows]  # of the peak
    assert len(rows) == 12 and all(0.1 < share < 0.6 for share in shares)
