"""One film on several processes: the same numbers as on one, and the bytes that it costs."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_train import SHORT, assert_same_numbers, launch

import data
import sample
import train

SCRIPT = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from dataclasses import replace
import torch, torch.distributed as dist
from conftest import randomize
import stdit
from stdit import MODELS, STDiT, checkpoint_blocks

torch.set_num_threads(1)
dist.init_process_group("gloo")
n, group, sent = dist.get_world_size(), dist.group.WORLD, []
exchange = stdit.exchange

def counted(x, group):  # elements that leave this process, forward; backward, as many
    sent.append(x.numel() * (n - 1) // n)
    return exchange(x, group)

stdit.exchange = counted
for variant in ("sequential", "parallel", "latte"):
    for T, H, W in ((4, 8, 8), (5, 6, 10), (1, 4, 4), (3, 2, 2)):  # 5 and 15: 2, 4 do not divide
        for again in (False, True):  # with blocks recomputed in the backward pass
            model = randomize(STDiT(replace(MODELS["toy"], variant=variant, depth=2)))
            torch.manual_seed(1)
            x, y = torch.randn(2, 4, T, H, W), torch.randn(2, 7, 64)
            t, mask = torch.tensor([3, 700]), torch.rand(2, 7) < 0.7
            weight = torch.randn(2, 8, T, H, W)

            def gradients():
                model.zero_grad()
                out = model(x, t, y, mask)
                (out * weight).mean().backward()
                return out.detach(), {{k: p.grad.clone() for k, p in model.named_parameters()
                                      if p.grad is not None}}

            expected, of_one = gradients()
            model.group = group
            if again:
                checkpoint_blocks(model, keep_products=variant == "parallel")
            sent.clear()
            found, shared = gradients()
            if variant == "sequential" and (T, H, W) == (4, 8, 8) and n in (2, 4) and not again:
                # per block: two exchanges of the T S D / n numbers that each has, of which
                # (n - 1) / n leave it; Ulysses has four (q, k, v, out); at the end, T S
                # patches of 4 x 2 C = 32 numbers
                tokens, D = 2 * T * H * W // 4, model.config.hidden_size
                block = 2 * tokens * D // n * (n - 1) // n
                last = tokens // n * (n - 1) * 32
                assert sum(sent) == 2 * block + last, (sum(sent), block, last)
            worst = (found - expected).abs().max() / expected.abs().max()
            assert worst < 1e-5, (variant, T, H, W, "forward", worst)
            assert shared.keys() == of_one.keys()
            for name, gradient in shared.items():  # what DDP does
                dist.all_reduce(gradient)
                off = (gradient / n - of_one[name]).norm() / of_one[name].norm().clamp(min=1e-6)
                assert off < 1e-5, (variant, T, H, W, name, off)
model = STDiT(replace(MODELS["toy"], variant="full"))
model.group = group
try:
    model(x, t, y, mask)
    raise SystemExit("full was not refused")
except ValueError as error:
    assert "sp=1" in str(error)
print("equal")
dist.destroy_process_group()
"""


def torchrun(n, *arguments):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.run([*start, str(n), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow),
                               pytest.param(3, marks=pytest.mark.slow)])  # fmt: skip
def test_a_shared_film_gives_the_outputs_and_gradients_of_one_process(n, tmp_path):
    """fp32; the mean over processes of each weight's gradient, in the designs that can be shared,
    with frames and patches that n divides and that it does not.
    """
    script = tmp_path / "shared.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    done = torchrun(n, script)
    assert done.returncode == 0 and done.stdout.count("equal") == n, done.stderr[-3000:]


@pytest.fixture
def config(toy, tmp_path):
    options = SHORT | dict(batch_size=4, steps=20, save_every=20, eval_every=10, films=2)
    return train.TrainConfig(data=str(toy / "cache_train"), held_out=str(toy / "cache_held_out"),
                             out=str(tmp_path / "run"), film_every=20, film_steps=2,
                             **options)  # fmt: skip


@pytest.mark.parametrize("processes, sp, micro_batch", [
    (2, 2, 1), pytest.param(4, 2, 0, marks=pytest.mark.slow),
    pytest.param(4, 1, 0, marks=pytest.mark.slow), pytest.param(4, 4, 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_training_with_shared_films_gives_the_numbers_of_one_process(
    config, processes, sp, micro_batch
):
    """20 steps; 4 processes: 2 replicas of 2, 4 of 1, 1 of 4. Clips, t, noise and dropped captions
    are those of the global batch, so also held-out losses and films agree.
    """
    if sp == 2 and processes == 2:
        config = replace(config, steps=4, eval_every=4, film_every=4, save_every=4)
    shared = replace(config, out=config.out + "2", sp=sp, micro_batch=micro_batch)
    process = launch(shared, processes)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    train.train(config)
    assert_same_numbers(config.out, shared.out, 1e-4)  # 20 steps multiply fp32 rounding
    one, two = (Image.open(Path(c.out) / "films.png").convert("RGB") for c in (config, shared))
    difference = np.abs(np.asarray(one, float) - np.asarray(two, float))
    assert one.size == two.size and difference.mean() < 0.5  # of 255


def test_a_film_sampled_by_two_processes_is_that_of_one(config, tmp_path, monkeypatch):
    train.train(replace(config, steps=2, films=0))
    argv = ["--weights", config.out, "--prompt", "a red circle moving left", "--steps", "3"]
    done = torchrun(2, ROOT / "sample.py", *argv, "--sp", "2", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("sheet.png") == 1  # the first process alone writes and tells
    monkeypatch.setattr(sys, "argv", ["sample.py", *argv, "--out", str(tmp_path / "one")])
    sample.main()
    one, two = (data.read_frames(next((tmp_path / out).glob("*.mp4")), 8) for out in ("one", "two"))
    assert (one.float() - two.float()).abs().max() <= 12  # rounding, through H.264
    done = torchrun(2, ROOT / "sample.py", *argv, "--out", tmp_path / "two")
    assert done.returncode != 0 and "all have to share; give --sp 2" in done.stderr


@pytest.mark.parametrize("options, message", [
    (dict(variant="full", sp=2), "variant=full attends to all tokens at once"),
    (dict(sp=0), "sp=0: expected 1"),
])  # fmt: skip
def test_what_can_not_be_shared_is_refused(config, options, message):
    with pytest.raises(data.BadInput, match=message):
        train.check(replace(config, **options), world=2)
