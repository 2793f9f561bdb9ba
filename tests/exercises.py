"""Tests of the tutorial's exercises: each fails until the code is changed.

    python -m pytest tests/exercises.py -k causal     # or flow, qk_norm, first_frame

A plain `python -m pytest` leaves this file out; test_tutorial.py applies the solutions in
tests/exercises to a copy of the project and runs it there.
"""

from dataclasses import replace

import torch
from conftest import assert_close, hand_attention, randomize

import sample
from stdit import BLOCKS, MODELS, STDiT

FP32 = "fp32 rounding"


def random_batch(B=2):
    """x0, noise [B, 4, 8, 8, 8], y [B, 16, 64], mask [B, 16]."""
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(B, 4, 8, 8, 8, generator=g) for _ in range(2))
    return x0, noise, torch.randn(B, 16, 64, generator=g), torch.ones(B, 16, dtype=torch.bool)


class Known(torch.nn.Module):
    """Stands for a network: predicts predict(x, t), and 0 in the second half of the channels."""

    def __init__(self, predict):
        super().__init__()
        self.predict, self.y_embedder = predict, STDiT(MODELS["toy"]).y_embedder

    def forward(self, x, t, y, mask):
        first = self.predict(x, t.view(-1, 1, 1, 1, 1))
        return torch.cat([first, torch.zeros_like(first)], dim=1)


def test_causal():
    assert "causal" in BLOCKS, "add it to BLOCKS in stdit.py"
    x, noise, y, mask = random_batch()
    model, t = randomize(STDiT(replace(MODELS["toy"], variant="causal"))), torch.tensor([5, 700])
    out = model(x, t, y, mask)
    other_end = torch.cat([x[:, :, :5], noise[:, :, 5:]], dim=2)
    difference = (model(other_end, t, y, mask) - out).abs().amax((0, 1, 3, 4))  # [T]
    assert difference[:5].max() < 1e-5 and difference[5:].min() > 0.01  # fp32 rounding
    other_start = torch.cat([noise[:, :, :1], x[:, :, 1:]], dim=2)
    difference = (model(other_start, t, y, mask) - out).abs().amax((0, 1, 3, 4))
    assert difference.min() > 0.01  # all frames depend on the first
    new = STDiT(replace(MODELS["toy"], variant="causal"))  # starts as an image model
    assert all(block.attn_temp.proj.weight.abs().max() == 0 for block in new.blocks)


def test_flow():
    x0, noise, y, mask = random_batch()
    t, schedule = torch.tensor([499, 999]), sample.TRAIN_SCHEDULE
    x_t = sample.q_sample(schedule, x0, t, noise)
    assert_close(x_t[0], (x0[0] + noise[0]) / 2, 1e-6, FP32)  # the middle of the line
    assert_close(x_t[1], noise[1], 1e-6, FP32)  # its end
    assert_close(sample.predict_x0(schedule, x_t, t, noise - x0), x0, 1e-5, FP32)
    out = torch.cat([noise - x0, torch.zeros_like(x0)], dim=1)  # the exact velocity
    assert sample.diffusion_loss(schedule, out, x0, x_t, t, noise)["mse"].max() < 1e-10
    loss = sample.diffusion_loss(schedule, 0 * out, x0, x_t, t, noise)
    assert_close(loss["mse"], (noise - x0).square().flatten(1).mean(1), 1e-5, FP32)
    assert loss["vlb"].abs().max() == 0
    # With one video in the data the velocity is known, and any number of steps yields that video.
    model = Known(lambda x, t: (x - x0[:1]) / ((t + 1) / 1000))
    keys = [(0, i) for i in range(2)]
    for sampler in sample.SAMPLERS:
        for steps in (2, 7):
            args = (model, y, mask, x0[0].shape, keys, steps, 1.0, 0, sampler)
            assert_close(sample.sample_latents(*args), x0[:1].expand(2, -1, -1, -1, -1), 1e-4, FP32)


def test_qk_norm():
    attention, heads = randomize(STDiT(MODELS["toy"])).blocks[0].attn, 4
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))  # 2 frames, 5 patches
    q, k, v = attention.qkv(x).chunk(3, dim=-1)  # [B, N, D] each
    q, k = (z.unflatten(-1, (heads, -1)) for z in (q, k))  # [B, N, heads, D/heads]
    q, k = ((z / z.square().mean(-1, keepdim=True).sqrt()).flatten(2) for z in (q, k))
    expected = attention.proj(hand_attention(q, k, v, heads))
    assert_close(attention(x[None])[0], expected, 1e-5, FP32)


def test_first_frame():
    x0, noise, y, mask = random_batch()
    t, schedule = torch.tensor([300, 900]), sample.TRAIN_SCHEDULE
    x_t = sample.q_sample(schedule, x0, t, noise)
    assert torch.equal(x_t[:, :, 0], x0[:, :, 0])  # without noise
    assert (x_t[:, :, 1:] - x0[:, :, 1:]).abs().mean() > 0.3
    out = torch.zeros(2, 8, 8, 8, 8)
    other = out.clone()
    other[:, :, 0] = 9.0  # the prediction for frame 0 does not count
    a, b = (sample.diffusion_loss(schedule, o, x0, x_t, t, noise) for o in (out, other))
    assert all(torch.equal(a[name], b[name]) and a[name].min() > 0 for name in ("mse", "vlb"))
    inputs, first = [], x0[:, :, :1]
    model, keys = Known(lambda x, t: (inputs.append(x), 0 * x)[1]), [(0, i) for i in range(2)]
    made = sample.sample_latents(model, y, mask, x0[0].shape, keys, 5, 2.0, first=first)
    assert torch.equal(made[:, :, :1], first)
    assert all(torch.equal(x[:, :, :1], first.repeat(2, 1, 1, 1, 1)) for x in inputs)
