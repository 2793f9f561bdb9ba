"""Sequence parallelism: one video on several processes gives the numbers of one process. Training
runs are in test_train.py.
"""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_train import SHORT

import sample
import train

SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from dataclasses import replace
import torch, torch.distributed as dist
from conftest import randomize
import stdit
from stdit import MODELS, STDiT

torch.set_num_threads(1)
dist.init_process_group("gloo")
n, sent, exchange = dist.get_world_size(), [], stdit.all_to_all_single_autograd

def counted(x, *options):  # numbers that leave this process, forward; backward, as many
    sent.append(x.numel() * (n - 1) // n)
    return exchange(x, *options)

stdit.all_to_all_single_autograd = counted
for variant in ("sequential", "parallel", "latte"):
    for T, H, W in ((4, 8, 8), (12, 6, 8)):
        for mode in ("none", "full", "selective"):
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
            model.sp_group = dist.group.WORLD
            for block in model.blocks:
                block.activation_checkpointing = mode
            sent.clear()
            found, of_many = gradients()
            if (variant, T, mode) == ("sequential", 4, "none"):
                # per block two all-to-alls (Ulysses has four) of T S D / n numbers, of which
                # (n - 1) / n leave a process; at the end T S patches of 4 x 2 C = 32 numbers
                tokens, D = 2 * T * H * W // 4, model.config.hidden_size
                last = tokens // n * (n - 1) * 32
                assert sum(sent) == 4 * (tokens * D // n * (n - 1) // n) + last
            worst = (found - expected).abs().max() / expected.abs().max()
            assert worst < 1e-5, (variant, T, H, W, "forward", worst)
            assert of_many.keys() == of_one.keys()
            for name, gradient in of_many.items():  # DDP's mean
                dist.all_reduce(gradient)
                off = (gradient / n - of_one[name]).norm() / of_one[name].norm().clamp(min=1e-6)
                assert off < 1e-5, (variant, T, H, W, name, off)
print("equal")
dist.destroy_process_group()
"""


def torchrun(n, *arguments):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.run([*start, str(n), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_outputs_and_gradients_of_several_processes_are_those_of_one(n, tmp_path):
    """fp32; the mean over processes of each weight's gradient."""
    script = tmp_path / "parallel.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests")))
    done = torchrun(n, script)
    assert done.returncode == 0 and done.stdout.count("equal") == n, done.stderr[-3000:]


def test_a_video_sampled_by_two_processes_is_that_of_one(toy, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train.train(train.TrainConfig(data=str(toy / "train"), out=str(out), **SHORT | {"steps": 2}))
    argv = ["--weights", str(out), "--prompt", "a red circle moving left", "--steps", "3"]
    done = torchrun(2, ROOT / "sample.py", *argv, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("sheet.png") == 1  # rank 0 alone writes and prints
    monkeypatch.setattr(sys, "argv", ["sample.py", *argv, "--out", str(tmp_path / "one")])
    sample.main()
    sheets = (Image.open(tmp_path / out / "sheet.png").convert("RGB") for out in ("one", "two"))
    one, two = (np.asarray(sheet, dtype=float) for sheet in sheets)
    assert one.shape == two.shape and np.abs(one - two).max() <= 2  # of 255: rounding
