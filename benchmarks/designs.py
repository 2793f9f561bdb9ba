"""The report's comparison of four designs (A4), on the toy: which learns best, at what cost?

    python benchmarks/designs.py           # 4 designs x 3 seeds: 1.5 hours, 2 cores; resumes
    python benchmarks/designs.py --quick   # proves the path in a minute, in out/designs-quick

Each design is trained by train.py as the preset `toy` has it, but for 2,000 steps: that preset's
5,000 bring `sequential` to 98% of right films, where no design could be told from another.
Before any ranking was seen this was fixed, and the rule: if in no bin of t, nor in the share of
right films, two designs differ (mean over seeds of the difference) by more than that difference
varies (from its least to its largest), the toy is made harder.

What is paired: with one seed, all designs see the same clips, noise, timesteps and dropped captions
and are asked the same held-out questions, so differences are taken seed by seed. Initial weights
are not. What may favour one: the preset's learning rate, loss weights and guidance were chosen on
`sequential`; and in the first tenth of the steps, on single frames, `latte` trains its temporal
blocks on films of one frame, which the others leave as they are. Parameters are not equalised, as
in the report. `latte` has as many *pairs* of blocks as the others have blocks: all but `full` have
2 self-attentions per unit of depth, `full` has one.

Writes benchmarks/designs.json and designs.png: the held-out loss of the noise in four bins of t and
the share of captions whose films are right, against steps and against the FLOPs of training. (The
learning rate falls to 0 with the last step, so against FLOPs only the curves' ends compare. And in
films of 8 x 16 tokens `full` is the cheapest: what it costs in large ones is in cost.py.)
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import Process  # noqa: E402
from stdit import STDiT  # noqa: E402
from train import (  # noqa: E402
    PRESETS, Cost, Encoders, model_config, prepare_toy, read_metrics,
)  # fmt: skip

SEEDS = (0, 1, 2)
SETTING = {"steps": 2000, "eval_every": 250, "film_every": 500, "save_every": 500, "keep": 1}
QUICK = {"steps": 6, "eval_every": 3, "film_every": 6, "save_every": 6, "keep": 1, "film_steps": 2,
         "toy_clips": 84, "warmup": 1}  # fmt: skip
COLOURS = {"full": "C3", "sequential": "C0", "parallel": "C2", "latte": "C1"}
BINS = ("t 0-249", "t 250-499", "t 500-749", "t 750-999")


# ---------------------------------------------------------------------------------------------
# Many runs of train.py, some at a time, each with its share of the cores


def finished(config):
    """Whether a run has come to its end."""
    end = [m for m in read_metrics(config.out) if m["step"] == config.steps]
    filmed = not config.films or any("films" in m for m in end)
    return filmed and any("held_out" in m for m in end)


def check_unchanged(config):
    """What lies in a run's folder must have been trained as it is asked for now."""
    for path in sorted(Path(config.out).glob("checkpoints/step_*/state.json"))[-1:]:
        stored, asked = json.loads(path.read_text())["config"], asdict(config)
        for k in stored.keys() - {"out", "device"}:
            if stored[k] != asked.get(k):
                raise SystemExit(f"{config.out} was trained with {k}={stored[k]}, not "
                                 f"{asked.get(k)}: remove it")  # fmt: skip


def run_all(runs, jobs):
    """Train those of the runs, [TrainConfig], that are not finished yet, `jobs` at a time. One that
    begins with the weights of another belongs in a later call. Each writes what it says to log.txt
    in its folder; no other process may be at work there.
    """
    base, environment = PRESETS["toy"], dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    encoders = Encoders({"vae": base.vae, "t5": base.t5}, 16, "cpu")
    for c in {(c.frames, c.size, c.toy_clips): c for c in runs}.values():
        prepare_toy(c, encoders)  # now, once, and not by several runs at the same time
    for c in runs:
        check_unchanged(c)

    def run(config):
        options = [f"--{k}={v}" for k, v in vars(config).items() if v != getattr(base, k)]
        Path(config.out).mkdir(parents=True, exist_ok=True)
        with open(Path(config.out) / "log.txt", "a") as log:
            command = [sys.executable, str(ROOT / "train.py"), "--resume", *options]
            subprocess.run(command, stdout=log, stderr=log, env=environment)
        if not finished(config):  # it failed, or was stopped
            raise SystemExit(f"{config.out} is not finished: see {config.out}/log.txt")

    steps_of = lambda c: max((m["step"] for m in read_metrics(c.out)), default=0)  # noqa: E731
    done = lambda: sum(steps_of(c) for c in runs)  # noqa: E731
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, config) for config in runs if not finished(config)]
        bar = tqdm(total=sum(c.steps for c in runs), initial=done(), unit="step")
        try:
            while not all(future.done() for future in futures):
                time.sleep(5)
                bar.update(done() - bar.n)
                for future in futures:
                    if future.done():
                        future.result()  # raises what was raised there
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            bar.close()
        for future in futures:
            future.result()


@lru_cache
def tflop_per_step(config, frames):
    """TFLOP of one training step on clips of so many frames."""
    one_clip = Cost(replace(config, frames=frames), Process(0, 1, "cpu")).flops
    return config.batch_size * one_clip / 1e12


def tflop_until(config, step):
    """TFLOP of a run's first steps: of those on pictures, then of those on films."""
    pictures = min(step, math.ceil(config.image_share * config.steps))
    films = (step - pictures) * tflop_per_step(config, config.frames)
    return films + pictures * tflop_per_step(config, 1) if pictures else films


def collect(*chain):
    """The figures of a finished run, the last of a chain of runs of which each went on from the one
    before; the TFLOP are of all of them.
    """
    config, before = chain[-1], sum(tflop_until(c, c.steps) for c in chain[:-1])
    lines, model = read_metrics(config.out), STDiT(model_config(config))

    def at(m):
        return {"step": m["step"], "tflop": before + tflop_until(config, m["step"])}

    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "self_attentions": sum("qkv.weight" in name for name, _ in model.named_parameters()),
        "tflop_per_step": tflop_per_step(config, config.frames),
        "held_out": [at(m) | {"loss": m["held_out"]} for m in lines if "held_out" in m],
        "films": [at(m) | {"counts": m["accuracy"]} for m in lines if "films" in m],
    }


def about(command):
    """What stands beside every measurement."""
    return {"command": command, "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
            "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# What they say


def right(counts):
    """The share of the toy's 48 captions that are filmed right: of 42 seen and 6 unseen ones, each
    of which is filmed once, but at a run's end 2 and 8 times.
    """
    return (42 * counts[1] / counts[0] + 6 * counts[6] / counts[5]) / 48


def difference(values, others, unit):
    """" (mean, least to largest)" of differences seed by seed."""
    each = [a - b for a, b in zip(values, others)]
    return f" ({statistics.mean(each):+.1f}{unit}, {min(each):+.1f} to {max(each):+.1f})"


def summary(results, base):
    """Two tables of what runs came to at their end, {name: [figures of a run for each seed]}: cost
    and films (if any), and held-out loss; in brackets, differences to the one called `base`, seed
    by seed.
    """
    films = all(run["films"] for seeds in results.values() for run in seeds)
    lines = ["| | parameters | self-attentions | steps | TFLOP |" + films * (
        " right films, of seen captions | of unseen | captions right, % |")]  # fmt: skip
    lines.append("|---" * lines[0].count(" |") + "|")
    for name, seeds in results.items():
        run, end = seeds[0], seeds[0]["held_out"][-1]
        cells = [name, f"{run['parameters']:,}", str(run["self_attentions"]), f"{end['step']:,}",
                 f"{end['tflop']:.1f}"]  # fmt: skip
        if films:
            counts = [r["films"][-1]["counts"] for r in seeds]
            cells += [f"{', '.join(str(c[k + 1]) for c in counts)} of {counts[0][k]}"
                      for k in (0, 5)]  # fmt: skip
            share, other = ([100 * right(r["films"][-1]["counts"]) for r in results[n]]
                            for n in (name, base))  # fmt: skip
            more = difference(share, other, "") if name != base else ""
            cells.append(f"{statistics.mean(share):.0f}{more}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| held-out loss, t | {' | '.join(b[2:] for b in BINS)} |", "|---" * 5 + "|"]
    losses = {n: [run["held_out"][-1]["loss"] for run in runs] for n, runs in results.items()}
    for name, seeds in losses.items():
        cells = []
        for b in range(4):
            cells.append(f"{statistics.mean(loss[b] for loss in seeds):.4g}")
            if name != base:
                relative = [100 * loss[b] / other[b] for loss, other in zip(seeds, losses[base])]
                cells[-1] += difference(relative, [100] * len(seeds), "%")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results, path):
    """Five rows (four bins of t, films), against steps (left) and training FLOPs (right)."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(9, 13), layout="constrained")
    axes = figure.subplots(5, 2, sharey="row", sharex="col")
    for column, unit in enumerate(("step", "tflop")):
        for design, seeds in results.items():
            colour = COLOURS[design]
            for b in range(4):
                xs = [point[unit] for point in seeds[0]["held_out"]]
                ys = list(zip(*([point["loss"][b] for point in run["held_out"]] for run in seeds)))
                draw(axes[b, column], xs, ys, colour, design)
            xs = [point[unit] for point in seeds[0]["films"]]
            ys = [[right(point["counts"]) for point in points]
                  for points in zip(*(run["films"] for run in seeds))]  # fmt: skip
            draw(axes[4, column], xs, ys, colour, design)
        for b in range(4):
            axes[b, column].set(yscale="log")
    for row, title in enumerate((*BINS, "share of captions filmed right")):
        axes[row, 0].set_ylabel(title if row == 4 else f"held-out loss, {title}")
    axes[4, 0].set(xlabel="steps", ylim=(0, None))
    axes[4, 1].set(xlabel="TFLOP of training")
    for axis in axes.flat:
        axis.grid(color="0.9", which="both")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=100)
    picture = Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)  # half as large


def draw(axis, xs, ys, colour, label):
    """A line of means through ys [len(xs)][seeds], in a band from the least to the largest."""
    axis.plot(xs, [statistics.mean(y) for y in ys], color=colour, label=label)
    axis.fill_between(xs, [min(y) for y in ys], [max(y) for y in ys], color=colour, alpha=0.15,
                      linewidth=0)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="prove the path in a minute")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    args = parser.parse_args()
    setting, seeds = (QUICK, SEEDS[:1]) if args.quick else (SETTING, SEEDS)
    folder = Path("out/designs-quick" if args.quick else "out/designs")
    if args.quick:
        shutil.rmtree(folder, ignore_errors=True)
    runs = {f"{variant}-{seed}": replace(PRESETS["toy"], variant=variant, seed=seed,
                                         out=f"{folder}/{variant}-{seed}", **setting)
            for seed in seeds for variant in COLOURS}  # fmt: skip
    run_all([*runs.values()], args.jobs)
    results = {v: [collect(runs[f"{v}-{seed}"]) for seed in seeds] for v in COLOURS}
    print(summary(results, "sequential"))
    stored = about("python benchmarks/designs.py") | {"seeds": seeds, "setting": setting}
    text = json.dumps(stored | {"results": results}, indent=1)
    target = folder if args.quick else Path(__file__).parent
    (target / "designs.json").write_text(text + "\n")
    plot(results, target / "designs.png")


if __name__ == "__main__":
    main()
