"""Store the model of a run of the toy in assets/toy, in fp16.

python train.py && python tools/make_toy.py --run out/toy
"""

import json
import shutil
import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from train import read_metrics  # noqa: E402

README = """# The toy model

STDiT with {parameters:,} parameters, in fp16: the moving average of the weights after `python
train.py --seed {seed}`, written by tools/make_toy.py. With 10 steps of DDPM and guidance 3 at
t >= 600, {seen} of {n} videos of seen captions and {unseen} of {m} of unseen ones match in color,
shape and direction. Sample with

    python sample.py --weights assets/toy --prompt "a red circle moving left" --steps 10
"""


def main(run: str = "out/toy"):
    """Store the model of a run of the toy in assets/toy, in fp16.

    Args:
        run: a finished run of the preset toy
    """
    folder, out = sample.find_weights(run), ROOT / "assets/toy"
    model = sample.load_model(folder)
    model.half().save_pretrained(out)
    shutil.copy(folder / "sample.json", out)
    config = json.loads((folder / "state.json").read_text())["config"]
    (seen, n), (unseen, m) = [m for m in read_metrics(run) if "accuracy" in m][-1][
        "accuracy"
    ].values()
    counts = {"seen": seen, "n": n, "unseen": unseen, "m": m, "seed": config["seed"]}
    parameters = sum(p.numel() for p in model.parameters())
    (out / "README.md").write_text(README.format(parameters=parameters, **counts))
    size = (out / "model.safetensors").stat().st_size / 1e6
    print(f"{out.relative_to(ROOT)}: {size:.1f} MB, {seen} of {n} seen, {unseen} of {m} unseen")


if __name__ == "__main__":
    tyro.cli(main)
