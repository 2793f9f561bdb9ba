"""Speed and memory of training and sampling on this machine, with random weights and latents.

    python benchmarks/speed.py                  # CPU: small sizes, 5 minutes; CUDA: v1's stages
    python benchmarks/speed.py --quick          # tiny sizes, seconds; writes nothing
    python benchmarks/speed.py --project 0.4    # calculate v1's stages on many GPUs
    MALLOC_MMAP_THRESHOLD_=1000000 python benchmarks/speed.py --step
                                                # one step of XL/2 at 16x512x512; Linux, 24 GB

Models of a table are measured in turns, so ratios hold on a noisy machine; times are medians. The
reference is diffusers' Latte of the same width, depth and shape. Its depth counts pairs of blocks,
spatial and temporal, each with an MLP, so at equal depth it has 26 D^2 multiplications per token
and layer, STDiT 18 D^2; each also has 2 D^2 per caption token, which Latte repeats for every frame.
Results go to benchmarks/speed.json.

MALLOC_MMAP_THRESHOLD_ keeps glibc from holding on to freed tensors of less than 32 MB, which added
5 GB to the peak at 16x256x256.
"""

import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler is silent

import torch
import torch.nn as nn
import tyro
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from sample import sample
from stdit import MODELS, STDiT, STDiTBlock, autocast
from train import PRESETS

# TFLOP/s of dense bf16 matrix products from the data sheets, of SXM modules; PCIe cards have less
PEAK = {"H100": 989, "H200": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362}
PEAK |= {"RTX 4090": 165, "RTX 3090": 71}
XL = MODELS["STDiT-XL/2"]

# ---------------------------------------------------------------------------------------------
# Models and inputs


def make(config, activation_checkpointing="none", compile=False):
    """An STDiT; its blocks are checkpointed and compiled as in train.parallelize."""
    model = STDiT(config)
    for block in model.blocks:
        block.activation_checkpointing = activation_checkpointing
        if compile:
            block.compile(dynamic=False)
    return model


class Latte(nn.Module):
    """diffusers' Latte with the width, depth and heads of an STDiTConfig, called like STDiT."""

    def __init__(self, config, shape, gradient_checkpointing=False):
        from diffusers import LatteTransformer3DModel

        super().__init__()
        self.config, (_, T, _, W) = config, shape
        D, heads = config.hidden_size, config.num_heads
        sizes = {"num_layers": config.depth, "num_attention_heads": heads, "in_channels": 4}
        sizes |= {"attention_head_dim": D // heads, "cross_attention_dim": D, "out_channels": 8}
        sizes |= {"caption_channels": config.caption_channels, "patch_size": 2}
        options = {"attention_bias": True, "activation_fn": "gelu-approximate", "norm_eps": 1e-6}
        options |= {"norm_type": "ada_norm_single", "norm_elementwise_affine": False}
        options |= {"num_embeds_ada_norm": 1000, "sample_size": W, "video_length": T}
        self.model = LatteTransformer3DModel(**sizes, **options)
        if gradient_checkpointing:
            self.model.enable_gradient_checkpointing()

    def forward(self, x, t, y):
        with autocast(x.device):
            return self.model(x, t, y).sample


def latent_shape(config):
    """(C, T, H, W) of a TrainConfig's clips."""
    return 4, config.frames, config.size // 8, (config.width or config.size) // 8


def inputs(config, shape, clips, device):
    """Random x [B, C, T, H, W], t [B], y [B, L, E] without padding."""
    x = torch.randn(clips, *shape, device=device)
    t = torch.randint(1000, (clips,), device=device)
    return x, t, torch.randn(clips, config.caption_length, config.caption_channels, device=device)


# ---------------------------------------------------------------------------------------------
# FLOPs and memory, without running a step


def flops_per_clip(model, shape):
    """FLOPs of forward and backward on one clip with latents `shape` (C, T, H, W): 2 for a
    multiplication and an addition. The model is on the meta device. Only gradients that
    requires_grad asks for are counted: with none, the forward pass. Recomputation would be counted
    too, so the model should be without activation checkpointing.
    """
    batch = inputs(model.config, shape, 1, "meta")
    with FlopCounterMode(display=False) as counter:
        out = model(*batch)
        if out.requires_grad:
            out.sum().backward()
    return counter.get_total_flops()


def kept_bytes(forward, device="cpu"):
    """Bytes that forward() allocates and that live as long as its output: the output itself, and
    what is kept for the backward pass.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        out = forward()
        return torch.cuda.memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        out = forward()  # noqa: F841  alive until the profile ends
    return sum(event.self_cpu_memory_usage for event in profile.events())


def predicted_memory(model, shape, clips=1, bf16=False):
    """GB of a training process that takes `clips` clips with latents `shape` at a time: fp32
    weights and EMA; for trainable weights the gradient and AdamW's two moments; and what the blocks
    keep for the backward pass, measured on few tokens and scaled up. Not counted: embedders, final
    layer, frozen encoders, temporary buffers. The model may be on the meta device; requires_grad
    and activation_checkpointing are taken from it.
    """
    c, mode, (_, T, H, W) = model.config, model.blocks[0].activation_checkpointing, shape
    fixed = sum(p.numel() * (20 if p.requires_grad else 8) for p in model.parameters())
    (pt, ph, pw), block = c.patch_size, STDiTBlock(c)
    for p, of_model in zip(block.parameters(), model.blocks[0].parameters()):
        p.requires_grad_(of_model.requires_grad)
    frames, S, few = clips * T // pt, H // ph * (W // pw), 64  # patches per frame, as measured

    def block_bytes(mode):
        block.activation_checkpointing, kept = mode, []
        for n in (1, 2):  # frames
            sizes = (n, few), (math.ceil(c.caption_length * few / S),), (6,)
            x, y, m = (torch.zeros(1, *size, c.hidden_size, requires_grad=True) for size in sizes)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                kept.append(kept_bytes(lambda: block(x, y, None, m, 0.0)))
        per_frame = kept[1] - kept[0]
        return kept[0] - per_frame + frames * S / few * per_frame

    recomputed = 0 if mode == "none" else block_bytes("none")  # one block at a time, in backward
    return (fixed + c.depth * block_bytes(mode) + recomputed) / 1e9


# ---------------------------------------------------------------------------------------------
# Measuring


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def training_step(model, batch, device):
    """Forward and backward -> seconds."""
    model.zero_grad()
    wait(device)
    start = time.perf_counter()
    out = model(*batch)
    (out - 1).square().mean().backward()
    wait(device)
    return time.perf_counter() - start


def compare(makers, config, shape, clips, device, repeats):
    """Measure training steps of models, in turns. makers {name: function that makes the model}
    -> {name: figures}.
    """
    gc.collect()  # the last models
    torch.compiler.reset()  # else the next shape would be compiled as a dynamic one
    batch, figures, models = inputs(config, shape, clips, device), {}, {}
    for name, maker in makers.items():
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        models[name], figures[name] = maker().to(device), {}
        training_step(models[name], batch, device)  # compiles, selects kernels
        if device == "cuda":
            figures[name]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        kept = kept_bytes(lambda: models[name](*batch), device)
        figures[name]["activation_gb"] = kept / 1e9
    times = {name: [] for name in makers}
    for _ in range(repeats):
        for name in makers:
            times[name].append(training_step(models[name], batch, device))
    tokens = clips * math.prod(shape[1:]) / math.prod(config.patch_size)
    for name, seconds in times.items():
        median = statistics.median(seconds)
        figures[name] |= {"seconds": median, "tokens_per_second": tokens / median}
    return figures


def add_flops(row, maker, shape, clips, device):
    """Add to a row of figures the FLOPs of its step, their rate and fraction of the peak."""
    with torch.device("meta"):
        row["tflop"] = clips * flops_per_clip(maker(), shape) / 1e12
    row["tflop_per_second"] = row["tflop"] / row["seconds"]
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    for name, peak in PEAK.items():
        if name in gpu:
            row["fraction_of_peak"] = row["tflop_per_second"] / peak


def sampling_seconds(model, shape, videos, steps, sampler, guidance, device):
    """Seconds that sampling takes per video, all of them in one batch."""
    _, _, y = inputs(model.config, shape, videos, device)
    mask = torch.ones(y.shape[:2], dtype=torch.bool, device=device)
    keys, seconds = [("speed", i) for i in range(videos)], 0.0
    for n in (2, steps):  # first a warm-up
        wait(device)
        start = time.perf_counter()
        sample(model, y, mask, shape, keys, n, guidance, sampler)
        wait(device)
        seconds = time.perf_counter() - start
    return seconds / videos


def table(title, figures, columns):
    print(f"\n{title}\n| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, row in figures.items():
        cells = [f"{row[c]:.4g}" if c in row else "" for c in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def about(command, device="cpu"):
    """What is stored with every measurement."""
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if device == "cuda" else machine
    version, date = torch.__version__, time.strftime("%Y-%m-%d")
    return {"command": command, "machine": machine, "torch": version, "date": date}


# ---------------------------------------------------------------------------------------------
# The tables


def on_cpu(config, shape):
    """Two layers of XL/2's width at 16x256x256; the toy; sampling of the toy."""
    ours, latte, device = partial(make, config), partial(Latte, config, shape), "cpu"
    size = f"width {config.hidden_size}, depth {config.depth}, {shape[1]} frames of {shape[2]}x"
    size += f"{shape[3]} latents, fp32: forward and backward"
    figures = compare({"STDiT": ours, "diffusers' Latte": latte}, config, shape, 1, device, 5)
    for row, maker in zip(figures.values(), (ours, latte)):
        add_flops(row, maker, shape, 1, device)
    a, b = figures["STDiT"], figures["diffusers' Latte"]
    figures["ratio"] = {k: a[k] / b[k] for k in ("seconds", "activation_gb", "tflop")}
    columns = ["seconds", "tokens_per_second", "activation_gb", "tflop", "tflop_per_second"]
    table(size, figures, columns)
    results = {"latte": figures}

    makers = {mode: partial(make, config, mode) for mode in ("none", "full", "selective")}
    makers["none, variant full"] = partial(make, replace(config, variant="full"))
    figures = compare(makers, config, shape, 1, device, 2)
    table("the same, by activation checkpointing; and the variant `full`", figures, columns[:3])
    results["kept"] = figures

    config, shape, clips = MODELS["toy"], latent_shape(PRESETS["toy"]), 16
    figures = compare({"toy, batch 16": partial(make, config)}, config, shape, clips, device, 20)
    row = figures["toy, batch 16"]
    add_flops(row, partial(make, config), shape, clips, device)
    row["clips_per_second"] = clips / row["seconds"]
    seconds = sampling_seconds(make(config).eval(), shape, 8, 20, "dpm", 2.0, device)
    row["seconds_per_video_of_20_steps"] = seconds
    columns[2:4] = ["clips_per_second", "seconds_per_video_of_20_steps"]
    table("the toy", figures, columns)
    return results | {"toy": figures}


def on_cuda(stages, device="cuda", repeats=5, steps=(20, 100)):
    """Training steps and sampling of each stage {name: (STDiTConfig, shape, clips)} in bf16."""
    results = {}
    for stage, (config, shape, clips) in stages.items():
        ours, latte = partial(make, config), partial(Latte, config, shape)
        makers = {mode: partial(ours, mode) for mode in ("none", "full", "selective")}
        if device == "cuda":
            makers |= {f"compiled, {mode}": partial(ours, mode, True) for mode in makers}
        makers |= {"diffusers' Latte": latte, "diffusers' Latte, full": partial(latte, True)}
        figures = {}
        for title, maker in makers.items():
            try:
                figures |= compare({title: maker}, config, shape, clips, device, repeats)
                plain = latte if "Latte" in title else ours
                add_flops(figures[title], plain, shape, clips, device)
            except torch.OutOfMemoryError:  # a result too: it does not fit
                figures[title] = {}
        columns = ["seconds", "tokens_per_second", "fraction_of_peak", "activation_gb", "peak_gb"]
        table(f"{stage}, {clips} clips, by activation checkpointing", figures, columns)
        model, videos = ours().to(device).eval(), {}
        for sampler, n in zip(("dpm", "ddpm"), steps):
            seconds = sampling_seconds(model, shape, 1, n, sampler, 7.0, device)
            videos[f"{n} steps of {sampler}, guided"] = {"seconds": seconds}
        table(f"{stage}, sampling a video", videos, ["seconds"])
        results[stage] = figures | videos
        del model
    return results


def one_step(config, shape):
    """One AdamW step with full activation checkpointing and EMA on the CPU: the process's largest
    memory, and the predicted one.
    """
    model = make(config, "full")
    predicted, ema = predicted_memory(model, shape), deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    for p in model.parameters():  # as in any step but the first; filled, since zeros take no memory
        moments = {name: torch.empty_like(p).fill_(0) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] |= {"step": torch.zeros(()), **moments}
    start = time.perf_counter()
    training_step(model, inputs(config, shape, 1, "cpu"), "cpu")
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    train.update_ema(PRESETS["16x512x512"], 0, ema, model)
    seconds = time.perf_counter() - start
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9
    row = {"tokens": math.prod(shape[1:]) / math.prod(config.patch_size), "seconds": seconds}
    row |= {"gradient_norm": norm, "peak_gb": peak, "predicted_gb": predicted}
    _, T, H, W = shape
    return {f"depth {config.depth}, {T}x{8 * H}x{8 * W}": row | {"ratio": predicted / peak}}


def project(fraction, link=50e9, gpus=(8, 64, 512)):
    """v1's stages on many GPUs, calculated, not measured: compute at a fraction of an H100's peak;
    the all-reduce of gradients, 4 bytes per weight, in a ring over links of 400 Gb/s = 50 GB/s per
    GPU, hidden behind the backward pass or after it; a cache of 2 bytes per number with captions of
    full length. With fewer clips than GPUs, the exchanges of --sp come on top, and each process
    that shares a clip reads it.
    """
    figures = {}
    for stage in ("16x256x256", "16x256x256-hq", "16x512x512", "64x512x512"):
        c, shape = PRESETS[stage], latent_shape(PRESETS[stage])
        with torch.device("meta"):
            model = STDiT(train.model_config(c))
        flops, weights = flops_per_clip(model, shape), sum(p.numel() for p in model.parameters())
        numbers = math.prod(shape) + XL.caption_length * XL.caption_channels
        for n in gpus:
            clips = c.batch_size / n  # per GPU; below 1, --sp shares clips
            compute = clips * flops / (fraction * 1e12 * PEAK["H100"])
            reduce = 2 * (n - 1) / n * 4 * weights / link
            row = {"clips per GPU": clips, "compute s": compute, "all-reduce s": reduce}
            row["days, hidden"] = c.steps * max(compute, reduce) / 86400
            row["days, after"] = c.steps * (compute + reduce) / 86400
            row["cache GB/s in all"] = c.batch_size * 2 * numbers / max(compute, reduce) / 1e9
            figures[f"{stage}, {n} GPUs"] = row
    table(f"projection at {fraction:.0%} of the peak: calculated, not measured", figures, [*row])


# ---------------------------------------------------------------------------------------------
# The command line


@dataclass(frozen=True)
class SpeedConfig:
    quick: bool = False  # tiny sizes, and both the CPU's and CUDA's tables; writes nothing
    step: bool = False  # one optimizer step of STDiT-XL/2 on the CPU, and its peak memory
    frames: int = 16  # of --step
    size: int = 512  # of --step, in pixels
    project: float = 0.0  # calculate v1's stages on many GPUs at this fraction of an H100's peak


def main():
    c = tyro.cli(SpeedConfig, description=__doc__)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiny = replace(XL, depth=2, hidden_size=64, num_heads=4, caption_channels=64)
    if c.project:
        project(c.project)
        return
    if c.step:
        config = tiny if c.quick else XL
        results = {"step": one_step(config, (4, c.frames, c.size // 8, c.size // 8))}
        columns = ["tokens", "seconds", "gradient_norm", "peak_gb", "predicted_gb", "ratio"]
        table("one AdamW step", results["step"], columns)
    elif c.quick:
        on_cpu(tiny, (4, 4, 8, 8))
        on_cuda({"tiny": (tiny, (4, 4, 8, 8), 2)}, device, repeats=1, steps=(2, 2))
    elif device == "cuda":
        stages = {}
        for name, clips in (("16x256x256", 8), ("16x512x512", 1), ("64x512x512", 1)):
            run = PRESETS[name]
            stages[name] = train.model_config(run), latent_shape(run), clips
        results = on_cuda(stages)
    else:
        results = on_cpu(replace(XL, depth=2), (4, 16, 32, 32))
    if c.quick:
        return
    path = Path(__file__).with_name("speed.json")
    stored = json.loads(path.read_text()) if path.exists() else {}
    for key, figures in results.items():
        command = f"python benchmarks/speed.py{' --step' * c.step}"
        old = stored.get(key, {}).get("figures", {}) if key == "step" else {}
        stored[key] = about(command, "cpu" if c.step else device) | {"figures": old | figures}
    path.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
