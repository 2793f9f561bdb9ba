"""What samplers, steps and guidance are worth on the toy, measured with a trained model.

    python tools/measure_samplers.py --weights out/toy

generates every toy caption (42 seen ones twice, 6 unseen ones eight times) with each sampler and
number of steps at the guidance stored with the weights, then with DDIM at 50 steps and each
guidance, and prints a Markdown table. A video matches if data.detect finds the color, shape and
direction of its caption. Seconds are those of sampling and decoding, in batches of 32.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import train
from sample import SAMPLERS, SampleConfig, generate, load_model, resolve, video_keys


@dataclass(frozen=True)
class MeasureConfig:
    weights: str = "out/toy"  # run of train.py on the toy, folder, or Hub name
    samplers: tuple[str, ...] = tuple(SAMPLERS)  # which samplers
    steps: tuple[int, ...] = (10, 20, 50, 100)  # of each sampler
    guidance: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0)  # of DDIM at 50 steps
    device: str = "auto"  # cpu, cuda, mps


def main():
    c, captions = (
        tyro.cli(MeasureConfig, description=__doc__),
        train.sample_captions(train.PRESETS["toy"], None),
    )
    device, stored = data.init_distributed(c.device).device, resolve(SampleConfig(c.weights))
    model = load_model(c.weights).to(device)
    vae, t5 = data.VAE(stored.vae, device), data.T5(stored.t5, model.config.caption_length, device)
    y, mask = t5.encode(captions)
    shape = vae.channels, stored.frames, stored.size // vae.factor, stored.width // vae.factor
    keys = video_keys(stored.seed, captions)
    print("| sampler | steps | guidance | seen captions | unseen captions | seconds per video |")
    print("|---|---|---|---|---|---|")
    runs = [(sampler, steps, stored.guidance) for sampler in c.samplers for steps in c.steps]
    for sampler, steps, guidance in runs + [("ddim", 50, guidance) for guidance in c.guidance]:
        start, options = time.time(), {"sampler": sampler, "steps": steps, "guidance": guidance}
        videos = generate(model, vae, y, mask, keys, shape, batch_size=32, **options)
        seconds = (time.time() - start) / len(videos)
        counts = train.evaluate_toy(captions, videos)["accuracy"].values()  # seen, unseen
        matches = " | ".join(f"{n / total:.0%} ({n} of {total})" for n, total in counts)
        print(f"| {sampler} | {steps} | {guidance:g} | {matches} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    data.run_command(main)
