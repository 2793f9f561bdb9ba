"""What the four designs cost, as films grow longer and larger.

    python benchmarks/cost.py              # a CPU: 15 minutes; writes cost.json and cost.png
    python benchmarks/cost.py --quick      # narrow and small, half a minute, writes nothing

One block (of `latte`, and of diffusers' Latte: a pair) of STDiT-XL/2's width between its embedders
and its final layer, with random weights and latents: parameters, FLOPs, what the forward pass keeps
for the backward pass, and the time of both, against the number of frames and against the size of a
frame. What stands at one place of an axis was measured in turns, small shapes 3 to 5 times; on a
CPU the largest (from 5,000 tokens on) once, so trust their times to a tenth.

FLOPs are torch's count of one forward pass, times three. A token of the designs with factorized
attention looks at S + T others (its frame, its patch through time), a token of `full` at all S*T.
So with more frames the cost of `full` grows with their square, and the others' hardly faster than
their number; with larger frames every design's attention grows with the square of S. What `full`
*keeps* is no more: fused attention never stores its S*T x S*T matrix.
"""

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from speed import compare, flops, latte, table  # first: it puts the project on the path
from stdit import MODELS, VARIANTS, STDiT

FRAMES, FRAME_SIZE = (4, 8, 16, 32, 64), 256  # all of 256x256, as in v1's first stage
SIZES, SIZE_FRAMES = (128, 256, 384, 512), 16  # all of 16 frames
COLOURS = {"full": "C3", "sequential": "C0", "parallel": "C2", "latte": "C1",
           "diffusers' Latte": "0.5"}  # fmt: skip


def maker(name, config, frames, size):
    """A function that makes a design for films of this shape."""
    if name in VARIANTS:
        return lambda: STDiT(replace(config, variant=name))
    return lambda: latte(config, frames, size // 8)


def measure(config, frames, size, device):
    """{design: figures} at one shape; one training step of each design before the ones timed."""
    torch.manual_seed(0)
    shape, tokens = (4, frames, size // 8, size // 8), frames * size**2 // 256
    makers = {name: maker(name, config, frames, size) for name in COLOURS}
    repeats = 5 if tokens < 1500 else 3 if tokens < 5000 or device == "cuda" else 1
    figures = compare(makers, config, shape, 1, device, repeats)
    for name, make in makers.items():
        figures[name]["tflop"] = flops(make, config, shape) / 1e12
        figures[name]["parameters"] = sum(p.numel() for p in make().parameters())
    return figures


def crossings(config, points):
    """{other design: {figure: frames}}: the first number of frames at which `full` has more FLOPs,
    and the one at which lines between measured times cross (None: nowhere among them).
    """
    frames, found, side = [int(n) for n in points], {}, FRAME_SIZE // 8

    def count(name, T):
        return flops(maker(name, config, T, FRAME_SIZE), config, (4, T, side, side))

    for name in COLOURS:
        if name == "full":
            continue
        more = (T for T in range(2, 1000) if count("full", T) > count(name, T))
        lead = [p["full"]["seconds"] - p[name]["seconds"] for p in points.values()]
        cross = (frames[i] + (frames[i + 1] - frames[i]) * lead[i] / (lead[i] - lead[i + 1])
                 for i in range(len(lead) - 1) if lead[i] <= 0 < lead[i + 1])  # fmt: skip
        found[name] = {"flops": next(more), "seconds": next(cross, None)}
    return found


def plot(results, path):
    """Two rows, against frames and against size; FLOPs, kept memory and time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.6), layout="constrained")
    columns = {"tflop": "TFLOP", "activation_gb": "kept for the backward pass, GB",
               "seconds": "time, s"}  # fmt: skip
    rows = {"frames": f"frames of {FRAME_SIZE}×{FRAME_SIZE}",
            "sizes": f"pixels a side, {SIZE_FRAMES} frames"}  # fmt: skip
    axes = figure.subplots(2, 3)
    for axis_row, (key, label) in zip(axes, rows.items()):
        points = results[key]
        xs = [int(n) for n in points]
        for axis, (column, title) in zip(axis_row, columns.items()):
            for k, (name, colour) in enumerate(COLOURS.items()):
                ys = [figures[name][column] for figures in points.values()]
                style = "--" if "diffusers" in name else "-"
                axis.plot(xs, ys, style, marker="osD^x"[k], ms=5, color=colour, label=name)
            axis.set(title=f"{title}", xlabel=label, xscale="log", yscale="log")
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="prove the path in half a minute")
    quick = parser.parse_args().quick
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, frames, sizes = replace(MODELS["STDiT-XL/2"], depth=1), FRAMES, SIZES
    if quick:
        config, frames, sizes = replace(config, hidden_size=128), (4, 8, 16), (128, 256)
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    results = {"machine": torch.cuda.get_device_name() if device == "cuda" else machine,
               "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
               "command": "python benchmarks/cost.py", "frames": {}, "sizes": {}}  # fmt: skip
    columns = ["parameters", "tflop", "activation_gb", "seconds", "tokens_per_second"]
    for key, shapes in (("frames", [(n, FRAME_SIZE) for n in frames]),
                        ("sizes", [(SIZE_FRAMES, n) for n in sizes])):  # fmt: skip
        for shape in shapes:
            with get_context("spawn").Pool(1) as fresh:  # else allocators keep what was freed
                figures = fresh.apply(measure, (config, *shape, device))
            results[key][str(shape[key == "sizes"])] = figures
            table(f"{shape[0]} frames of {shape[1]}x{shape[1]}", figures, columns)
            sys.stdout.flush()
    results["crossings"] = crossings(config, results["frames"])
    print("\nframes from which `full` is the dearer:", json.dumps(results["crossings"], indent=1))
    if not quick:
        here = Path(__file__).parent
        (here / "cost.json").write_text(json.dumps(results, indent=1) + "\n")
        plot(results, here / "cost.png")


if __name__ == "__main__":
    main()
