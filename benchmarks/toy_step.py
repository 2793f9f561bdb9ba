"""Steps of the toy on this machine, in turns: blocks in bf16 against fp32, plain against fused
attention, and with against without reading the next batch in a thread.

    python train.py                  # or a part of it: makes the latent cache
    python benchmarks/toy_step.py --cache out/toy-train-2048x8x64

Prints the median step in ms of each, and the median and range of the ratios of neighboring turns.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import stdit
import train
from data import Distributed, run_command


def in_turns(name, runs, set_up, rounds, steps):
    """Time `steps` training steps of each of two runs, {label: Run}, in turns."""
    times = {label: [] for label in runs}
    for r in range(rounds + 1):
        for label in list(runs) if r % 2 else reversed(runs):
            set_up(label)
            start = time.perf_counter()
            for _ in range(steps):
                train.train_step(runs[label])
            times[label].append(1000 * (time.perf_counter() - start) / steps)
    a, b = (values[1:] for values in times.values())  # the first round warms up
    ratios = [x / y for x, y in zip(a, b)]
    medians = ", ".join(f"{k} {statistics.median(v[1:]):.0f} ms" for k, v in times.items())
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{name}: {medians}; ratio {spread}", flush=True)


def main(cache: str = "out/toy-train-2048x8x64", rounds: int = 6, steps: int = 8):
    options = dict(data=cache, num_samples=0, out="out/toy-step")
    run = train.start_run(train.replace(train.TOY, **options), Distributed())
    fp32 = stdit.autocast

    def attention(label):
        """Let a CPU use fused attention or not; the switch counts for it too."""
        torch.backends.cuda.enable_flash_sdp(label == "fused")

    def precision(label):
        """Let the blocks compute in bf16, as on CUDA, or in fp32."""
        bf16 = label == "bf16"
        stdit.autocast = (lambda device: torch.autocast("cpu", torch.bfloat16)) if bf16 else fp32

    for label in ("fused", "plain"):
        attention(label)
        in_turns(f"{label} attention", {"bf16": run, "fp32": run}, precision, rounds, steps)
    precision("fp32")
    in_turns("attention", {"plain": run, "fused": run}, attention, rounds, steps)
    attention("fused")

    c, training = run.config, run.training
    B = c.batch_size
    indices = train.indices_from(0, B, B, 0, 1)
    batches = (train.training_batch(c, training, i) for i in indices)
    runs = {"with": run, "without": train.replace(run, batches=batches)}
    in_turns("prefetch", runs, lambda label: None, rounds, steps)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, description=__doc__))
