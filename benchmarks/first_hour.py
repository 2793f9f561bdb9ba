"""The first hour on a new GPU: all that a CPU cannot show, in one command and one report.

    python benchmarks/first_hour.py                       # 10 minutes on an H200, no download
    python benchmarks/first_hour.py --parts 3 5           # some of its parts

    1  gradients of compiled blocks against eager ones, at the shape of each preset, without and
       with Inductor's mix_order_reduction (stdit.set_up_scaling)
    2  the three attentions against plain matrix products
    3  tokens/s, share of the peak and memory by preset and activation checkpointing, next to the
       predictions of cost_model.py and speed.predicted_memory
    4  losses of the toy in bf16 and in fp32, from the same weights and draws
    5  100 guided steps of sampling at 64x512x512

The report, Markdown, is written line by line, so that nothing is lost if the time ends. After
--minutes nothing new is started, and the report says what was left out. On a CPU all parts run at
tiny shapes, which shows that this script works and nothing else.
"""

import gc
import tempfile
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import cost_model
import speed  # first: it puts the project on the path
import torch
import tyro

import stdit
import train
from data import Distributed
from stdit import STDiT
from train import PRESETS

PRECISIONS = {
    "fp32": lambda device: nullcontext(),
    "bf16": lambda device: torch.autocast(device.type, torch.bfloat16),
}


class Report:
    """A Markdown file to which lines are appended, and a deadline."""

    def __init__(self, path, minutes):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")
        self.start = time.time()
        self.end = self.start + 60 * minutes

    def write(self, line=""):
        print(line, flush=True)
        with open(self.path, "a") as file:
            file.write(line + "\n")

    def late(self, what):
        """Tells whether the time is over, and then reports that `what` was left out."""
        if time.time() > self.end:
            self.write(f"\nNo time was left for {what}.")
        return time.time() > self.end


def gradients(report, device):
    report.write("| preset | checkpointing | mix_order_reduction | largest error | where | wrong |")
    report.write("|---" * 6 + "|")
    bound = speed.BOUND["bf16" if device == "cuda" else "fp32"]
    for title, case in speed.preset_cases(device).items():
        for mix in (False, True) if case.compile else ():
            if report.late(f"the gradients of {title}"):
                return
            errors = speed.gradient_errors(case, device, mix)
            wrong = [name for name, error in errors.items() if not error <= bound]
            worst = max(errors, key=lambda name: (name in wrong, errors[name]))
            switch = "on" if mix else "off"
            figures = f"{errors[worst]:.2g} | {worst} | {len(wrong)} of {len(errors)}"
            report.write(f"| {title} | {case.mode} | {switch} | {figures} |")
    report.write(f"\nWrong: tensors or rows of a table that are off by more than {bound:g}.")


def attentions(report, device):
    report.write("| preset | attention | largest error | where |\n|---|---|---|---|")
    for title, case in speed.preset_cases(device).items():
        if report.late(f"the attentions of {title}"):
            return
        for attention, errors in speed.attention_errors(case, device).items():
            worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
            report.write(f"| {title} | {attention} | {errors[worst]:.2g} | {worst} |")
    report.write(f"\nRounding to bf16 explains {speed.BOUND['bf16']:g}; NaN is wrong.")


def training_steps(report, device):
    gpu = "H200" if device == "cuda" and "H200" in torch.cuda.get_device_name() else "H100"
    columns = ["preset, micro-batch", "blocks", "s", "tokens/s", "predicted", "of peak"]
    columns += ["predicted", "memory, GB", "predicted"]
    report.write(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for preset in ("64x512x512", "16x256x256", "16x512x512"):
        c = PRESETS[preset]
        case = speed.preset_case(preset, device)
        own = c.activation_checkpointing
        others = [mode for mode in speed.MODES if mode != own]
        runs = [(True, own), (False, own)] + [(True, mode) for mode in others]
        for compiled, mode in runs:
            name = f"{'compiled' if compiled else 'eager'}, {mode} checkpointing"
            if report.late(f"{preset}, {name}"):
                return
            compiled_here = compiled and (device == "cuda" or speed.has_compiler())
            maker = partial(speed.make, case.config, mode, compiled_here)
            plain = partial(speed.make, case.config)
            row = speed.timed(maker, plain, *case[:3], device, repeats=3)
            parts = cost_model.step(preset, gpu, compiled, mode, c.micro_batch)
            T, S = cost_model.tokens(preset)
            rate = c.micro_batch * T * S / sum(parts.values())
            useful = 3 * c.micro_batch * sum(cost_model.flops(preset))
            share = useful / sum(parts.values()) / cost_model.GPUS[gpu].peak
            cells = [f"{preset}, {c.micro_batch}", name, f"{row.get('seconds', 0):.3f}"]
            cells += [f"{row.get('tokens_per_second', 0):,.0f}", f"{rate:,.0f}"]
            cells += [f"{row.get('mfu', 0):.1%}", f"{share:.1%}"]
            cells += [f"{row.get('peak_gb', 0):.1f}", f"{speed.preset_memory(preset, mode):.1f}"]
            report.write(f"| {' | '.join(cells)} |")
    report.write(f"\nPredictions are for the {gpu}; zeros: it did not fit into memory.")


def toy_losses(report, device, steps=50):
    losses = {}
    for name, autocast in PRECISIONS.items():
        with tempfile.TemporaryDirectory() as folder, patch.object(stdit, "autocast", autocast):
            options = dict(preset="toy", out=f"{folder}/run", num_samples=0)
            options["toy_clips"] = 256 if device == "cuda" else 84
            run = train.start_run(replace(PRESETS["toy"], **options), Distributed(device))
            losses[name] = []
            for run.step in range(steps if device == "cuda" else 4):
                losses[name].append(train.train_step(run)[0][1].item())
            run.batches.close()
    report.write("| step | MSE in fp32 | in bf16 | difference |\n|---|---|---|---|")
    pairs = list(zip(*losses.values()))
    for i in sorted({*range(0, len(pairs), 10), len(pairs) - 1}):
        a, b = pairs[i]
        report.write(f"| {i + 1} | {a:.5f} | {b:.5f} | {b / a - 1:+.2%} |")
    mean = sum(abs(b / a - 1) for a, b in pairs) / len(pairs)
    report.write(f"\nThe mean difference over {len(pairs)} steps, without its sign, is {mean:.2%}.")


def sampling(report, device):
    case = speed.preset_case("64x512x512", device)
    steps = 100 if device == "cuda" else 3
    with torch.device(device):
        model = STDiT(case.config).eval()
    seconds = speed.sampling_seconds(model, case.shape, 1, steps, "ddpm", 7.0, device)
    with torch.device("meta"):
        meta = STDiT(case.config).requires_grad_(False)
    rate = 2 * steps * speed.flops_per_clip(meta, case.shape) / seconds / 1e12
    _, T, H, W = case.shape
    size = f"{T}x{8 * H}x{8 * W}"
    report.write(f"{steps} guided steps at {size}, eager: {seconds:.1f} s, {rate:.3g} TFLOP/s.")


PARTS = {
    1: ("Gradients of compiled blocks against eager ones", gradients),
    2: ("Attention against plain matrix products", attentions),
    3: ("Training steps", training_steps),
    4: ("The toy in bf16 and in fp32", toy_losses),
    5: ("Sampling", sampling),
}


@dataclass(frozen=True)
class FirstHourConfig:
    out: str = "out/first_hour.md"  # file to write
    parts: tuple[int, ...] = tuple(PARTS)  # which parts, in this order
    minutes: float = 12  # after these, nothing new is started


def main():
    c = tyro.cli(FirstHourConfig, description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = Report(c.out, c.minutes)
    about = speed.about("python benchmarks/first_hour.py", device)
    report.write("# The first hour on a GPU\n\n" + ", ".join(about.values()))
    if device == "cpu":
        report.write("\nWithout a GPU: tiny shapes. No figure here means anything.")
    failed = []
    for number in c.parts:
        title, part = PARTS[number]
        report.write(f"\n## {number}. {title}\n")
        gc.collect()  # the models of the last part
        if device == "cuda":
            torch.cuda.empty_cache()
        start = time.time()
        try:
            if not report.late(f"part {number}"):
                part(report, device)
        except (Exception, SystemExit):  # one part must not take the others with it
            report.write(f"\n```\n{traceback.format_exc()}```")
            failed.append(number)
        report.write(f"\n{time.time() - start:.0f} s")
    print(c.out)
    if failed:
        raise SystemExit(f"parts {failed} failed: see {c.out}")


if __name__ == "__main__":
    main()
