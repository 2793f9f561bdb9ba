"""Speed and memory of training and sampling, on whatever machine this is.

    python benchmarks/speed.py                 # a CPU: small sizes, 5 minutes; CUDA: v1's stages
    MALLOC_MMAP_THRESHOLD_=1000000 python benchmarks/speed.py --step
                                               # one AdamW step of XL/2 at 16x512x512; Linux, 24 GB

Random weights and latents. A table is of one run (that of --step: one run a line), on a CPU in
turns, so that ratios hold also where the machine is noisy; times are medians. Beside ours stands
diffusers' Latte, of the same width, depth and shape: the nearest thing that many people use.
Latte's depth counts pairs of blocks, one of space and one of time, each with an MLP; ours is one
block with both attentions, so at equal depth Latte has 26 C^2 multiplications a token and layer,
ours 18 C^2; besides, 2 C^2 for each token of the caption, which Latte repeats for every frame.
Writes benchmarks/speed.json.

(The environment variable keeps glibc from holding on to freed tensors of less than 32 MB, which at
16x256x256 added 5 GB to the peak.)

FLOPs are counted by torch (a multiplication and an addition are two), three times the forward pass
for a training step; what is recomputed does not count as work done. Activation memory is what the
forward pass keeps for the backward pass, each storage once, without the weights (but with their
copies in bf16, on CUDA).
"""

import argparse
import gc
import inspect
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sample import autocast, sample  # noqa: E402
from stdit import MODELS, STDiT, checkpoint_blocks  # noqa: E402
from train import PEAK, PRESETS, Cost, Process, latent_shape, predicted_memory  # noqa: E402


def latte(config, frames, size):
    """diffusers' Latte with the width, depth and heads of a configuration, called as ours is."""
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        num_attention_heads=config.num_heads, num_layers=config.depth, in_channels=4,
        attention_head_dim=config.hidden_size // config.num_heads, out_channels=8, patch_size=2,
        cross_attention_dim=config.hidden_size, caption_channels=config.caption_channels,
        sample_size=size, video_length=frames, attention_bias=True, norm_eps=1e-6,
        activation_fn="gelu-approximate", norm_type="ada_norm_single", num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    )  # fmt: skip
    forward = model.forward
    model.forward = lambda x, t, y: forward(x, t, y).sample
    return model


def inputs(config, shape, batch, device):
    """Random x [B, C, T, h, w], t [B], y [B, L, E]: all captions have their full length."""
    x = torch.randn(batch, *shape, device=device)
    t = torch.randint(1000, (batch,), device=device)
    return x, t, torch.randn(batch, config.caption_length, config.caption_channels, device=device)


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def training_step(model, batch, device):
    """Forward, backward; -> seconds."""
    model.zero_grad()
    wait(device)
    start = time.perf_counter()
    with autocast(device):
        out = model(*batch)
    (out - 1).square().mean().backward()
    wait(device)
    return time.perf_counter() - start


def kept(model, batch, device):
    """Bytes that the forward pass keeps for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def hold(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        with autocast(device):
            out = model(*batch)  # noqa: F841  alive until the sum is taken
    return sum(held.values())


def flops(make, config, shape):
    """FLOPs of one training step on one film, three times the forward pass, counted without content
    on the device "meta".
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        y = torch.empty(1, config.caption_length, config.caption_channels)
        make()(torch.empty(1, *shape), torch.zeros(1, dtype=torch.long), y)
    return 3 * counter.get_total_flops()


def compare(makers, config, shape, batch, device, repeats):
    """Measure training steps of one or several networks, in turns -> {name: figures}."""
    gc.collect()  # what the last networks held
    torch.compiler.reset()  # else the next shape would be compiled for any shape
    data, figures, models = inputs(config, shape, batch, device), {}, {}
    tokens = batch * shape[1] * shape[2] * shape[3] // 4
    for name, make in makers.items():
        if device == "cuda":
            torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
        models[name], figures[name] = make().to(device), {}
        training_step(models[name], data, device)  # compiles, chooses kernels
        if device == "cuda":
            figures[name]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        figures[name]["activation_gb"] = kept(models[name], data, device) / 1e9
    times = {name: [] for name in makers}
    for _ in range(repeats):
        for name in makers:
            times[name].append(training_step(models[name], data, device))
    for name, seconds in times.items():
        median = statistics.median(seconds)
        figures[name] |= {"seconds": median, "tokens_per_second": tokens / median}
    return figures


def table(title, figures, columns):
    print(f"\n{title}\n| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, row in figures.items():
        cells = [f"{row[c]:.4g}" if c in row else "" for c in columns]
        print(f"| {name} | {' | '.join(cells)} |")


def recomputing(make, selective=False):
    def made():
        model = make()
        # so that what is kept can be counted also inside; torch 2.11 does not know this option
        known = "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters
        options = {"respect_saved_tensors_hooks": True} if known and selective else {}
        checkpoint_blocks(model, selective, **options)
        return model

    return made


def compiled(make):
    def made():
        model = make()
        for block in model.blocks:
            block.forward = torch.compile(block.forward)
        return model

    return made


def recomputed_latte(make):
    def made():
        model = make()
        model.enable_gradient_checkpointing()
        return model.train()

    return made


def on_cpu(device):
    """Two layers of XL/2's width on 16 x 256 x 256; the toy; sampling of the toy."""
    config = replace(MODELS["STDiT-XL/2"], depth=2)
    shape, results = (4, 16, 32, 32), {}
    ours, theirs = lambda: STDiT(config), lambda: latte(config, 16, 32)
    makers = {"ours": ours, "diffusers' Latte": theirs}
    figures = compare(makers, config, shape, 1, device, 5)
    for name, make in makers.items():
        figures[name]["tflop"] = flops(make, config, shape) / 1e12
        figures[name]["tflop_per_second"] = figures[name]["tflop"] / figures[name]["seconds"]
    a, b = figures["ours"], figures["diffusers' Latte"]
    keys = "seconds", "activation_gb", "tflop"
    figures["ratio"] = {k: a[k] / b[k] for k in keys}
    columns = ["seconds", "tokens_per_second", "activation_gb", "tflop", "tflop_per_second"]
    table("width 1152, depth 2, 16 x 256 x 256, fp32: forward and backward", figures, columns)
    results["latte"] = figures

    makers = {"all kept": ours, "recomputed": recomputing(ours),
              "matrix products kept": recomputing(ours, True),
              "full attention": lambda: STDiT(replace(config, variant="full"))}  # fmt: skip
    figures = compare(makers, config, shape, 1, device, 2)
    table("the same: what is kept, and the design `full`", figures, columns[:3])
    results["kept"] = figures

    config, shape = MODELS["toy"], (4, 8, 8, 8)
    toy = lambda: STDiT(config)  # noqa: E731
    figures = compare({"toy, batch 16": toy}, config, shape, 16, device, 20)
    row = figures["toy, batch 16"]
    row["films_per_second"] = 16 / row["seconds"]
    row["tflop_per_second"] = 16 * flops(toy, config, shape) / 1e12 / row["seconds"]
    model = toy().eval()
    _, _, y = inputs(config, shape, 8, device)
    mask, keys = torch.ones(y.shape[:2], dtype=torch.bool), [("speed", i) for i in range(8)]
    start = time.perf_counter()
    sample(model, y, mask, shape, keys, 20, 2.0, "dpm")
    row["seconds_per_film_of_20_steps"] = (time.perf_counter() - start) / 8
    table("the toy", figures, ["seconds", "films_per_second", "tokens_per_second",
                               "tflop_per_second", "seconds_per_film_of_20_steps"])  # fmt: skip
    return results | {"toy": figures}


def on_cuda(device):
    """v1's shapes with XL/2 in bf16, from random latents; and sampling."""
    results, name = {}, torch.cuda.get_device_name()
    peak = next((1e12 * v for k, v in PEAK.items() if k in name), None)
    for preset, batch in (("16x256x256", 8), ("16x512x512", 1), ("64x512x512", 1)):
        run = PRESETS[preset]
        config, shape = MODELS["STDiT-XL/2"], latent_shape(run)
        ours = lambda config=config: STDiT(config)  # noqa: E731
        theirs = lambda c=config, s=shape: latte(c, s[1], s[2])  # noqa: E731
        plain = {"all kept": ours, "recomputed": recomputing(ours),
                 "matrix products kept": recomputing(ours, True)}  # fmt: skip
        makers = plain | {f"compiled, {title}": compiled(make) for title, make in plain.items()}
        makers["diffusers' Latte"] = theirs
        makers["diffusers' Latte, recomputed"] = recomputed_latte(theirs)
        figures, cost = {}, Cost(run, Process(0, 1, "cpu"))
        for title, make in makers.items():
            try:
                figures |= compare({title: make}, config, shape, batch, device, 5)
            except torch.OutOfMemoryError:  # a figure too: it does not fit
                figures[title] = {}
                continue
            row = figures[title]
            used = flops(make, config, shape) if "Latte" in title else cost.flops
            if peak:
                row["share_of_peak"] = batch * used / row["seconds"] / peak
        table(f"{preset}, batch {batch}, bf16, {name}", figures,
              ["seconds", "tokens_per_second", "share_of_peak", "activation_gb", "peak_gb"])
        results[preset] = figures
        model = ours().to(device).eval()
        _, _, y = inputs(config, shape, 1, device)
        mask = torch.ones(y.shape[:2], dtype=torch.bool, device=device)
        for sampler, steps in (("dpm", 20), ("ddpm", 100)):
            sample(model, y, mask, shape, [("speed", 0)], 2, 7.0, sampler)  # warm up
            wait(device)
            start = time.perf_counter()
            sample(model, y, mask, shape, [("speed", 0)], steps, 7.0, sampler)
            wait(device)
            results[preset][f"{steps} steps of {sampler}, guided"] = {
                "seconds": time.perf_counter() - start}  # fmt: skip
            print(f"{steps} steps of {sampler}: {time.perf_counter() - start:.1f} s")
        del model
    return results


def one_step(device, depth, frames, size):
    """One AdamW step of STDiT of XL/2's width, recomputed, with EMA; the process's largest memory
    against the prediction.
    """
    run = replace(PRESETS["16x512x512"], frames=frames, size=size, checkpointing="all")
    config, shape = replace(MODELS["STDiT-XL/2"], depth=depth), latent_shape(run)
    model = STDiT(config).to(device)
    predicted = predicted_memory(run, model, Process(0, 1, device))  # it takes one clip at a time
    checkpoint_blocks(model)
    ema = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    for p in model.parameters():  # as in any step but the first; filled, for zeros take no memory
        moments = {name: torch.empty_like(p).fill_(0) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] |= {"step": torch.zeros(()), **moments}
    start = time.perf_counter()
    training_step(model, inputs(config, shape, 1, device), device)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(ema, [*model.parameters()], 1e-4)
    wait(device)
    seconds = time.perf_counter() - start
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9
    tokens = frames * (size // 16) ** 2
    return {f"depth {depth}, {frames}x{size}x{size}": {
        "tokens": tokens, "seconds": seconds, "gradient_norm": norm, "peak_gb": peak,
        "predicted_gb": predicted, "ratio": predicted / peak}}  # fmt: skip


def project(share, link=50e9, gpus=(8, 64, 512)):
    """v1's stages on many GPUs, worked out, not measured: compute at a share of an H100's peak;
    gradients, 4 bytes a weight, in a ring over links of 400 Gb/s = 50 GB/s a GPU, at worst after
    the backward pass, at best hidden behind it; the cache's 2 bytes a number, all captions full.
    Where there are fewer clips than GPUs, the exchanges of --sp come on top, and each of those that
    share a clip reads it.
    """
    figures, weights = {}, 759_620_768
    for name in ("16x256x256", "16x256x256-hq", "16x512x512", "64x512x512"):
        run = PRESETS[name]
        cost, config = Cost(run, Process(0, 1, "cpu")), MODELS[run.model]
        _, T, h, w = shape = latent_shape(run)
        numbers = shape[0] * T * h * w + config.caption_length * config.caption_channels
        for n in gpus:
            clips = run.batch_size / n  # of each GPU; below 1, --sp shares clips
            compute = clips * cost.flops / (share * 1e12 * PEAK["H100"])
            reduce = 2 * (n - 1) / n * 4 * weights / link
            figures[f"{name}, {n} GPUs"] = {
                "clips a GPU": clips, "compute s": compute, "all-reduce s": reduce,
                "days, hidden": run.steps * max(compute, reduce) / 86400,
                "days, after": run.steps * (compute + reduce) / 86400,
                "cache GB/s in all": run.batch_size * 2 * numbers / max(compute, reduce) / 1e9,
            }  # fmt: skip
    table(f"projection at {share:.0%} of the peak: calculated, not measured", figures,
          [*next(iter(figures.values()))])  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", action="store_true", help="one whole step of XL/2 on the CPU")
    parser.add_argument("--depth", type=int, default=28, help="... of so many blocks")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--project", type=float, metavar="SHARE",
                        help="work out v1's stages on many GPUs, at this share of the peak")
    args = parser.parse_args()
    if args.project:
        project(args.project)
        return
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.step:
        results = {"step": one_step("cpu", args.depth, args.frames, args.size)}
        columns = ["tokens", "seconds", "gradient_norm", "peak_gb", "predicted_gb", "ratio"]
        table("one AdamW step", results["step"], columns)
    else:
        results = on_cuda(device) if device == "cuda" else on_cpu(device)
    path = Path(__file__).with_name("speed.json")
    stored = json.loads(path.read_text()) if path.exists() else {}
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if device == "cuda" and not args.step else machine
    for key, figures in results.items():
        old = stored.get(key, {}).get("figures", {}) if key == "step" else {}
        stored[key] = {"machine": machine, "torch": torch.__version__,
                       "date": time.strftime("%Y-%m-%d"), "figures": old | figures}  # fmt: skip
    path.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
