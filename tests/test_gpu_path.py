"""The GPU path as far as a CPU can test it: copies of fake CUDA tensors, graphs of torch.compile,
and the cost model's formulas against counted FLOPs.
"""

import sys
from dataclasses import replace

import pytest
import torch
import torch._dynamo.config
import torch.nn.functional as F
from conftest import ROOT, randomize
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import sample
import stdit
import train
from stdit import MODELS, STDiT, STDiTConfig

sys.path.insert(0, str(ROOT / "benchmarks"))
import cost_model  # noqa: E402
import speed  # noqa: E402


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
    """Fake tensors on cuda:0 run without a GPU. The first call fills the caches of tables."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(train, "draw_timesteps", lambda c, p: torch.zeros(2, dtype=torch.long))
    monkeypatch.setattr(train, "draw", lambda random, c, name, p, *shape: torch.zeros(2, *shape))
    caches = train.schedule_on, stdit.spatial_pos_embed, stdit.temporal_pos_embed
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda:0"):
        model = STDiT(MODELS["toy"])
        batch = torch.zeros(2, 4, 8, 8, 8), torch.zeros(2, 16, 64), torch.ones(2, 16).bool()
    with FakeTensorMode(allow_non_fake_inputs=True):
        counts = []
        for _ in range(2):
            with Copies() as copies:
                null, config = model.y_embedder.y_embedding, train.TrainConfig()
                loss = train.training_loss(config, model, null, batch, range(2))
            counts.append(copies.blocking)
    for cache in caches:  # they hold fake tensors now
        cache.cache_clear()
    assert loss.device.type == "cuda" and len(counts[0]) >= 9  # the nine tables of the schedule
    assert counts[1] == []


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_all_blocks_of_a_deep_model_share_two_graphs(mode):
    """28 blocks must not reach torch.compile's limit of recompilations: the first block has a
    temporal position embedding, the others have none.
    """
    torch._dynamo.reset()
    config = STDiTConfig(depth=12, hidden_size=32, num_heads=4, caption_channels=24)
    model, graphs = randomize(STDiT(config)), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in model.blocks:
        block.activation_checkpointing = mode
        block.compile(dynamic=False, backend=backend)
    for T in (1, 3):  # images, then videos
        model(torch.zeros(1, 4, T, 4, 4), torch.ones(1), torch.zeros(1, 120, 24)).sum().backward()
    assert len(graphs) == 4


@pytest.mark.parametrize("preset", ["16x256x256", "64x512x512"])
def test_the_cost_model_counts_the_flops_of_the_blocks(preset):
    c, config = train.PRESETS[preset], MODELS["STDiT-XL/2"]
    side = c.size // 8
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        y = torch.empty(1, config.caption_length, config.caption_channels)
        STDiT(config)(torch.empty(1, 4, c.frames, side, side), torch.empty(1), y)
    counted, (products, attention) = counter.get_total_flops(), cost_model.flops(preset)
    # embedders and the final layer, which the model leaves out, are below 1% of the whole
    assert 0 <= counted / (products + attention) - 1 < 0.01


def test_sampling_draws_noise_only_for_ddpm(monkeypatch):
    drawn = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: drawn.append(1) or randn(*a, **k))
    model = randomize(STDiT(STDiTConfig(depth=1, hidden_size=32, num_heads=4, caption_channels=24)))
    y, mask = torch.zeros(1, 120, 24), torch.ones(1, 120, dtype=torch.bool)
    counts = {}
    for name in sample.SAMPLERS:
        drawn.clear()
        sample.sample(model, y, mask, (4, 1, 4, 4), [("test", 0)], 4, 1, sampler=name)
        counts[name] = len(drawn)
    assert counts == {"ddpm": 5, "ddim": 1, "dpm": 1}


def test_the_check_of_attention_passes_here_and_finds_a_wrong_kernel(monkeypatch):
    config, shape = replace(MODELS["toy"], hidden_size=64), (4, 4, 8, 8)
    speed.check_attention(config, shape, "cpu")
    attention = F.scaled_dot_product_attention

    def wrong(q, k, v, attn_mask):
        return attention(q, k, v, attn_mask if q.dtype == torch.float32 else None)

    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)  # without its mask
    with pytest.raises(SystemExit, match="attention is off by"):
        speed.check_attention(config, shape, "cpu")


def test_the_projection_is_calculated_for_every_stage(capsys, monkeypatch):
    make = speed.make  # predicts memory with few blocks, which is faster
    monkeypatch.setattr(speed, "make", lambda config, mode: make(replace(config, depth=2), mode))
    speed.project()
    rows = [line for line in capsys.readouterr().out.splitlines() if "GPUs |" in line]
    shares = [float(row.split("|")[-3]) for row in rows]  # of the peak
    assert len(rows) == 12 and all(0.1 < share < 0.6 for share in shares)
