"""What samplers, steps and guidance are worth on the toy, measured with a trained model.

    python tools/measure_samplers.py --weights assets/toy

generates every toy caption (42 seen ones twice, 6 unseen ones eight times) with each sampler and
number of steps at the guidance stored with the weights, then with DPM-Solver++ at 20 steps and each
guidance, at all timesteps and at large ones, and prints a Markdown table. A video matches if
data.detect finds the color, shape and direction of its caption; overlap and flicker are those of
data.shape_quality; the first row is for drawn clips that the VAE encoded and decoded. Seconds are
those of sampling and decoding, in batches of 32.
"""

import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import train
from sample import SAMPLERS, SampleConfig, generate, load_model, resolve, video_keys


@dataclass(frozen=True)
class MeasureConfig:
    weights: str = "assets/toy"  # run of train.py on the toy, folder, or Hub name
    samplers: tuple[str, ...] = tuple(SAMPLERS)  # which samplers
    steps: tuple[int, ...] = (10, 20, 50)  # of each sampler
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 7.0)  # of DPM-Solver++ at 20 steps
    min_t: tuple[int, ...] = (0, 600)  # guide only at timesteps from this one up
    device: str = "auto"  # cpu, cuda, mps


def main():
    c = tyro.cli(MeasureConfig, description=__doc__)
    rows = train.sample_rows(train.PRESETS["toy"], None, last=True)
    captions = [data.caption_of(data.LABELS[row]) for row in rows]
    device = data.init_distributed(c.device).device
    stored = resolve(SampleConfig(c.weights))
    model = load_model(c.weights).to(device)
    vae = data.VAE(stored.vae, device)
    t5 = data.T5(stored.t5, model.config.caption_length, device)
    y, mask = t5.encode(captions)
    shape = vae.channels, stored.frames, stored.size // vae.factor, stored.width // vae.factor
    keys = video_keys(stored.seed, captions)
    columns = "sampler steps guidance at seen unseen overlap flicker seconds/video"
    print(f"| {columns.replace(' ', ' | ')} |\n{'|---' * 9}|")
    clips = data.Toy("validation", len(data.LABELS))
    videos = [data.to_uint8(vae.decode(vae.encode(clip))) for clip in clips]
    print_row("VAE alone | | | ", clips.captions, videos)
    stored = stored.guidance, stored.guidance_min_t
    runs = [(sampler, steps, *stored) for sampler in c.samplers for steps in c.steps]
    for sampler, steps, g, min_t in runs + [("dpm", 20, *v) for v in product(c.guidance, c.min_t)]:
        start = time.time()
        options = {"sampler": sampler, "steps": steps, "guidance": g, "guidance_min_t": min_t}
        videos = generate(model, vae, y, mask, keys, shape, batch_size=32, **options)
        seconds = (time.time() - start) / len(videos)
        print_row(f"{sampler} | {steps} | {g:g} | t ≥ {min_t}", captions, videos, seconds)


def print_row(name, captions, videos, seconds=0):
    found = train.evaluate_toy(captions, videos)
    matches = " | ".join(f"{n} of {total}" for n, total in found["accuracy"].values())
    _, overlap, flicker = found["quality"] or (0, 0, 0)
    print(f"| {name} | {matches} | {overlap:.3f} | {flicker:.1f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    data.run_command(main)
