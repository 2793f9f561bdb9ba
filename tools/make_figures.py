"""Write the figures of the tutorial to assets/figures, from a trained run of the preset `toy`.

    python tools/make_figures.py --weights out/toy        # half a minute

The figures that compare designs are made by benchmarks/cost.py and benchmarks/designs.py.
"""

import io
import json
import sys
from pathlib import Path

import torch
import tyro
from einops import rearrange
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import sample  # noqa: E402
from data import keyed_generator  # noqa: E402
from sample import TRAIN_SCHEDULE  # noqa: E402
from stdit import drop_captions  # noqa: E402
from train import read_metrics  # noqa: E402

TRIPLE = ("red", "triangle", "up")  # an unseen caption
FRAMES = [f"frame {k}" for k in range(8)]
FOLDER = ROOT / "assets/figures"


def save(figure, name):
    """Write a PNG of 256 colors, a third of the size of one in full color."""
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=100)
    image = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    data.atomic_write(FOLDER / name, lambda tmp: image.save(tmp, format="PNG", optimize=True))


def write_rows(name, videos, labels, titles=(), size=88):
    """A figure with a labeled row for each video, uint8 [T, 3, H, W]."""
    n, T = len(videos), len(videos[0])
    width, height = T * size + 130, n * size + 30 * bool(titles)  # pixels
    figure = Figure(figsize=(width / 100, height / 100))
    borders = {"left": 130 / width, "right": 0.998, "bottom": 0.002}
    top = 1 - 30 * bool(titles) / height
    figure.subplots_adjust(**borders, top=top, wspace=0.04, hspace=0.04)
    axes = figure.subplots(n, T, squeeze=False)
    for r, (video, label) in enumerate(zip(videos, labels)):
        for k, frame in enumerate(video):
            axes[r, k].imshow(frame.permute(1, 2, 0).numpy())
            axes[r, k].set(xticks=[], yticks=[])
            if r == 0 and titles:
                axes[r, k].set_title(titles[k], fontsize=10, pad=4)
        axes[r, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
    save(figure, name)


def decode(vae, latents):
    """Latents [B, C, T, H, W] -> uint8 [B, T, 3, H, W] in pixels."""
    return torch.stack([data.to_uint8(vae.decode(z)) for z in latents])


def noise_figure(vae, x0):
    """x_t for rising t, decoded by the VAE."""
    timesteps = [0, 100, 250, 400, 600, 999]
    noise = torch.randn(x0.shape, generator=keyed_generator("figures", "noise"))
    rows = [sample.q_sample(TRAIN_SCHEDULE, x0, torch.tensor([t]), noise) for t in timesteps]
    variance = 100 * TRAIN_SCHEDULE.alpha[timesteps] ** 2  # of the signal, percent
    labels = [f"t = {t}\n{round(v.item(), 3):.3g}% signal" for t, v in zip(timesteps, variance)]
    write_rows("noise.png", [decode(vae, x)[0] for x in rows], labels, FRAMES, size=76)


def attention_figure(model, vae, x0, y, mask):
    """Attention weights of one patch in each block, in space and in time, averaged over heads."""
    (row, column), frame, weights = (1, 1), 3, []  # a patch of 4 x 4

    def record(module, inputs, output):
        qkv = module.qkv(inputs[0])  # [sequences, N, 3D]
        q, k, _ = rearrange(qkv, "b n (qkv h d) -> qkv b h n d", qkv=3, h=module.heads)
        weights.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1))  # [sequences, N, N]

    hooks = [m.register_forward_hook(record) for b in model.blocks for m in (b.attn, b.attn_temp)]
    noise = torch.randn(x0.shape, generator=keyed_generator("figures", "attention"))
    t = torch.tensor([300])
    model(sample.q_sample(TRAIN_SCHEDULE, x0, t, noise), t, y, mask)
    for hook in hooks:
        hook.remove()
    video, s, n = decode(vae, x0)[0], 4 * row + column, len(model.blocks)
    T = len(video)
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 3.2))
    for k, (axis, image) in enumerate(zip(top.subplots(1, T), video)):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(f"frame {k}", fontsize=10)
        axis.axis("off")
        edge = {"edgecolor": "white" if k == frame else "0.55", "linewidth": 1 + (k == frame)}
        axis.add_patch(Rectangle((16 * column - 0.5, 16 * row - 0.5), 16, 16, fill=False, **edge))
    axes = bottom.subplots(2, n)
    highest = max(100 * w[s, frame].max().item() for w in weights[1::2])
    for i in range(n):
        space, time = weights[2 * i][frame, s].view(4, 4), weights[2 * i + 1][s, frame]
        axes[0, i].imshow(space, cmap="viridis", vmin=0)
        edge = {"fill": False, "edgecolor": "white", "linewidth": 2}
        axes[0, i].add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **edge))
        for k, weight in enumerate(space.flatten()):
            color = "white" if weight < 0.6 * space.max() else "black"
            style = {"ha": "center", "va": "center", "color": color}
            axes[0, i].text(k % 4, k // 4, f"{100 * weight:.0f}", **style)
        axes[0, i].set(title=f"block {i}", xticks=[], yticks=[])
        axes[1, i].bar(range(T), 100 * time, color=["C1" if k == frame else "C0" for k in range(T)])
        axes[1, i].set(xticks=range(T), xlabel="frame", ylim=(0, 1.05 * highest))
    axes[0, 0].set_ylabel("spatial, %")
    axes[1, 0].set_ylabel("temporal, %")
    save(figure, "attention.png")


def training_figure(run, size):
    """The first sample video of a run at each step at which it was written."""
    rows, labels = [], []
    for file in sorted(Path(run).glob("samples/step_*.gif")):
        with Image.open(file) as gif:
            scale = gif.width // (3 * size + 8)  # make_grid: 3 columns and 4 borders of 2 pixels
            box = [scale * edge for edge in (2, 2, size + 2, size + 2)]
            frames = []
            for k in range(gif.n_frames):
                gif.seek(k)
                tile = gif.convert("RGB").crop(box).resize((size, size), Image.Resampling.NEAREST)
                frames.append(torch.tensor(list(tile.tobytes())).view(size, size, 3))
        rows.append(torch.stack(frames).permute(0, 3, 1, 2))
        labels.append(f"{int(file.stem[5:]):,} steps")
    write_rows("training.png", rows, labels, FRAMES)


def sampling_figure(model, vae, y, mask):
    """The predicted x_0 in the course of sampling."""
    make, step = sample.SAMPLERS["dpm"]
    schedule, generator = make(20), keyed_generator("figures", "sampling")
    drop, null = torch.tensor([False, True]), model.y_embedder.y_embedding
    y, mask = drop_captions(y.repeat(2, 1, 1), mask.repeat(2, 1), drop, null)
    x, x0, rows = torch.randn(1, 4, 8, 8, 8, generator=generator), None, {}
    for i in reversed(range(20)):
        eps, v = sample.predict_noise(model, x, schedule.timesteps[i], y, mask, guidance=2.0)
        x0_last, x0 = x0, sample.predict_x0(schedule, x, i, eps)
        x = step(schedule, x, i, x0, eps, v, None, x0_last)
        rows[20 - i] = decode(vae, x0)[0]
    shown = (1, 4, 8, 12, 16, 20)
    labels = [f"step {k}\nt = {schedule.timesteps[20 - k]}" for k in shown]
    write_rows("sampling.png", [rows[k] for k in shown], labels, FRAMES)


def guidance_figure(model, vae, y, mask):
    """One caption and one noise with rising guidance."""
    values, inputs = (1, 2, 4, 7), (y, mask, [("figures", "guidance")], (4, 8, 8, 8))
    options = {"steps": 20, "sampler": "dpm"}
    rows = [sample.generate(model, vae, *inputs, guidance=g, **options)[0] for g in values]
    write_rows("guidance.png", rows, [f"g = {g}" for g in values], FRAMES)


def loss_figure(run):
    """The validation loss in four bins of t, each with its own scale."""
    lines = [(m["step"], m["validation"]) for m in read_metrics(run) if "validation" in m]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for b, axis in enumerate(figure.subplots(1, 4)):
        axis.plot([step for step, _ in lines], [bins[b] for _, bins in lines], "o-", ms=3)
        axis.set(title=f"t {250 * b} to {250 * b + 249}", xlabel="steps", ylim=(0, None))
        axis.grid(color="0.9")
    figure.suptitle("validation loss of the noise")
    save(figure, "loss.png")


def designs_figure():
    """The four designs: the operations of a block, from bottom to top."""
    space, time = ("spatial", "C0"), ("temporal", "C1")
    caption, mlp = ("caption", "0.75"), ("MLP", "0.88")
    parts = {
        "full": [[("all tokens", "C3")], [caption], [mlp]],
        "sequential": [[space], [time], [caption], [mlp]],
        "parallel": [[space, time], [caption], [mlp]],
        "latte": [[space], [caption], [mlp], [time], [mlp]],
    }
    figure = Figure(figsize=(9, 3.7))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 9), ylim=(-0.15, 3.55))
    axis.axis("off")
    for k, (name, rows) in enumerate(parts.items()):
        left, middle = 0.45 + 2.18 * k, 1.25 + 2.18 * k
        axis.text(middle, 3.3, name, ha="center", fontsize=12, weight="bold")
        arrow = {"arrowprops": {"arrowstyle": "->", "color": "0.3"}, "zorder": 0}
        axis.annotate("", (middle, 0.42 + 0.56 * len(rows)), (middle, 0), **arrow)
        for r, boxes in enumerate(rows):
            width, y = (1.76 - 0.16 * len(boxes)) / len(boxes), 0.3 + 0.56 * r
            for i, (text, color) in enumerate(boxes):
                x = left + i * (width + 0.16)
                style = {"boxstyle": "round,pad=0.04", "facecolor": color, "edgecolor": "0.3"}
                axis.add_patch(FancyBboxPatch((x, y), width, 0.34, **style))
                style = {"ha": "center", "va": "center", "fontsize": 10 if len(boxes) == 1 else 9}
                dark = color in ("C0", "C1", "C3")
                axis.text(
                    x + width / 2, y + 0.17, text, color="white" if dark else "black", **style
                )
        if name == "latte":
            for low, high, text in ((0.3, 1.76, "spatial block"), (1.98, 2.88, "temporal")):
                axis.plot([left - 0.12] * 2, [low, high], color="0.5")
                style = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 8}
                axis.text(left - 0.2, (low + high) / 2, text, **style)
    save(figure, "four_designs.png")


def main(weights: str = "out/toy"):
    """Write the figures of the tutorial to assets/figures.

    Args:
        weights: a run of the toy
    """
    model = sample.load_model(weights)
    settings = json.loads((sample.find_weights(weights) / "sample.json").read_text())
    vae, t5 = data.VAE(settings["vae"]), data.T5(settings["t5"], model.config.caption_length)
    clip = data.draw_clip(TRIPLE, keyed_generator("figures", "clip"))  # [T, 3, H, W]
    x0 = vae.encode(clip)[None]  # [1, 4, 8, 8, 8]
    y, mask = t5.encode([data.caption_of(TRIPLE)])
    with torch.no_grad():
        noise_figure(vae, x0)
        attention_figure(model, vae, x0, y, mask)
        sampling_figure(model, vae, y, mask)
        guidance_figure(model, vae, y, mask)
    training_figure(weights, settings["size"])
    loss_figure(weights)
    designs_figure()
    for path in sorted(FOLDER.glob("*.png")):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} KB")


if __name__ == "__main__":
    data.run_command(lambda: tyro.cli(main))
