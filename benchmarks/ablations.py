"""Three experiments that the report only mentions, on the toy, each one command.

    python benchmarks/ablations.py zero         # A5: temporal projections at zero, or random
    python benchmarks/ablations.py patches      # A7: patches of 1x2x2, or of 2x2x2
    python benchmarks/ablations.py progressive  # T1: small films first, or large ones at once
    python benchmarks/ablations.py zero --quick # proves the path, writes nothing

Every arm is a run of train.py in out/ablations, with the same seeds in all arms of an experiment;
run again, it goes on. The figures go to benchmarks/ablations.json.

zero: the toy is learned as pictures (T = 1) for 1,500 steps. From those weights two runs go on with
films for 600 steps: one as train.py does it, the new temporal projections at zero; one with the
projections drawn like any other linear layer's.

patches: 900 steps on films of 1x2x2, and of 2x2x2 patches, which are half as many; and of the
latter 1,800 steps, about as much compute. No pictures first, for one frame is no patch of two.

progressive: 8x32x32, then 8x64x64, then 16x64x64, where positions are rescaled from stage to stage;
and 16x64x64 from the beginning, for so many steps that both cost the same FLOPs.
"""

import argparse
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn

from designs import BINS, about, collect, run_all  # first: it puts the project on the path
from data import Process
from stdit import STDiT, load_weights
from train import PRESETS, Cost, model_config

SEEDS = (0, 1)
FOLDER = Path("out/ablations")


def arm(name, seed, quick, **options):
    """The configuration of one run; steps of training as given, or few."""
    steps = options.pop("steps")
    every = {"eval_every": 100, "film_every": steps, "save_every": 500, "keep": 1}
    few = {"film_steps": 2, "toy_clips": 84, "warmup": 1} if quick else {}
    out = FOLDER.with_name("ablations-quick") if quick else FOLDER
    return replace(PRESETS["toy"], seed=seed, out=f"{out}/{name}-{seed}",
                   steps=min(steps, 4) if quick else steps, **every | options | few)  # fmt: skip


def zero(quick, seeds, jobs):
    """A5 -> {arm: [configurations]}."""
    pictures = [arm("pictures", s, quick, steps=1500, image_share=1.0, films=0, eval_every=500)
                for s in seeds]  # fmt: skip
    run_all({c.out: c for c in pictures}, jobs)
    arms = {"zero": [], "random": []}
    for s, start in zip(seeds, pictures):
        folder = Path(start.out) / "random_projections"
        if not (folder / "model.safetensors").exists():
            model = STDiT(model_config(start))
            load_weights(model, start.out)
            torch.manual_seed(s)
            for block in model.blocks:
                nn.init.xavier_uniform_(block.attn_temp.proj.weight)
            model.save_pretrained(folder)
        for name, init in (("zero", start.out), ("random", str(folder))):
            arms[name].append(arm(name, s, quick, steps=600, image_share=0.0, init=init))
    return arms


def patches(quick, seeds, jobs):
    """A7 -> {arm: [configurations]}."""
    options = {"1x2x2": ("toy", 900), "2x2x2": ("toy-2x2x2", 900),
               "2x2x2, twice the steps": ("toy-2x2x2", 1800)}  # fmt: skip
    return {name: [arm(name.replace(", ", "-").replace(" ", "-"), s, quick, model=model,
                       steps=steps, image_share=0.0) for s in seeds]
            for name, (model, steps) in options.items()}  # fmt: skip


def progressive(quick, seeds, jobs):
    """T1 -> {arm: [configurations]}."""
    stages = (
        {"size": 32, "steps": 1200},
        {"size": 64, "steps": 450, "lr": 1e-3, "image_share": 0.0},
        {"size": 64, "steps": 225, "lr": 1e-3, "image_share": 0.0, "frames": 16,
         "time_scale": 0.5, "fps": 16},
    )  # fmt: skip
    chains = [[arm(f"stage{k + 1}", s, quick, **stage) for k, stage in enumerate(stages)]
              for s in seeds]  # fmt: skip
    for chain in chains:
        for k in (1, 2):
            chain[k] = replace(chain[k], init=chain[k - 1].out)
    cost = sum(training_flops(c) for c in chains[0])
    options = stages[2] | {"lr": 2e-3, "image_share": 0.1}  # as of the first stage
    steps = round(1000 * cost / training_flops(arm("", 0, False, **options | {"steps": 1000})))
    at_once = [arm("at-once", s, quick, **options | {"steps": steps}) for s in seeds]
    for k in (0, 1):  # the last stage of all is run with the others
        run_all({c[k].out: replace(c[k], films=0) for c in chains}, jobs)
    return {"at once": at_once, "progressive": [chain[-1] for chain in chains]}


def training_flops(config):
    """FLOPs of a whole run, pictures included."""
    images, process = math.ceil(config.image_share * config.steps), Process(0, 1, "cpu")
    parts = ((1, images), (config.frames, config.steps - images))
    return config.batch_size * sum(
        steps * Cost(replace(config, frames=T), process).flops for T, steps in parts if steps
    )


def report(results):
    print("| | held-out loss, " + " | ".join(BINS) + " | right, of seen captions | of unseen |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip
    for name, seeds in results.items():
        bins = [statistics.mean(r["held_out"][-1]["loss"][b] for r in seeds) for b in range(4)]
        counts = [r["films"][-1]["counts"] for r in seeds]
        shares = [
            f"{sum(c[k + 1] for c in counts) / sum(c[k] for c in counts):.0%} "
            f"({', '.join(str(c[k + 1]) for c in counts)} of {counts[0][k]})" for k in (0, 5)
        ]  # fmt: skip
        print(f"| {name} | {' | '.join(f'{b:.4g}' for b in bins)} | {' | '.join(shares)} |")


EXPERIMENTS = {"zero": zero, "patches": patches, "progressive": progressive}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--quick", action="store_true", help="prove the path in a minute")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    args = parser.parse_args()
    seeds = SEEDS[:1] if args.quick else SEEDS
    arms = EXPERIMENTS[args.experiment](args.quick, seeds, args.jobs)
    run_all({c.out: c for configs in arms.values() for c in configs}, args.jobs)
    results = {name: [collect(c) for c in configs] for name, configs in arms.items()}
    report(results)
    if not args.quick:
        path = Path(__file__).with_name("ablations.json")
        stored = json.loads(path.read_text()) if path.exists() else {}
        stored[args.experiment] = about(f"python benchmarks/ablations.py {args.experiment}") | {
            "seeds": seeds, "results": results}  # fmt: skip
        path.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
