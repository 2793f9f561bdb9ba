"""Speed and memory of training and sampling on this machine, with random weights and latents.

    python benchmarks/speed.py                  # CPU: small sizes, minutes; CUDA: v1's stages
    python benchmarks/speed.py --quick          # tiny sizes, seconds; writes nothing
    python benchmarks/speed.py --project        # calculate v1's stages on many GPUs
    MALLOC_MMAP_THRESHOLD_=1000000 python benchmarks/speed.py --step
                                                # one step of XL/2 at 16x512x512; Linux, 24 GB

A step is a whole training step: forward pass with a caption mask, backward pass, clipping, AdamW,
moving average; without data and all-reduce. On CUDA the three attentions are first checked against
fp32, because fused kernels for some lengths and masks have had errors.

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
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler is silent

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cost_model

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

    def __init__(self, config, shape, gradient_checkpointing=False, compile=False):
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
        if compile:
            blocks = *self.model.transformer_blocks, *self.model.temporal_transformer_blocks
            for block in blocks:
                block.compile(dynamic=False)

    def forward(self, x, t, y, mask):
        bias = (~mask * -10000.0)[:, None].repeat_interleave(x.shape[2], 0)  # [B*T, 1, L]
        with autocast(x.device):
            return self.model(x, t, y, encoder_attention_mask=bias).sample


def latent_shape(config):
    """(C, T, H, W) of a TrainConfig's clips."""
    return 4, config.frames, config.size // 8, (config.width or config.size) // 8


def inputs(config, shape, clips, device):
    """Random x [B, C, T, H, W], t [B], y [B, L, E], mask [B, L] with a third of padding."""
    x, L = torch.randn(clips, *shape, device=device), config.caption_length
    y = torch.randn(clips, L, config.caption_channels, device=device)
    mask = (torch.arange(L, device=device) < 2 * L // 3).expand(clips, -1)
    return x, torch.randint(1000, (clips,), device=device), y, mask


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


def with_optimizer(model):
    """(model, its optimizer, moving average of its weights)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    return model, optimizer, [p.detach().clone() for p in model.parameters()]


def training_step(model, optimizer, ema, batch, device):
    """A whole step -> (seconds, gradient norm)."""
    wait(device)
    start = time.perf_counter()
    (model(*batch) - 1).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with torch.no_grad():
        torch._foreach_lerp_(ema, list(model.parameters()), 1e-4)
    wait(device)
    return time.perf_counter() - start, norm


def attention_errors(config, shape, device):
    """Largest relative errors, forward and in gradients, of the three attentions in bf16 at these
    sizes against the plain computation in fp32 -> {name: figures}, with the kernel's name.
    """
    (pt, ph, pw), (_, T, H, W), heads = config.patch_size, shape, config.num_heads
    T, S, L, d = T // pt, H // ph * (W // pw), config.caption_length, config.hidden_size // heads
    mask, errors = torch.arange(L, device=device) < 2 * L // 3, {}
    sizes = {"spatial": (T, S, S), "temporal": (S, T, T), "cross": (T, S, L)}
    for name, (batch, queries, keys) in sizes.items():
        batch, lengths = min(batch, 64), (queries, keys, keys)
        qkv = [torch.randn(batch, heads, n, d, device=device).bfloat16() for n in lengths]
        bias, results = mask.expand(batch, 1, 1, L) if name == "cross" else None, []
        kernel = SDPBackend(torch._fused_sdp_choice(*qkv, bias)).name
        exact = sdpa_kernel(SDPBackend.MATH)
        for dtype, context in ((torch.bfloat16, nullcontext()), (torch.float32, exact)):
            leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
            with context:
                out = F.scaled_dot_product_attention(*leaves, attn_mask=bias)
                out.float().square().mean().backward()
            results.append([out, *(x.grad for x in leaves)])
        pairs = [(a.float() - b).norm() / b.norm() for a, b in zip(*results)]
        errors[name] = {"kernel": kernel} | dict(zip(("out", "dq", "dk", "dv"), map(float, pairs)))
    return errors


def check_attention(config, shape, device):
    """Print attention_errors; SystemExit if one is larger than bf16 explains."""
    errors = attention_errors(config, shape, device)
    for name, row in errors.items():
        print(f"{name} attention: " + ", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    worst = max(value for row in errors.values() for key, value in row.items() if key != "kernel")
    if not worst < 0.03:  # bf16 keeps 8 bits, 0.4% per number
        raise SystemExit(f"attention is off by {worst:.2g}: speeds would be of wrong numbers")


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
        models[name], figures[name] = with_optimizer(maker().to(device)), {}
        training_step(*models[name], batch, device)  # compiles, selects kernels
        if device == "cuda":
            figures[name]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        kept = kept_bytes(lambda: models[name][0](*batch), device)
        figures[name]["activation_gb"] = kept / 1e9
    times = {name: [] for name in makers}
    for _ in range(repeats):
        for name in makers:
            times[name].append(training_step(*models[name], batch, device)[0])
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
    _, _, y, mask = inputs(model.config, shape, videos, device)
    keys, seconds = [("speed", i) for i in range(videos)], 0.0
    for n in (2, steps):  # first a warm-up
        wait(device)
        start = time.perf_counter()
        sample(model, y, mask, shape, keys, n, guidance, sampler=sampler)
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
    size += f"{shape[3]} latents, fp32: a step"
    makers = {"STDiT": ours, "diffusers' Latte": latte}
    if train.HAS_COMPILER:
        makers["STDiT, compiled"] = partial(ours, "none", True)
        makers["diffusers' Latte, compiled"] = partial(latte, False, True)
    figures = compare(makers, config, shape, 1, device, 5)
    for name, row in figures.items():
        add_flops(row, latte if "Latte" in name else ours, shape, 1, device)
    for a, b in product(*[[name for name in makers if name.startswith(k)] for k in ("STD", "dif")]):
        keys = ("seconds", "activation_gb", "tflop")
        figures[f"{a} / {b}"] = {k: figures[a][k] / figures[b][k] for k in keys}
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
    for config, shape, _ in stages.values():
        check_attention(config, shape, device)
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
    predicted, trained = predicted_memory(model, shape), with_optimizer(model)
    for p in model.parameters():  # as in any step but the first; filled, since zeros take no memory
        moments = {name: torch.empty_like(p).fill_(0) for name in ("exp_avg", "exp_avg_sq")}
        trained[1].state[p] |= {"step": torch.zeros(()), **moments}
    seconds, norm = training_step(*trained, inputs(config, shape, 1, "cpu"), "cpu")
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9
    row = {"tokens": math.prod(shape[1:]) / math.prod(config.patch_size), "seconds": seconds}
    row |= {"gradient_norm": norm, "peak_gb": peak, "predicted_gb": predicted}
    _, T, H, W = shape
    return {f"depth {config.depth}, {T}x{8 * H}x{8 * W}": row | {"ratio": predicted / peak}}


def project(gpus=(8, 64, 512)):
    """v1's stages on nodes of 8 H100, calculated, not measured. Compute: cost_model.py, compiled,
    with the preset's checkpointing and micro-batch. Gradients, 4 bytes per weight, are summed over
    NVLink (350 GB/s) within a node; then each GPU sums an eighth of them over its own link of 400
    Gb/s = 50 GB/s. With fewer clips than GPUs --sp shares a clip; its exchanges are not counted.
    """
    figures = {}
    for stage in ("16x256x256", "16x256x256-hq", "16x512x512", "64x512x512"):
        c, (_, T, H, W) = PRESETS[stage], latent_shape(PRESETS[stage])
        micro_batch, mode = c.micro_batch, c.activation_checkpointing
        parts = cost_model.step(stage, "H100", True, mode, micro_batch)
        optimizer = parts.pop("optimizer, EMA")
        numbers = 4 * T * H * W + XL.caption_length * XL.caption_channels
        for n in gpus:
            clips, nodes = c.batch_size / n, n // 8  # clips per GPU; below 1, --sp shares them
            compute = clips / micro_batch * sum(parts.values())
            reduce = 2 * 4 * cost_model.WEIGHTS * (7 / 8 / 350e9 + (1 - 1 / nodes) / 8 / 50e9)
            row = {"clips per GPU": clips, "compute s": compute, "optimizer s": optimizer}
            row |= {"all-reduce s": reduce, "step s": compute + optimizer + reduce}
            row["days"] = c.steps * row["step s"] / 86400
            useful = 3 * clips * sum(cost_model.flops(stage))
            row["of peak"] = useful / row["step s"] / cost_model.GPUS["H100"].peak
            row["cache GB/s in all"] = c.batch_size * 2 * numbers / row["step s"] / 1e9
            figures[f"{stage}, {n} GPUs"] = row
    table("calculated, not measured; the all-reduce is not hidden", figures, [*row])
    figures = {}
    for stage, sp in product(("16x256x256", "16x512x512", "64x512x512", "16x256x256-24gb"), (1, 2)):
        c, (_, T, H, W), row = PRESETS[stage], latent_shape(PRESETS[stage]), {}
        for mode in ("none", "selective", "full"):
            with torch.device("meta"):
                model = make(train.model_config(c), mode)
            for name, p in model.named_parameters():
                p.requires_grad_(c.trainable == "all" or "_temp" in name)
            row[mode] = predicted_memory(model, (4, T // sp, H, W), c.micro_batch, bf16=True)
        figures[f"{stage}, micro-batch {c.micro_batch}, sp {sp}"] = row
    table("predicted GB of a GPU, by activation checkpointing", figures, [*row])


# ---------------------------------------------------------------------------------------------
# The command line


@dataclass(frozen=True)
class SpeedConfig:
    quick: bool = False  # tiny sizes, and both the CPU's and CUDA's tables; writes nothing
    step: bool = False  # one optimizer step of STDiT-XL/2 on the CPU, and its peak memory
    frames: int = 16  # of --step
    size: int = 512  # of --step, in pixels
    project: bool = False  # calculate v1's stages on many GPUs


def main():
    c = tyro.cli(SpeedConfig, description=__doc__)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiny = replace(XL, depth=2, hidden_size=64, num_heads=4, caption_channels=64)
    if c.project:
        project()
        return
    if c.step:
        config = tiny if c.quick else XL
        results = {"step": one_step(config, (4, c.frames, c.size // 8, c.size // 8))}
        columns = ["tokens", "seconds", "gradient_norm", "peak_gb", "predicted_gb", "ratio"]
        table("one AdamW step", results["step"], columns)
    elif c.quick:
        check_attention(tiny, (4, 4, 8, 8), device)
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
