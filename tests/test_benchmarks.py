"""FLOPs and memory as benchmarks/speed.py counts and predicts them; the benchmarks run."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from speed import flops_per_clip, inputs, kept_bytes, latent_shape, make, predicted_memory

from data import Distributed
from stdit import MODELS, STDiT
from train import PRESETS, model_config, positions_of_step


def test_flops_are_those_of_the_matrix_products_that_training_needs():
    """2 per multiplication; twice that in backward, for the gradients of input and weight."""
    c, T, S = replace(MODELS["STDiT-XL/2"], depth=2), 16, 256
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
    config, shape, clips = MODELS["toy"], (4, 8, 8, 8), 16
    fixed, blocks = 20 * sum(p.numel() for p in STDiT(config).parameters()), {}
    for mode in ("none", "selective", "full"):
        model, batch = make(config, mode), inputs(config, shape, clips, "cpu")
        blocks[mode] = 1e9 * predicted_memory(model, shape, clips) - fixed
        if mode != "none":  # the inside of one block comes on top, recomputed in backward
            blocks[mode] -= blocks["none"] / config.depth
        outside = kept_bytes(lambda: model(*batch)) - blocks[mode]
        assert 0.02 < outside / blocks["none"] < 0.05, mode
    assert blocks["full"] < 0.05 * blocks["none"] < 0.5 * blocks["selective"]


@pytest.mark.parametrize("name", ("16x256x256", "16x512x512", "64x512x512", "16x256x256-24gb"))
def test_presets_fit_their_gpu_by_prediction(name):
    """With 8 GPUs of 80 or 24 GB; 10% are left for what is not predicted."""
    run, limit = PRESETS[name], 24 if "24gb" in name else 80
    with torch.device("meta"):
        model = make(model_config(run), run.activation_checkpointing)
    for weight, p in model.named_parameters():
        p.requires_grad_(run.trainable == "all" or "attn_temp" in weight)
    clips = len(positions_of_step(run, 0, Distributed("cpu", dp_size=8))[0])
    predicted = predicted_memory(model, latent_shape(run), clips, bf16=True)
    assert 0.2 * limit < predicted < 0.9 * limit


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
