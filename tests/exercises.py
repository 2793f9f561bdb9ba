"""Whether you did the tutorial's exercises: each fails until the code is changed.

    python -m pytest tests/exercises.py -k causal     # or flow, qk_norm, first_frame

A plain `python -m pytest` leaves this file out; test_tutorial.py applies the solutions in
assets/exercises to a copy of the project and runs it there.
"""

from dataclasses import replace

import torch
from conftest import assert_close, randomize

import sample
from stdit import MODELS, VARIANTS, STDiT

FP32 = "fp32 rounding"


def films(B=2):
    """x0, noise [B, 4, 8, 8, 8], y [B, 16, 64] and their mask."""
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(B, 4, 8, 8, 8, generator=g) for _ in range(2))
    return x0, noise, torch.randn(B, 16, 64, generator=g), torch.ones(B, 16, dtype=torch.bool)


class Answer(torch.nn.Module):
    """In place of a network: says answer(x, t), and 0 in the second half of the channels."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.y_embedder = answer, STDiT(MODELS["toy"]).y_embedder

    def forward(self, x, t, y, mask):
        first = self.answer(x, t.view(-1, 1, 1, 1, 1))
        return torch.cat([first, torch.zeros_like(first)], dim=1)


def test_causal():
    assert "causal" in VARIANTS, "add it to VARIANTS in stdit.py"
    x, noise, y, mask = films()
    changed = torch.cat([x[:, :, :5], noise[:, :, 5:]], dim=2)  # another end of the film
    model, t = randomize(STDiT(replace(MODELS["toy"], variant="causal"))), torch.tensor([5, 700])
    a, b = model(x, t, y, mask), model(changed, t, y, mask)
    assert_close(a[:, :, :5], b[:, :, :5], 1e-5, FP32)  # nobody saw it who came before
    assert (a[:, :, 5:] - b[:, :, 5:]).abs().max() > 0.01
    other = torch.cat([noise[:, :, :1], x[:, :, 1:]], dim=2)  # another beginning
    seen = (model(other, t, y, mask) - a).abs().amax((0, 1, 3, 4))  # [T]
    assert seen.min() > 0.01  # by all
    new = STDiT(replace(MODELS["toy"], variant="causal"))  # it can begin as an image model
    assert all(block.attn_temp.proj.weight.abs().max() == 0 for block in new.blocks)


def test_flow():
    x0, noise, y, mask = films()
    t = torch.tensor([499, 999])
    x_t = sample.q_sample(sample.TRAINING, x0, t, noise)
    assert_close(x_t[0], (x0[0] + noise[0]) / 2, 1e-6, FP32)  # half of the way
    assert_close(x_t[1], noise[1], 1e-6, FP32)  # its end
    out = torch.cat([noise - x0, torch.zeros_like(x0)], dim=1)
    loss = sample.diffusion_loss(sample.TRAINING, out, x0, x_t, t, noise)
    assert loss["mse"].max() < 1e-10  # of the right velocity
    loss = sample.diffusion_loss(sample.TRAINING, 0 * out, x0, x_t, t, noise)
    assert_close(loss["mse"], (noise - x0).square().flatten(1).mean(1), 1e-5, FP32)
    # If there is but one film in the world, the velocity is known, and any number of steps leads to
    # that film.
    known = Answer(lambda x, t: (x - x0[:1]) / ((t + 1) / 1000))
    for steps in (2, 7):
        made = sample.sample(known, y, mask, x0[0].shape, [(0, i) for i in range(2)], steps, 1.0)
        assert_close(made, x0[:1].expand(2, -1, -1, -1, -1), 1e-4, FP32)


def test_qk_norm():
    x0, _, y, mask = films()
    model, t = randomize(STDiT(MODELS["toy"])), torch.tensor([5, 700])
    before = model(x0, t, y, mask)
    with torch.no_grad():
        for block in model.blocks:
            for attention in (block.attn, block.attn_temp):
                q_and_k = 2 * attention.qkv.weight.shape[0] // 3
                attention.qkv.weight[:q_and_k].mul_(100)
                attention.qkv.bias[:q_and_k].mul_(100)
    assert_close(model(x0, t, y, mask), before, 1e-4, "fp32 rounding, and rms_norm's epsilon")
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[-128:].mul_(2)  # the values are as they were
    assert (model(x0, t, y, mask) - before).abs().max() > 0.01


def test_first_frame():
    x0, noise, y, mask = films()
    t = torch.tensor([300, 900])
    x_t = sample.q_sample(sample.TRAINING, x0, t, noise)
    assert torch.equal(x_t[:, :, 0], x0[:, :, 0])  # given
    assert (x_t[:, :, 1:] - x0[:, :, 1:]).abs().mean() > 0.3
    out = torch.zeros(2, 8, 8, 8, 8)
    wrong = out.clone()
    wrong[:, :4, 0] = 9.0  # whatever the network says of it
    for name in ("mse", "vlb"):
        a, b = (sample.diffusion_loss(sample.TRAINING, o, x0, x_t, t, noise)[name]
                for o in (out, wrong))  # fmt: skip
        assert torch.equal(a, b) and a.min() > 0
    keys = [(0, i) for i in range(2)]
    seen = []
    model = Answer(lambda x, t: (seen.append(x[:, :, 0]), 0 * x)[1])
    made = sample.sample(model, y, mask, x0[0].shape, keys, 5, 1.0, first=x0[:, :, :1])
    assert torch.equal(made[:, :, 0], x0[:, :, 0])
    assert all(torch.equal(part, x0[:, :, 0]) for x in seen for part in x.chunk(2))
