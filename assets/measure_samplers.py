"""What samplers, steps and guidance are worth on the toy, measured on a trained run.

    python assets/measure_samplers.py --run out/toy

films every toy caption (the 42 that training showed twice, the 6 that it did not show eight times)
with each sampler at 10, 20, 50 and 100 steps and the run's guidance, then with DDIM at 50 steps and
guidance 1, 2, 4 and 7; prints a table for the README. A film counts as right if data.detect sees in
it the colour, the shape and the direction that its caption names. Its time is that of sampling,
decoding and detection, in batches of 32.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from sample import SAMPLERS, caption_accuracy, load_run  # noqa: E402
from stdit import BadWeights  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="out/toy", help="a run of the toy")
    parser.add_argument("--samplers", nargs="*", default=list(SAMPLERS))
    parser.add_argument("--steps", type=int, nargs="*", default=[10, 20, 50, 100])
    parser.add_argument("--guidance", type=float, nargs="*", default=[1, 2, 4, 7])
    args = parser.parse_args()
    model, state = load_run(args.run)
    config, device = state["config"], data.pick_device("auto")
    if config["data"] != "toy":
        raise data.BadInput(f"{args.run} was trained on {config['data']}: expected the toy")
    vae = data.VAE(state["encoders"]["vae"], device)
    t5 = data.T5(state["encoders"]["t5"], model.config.caption_length, device)
    side = config["size"] // vae.factor
    shape = model.config.in_channels, config["frames"], side, side
    frozen = model.to(device), vae, t5

    def measure(**options):
        """Print a row of the table."""
        start = time.time()
        counts = caption_accuracy(*frozen, (2, 8), config["seed"], shape, **options)
        seconds = (time.time() - start) / (counts[0] + counts[5])
        shares = [f"{right / n:.0%} ({right} of {n})" for n, right in (counts[:2], counts[5:7])]
        print(f"| {options['sampler']} | {options['steps']} | {options['guidance']:g} | "
              f"{shares[0]} | {shares[1]} | {seconds:.2f} |", flush=True)  # fmt: skip

    print("| sampler | steps | guidance | seen captions | unseen captions | seconds a film |")
    print("|---|---|---|---|---|---|")
    for sampler in args.samplers:
        for steps in args.steps:
            measure(sampler=sampler, steps=steps, guidance=config["guidance"])
    for guidance in args.guidance:
        measure(sampler="ddim", steps=50, guidance=guidance)


if __name__ == "__main__":
    data.command(main, BadWeights)
