"""What the four designs cost as videos grow longer and larger.

    python benchmarks/cost.py              # CPU: 15 minutes; writes cost.json and cost.png
    python benchmarks/cost.py --quick      # narrow and small, a minute; writes nothing
    python benchmarks/cost.py --large      # full and sequential at 64x512x512 alone; 25 minutes

One block of STDiT-XL/2's width (of `latte` and of diffusers' Latte a pair of blocks) with embedders
and final layer: parameters, FLOPs of forward and backward, what the forward pass keeps for the
backward pass, and the time of both, against the number of frames and against their size. The
designs of one shape are measured in turns, 3 to 5 times; on a CPU from 5,000 tokens on once, which
is good to about 10%.

In factorized attention a token attends to S + T others (its frame, its patch through time), in
`full` to all S*T. So with more frames the cost of `full` grows with their square, that of the
others hardly faster than linearly; with larger frames attention grows with S^2 in every design.
`full` *keeps* no more than the others: fused attention never stores its S*T x S*T matrix.
"""

import json
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro
from speed import Latte, about, add_flops, compare, flops_per_clip, make, table  # sets the path

from stdit import BLOCKS, MODELS

FRAMES, FRAME_SIZE = (4, 8, 16, 32, 64), 256  # all of 256x256, as in v1's first stage
SIZES, SIZE_FRAMES = (128, 256, 384, 512), 16  # all of 16 frames
COLORS = {"full": "C3", "sequential": "C0", "parallel": "C2", "latte": "C1"}
COLORS["diffusers' Latte"] = "0.5"


def latents(frames, size):
    return 4, frames, size // 8, size // 8  # [C, T, H, W]


def maker(name, config, shape):
    """Returns a function that makes a design for clips of this shape."""
    if name in BLOCKS:
        return partial(make, replace(config, variant=name))
    return partial(Latte, config, shape)


def measure(config, frames, size, device, names=tuple(COLORS)):
    """Returns {design: figures} at one shape."""
    torch.manual_seed(0)
    shape = latents(frames, size)
    tokens = frames * size**2 // 256
    makers = {name: maker(name, config, shape) for name in names}
    repeats = 5 if tokens < 1500 else 3 if tokens < 5000 or device == "cuda" else 1
    figures = compare(makers, config, shape, 1, device, repeats)
    for name, make_model in makers.items():
        add_flops(figures[name], make_model, shape, 1, device)
        figures[name]["parameters"] = sum(p.numel() for p in make_model().parameters())
    return figures


def crossings(config, points):
    """Returns {other design: {figure: frames}}: the first number of frames at which `full` has more
    FLOPs, and the one at which lines through the measured times cross (None: outside them).
    """
    frames = [int(n) for n in points]
    found = {}

    @lru_cache
    def flops(name, T):
        shape = latents(T, FRAME_SIZE)
        with torch.device("meta"):
            return flops_per_clip(maker(name, config, shape)(), shape)

    for name in COLORS:
        if name == "full":
            continue
        more = next(T for T in range(2, 1000) if flops("full", T) > flops(name, T))
        lead = [p["full"]["seconds"] - p[name]["seconds"] for p in points.values()]
        cross = None
        for i in range(len(lead) - 1):
            if lead[i] <= 0 < lead[i + 1] and cross is None:
                part = lead[i] / (lead[i] - lead[i + 1])
                cross = frames[i] + (frames[i + 1] - frames[i]) * part
        found[name] = {"flops": more, "seconds": cross}
    return found


def plot(results, path):
    """Draws FLOPs, kept memory and time: a row against frames, a row against size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.6), layout="constrained")
    columns = {"tflop": "TFLOP", "activation_gb": "kept for the backward pass, GB"}
    columns["seconds"] = "time, s"
    rows = {"frames": f"frames of {FRAME_SIZE}×{FRAME_SIZE}"}
    rows["sizes"] = f"height and width in pixels, {SIZE_FRAMES} frames"
    axes = figure.subplots(2, 3)
    for axis_row, (key, label) in zip(axes, rows.items()):
        points = results[key]
        xs = [int(n) for n in points]
        for axis, (column, title) in zip(axis_row, columns.items()):
            for marker, (name, color) in zip("osD^x", COLORS.items()):
                ys = [figures[name][column] for figures in points.values()]
                style = "--" if "diffusers" in name else "-"
                axis.plot(xs, ys, style, marker=marker, ms=5, color=color, label=name)
            axis.set(title=title, xlabel=label, xscale="log", yscale="log")
            axis.set_xticks(xs, [str(x) for x in xs])
            low, high = axis.get_ylim()
            marks = [m for m in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low < m < high]
            axis.set_yticks(marks, [f"{m:g}" for m in marks])
            axis.minorticks_off()
            axis.grid(color="0.9")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.suptitle("One block of XL/2's width, forward and backward")
    figure.savefig(path, dpi=100)


@dataclass(frozen=True)
class CostConfig:
    quick: bool = False  # narrow and small, a minute; writes nothing
    large: bool = False  # full and sequential at 64x512x512 alone; 25 minutes


def main():
    c = tyro.cli(CostConfig, description=__doc__)
    quick = c.quick
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = replace(MODELS["STDiT-XL/2"], depth=1, hidden_size=128 if quick else 1152)
    frames = (4, 8, 16) if quick else FRAMES
    sizes = (128, 256) if quick else SIZES
    results = about("python benchmarks/cost.py", device) | {"frames": {}, "sizes": {}}
    columns = ["parameters", "tflop", "activation_gb", "seconds", "tokens_per_second"]
    if c.large:
        figures = measure(config, 64, 512, device, ("sequential", "full"))
        return table("64 frames of 512x512", figures, columns)
    shapes = [("frames", n, FRAME_SIZE) for n in frames]
    for key, T, size in shapes + [("sizes", SIZE_FRAMES, n) for n in sizes]:
        with get_context("spawn").Pool(1) as fresh:  # else allocators keep what was freed
            figures = fresh.apply(measure, (config, T, size, device))
        results[key][str(T if key == "frames" else size)] = figures
        table(f"{T} frames of {size}x{size}", figures, columns)
    results["crossings"] = crossings(config, results["frames"])
    print("\nframes from which `full` costs more:", json.dumps(results["crossings"], indent=1))
    if not quick:
        here = Path(__file__).parent
        (here / "cost.json").write_text(json.dumps(results, indent=1) + "\n")
        plot(results, here / "cost.png")


if __name__ == "__main__":
    main()
