"""Kill a run at random moments, saving included, resume it each time, and compare its end with that
of a run that was left alone: weights, averages, optimizer and metrics, bit for bit.

    python tests/kill_loop.py --kills 50 --out out/kill_loop                     # 10 minutes
    python tests/kill_loop.py --kills 5 --signal TERM --processes 2 --micro_batch 1 --workers 2

After every kill each checkpoint that is there must be whole, and the newest not older than before.
The moments are drawn with --seed; what they hit hangs on the machine.
"""

import argparse
import json
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
from stdit import newest_checkpoint, open_weights  # noqa: E402


def start(out, options, processes, resume):
    """train.py, under torchrun if there is more than one process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    launcher = [*torchrun, str(processes)] if processes > 1 else [sys.executable]
    command = [*launcher, ROOT / "train.py", f"--out={out}", *options, *["--resume"] * resume]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def state_of(run):
    """(everything in the newest checkpoint, the steps and losses of metrics.jsonl)."""
    folder, tensors = newest_checkpoint(run), {}
    for file in sorted(folder.glob("*.safetensors")):  # open_weights checks the hash
        tensors |= {f"{file.stem}.{name}": v for name, v in open_weights(file).items()}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return tensors, [(m["step"], m.get("loss"), m.get("held_out")) for m in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--micro_batch", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/kill_loop"))
    args = parser.parse_args()
    toy, choice = args.out / "toy", random.Random(args.seed)
    if not (toy / "cache/index.json").exists():
        data.make_toy(toy, clips=24)
        encoders = data.VAE("assets/vae"), data.T5("assets/t5", 16)
        data.write_cache(toy / "train.csv", toy / "cache", *encoders, 8, 1, 64)
    options = [f"--data={toy / 'cache'}", f"--steps={12 * args.kills}", "--batch_size=4",
               "--films=0", "--save_every=2", "--eval_every=10", "--log_every=1",
               f"--workers={args.workers}", f"--micro_batch={args.micro_batch}"]  # fmt: skip
    left_alone, killed = args.out / "left_alone", args.out / "killed"
    for run in (left_alone, killed):
        if newest_checkpoint(run):
            sys.exit(f"error: {run} is of an earlier loop; give another --out")
    process = start(left_alone, options, args.processes, resume=False)
    output = process.communicate()[0]
    assert process.returncode == 0, output

    kills, in_training, in_saving, last = 0, 0, 0, -1
    while True:
        resume = newest_checkpoint(killed) is not None
        process = start(killed, options, args.processes, resume)
        while not (line := process.stdout.readline()).startswith("step "):  # a first step is done
            assert line, "it ended before it began"
        if kills == args.kills:
            output = process.communicate()[0]
            assert process.returncode == 0, output
            break
        time.sleep(choice.uniform(0.0, 1.0))
        if args.signal == "KILL":
            # by what stands in their command lines: torchrun's processes are in no common group
            subprocess.run(["pkill", "-KILL", "-f", f"train.py --out={killed}"])
        else:
            process.send_signal(signal.SIGTERM)
        output = process.communicate()[0]
        if args.signal == "TERM" and args.processes == 1:
            assert process.returncode == 0, output
        kills += 1
        in_saving += bool(list((killed / "checkpoints").glob(".step_*")))
        step = -1  # there may be none yet
        for folder in sorted((killed / "checkpoints").glob("step_*")):
            step = json.loads((folder / "state.json").read_text())["step"]
            [open_weights(file) for file in folder.glob("*.safetensors")]
        assert step >= last, f"went back from step {last} to {step}"
        in_training += last < step < 12 * args.kills
        last = step
        print(f"kill {kills}: at step {last} of {12 * args.kills}", flush=True)
    (a, a_lines), (b, b_lines) = state_of(left_alone), state_of(killed)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert a_lines == b_lines, "metrics.jsonl has a gap, a double or other numbers"
    print(f"{kills} kills by SIG{args.signal}, {in_training} after new checkpoints, {in_saving} "
          "while saving: at the end all is equal")  # fmt: skip
    assert in_training > 0, "all kills hit the beginning or the end: try another --seed"


if __name__ == "__main__":
    main()
