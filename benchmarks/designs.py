"""The report's comparison of four designs (A4) on the toy: which learns best, at what cost?

    python benchmarks/designs.py           # 4 designs x 3 seeds: 75 minutes, 2 cores; resumes
    python benchmarks/designs.py --quick   # the same path in a minute, in out/designs-quick

Each design is trained by train.train with the preset `toy`, for fewer steps, after which a part of
the videos match. The steps were fixed before any ranking was seen, and so was this rule: if no two
designs differ, in any bin of t or in the fraction of matches, by more (mean over seeds) than that
difference varies (from its minimum to its maximum), the toy is made harder.

Runs of one seed see the same clips, noise, timesteps and dropped captions, and the same validation
noise, so differences are taken seed by seed. Initial weights are not paired. Possible bias: the
learning rate, the loss weights and the guidance of the preset were chosen on `sequential`.
Parameter counts are not equalized, as in the report. `latte` has as many *pairs* of blocks as the
others have blocks: all but `full` have 2 self-attentions per unit of depth, `full` has one.

Writes benchmarks/designs.json and designs.png: validation loss in four bins of t and the fraction
of captions that the videos match, against steps and training FLOPs. (The learning rate falls to 0
with the last step, so against FLOPs only the ends of the curves compare. For 8 x 16 tokens `full`
is the cheapest; cost.py measures larger videos.)
"""

import json
import os
import shutil
import signal
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro
from speed import about, flops_per_clip, latent_shape  # first: it puts the project on the path
from tqdm import tqdm

import train
from data import Distributed
from sample import newest_checkpoint
from stdit import STDiT
from train import PRESETS, TrainConfig, derive, model_config, read_metrics, toy_caches

SEEDS = (0, 1, 2)
SETTING = dict(steps=1500, eval_every=250, sample_every=500, save_every=500, keep_checkpoints=1)
QUICK = dict(steps=6, eval_every=3, sample_every=6, save_every=6, keep_checkpoints=1)
QUICK |= dict(sample_steps=2, toy_clips=84, warmup=1)
COLORS = {"full": "C3", "sequential": "C0", "parallel": "C2", "latte": "C1"}
BINS = ("0-249", "250-499", "500-749", "750-999")  # of t

# ---------------------------------------------------------------------------------------------
# Many runs of train.train


def finished(config):
    """Tells whether a run has written its last validation loss and its last samples."""
    if not (Path(config.out) / "metrics.jsonl").exists():
        return False
    end = {k for m in read_metrics(config.out) if m["step"] == config.steps for k in m}
    return "validation" in end and ("samples" in end or config.num_samples == 0)


def check_unchanged(config):
    """Raises SystemExit if the run in a config's folder was trained with other options."""
    if checkpoint := newest_checkpoint(config.out):
        stored = TrainConfig(**json.loads((checkpoint / "state.json").read_text())["config"])
        if stored != derive(config):
            raise SystemExit(f"{config.out} was trained with other options: remove it")


def run_all(runs, jobs):
    """Trains those of the runs, [TrainConfig], that are not finished, `jobs` at a time. A run that
    starts from the weights of another belongs in a later call.
    """
    for c in runs:
        check_unchanged(c)
        toy_caches(derive(c), Distributed())  # now, not in several runs at the same time
    threads = max(1, os.cpu_count() // jobs)
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1)
    futures = [pool.submit(run_one, config, threads) for config in runs if not finished(config)]
    try:
        for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
            future.result()  # raises what was raised there
    finally:
        pool.shutdown(cancel_futures=True)


def run_one(config, threads):
    """Trains one run in a process of its own. Output goes to log.txt in the run's folder."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, train.request_stop)  # Ctrl-C saves; a later call continues
    Path(config.out).mkdir(parents=True, exist_ok=True)
    with open(Path(config.out) / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        train.train(config)
    if not finished(config):
        raise SystemExit(f"{config.out} is not finished: see {config.out}/log.txt")


@lru_cache
def tflop_per_step(config):
    """Returns the TFLOP of a training step."""
    with torch.device("meta"):
        model = STDiT(model_config(config))
    return config.batch_size * flops_per_clip(model, latent_shape(config)) / 1e12


def collect(*chain):
    """Returns the figures of a finished run, the last of a chain of runs each of which started from
    the one before; TFLOP are of the whole chain.
    """
    config = chain[-1]
    before = sum(c.steps * tflop_per_step(c) for c in chain[:-1])
    lines = read_metrics(config.out)
    model = STDiT(model_config(config))

    def at(m):
        return {"step": m["step"], "tflop": before + m["step"] * tflop_per_step(config)}

    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "self_attentions": sum("qkv.weight" in name for name, _ in model.named_parameters()),
        "tflop_per_step": tflop_per_step(config),
        "validation": [at(m) | {"loss": m["validation"]} for m in lines if "validation" in m],
        "accuracy": [at(m) | m["accuracy"] for m in lines if "accuracy" in m],
    }


# ---------------------------------------------------------------------------------------------
# Tables and curves


def matching(point):
    """Returns the fraction of the toy's 48 captions (42 seen, 6 unseen) that the videos match."""
    (seen, n), (unseen, m) = point["seen"], point["unseen"]
    return (42 * seen / n + 6 * unseen / m) / 48


def difference(values, others, unit):
    """Returns mean, minimum and maximum of differences seed by seed, as text."""
    each = [a - b for a, b in zip(values, others)]
    return f" ({statistics.mean(each):+.1f}{unit}, {min(each):+.1f} to {max(each):+.1f})"


def summary(results, base):
    """Returns two tables of the ends of runs, {name: [figures of a run per seed]}: cost and, if
    there are sample videos, matches; validation loss. In brackets, differences to `base` seed by
    seed.
    """
    videos = all(run["accuracy"] for seeds in results.values() for run in seeds)
    header = "| | parameters | self-attentions | steps | TFLOP |"
    header += " matches, seen captions | unseen captions | captions matched, % |" * videos
    lines = [header, "|---" * header.count(" |") + "|"]
    for name, seeds in results.items():
        run = seeds[0]
        end = run["validation"][-1]
        cells = [name, f"{run['parameters']:,}", str(run["self_attentions"]), f"{end['step']:,}"]
        cells.append(f"{end['tflop']:.1f}")
        if videos:
            for kind in ("seen", "unseen"):
                counts = [r["accuracy"][-1][kind] for r in seeds]
                cells.append(f"{', '.join(str(n) for n, _ in counts)} of {counts[0][1]}")
            percent, other = (
                [100 * matching(r["accuracy"][-1]) for r in results[n]] for n in (name, base)
            )
            more = difference(percent, other, "") if name != base else ""
            cells.append(f"{statistics.mean(percent):.0f}{more}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| validation loss, t | {' | '.join(BINS)} |", "|---" * 5 + "|"]
    losses = {n: [run["validation"][-1]["loss"] for run in runs] for n, runs in results.items()}
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
    """Draws five rows (four bins of t, matches), against steps and against training TFLOP."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(9, 13), layout="constrained")
    axes = figure.subplots(5, 2, sharey="row", sharex="col")

    def draw(axis, xs, ys, design):
        """Draws the mean of ys [len(xs)][seeds], in a band from minimum to maximum."""
        low = [min(y) for y in ys]
        high = [max(y) for y in ys]
        axis.plot(xs, [statistics.mean(y) for y in ys], color=COLORS[design], label=design)
        axis.fill_between(xs, low, high, color=COLORS[design], alpha=0.15, linewidth=0)

    for column, unit in enumerate(("step", "tflop")):
        for design, seeds in results.items():
            points = list(zip(*(run["validation"] for run in seeds)))  # [points][seeds]
            for b in range(4):
                ys = [[run["loss"][b] for run in point] for point in points]
                draw(axes[b, column], [point[0][unit] for point in points], ys, design)
            points = list(zip(*(run["accuracy"] for run in seeds)))
            ys = [[matching(run) for run in point] for point in points]
            draw(axes[4, column], [point[0][unit] for point in points], ys, design)
        for b in range(4):
            axes[b, column].set(yscale="log")
            axes[b, 0].set_ylabel(f"validation loss, t {BINS[b]}")
    axes[4, 0].set(ylabel="fraction of captions matched", xlabel="steps", ylim=(0, None))
    axes[4, 1].set(xlabel="TFLOP of training")
    for axis in axes.flat:
        axis.grid(color="0.9", which="both")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=100)
    picture = Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)  # half as large


@dataclass(frozen=True)
class DesignsConfig:
    quick: bool = False  # the same path in a minute, in out/designs-quick
    jobs: int = 2  # runs at a time, which share the CPU's cores


def main():
    c = tyro.cli(DesignsConfig, description=__doc__)
    setting = QUICK if c.quick else SETTING
    seeds = SEEDS[:1] if c.quick else SEEDS
    folder = Path("out/designs-quick" if c.quick else "out/designs")
    if c.quick:
        shutil.rmtree(folder, ignore_errors=True)
    runs = {}
    for variant in COLORS:
        base = replace(PRESETS["toy"], preset="toy", variant=variant, **setting)
        runs[variant] = [replace(base, seed=s, out=f"{folder}/{variant}-{s}") for s in seeds]
    run_all([run for group in zip(*runs.values()) for run in group], c.jobs)  # seed by seed
    results = {variant: [collect(run) for run in group] for variant, group in runs.items()}
    print(summary(results, "sequential"))
    stored = about("python benchmarks/designs.py") | {"seeds": seeds, "setting": setting}
    target = folder if c.quick else Path(__file__).parent
    text = json.dumps(stored | {"results": results}, indent=1)
    (target / "designs.json").write_text(text + "\n")
    plot(results, target / "designs.png")


if __name__ == "__main__":
    main()
