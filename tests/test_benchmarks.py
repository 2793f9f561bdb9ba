"""FLOPs and memory as benchmarks/speed.py counts and predicts them; its check finds what is wrong;
the benchmarks run.
"""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import speed
from speed import flops_per_clip, inputs, kept_bytes, latent_shape, make, predicted_memory

import stdit
from data import UserError
from stdit import MODELS, STDiT
from train import PRESETS, model_config


def test_flops_are_those_of_the_matrix_products_that_training_needs():
    """2 per multiplication; twice that in backward, for the gradients of input and weight."""
    c = replace(MODELS["STDiT-XL/2"], depth=2)
    T, S = 16, 256
    N, D, L, E = T * S, c.hidden_size, c.caption_length, c.caption_channels
    block = N * (18 * D**2 + 2 * D * (S + T + L)) + 2 * L * D**2  # layers, attentions, kv
    first = N * 16 * D + L * E * D + 256 * D  # layers of patch, caption and timestep
    forward = 2 * (c.depth * block + first + (L + 1 + 6) * D**2 + N * D * 32)
    expected = {"none": forward, "final_layer.linear": forward + 2 * N * D * 32}
    expected[""] = 3 * forward - 2 * first  # no gradient of the model's inputs
    with torch.device("meta"):
        model = STDiT(c)
    for trainable, flops in expected.items():
        for name, p in model.named_parameters():
            p.requires_grad_(trainable in name)
        assert flops_per_clip(model, (4, T, 32, 32)) == flops


def test_predicted_memory_is_what_the_blocks_keep():
    """What a model keeps beyond the prediction, for embedders and final layer, is small."""
    config = MODELS["toy"]
    shape, clips = (4, 8, 8, 8), 16
    fixed = 20 * sum(p.numel() for p in STDiT(config).parameters())
    batch = inputs(config, shape, clips, "cpu")
    blocks = {}
    for mode in ("none", "selective", "full"):
        blocks[mode] = 1e9 * predicted_memory(STDiT(config), shape, clips, mode) - fixed
        if mode != "none":  # the inside of one block comes on top, recomputed in backward
            blocks[mode] -= blocks["none"] / config.depth
        model = make(config, mode)
        outside = kept_bytes(lambda: model(*batch)) - blocks[mode]
        assert 0.02 < outside / blocks["none"] < 0.05, mode
    assert blocks["full"] < 0.05 * blocks["none"] < 0.5 * blocks["selective"]


@pytest.mark.parametrize("name", ("16x256x256", "16x512x512", "64x512x512", "16x256x256-24gb"))
def test_presets_fit_their_gpu_by_prediction(name):
    """With 8 GPUs of 80 or 24 GB; 10% are left for what is not predicted."""
    c = PRESETS[name]
    limit = 24 if "24gb" in name else 80
    with torch.device("meta"):
        model = STDiT(model_config(c))
    for weight, p in model.named_parameters():
        p.requires_grad_(c.trainable == "all" or "attn_temp" in weight)
    clips = c.micro_batch or c.batch_size // 8
    mode = c.activation_checkpointing
    predicted = predicted_memory(model, latent_shape(c), clips, mode, bf16=True)
    assert 0.2 * limit < predicted < 0.9 * limit


# ----------------------------------------------------------------------------------------- check
CASE = {"tiny": speed.Case(speed.TINY, speed.TINY_SHAPE, 2, "full")}


@pytest.fixture
def compile_with(monkeypatch):
    """Compiles blocks without g++, and with a fault in the first block."""

    def patch(fault=None):
        monkeypatch.setattr(speed, "has_compiler", lambda: True)
        faults = iter([fault] if fault else [])

        def compile_block(block):
            block.compile(dynamic=False, backend="eager")
            for spoil in faults:
                block.scale_shift_table.register_hook(spoil)
                break

        monkeypatch.setattr(stdit, "compile_block", compile_block)

    return patch


def test_the_check_passes_here(compile_with, capsys):
    compile_with()
    speed.check(CASE, "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("right  tiny, ") for line in lines)


@pytest.mark.parametrize("value", (0.0, math.nan, "noise"))
def test_the_check_finds_one_lost_row_of_a_gradient(value, compile_with, capsys):
    """As when compiled code computes a row and does not store it."""

    def spoil(grad):
        grad = grad.clone()
        grad[2] = torch.randn_like(grad[2]) * grad[2].std() if value == "noise" else value
        return grad

    compile_with(spoil)
    with pytest.raises(SystemExit, match="1 of 4 checks failed. Wrong gradients"):
        speed.check(CASE, "cpu")
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert len(wrong) == 1 and "blocks.0.scale_shift_table, row 2 is off by " in wrong[0]


def test_the_check_notices_that_nothing_was_compiled(monkeypatch):
    monkeypatch.setattr(speed, "has_compiler", lambda: True)
    monkeypatch.setattr(stdit, "compile_block", lambda block: None)
    with pytest.raises(UserError, match="0 graphs were compiled, expected 2"):
        speed.check(CASE, "cpu")


@pytest.mark.parametrize("fault", ("no mask", "not finite", "gradient of v"))
def test_the_check_finds_a_wrong_attention_kernel(fault, monkeypatch, capsys):
    """Wrong in bf16 only, as a fused kernel would be."""
    attention = F.scaled_dot_product_attention

    def wrong(q, k, v, attn_mask=None):
        bf16 = q.dtype == torch.bfloat16
        if bf16 and fault == "gradient of v":
            v = v.clone()
            v.register_hook(lambda grad: torch.cat([0 * grad[:, :, :1], grad[:, :, 1:]], dim=2))
        out = attention(q, k, v, None if bf16 and fault == "no mask" else attn_mask)
        if bf16 and fault == "not finite":
            out = torch.where(torch.arange(out.shape[2])[:, None] == 3, math.inf, out)
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    with pytest.raises(SystemExit, match="checks failed"):
        speed.check({"tiny": speed.Case(speed.TINY, speed.TINY_SHAPE, 1, compile=False)}, "cpu")
    lines = capsys.readouterr().out.splitlines()
    wrong = {line.split(", ")[1].split(":")[0] for line in lines if line.startswith("WRONG")}
    assert wrong == ({"cross_attn"} if fault == "no mask" else {"attn", "attn_temp", "cross_attn"})


def test_every_compiled_preset_is_checked(capsys, monkeypatch):
    """On a GPU at its own shape; on a CPU each combination of modes at tiny shapes."""
    on_gpu = speed.preset_cases("cuda")
    for name, c in PRESETS.items():
        same = [n for n, d in PRESETS.items() if model_config(d) == model_config(c)]
        assert name in on_gpu or set(same) & on_gpu.keys(), name
    assert on_gpu["64x512x512"][1:4] == ((4, 64, 64, 64), 1, "full")
    assert any(case.clips * case.shape[2] * case.shape[3] // 4 > 65535 for case in on_gpu.values())
    on_cpu = speed.preset_cases("cpu").values()
    assert {(c.mode, c.trainable) for c in on_cpu if c.compile} == {
        (c.activation_checkpointing, c.trainable) for c in PRESETS.values() if c.compile
    }
    monkeypatch.setattr(speed, "has_compiler", lambda: False)
    speed.check(CASE, "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("compiled gradients are not checked: g++") and len(lines) == 4


def test_nothing_wrong_is_timed(compile_with, monkeypatch):
    compile_with(torch.zeros_like)
    monkeypatch.setattr(speed, "compare", lambda *args: pytest.fail("was timed"))
    with pytest.raises(SystemExit, match="checks failed"):
        speed.on_cpu(speed.TINY, speed.TINY_SHAPE)
    monkeypatch.setattr(speed, "attention_errors", lambda *args: {"attn": {"output": math.nan}})
    with pytest.raises(SystemExit, match="checks failed"):
        speed.on_cuda({"tiny": (speed.TINY, speed.TINY_SHAPE, 1)}, "cpu")


# -------------------------------------------------------------------------------------- all of it
COMMANDS = ("speed.py", "designs.py", "cost.py", "ablations.py zero", "ablations.py patches")


@pytest.mark.slow
@pytest.mark.parametrize("command", (*COMMANDS, "ablations.py progressive"))
def test_the_benchmarks_run(command, tmp_path):
    """With --quick, a minute or two each."""
    script, *words = command.split()
    command = [sys.executable, ROOT / "benchmarks" / script, *words, "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum(line.startswith("|") for line in done.stdout.splitlines()) > 5  # tables
