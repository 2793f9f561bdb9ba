"""Three experiments that the report only mentions, on the toy, each one command.

    python benchmarks/ablations.py zero         # A5: temporal projections at zero, or random
    python benchmarks/ablations.py patches      # A7: patches of 1x2x2, or of 2x2x2
    python benchmarks/ablations.py progressive  # T1: small films first, or large ones at once
    python benchmarks/ablations.py zero --quick # proves the path, in out/ablations-quick

Every arm is a run of train.py in out/ablations, with the same seeds in all arms of an experiment;
run again, it goes on. The figures go to benchmarks/ablations.json.

zero: the toy is learned as pictures (T = 1) for 1,500 steps. From those weights two runs go on with
films for 600 steps: one as train.py does it, the new temporal projections at zero; one with the
projections drawn like any other linear layer's. Their held-out losses begin at step 0.

patches: 900 steps on films of 1x2x2, and of 2x2x2 patches, which are half as many; and of the
latter 1,800 steps, about as much compute, and twice the clips. No pictures first, for one frame
is no patch of two; so unlike the report's, which began as PixArt-alpha, these begin from nothing.

progressive: 8x32x32, then 8x64x64, then 16x64x64, where positions are rescaled from stage to stage;
and 16x64x64 from the beginning, for so many steps that both cost the same FLOPs. Each run has its
own warm-up and cosine, from 2e-3 to 0; those that go on begin at 1e-3.

So few steps bring hardly a film that is right, so the last two compare the held-out loss alone.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn

from designs import about, collect, run_all, summary, tflop_until  # first: it sets the path
from data import Process
from stdit import STDiT, load_weights
from train import PRESETS, held_out_loss, model_config, open_data

SEEDS = (0, 1)
FOLDER, QUICK = "out/ablations", "out/ablations-quick"


def arm(name, seed, quick, **options):
    """The configuration of one run; steps of training as given, or few."""
    steps = options.pop("steps")
    every = {"eval_every": 100, "film_every": steps, "save_every": 500, "keep": 1}
    few = {"film_steps": 2, "toy_clips": 84, "warmup": 1} if quick else {}
    return replace(PRESETS["toy"], seed=seed, out=f"{QUICK if quick else FOLDER}/{name}-{seed}",
                   steps=min(steps, 4) if quick else steps, **every | options | few)  # fmt: skip


def zero(quick, seeds, jobs):
    """A5 -> {arm: [chains of configurations]}."""
    pictures = [arm("pictures", s, quick, steps=1500, image_share=1.0, films=0, eval_every=500)
                for s in seeds]  # fmt: skip
    run_all(pictures, jobs)
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
            film = arm(name, s, quick, steps=600, image_share=0.0, init=init)
            arms[name].append((start, film))
    return arms


def at_step_0(config):
    """The held-out loss of a run before its first step."""
    process = Process(0, 1, "cpu")
    _, held_out, encoders = open_data(config, process)
    model = STDiT(model_config(config))
    load_weights(model, config.init)
    return held_out_loss(config, model, held_out, encoders, process)


def patches(quick, seeds, jobs):
    """A7 -> {arm: [chains of configurations]}."""
    options = {"1x2x2": ("toy", 900), "2x2x2": ("toy-2x2x2", 900),
               "2x2x2, twice the steps": ("toy-2x2x2", 1800)}  # fmt: skip
    return {name: [(arm(name.replace(", ", "-").replace(" ", "-"), s, quick, model=model,
                        steps=steps, image_share=0.0, films=0),) for s in seeds]
            for name, (model, steps) in options.items()}  # fmt: skip


def progressive(quick, seeds, jobs):
    """T1 -> {arm: [chains of configurations]}."""
    stages = (
        {"size": 32, "steps": 800, "films": 0},
        {"size": 64, "steps": 300, "films": 0, "lr": 1e-3, "image_share": 0.0, "warmup": 20},
        {"size": 64, "steps": 150, "films": 0, "lr": 1e-3, "image_share": 0.0, "warmup": 20,
         "frames": 16, "time_scale": 0.5, "fps": 16},
    )  # fmt: skip
    chains = [[arm(f"stage{k + 1}", s, quick, **stage) for k, stage in enumerate(stages)]
              for s in seeds]  # fmt: skip
    for chain in chains:
        for k in (1, 2):
            chain[k] = replace(chain[k], init=chain[k - 1].out)
    cost = sum(tflop_until(c, c.steps) for c in chains[0])
    options = stages[2] | {"lr": 2e-3, "image_share": 0.1, "warmup": 100}  # as the first stage
    one = arm("", 0, False, **options | {"steps": 1000})
    steps = round(1000 * cost / tflop_until(one, 1000))
    at_once = [(arm("at-once", s, quick, **options | {"steps": steps}),) for s in seeds]
    for k in (0, 1):  # the last stage of all is run with the others
        run_all([chain[k] for chain in chains], jobs)
    return {"at once": at_once, "progressive": chains}


EXPERIMENTS = {"zero": zero, "patches": patches, "progressive": progressive}
BASE = {"zero": "zero", "patches": "1x2x2", "progressive": "at once"}  # what others differ from


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--quick", action="store_true", help="prove the path in a minute")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    args = parser.parse_args()
    if args.quick:
        shutil.rmtree(QUICK, ignore_errors=True)
    seeds = SEEDS[:1] if args.quick else SEEDS
    arms = EXPERIMENTS[args.experiment](args.quick, seeds, args.jobs)
    run_all([chain[-1] for chains in arms.values() for chain in chains], args.jobs)
    results = {name: [collect(*chain) for chain in chains] for name, chains in arms.items()}
    if args.experiment == "zero":
        for name, chains in arms.items():
            for run, (pictures, film) in zip(results[name], chains):
                start = {"step": 0, "tflop": tflop_until(pictures, pictures.steps)}
                run["held_out"].insert(0, start | {"loss": at_step_0(film)})
    print(summary(results, BASE[args.experiment]))
    path = Path(QUICK if args.quick else Path(__file__).parent) / "ablations.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    command = f"python benchmarks/ablations.py {args.experiment}"
    stored[args.experiment] = about(command) | {"seeds": seeds, "results": results}
    path.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
