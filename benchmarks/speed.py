"""Speed and memory of training and sampling on this machine, with random weights and latents.

    python benchmarks/speed.py --check          # are kernels and compiled gradients right here?
    python benchmarks/speed.py                  # CPU: small sizes, minutes; CUDA: v1's stages
    python benchmarks/speed.py --quick          # tiny sizes, a minute; writes nothing
    python benchmarks/speed.py --project        # calculate v1's stages on many GPUs
    MALLOC_MMAP_THRESHOLD_=1000000 python benchmarks/speed.py --step
                                                # one step of XL/2 at 16x512x512; Linux, 24 GB

--check is the first command to run on a new kind of GPU and after an update of torch. What is timed
is checked before, so that no speed of wrong numbers is reported.

A step is a whole training step: forward pass with a caption mask, backward pass, clipping, AdamW,
moving average; without data and all-reduce. Models of a table are measured in turns, so ratios hold
on a noisy machine; times are medians. The reference is diffusers' Latte of the same width, depth
and shape. Its depth counts pairs of blocks, spatial and temporal, each with an MLP, so at equal
depth it has 26 D^2 multiplications per token and layer, STDiT 18 D^2; each also has 2 D^2 per
caption token, which Latte repeats for every frame. Results go to benchmarks/speed.json.

MALLOC_MMAP_THRESHOLD_ keeps glibc from holding on to freed tensors of less than 32 MB, which added
5 GB to the peak at 16x256x256.
"""

import gc
import json
import math
import os
import platform
import shutil
import statistics
import sys
import sysconfig
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler is silent

import torch
import torch.nn as nn
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cost_model

import data
import stdit
import train
from sample import sample_latents
from stdit import BLOCKS, MODELS, STDiT, STDiTBlock, STDiTConfig, autocast, set_up_scaling
from train import PEAK, PRESETS

XL = MODELS["STDiT-XL/2"]
TINY = replace(XL, depth=2, hidden_size=64, num_heads=4, caption_channels=64)
TINY_SHAPE = (4, 4, 8, 8)  # C, T, H, W

# ---------------------------------------------------------------------------------------------
# Models and inputs


def make(config, activation_checkpointing="none", compile=False):
    """Makes an STDiT, set up as train.py does."""
    model = STDiT(config)
    set_up_scaling(model, activation_checkpointing, compile)
    return model


class Latte(nn.Module):
    """diffusers' Latte with the width, depth and heads of an STDiTConfig, called like STDiT."""

    def __init__(self, config, shape, gradient_checkpointing=False, compile=False):
        from diffusers import LatteTransformer3DModel

        super().__init__()
        self.config = config
        _, T, _, W = shape
        D, heads = config.hidden_size, config.num_heads
        self.model = LatteTransformer3DModel(
            num_layers=config.depth,
            num_attention_heads=heads,
            attention_head_dim=D // heads,
            cross_attention_dim=D,
            in_channels=4,
            out_channels=8,
            caption_channels=config.caption_channels,
            patch_size=2,
            sample_size=W,
            video_length=T,
            attention_bias=True,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            num_embeds_ada_norm=1000,
        )
        if gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if compile:
            blocks = *self.model.transformer_blocks, *self.model.temporal_transformer_blocks
            for block in blocks:
                stdit.compile_block(block)

    def forward(self, x, t, y, mask):
        bias = (~mask * -10000.0)[:, None].repeat_interleave(x.shape[2], 0)  # [B*T, 1, L]
        with autocast(x.device):
            return self.model(x, t, y, encoder_attention_mask=bias).sample


def latent_shape(config):
    """Returns (C, T, H, W) of a TrainConfig's clips."""
    return 4, config.frames, config.size // 8, (config.width or config.size) // 8


def tokens_of(config, shape):
    """Returns the tokens of a clip with latents `shape`."""
    return math.prod(shape[1:]) // math.prod(config.patch_size)


def inputs(config, shape, clips, device):
    """Draws x [B, C, T, H, W], t [B], y [B, L, E] and a mask [B, L] with a third of padding."""
    L = config.caption_length
    x = torch.randn(clips, *shape, device=device)
    t = torch.randint(1000, (clips,), device=device)
    y = torch.randn(clips, L, config.caption_channels, device=device)
    mask = (torch.arange(L, device=device) < 2 * L // 3).expand(clips, -1)
    return x, t, y, mask


def has_compiler():
    """Tells whether torch.compile finds what it needs on a CPU: g++ and Python's headers."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    return bool(shutil.which(os.environ.get("CXX", "g++"))) and header.exists()


# ---------------------------------------------------------------------------------------------
# FLOPs and memory, without running a step


def flops_per_clip(model, shape):
    """Counts the FLOPs of forward and backward on one clip with latents `shape` (C, T, H, W): 2 for
    a multiplication and an addition. The model is on the meta device. Only gradients that
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
    """Counts the bytes that forward() allocates and that live as long as its output: the output
    itself, and what is kept for the backward pass.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        out = forward()
        return torch.cuda.memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        out = forward()  # noqa: F841  alive until the profile ends
    return sum(event.self_cpu_memory_usage for event in profile.events())


def predicted_memory(model, shape, clips=1, mode="none", bf16=False):
    """Predicts the GB of a training process that takes `clips` clips with latents `shape` at a
    time: fp32 weights and EMA; for trainable weights the gradient and AdamW's two moments; and what
    the blocks keep for the backward pass, measured on few tokens and scaled up. Not counted:
    embedders, final layer, frozen encoders, temporary buffers.

    model: an STDiT that is not set up for training, on any device, even meta; only its sizes and
    requires_grad are read. mode: activation checkpointing.
    """
    c = model.config
    _, T, H, W = shape
    pt, ph, pw = c.patch_size
    frames, S = clips * T // pt, H // ph * (W // pw)
    few = 64  # patches per frame, as measured
    fixed = sum(p.numel() * (20 if p.requires_grad else 8) for p in model.parameters())

    def block_bytes(mode):
        block = BLOCKS[c.variant](c)
        for p, of_model in zip(block.parameters(), model.blocks[0].parameters()):
            p.requires_grad_(of_model.requires_grad)
        set_up_scaling(SimpleNamespace(blocks=[block]), mode)
        kept = []
        for n in (1, 2):  # frames
            sizes = (n, few), (math.ceil(c.caption_length * few / S),), (6,)
            x, y, m = (torch.zeros(1, *size, c.hidden_size, requires_grad=True) for size in sizes)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                kept.append(kept_bytes(lambda: block(x, y, None, m)))
        per_frame = kept[1] - kept[0]
        return kept[0] - per_frame + frames * S / few * per_frame

    recomputed = 0 if mode == "none" else block_bytes("none")  # one block at a time, in backward
    return (fixed + c.depth * block_bytes(mode) + recomputed) / 1e9


# ---------------------------------------------------------------------------------------------
# The check
#
# A compiler or a kernel can be wrong for one shape on one kind of GPU, without an error: see
# stdit.set_up_scaling. So the same numbers are computed in two ways: gradients by compiled and by
# eager blocks, attention in bf16 by the kernel that torch selects and in fp32 by matrix products.

# Largest allowed norm(found - expected) / norm(expected). A rounding to bf16 changes a number by up
# to 0.4%, and compiled code rounds elsewhere; in fp32 only the order of sums differs. A row that is
# lost is off by 1, one of foreign memory by more.
BOUND = {"bf16": 0.03, "fp32": 1e-4}
WRONG = """{} of {} checks failed. Wrong gradients: do not train compiled here (--no-compile) or
take another torch. Wrong attention: switch its kernel off, e.g. with
torch.backends.cuda.enable_cudnn_sdp(False), and check again."""


class Case(NamedTuple):
    """What is checked: a network on clips with latents `shape` (C, T, H, W)."""

    config: STDiTConfig
    shape: tuple
    clips: int  # in one forward pass
    mode: str = "none"  # activation checkpointing
    trainable: str = "all"  # as in TrainConfig
    compile: bool = True  # check compiled gradients too, not attention alone


def preset_case(preset, device):
    """Returns the Case of a preset; on a CPU its modes at a tiny shape."""
    c = PRESETS[preset]
    shape = TINY, TINY_SHAPE, 2
    if device == "cuda":
        shape = train.model_config(c), latent_shape(c), c.micro_batch or c.batch_size
    return Case(*shape, c.activation_checkpointing, c.trainable, c.compile)


def preset_cases(device):
    """Returns {preset: its Case}, equal ones once."""
    found = {}
    for name in PRESETS:
        case = preset_case(name, device)
        if case not in found.values():
            found[name] = case
    if device == "cuda":  # more than 65,535, which is the limit of some dimensions of CUDA's grid
        found["65,792 temporal sequences"] = Case(XL, (4, 4, 32, 32), 257, compile=False)
    return found


def randomize(module):
    """Gives every weight a random value, because with the initial zeros many gradients are 0."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3 if p.ndim < 2 else p[0].numel() ** -0.5)
    return module


def output_and_gradients(module, inputs, context=nullcontext()):
    """Returns {name: tensor} of the output and of the gradients of a weighted sum of it, those of
    inputs that require one included.
    """
    leaves = dict(module.named_parameters()) | {f"input {i}": v for i, v in enumerate(inputs)}
    for leaf in leaves.values():
        leaf.grad = None
    with context:
        out = module(*inputs)
    torch.manual_seed(1)
    (out * torch.randn_like(out)).sum().backward()
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"output": out.detach()} | grads


def relative_errors(found, expected):
    """Returns {name: norm(found - expected) / norm(expected)}, NaN if a number is not finite. Rows
    of a table count one by one, because some are much smaller than others.
    """
    errors = {}
    for name, b in expected.items():
        rows = len(b) if "table" in name else 1
        a, b = found[name].float().reshape(rows, -1), b.float().reshape(rows, -1)
        for i, error in enumerate(((a - b).norm(dim=1) / b.norm(dim=1)).tolist()):
            errors[f"{name}, row {i}" if rows > 1 else name] = error
    return errors


def gradient_errors(case, device, mix_order_reduction=False):
    """Returns relative_errors of a compiled against an eager model of two blocks, the first with a
    temporal position, the other without.
    """
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    with torch.device(device):
        eager = randomize(STDiT(replace(case.config, depth=2)))
    for name, p in eager.named_parameters():
        p.requires_grad_(case.trainable == "all" or "_temp" in name)
    compiled = deepcopy(eager)
    set_up_scaling(compiled, case.mode, compile=True)
    torch._inductor.config.triton.mix_order_reduction = mix_order_reduction
    batch = inputs(case.config, case.shape, case.clips, device)
    errors = relative_errors(
        output_and_gradients(compiled, batch), output_and_gradients(eager, batch)
    )
    graphs = counters["stats"]["unique_graphs"]
    data.require(graphs == 2, f"{graphs} graphs were compiled, expected 2: this checks nothing")
    return errors


def attention_errors(case, device):
    """Returns {attention: relative_errors} of a block's three attentions, as in training against
    plain matrix products.
    """
    c = case.config
    _, T, H, W = case.shape
    pt, ph, pw = c.patch_size
    torch.manual_seed(0)
    with torch.device(device):
        block = randomize(STDiTBlock(c))
        x = torch.randn(case.clips, T // pt, H // ph * (W // pw), c.hidden_size, requires_grad=True)
        y = torch.randn(case.clips, c.caption_length, c.hidden_size, requires_grad=True)
    mask = inputs(c, case.shape, case.clips, device)[3]
    errors = {}
    for name, batch in (("attn", [x]), ("attn_temp", [x]), ("cross_attn", [x, y, mask])):
        module = getattr(block, name)
        found = output_and_gradients(module, batch, torch.autocast(device, torch.bfloat16))
        expected = output_and_gradients(module, batch, sdpa_kernel(SDPBackend.MATH))
        errors[name] = relative_errors(found, expected)
    return errors


def check(cases, device):
    """Checks {title: Case} and prints a line for each result. Raises SystemExit if one is wrong."""
    right = []
    compiler = device == "cuda" or has_compiler()
    if not compiler:
        print("compiled gradients are not checked: g++ or Python.h is missing")
    for title, case in cases.items():
        tables = {}
        try:
            if case.compile and compiler:
                precision = "bf16" if device == "cuda" else "fp32"
                name = f"compiled gradients, {case.mode} checkpointing"
                tables[name] = gradient_errors(case, device), BOUND[precision]
            for name, errors in attention_errors(case, device).items():
                tables[name] = errors, BOUND["bf16"]
        except torch.OutOfMemoryError:
            print(f"       {title}: does not fit into this GPU's memory, not checked")
        for what, (errors, bound) in tables.items():
            wrong = [name for name, error in errors.items() if not error <= bound]  # also NaN
            right.append(not wrong)
            for name in wrong or [max(errors, key=errors.get)]:
                verdict = "WRONG" if wrong else "right"
                line = f"{name} is off by {errors[name]:.2g}, allowed {bound:g}"
                print(f"{verdict}  {title}, {what}: {line}", flush=True)
    if not all(right):
        raise SystemExit(WRONG.format(right.count(False), len(right)))


# ---------------------------------------------------------------------------------------------
# Measuring


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def with_optimizer(model):
    """Returns the model, its optimizer and a moving average of its weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    return model, optimizer, [p.detach().clone() for p in model.parameters()]


def training_step(model, optimizer, ema, batch, device):
    """Does a whole step. Returns its seconds and the gradient's norm."""
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


def compare(makers, config, shape, clips, device, repeats):
    """Measures training steps of models, in turns. makers: {name: function that makes the model}.
    Returns {name: figures}.
    """
    gc.collect()  # the last models
    torch.compiler.reset()  # else the next shape would be compiled as a dynamic one
    batch = inputs(config, shape, clips, device)
    figures, models = {}, {}
    for name, maker in makers.items():
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with torch.device(device):
            models[name] = with_optimizer(maker())
        figures[name] = {}
        training_step(*models[name], batch, device)  # compiles, selects kernels
        if device == "cuda":
            training_step(*models[name], batch, device)  # now with AdamW's moments
            figures[name]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        kept = kept_bytes(lambda: models[name][0](*batch), device)
        figures[name]["activation_gb"] = kept / 1e9
    times = {name: [] for name in makers}
    for _ in range(repeats):
        for name in makers:
            times[name].append(training_step(*models[name], batch, device)[0])
    tokens = clips * tokens_of(config, shape)
    for name, seconds in times.items():
        median = statistics.median(seconds)
        figures[name] |= {"seconds": median, "tokens_per_second": tokens / median}
    return figures


def add_flops(row, maker, shape, clips, device):
    """Adds to a row of figures the FLOPs of its step, their rate and the share of the peak."""
    with torch.device("meta"):
        row["tflop"] = clips * flops_per_clip(maker(), shape) / 1e12
    row["tflop_per_second"] = row["tflop"] / row["seconds"]
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    if peak := next((peak for name, peak in PEAK.items() if name in gpu), None):
        row["mfu"] = 1e12 * row["tflop_per_second"] / peak


def sampling_seconds(model, shape, videos, steps, sampler, guidance, device):
    """Measures the seconds that sampling takes per video, all of them in one batch."""
    _, _, y, mask = inputs(model.config, shape, videos, device)
    keys = [("speed", i) for i in range(videos)]
    for n in (2, steps):  # first a warm-up
        wait(device)
        start = time.perf_counter()
        sample_latents(model, y, mask, shape, keys, n, guidance, sampler=sampler)
        wait(device)
        seconds = time.perf_counter() - start
    return seconds / videos


def table(title, figures, columns):
    """Prints a Markdown table of {row: {column: number}}."""
    print(f"\n{title}\n| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, row in figures.items():
        cells = [f"{row[c]:.4g}" if c in row else "" for c in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def about(command, device="cpu"):
    """Returns what is stored with every measurement."""
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if device == "cuda" else machine
    date = time.strftime("%Y-%m-%d")
    return {"command": command, "machine": machine, "torch": torch.__version__, "date": date}


# ---------------------------------------------------------------------------------------------
# The tables


def on_cpu(config, shape):
    """Two layers of XL/2's width at 16x256x256; the toy; sampling of the toy."""
    device = "cpu"
    ours = partial(make, config)
    latte = partial(Latte, config, shape)
    size = f"width {config.hidden_size}, depth {config.depth}, {shape[1]} frames of {shape[2]}x"
    size += f"{shape[3]} latents, fp32: a step"
    makers = {"STDiT": ours, "diffusers' Latte": latte}
    if has_compiler():
        makers["STDiT, compiled"] = partial(ours, "none", True)
        makers["diffusers' Latte, compiled"] = partial(latte, False, True)
    check({"what is timed": Case(config, shape, 1)}, device)
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

    config = MODELS["toy"]
    shape = latent_shape(PRESETS["toy"])
    clips = PRESETS["toy"].batch_size
    title = f"toy, batch {clips}"
    figures = compare({title: partial(make, config)}, config, shape, clips, device, 20)
    row = figures[title]
    add_flops(row, partial(make, config), shape, clips, device)
    row["clips_per_second"] = clips / row["seconds"]
    seconds = sampling_seconds(make(config).eval(), shape, 8, 20, "dpm", 2.0, device)
    row["seconds_per_video_of_20_steps"] = seconds
    columns[2:4] = ["clips_per_second", "seconds_per_video_of_20_steps"]
    table("the toy", figures, columns)
    return results | {"toy": figures}


MODES = ("none", "full", "selective")  # of activation checkpointing
ON_CUDA = ["seconds", "tokens_per_second", "mfu", "activation_gb", "peak_gb"]


def on_cuda(stages, device="cuda", repeats=5, steps=(20, 100)):
    """Training steps and sampling of each stage {name: (STDiTConfig, shape, clips)} in bf16."""
    results = {}
    for stage, (config, shape, clips) in stages.items():
        compiles = device == "cuda"
        modes = {f"{stage}, {mode}": Case(config, shape, clips, mode) for mode in MODES}
        check({title: case._replace(compile=compiles) for title, case in modes.items()}, device)
        ours = partial(make, config)
        latte = partial(Latte, config, shape)
        makers = {mode: partial(ours, mode) for mode in MODES}
        if compiles:
            makers |= {f"compiled, {mode}": partial(ours, mode, True) for mode in MODES}
        makers |= {"diffusers' Latte": latte, "diffusers' Latte, full": partial(latte, True)}
        figures = {}
        for title, maker in makers.items():
            plain = latte if "Latte" in title else ours
            figures[title] = timed(maker, plain, config, shape, clips, device, repeats)
        table(f"{stage}, {clips} clips, by activation checkpointing", figures, ON_CUDA)
        with torch.device(device):
            model = ours().eval()
        videos = {}
        for sampler, n in zip(("dpm", "ddpm"), steps):
            seconds = sampling_seconds(model, shape, 1, n, sampler, 7.0, device)
            videos[f"{n} steps of {sampler}, guided"] = {"seconds": seconds}
        table(f"{stage}, sampling a video", videos, ["seconds"])
        results[stage] = figures | videos
        del model
    return results


def timed(maker, plain, config, shape, clips, device, repeats):
    """Returns the figures of one model, {} if it does not fit into the GPU's memory, which is a
    result too. plain: makes the same model without activation checkpointing.
    """
    try:
        row = compare({"": maker}, config, shape, clips, device, repeats)[""]
    except torch.OutOfMemoryError:
        return {}
    add_flops(row, plain, shape, clips, device)
    return row


def one_step(config, shape):
    """One AdamW step with full activation checkpointing and EMA on the CPU: the process's largest
    memory, and the predicted one.
    """
    model = STDiT(config)
    predicted = predicted_memory(model, shape, mode="full")
    set_up_scaling(model, "full")
    trained = with_optimizer(model)
    for p in model.parameters():  # as in any step but the first; filled, since zeros take no memory
        moments = {name: torch.empty_like(p).fill_(0) for name in ("exp_avg", "exp_avg_sq")}
        trained[1].state[p] |= {"step": torch.zeros(()), **moments}
    seconds, norm = training_step(*trained, inputs(config, shape, 1, "cpu"), "cpu")
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9
    row = {"tokens": tokens_of(config, shape), "seconds": seconds, "gradient_norm": norm}
    row |= {"peak_gb": peak, "predicted_gb": predicted, "ratio": predicted / peak}
    _, T, H, W = shape
    return {f"depth {config.depth}, {T}x{8 * H}x{8 * W}": row}


def project(gpus=(8, 64, 512)):
    """v1's stages on nodes of 8 H100, calculated, not measured. Compute: cost_model.py, compiled,
    with the preset's checkpointing and micro-batch. Gradients, 4 bytes per weight, are summed over
    NVLink (350 GB/s) within a node; then each GPU sums an eighth of them over its own link of 400
    Gb/s = 50 GB/s. With fewer clips than GPUs --sp shares a clip; its exchanges are not counted.
    """
    figures = {}
    for stage in ("16x256x256", "16x256x256-hq", "16x512x512", "64x512x512"):
        c = PRESETS[stage]
        _, T, H, W = latent_shape(c)
        mode = c.activation_checkpointing
        parts = cost_model.step(stage, "H100", True, mode, c.micro_batch)
        optimizer = parts.pop("optimizer, EMA")
        numbers = 4 * T * H * W + XL.caption_length * XL.caption_channels
        for n in gpus:
            clips = c.batch_size / n  # per GPU; below 1, --sp shares them
            nodes = n // 8
            compute = clips / c.micro_batch * sum(parts.values())
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
        name = f"{stage}, micro-batch {PRESETS[stage].micro_batch}, sp {sp}"
        figures[name] = {mode: preset_memory(stage, mode, sp) for mode in MODES}
    table("predicted GB of a GPU, by activation checkpointing", figures, MODES)


def preset_memory(preset, mode, sp=1):
    """Returns the predicted GB of a GPU in a preset."""
    c = PRESETS[preset]
    C, T, H, W = latent_shape(c)
    with torch.device("meta"):
        model = STDiT(train.model_config(c))
    for name, p in model.named_parameters():
        p.requires_grad_(c.trainable == "all" or "_temp" in name)
    return predicted_memory(model, (C, T // sp, H, W), c.micro_batch, mode, bf16=True)


# ---------------------------------------------------------------------------------------------
# The command line


@dataclass(frozen=True)
class SpeedConfig:
    check: bool = False  # check kernels and compiled gradients: a minute or two on a GPU
    quick: bool = False  # tiny sizes, and both the CPU's and CUDA's tables; writes nothing
    step: bool = False  # one optimizer step of STDiT-XL/2 on the CPU, and its peak memory
    frames: int = 16  # of --step
    size: int = 512  # of --step, in pixels
    project: bool = False  # calculate v1's stages on many GPUs


def main():
    c = tyro.cli(SpeedConfig, description=__doc__)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if c.check:
        check(preset_cases(device), device)
        return
    if c.project:
        project()
        return
    if c.step:
        config = TINY if c.quick else XL
        results = {"step": one_step(config, (4, c.frames, c.size // 8, c.size // 8))}
        columns = ["tokens", "seconds", "gradient_norm", "peak_gb", "predicted_gb", "ratio"]
        table("one AdamW step", results["step"], columns)
    elif c.quick:
        on_cpu(TINY, TINY_SHAPE)
        on_cuda({"tiny": (TINY, TINY_SHAPE, 2)}, device, repeats=1, steps=(2, 2))
    elif device == "cuda":
        stages = {}
        for name in ("16x256x256", "16x512x512", "64x512x512"):
            run = PRESETS[name]
            stages[name] = train.model_config(run), latent_shape(run), run.micro_batch
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
