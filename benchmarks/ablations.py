"""Three experiments that the report only mentions, on the toy, each with one command.

    python benchmarks/ablations.py zero          # A5: temporal projections at zero, or random
    python benchmarks/ablations.py patches       # A7: patches of 1x2x2, or of 2x2x2
    python benchmarks/ablations.py progressive   # T1: small videos first, or large ones at once
    python benchmarks/ablations.py zero --quick  # the same path in a minute, in out/ablations-quick

Every arm is a run of train.py in out/ablations, with the same seeds in all arms of an experiment;
called again, it resumes. Results go to benchmarks/ablations.json.

zero: 1,500 steps on single frames. From those weights two runs train 600 steps on videos: one with
train.py's initialization, temporal projections at zero; one with projections initialized like any
other linear layer. Their validation losses start at step 0.

patches: 900 steps on videos with 1x2x2 patches, and with 2x2x2, half as many; and with the latter
1,800 steps, about the same compute and twice the clips. These start from random weights, the
report's from PixArt-alpha.

progressive: 8x32x32, then 8x64x64, then 16x64x64, with positions rescaled from stage to stage; and
16x64x64 from the start, for the number of steps at which both cost the same FLOPs. Each run has its
own warm-up and linear decay, from the peak to 0; stages that start from weights begin at 1e-3.

After so few steps few videos match their captions, so the last two compare the validation loss
alone.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn as nn
import tyro
from designs import about, collect, run_all, summary, tflop_per_step  # first: it sets the path

from data import Distributed
from sample import TRAIN_SCHEDULE, load_model
from stdit import MODELS
from train import PRESETS, derive, open_data, validation_loss

SEEDS = (0, 1)
FOLDER = "out/ablations"
QUICK = "out/ablations-quick"
# Also in the processes of run_all, which import this file.
MODELS["toy-2x2x2"] = replace(MODELS["toy"], patch_size=(2, 2, 2))

# Each experiment is a function that returns {arm: [chain of TrainConfigs per seed]}.


def arm(name, seed, quick, steps, **options):
    """Returns the TrainConfig of one run."""
    out = f"{QUICK if quick else FOLDER}/{name}-{seed}"
    often = dict(eval_every=100, sample_every=steps, save_every=500, keep_checkpoints=1)
    options = dict(seed=seed, out=out, steps=steps) | often | options
    if quick:
        options |= dict(steps=min(steps, 4), sample_steps=2, toy_clips=84, warmup=1)
    return replace(PRESETS["toy"], preset="toy", **options)


def zero(quick, seeds, jobs):
    """A5: temporal projections at zero, or random."""
    options = {"steps": 1500, "frames": 1, "num_samples": 0, "eval_every": 500}
    images = [arm("images", s, quick, **options) for s in seeds]
    run_all(images, jobs)
    arms = {"zero": [], "random": []}
    for s, start in zip(seeds, images):
        folder = Path(start.out) / "random_projections"
        if not (folder / "model.safetensors").exists():
            model = load_model(start.out)
            torch.manual_seed(s)
            for block in model.blocks:
                nn.init.xavier_uniform_(block.attn_temp.proj.weight)
            model.save_pretrained(folder)
        for name, init in (("zero", start.out), ("random", str(folder))):
            videos = arm(name, s, quick, steps=600, init=init)
            arms[name].append((start, videos))
    return arms


def at_step_0(config):
    """Returns the validation loss of a run before its first step."""
    c = derive(config)
    _, validation = open_data(c, Distributed())
    run = dict(config=c, distributed=Distributed(), validation=validation, ema=load_model(c.init))
    return validation_loss(SimpleNamespace(**run, schedule=TRAIN_SCHEDULE.to("cpu")))


def patches(quick, seeds, jobs):
    """A7: patches of 1x2x2, or of 2x2x2."""
    sizes = {"1x2x2": ("toy", 900), "2x2x2": ("toy-2x2x2", 900)}
    sizes["2x2x2, twice the steps"] = ("toy-2x2x2", 1800)
    arms = {}
    for name, (model, steps) in sizes.items():
        options = {"model": model, "steps": steps, "num_samples": 0}
        out = name.replace(", ", "-").replace(" ", "-")
        arms[name] = [(arm(out, s, quick, **options),) for s in seeds]
    return arms


def progressive(quick, seeds, jobs):
    """T1: small videos first, or large ones at once."""
    small = {"size": 32, "steps": 800, "num_samples": 0}
    large = {"size": 64, "num_samples": 0, "lr": 1e-3, "warmup": 20}
    long = large | {"frames": 16, "time_scale": 0.5, "output_fps": 16}
    stages = (small, large | {"steps": 300}, long | {"steps": 150})
    chains = [
        [arm(f"stage{k + 1}", s, quick, **stage) for k, stage in enumerate(stages)] for s in seeds
    ]
    for chain in chains:
        for k in (1, 2):
            chain[k] = replace(chain[k], init=chain[k - 1].out)
    cost = sum(c.steps * tflop_per_step(c) for c in chains[0])
    start = long | {"lr": PRESETS["toy"].lr, "warmup": 100}  # as the first stage
    steps = round(cost / tflop_per_step(arm("", 0, False, steps=1000, **start)))
    at_once = [(arm("at-once", s, quick, steps=steps, **start),) for s in seeds]
    for k in (0, 1):  # the last stage runs with the other arm
        run_all([chain[k] for chain in chains], jobs)
    return {"at once": at_once, "progressive": chains}


EXPERIMENTS = {"zero": zero, "patches": patches, "progressive": progressive}
BASE = {"zero": "zero", "patches": "1x2x2", "progressive": "at once"}  # for differences


@dataclass(frozen=True)
class AblationsConfig:
    experiment: tyro.conf.Positional[Literal[tuple(EXPERIMENTS)]]  # which to run
    quick: bool = False  # the same path in a minute, in out/ablations-quick
    jobs: int = 2  # runs at a time, which share the CPU's cores


def main():
    c = tyro.cli(AblationsConfig, description=__doc__)
    if c.quick:
        shutil.rmtree(QUICK, ignore_errors=True)
    seeds = SEEDS[:1] if c.quick else SEEDS
    arms = EXPERIMENTS[c.experiment](c.quick, seeds, c.jobs)
    run_all([chain[-1] for chains in arms.values() for chain in chains], c.jobs)
    results = {name: [collect(*chain) for chain in chains] for name, chains in arms.items()}
    if c.experiment == "zero":
        for name, chains in arms.items():
            for run, (images, videos) in zip(results[name], chains):
                start = {"step": 0, "tflop": images.steps * tflop_per_step(images)}
                run["validation"].insert(0, start | {"loss": at_step_0(videos)})
    print(summary(results, BASE[c.experiment]))
    path = Path(QUICK if c.quick else Path(__file__).parent) / "ablations.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    command = f"python benchmarks/ablations.py {c.experiment}"
    stored[c.experiment] = about(command) | {"seeds": seeds, "results": results}
    path.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
