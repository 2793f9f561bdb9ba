"""Kill a run at random moments, also while it saves, resume it each time, and compare it with a run
that was not interrupted: weights, EMA, optimizer and metrics, bit for bit.

    python tests/kill_loop.py --kills 50                                         # 10 minutes
    python tests/kill_loop.py --kills 5 --signal TERM --processes 2 -- --micro-batch=1
    python tests/kill_loop.py --kills 5 -- --compile

After every kill each checkpoint must be complete, and the newest not older than before. The moments
are drawn with --seed; what they hit depends on the machine.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402


def start(out, options, processes):
    """train.py, under torchrun if there are several processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    launcher = [*torchrun, str(processes)] if processes > 1 else [sys.executable]
    command = [*launcher, ROOT / "train.py", "--resume", f"--out={out}", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def tree(pid):
    """A process and all its descendants; torchrun's workers are in sessions of their own."""
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [pid] + [p for child in children.split() for p in tree(int(child))]


def tensors_of(checkpoint):
    """All tensors of a checkpoint: averages, weights, optimizer."""
    training = torch.load(checkpoint / "training.pt", weights_only=True)
    tensors = {f"ema.{n}": v for n, v in sample.load_model(checkpoint).state_dict().items()}
    tensors |= {f"model.{name}": v for name, v in training["model"].items()}
    for i, state in training["optimizer"]["state"].items():
        tensors |= {f"optimizer.{i}.{name}": v for name, v in state.items()}
    return tensors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/kill_loop"))
    parser.add_argument("options", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    reference, killed, steps = args.out / "reference", args.out / "killed", 12 * args.kills
    for run in (reference, killed):
        if run.exists():
            sys.exit(f"error: {run} is of an earlier loop; give another --out")
    encoders, cache = (data.VAE("assets/vae"), data.T5("assets/t5", 16)), args.out / "cache"
    data.write_cache(data.Toy("train", 24), cache, *encoders)
    options = [f"--data={cache}", f"--steps={steps}", "--batch-size=4", "--num-samples=0"]
    options += ["--save-every=2", "--eval-every=10", "--log-every=1", "--device=cpu"]
    options += args.options
    process = start(reference, options, args.processes)
    output = process.communicate()[0]
    assert process.returncode == 0, output

    choice, in_training, in_saving, last = random.Random(args.seed), 0, 0, 0
    for kill in range(args.kills + 1):
        process = start(killed, options, args.processes)
        if kill == args.kills:
            break
        while not (line := process.stdout.readline()).startswith("step "):  # the first step is done
            assert line, "the run ended before its first step"
        time.sleep(choice.uniform(0.0, 1.0))
        if args.signal == "TERM":
            process.terminate()
        else:
            for pid in tree(process.pid):
                os.kill(pid, signal.SIGKILL)
        output = process.communicate()[0]
        if args.signal == "TERM" and args.processes == 1:
            assert process.returncode == 0, output
        in_saving += (killed / "checkpoints/tmp").exists()
        found = sorted((killed / "checkpoints").glob("step_*"))
        for checkpoint in found:
            tensors_of(checkpoint)
        step = int(found[-1].name[5:]) if found else 0
        assert step >= last, f"went back from step {last} to {step}"
        in_training += last < step < steps
        last = step
        print(f"kill {kill + 1}: at step {last} of {steps}", flush=True)
    output = process.communicate()[0]
    assert process.returncode == 0, output

    a, b = (tensors_of(sample.newest_checkpoint(run)) for run in (reference, killed))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    lines = [  # a resumed run repeats the lines after its checkpoint
        {str((m["step"], m.get("loss"), m.get("validation"))) for m in train.read_metrics(run)}
        for run in (reference, killed)
    ]
    assert lines[0] == lines[1], "metrics.jsonl has a gap or other numbers"
    print(
        f"{args.kills} x SIG{args.signal}, {in_training} after a new checkpoint, {in_saving} ",
        end="",
    )
    print("while saving: all tensors and metrics are equal")
    assert in_training > 0, "all kills hit the beginning or the end: try another --seed"


if __name__ == "__main__":
    main()
