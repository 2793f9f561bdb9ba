"""The tutorial's figures, from a trained run of the preset `toy`.

    python assets/make_figures.py --run out/toy        # half a minute; writes assets/figures

The figures of costs and of the comparison of designs are made by benchmarks/cost.py and designs.py.
"""

import argparse
import io
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import (  # noqa: E402
    T5, VAE, caption_of, draw_clip, keyed_generator, to_uint8, write_whole,
)  # fmt: skip
from sample import SAMPLERS, TRAINING, film, guided, load_run, predict_x0, q_sample  # noqa: E402
from stdit import drop_captions, split_heads  # noqa: E402
from train import read_metrics  # noqa: E402

TRIPLE = ("red", "triangle", "up")  # training never showed it
FRAMES = [f"frame {k}" for k in range(8)]
FOLDER = ROOT / "assets/figures"


def save(figure, name):
    """As a PNG of 256 colours, which is a third as large."""
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=100)
    picture = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    write_whole(FOLDER / name, lambda p: picture.save(p, format="PNG", optimize=True))


def sheet(name, rows, labels, titles=(), size=88):
    """Write films as rows of pictures: rows of uint8 [T, 3, H, W], a label for each."""
    n, T = len(rows), len(rows[0])
    figure = Figure(figsize=((T * size + 130) / 100, (n * size + 30 * bool(titles)) / 100))
    figure.subplots_adjust(left=130 / (T * size + 130), right=0.998, bottom=0.002, wspace=0.04,
                           hspace=0.04, top=1 - 0.3 * bool(titles) / figure.get_figheight())
    axes = figure.subplots(n, T, squeeze=False)
    for r, (frames, label) in enumerate(zip(rows, labels)):
        for k, frame in enumerate(frames):
            axes[r, k].imshow(frame.permute(1, 2, 0).numpy())
            axes[r, k].set_xticks([]), axes[r, k].set_yticks([])
            if r == 0 and titles:
                axes[r, k].set_title(titles[k], fontsize=10, pad=4)
        axes[r, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
    save(figure, name)


def pictures(vae, latents):
    """Latents [B, C, T, H, W] -> uint8 [B, T, 3, H, W]."""
    return to_uint8(vae.decode(latents).transpose(1, 2))


def noise(vae, x0):
    """A film of which more and more is noise, as the VAE's decoder shows it."""
    steps, generator = [0, 100, 250, 400, 600, 999], keyed_generator("figures", "noise")
    added = torch.randn(x0.shape, generator=generator)
    rows = [pictures(vae, q_sample(TRAINING, x0, torch.tensor([t]), added))[0] for t in steps]
    labels = [f"t = {t}\n{100 * TRAINING.abar[t]:.3g}% left" for t in steps]
    sheet("noise.png", rows, labels, FRAMES, size=76)


def attention(model, vae, x0, y, mask):
    """Where one patch looks, in its frame and through time, in each block; means over heads."""
    place, frame, given = (2, 3), 3, []  # patch (row, column) of 4 x 4

    def record(module, inputs, output):
        q, k, _ = split_heads(module.qkv(inputs[0]), 3, module.heads)  # [B', heads, N, D/heads]
        given.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1))  # [B', N, N]

    hooks = [m.register_forward_hook(record) for b in model.blocks for m in (b.attn, b.attn_temp)]
    added = torch.randn(x0.shape, generator=keyed_generator("figures", "attention"))
    t = torch.tensor([300])
    model(q_sample(TRAINING, x0, t, added), t, y, mask)
    for hook in hooks:
        hook.remove()
    video, n = pictures(vae, x0)[0], len(model.blocks)
    s, T = place[0] * 4 + place[1], len(video)
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 3.2))
    for k, (axis, picture) in enumerate(zip(top.subplots(1, T), video)):
        axis.imshow(picture.permute(1, 2, 0).numpy())
        axis.set_title(f"frame {k}", fontsize=10)
        axis.axis("off")
        corner = (16 * place[1] - 0.5, 16 * place[0] - 0.5)
        edge = ("white", 2) if k == frame else ("0.55", 1)
        axis.add_patch(Rectangle(corner, 16, 16, fill=False, edgecolor=edge[0], linewidth=edge[1]))
    axes = bottom.subplots(2, n)
    highest = max(100 * a[s, frame].max().item() for a in given[1::2])
    for i in range(n):
        space, time = given[2 * i][frame, s].view(4, 4), given[2 * i + 1][s, frame]
        axes[0, i].imshow(space, cmap="viridis", vmin=0)
        axes[0, i].add_patch(Rectangle((place[1] - 0.5, place[0] - 0.5), 1, 1, fill=False,
                                       edgecolor="white", linewidth=2))  # fmt: skip
        for k, weight in enumerate(space.flatten()):
            axes[0, i].text(k % 4, k // 4, f"{100 * weight:.0f}", ha="center", va="center",
                            color="white" if weight < 0.6 * space.max() else "black")  # fmt: skip
        axes[0, i].set(title=f"block {i}", xticks=[], yticks=[])
        axes[1, i].bar(range(T), 100 * time, color=["C1" if k == frame else "C0" for k in range(T)])
        axes[1, i].set(xticks=range(T), xlabel="frame", ylim=(0, 1.05 * highest))
    axes[0, 0].set_ylabel("its frame, %")
    axes[1, 0].set_ylabel("its place in time, %")
    save(figure, "attention.png")


def training(run):
    """The first of the captions that a run films, from the same noise, as training goes on."""
    files = [*sorted(Path(run).glob("films/step_*.gif")), Path(run) / "films.gif"]
    last = max(m["step"] for m in read_metrics(run))
    rows, labels = [], []
    for file in files:
        with Image.open(file) as gif:
            frames = []
            for k in range(gif.n_frames):
                gif.seek(k)
                tile = gif.convert("RGB").crop((0, 0, gif.width // 3, gif.height // 2))
                frames.append(torch.tensor(list(tile.resize((64, 64)).tobytes())).view(64, 64, 3))
        rows.append(torch.stack(frames).permute(0, 3, 1, 2))
        labels.append(f"{int(file.stem[5:]) if file.stem != 'films' else last:,} steps")
    sheet("training.png", rows, labels, FRAMES)


def sampling(model, vae, y, mask, null):
    """What the network believes x_0 to be, in the course of sampling."""
    make, step = SAMPLERS["dpm"]
    schedule, generator = make(20), keyed_generator("figures", "sampling")
    drop = torch.tensor([False, True])
    both = drop_captions(y.repeat(2, 1, 1), mask.repeat(2, 1), drop, null)
    x, before, rows = torch.randn(1, 4, 8, 8, 8, generator=generator), None, {}
    for i in reversed(range(20)):
        eps, v = guided(model, x, schedule.timesteps[i], *both, 2.0)
        x0 = predict_x0(schedule, x, torch.tensor([i]), eps)
        x, before = step(schedule, x, i, eps, v, torch.zeros_like(x), before), x0
        rows[20 - i] = pictures(vae, x0)[0]
    shown = (1, 4, 8, 12, 16, 20)
    labels = [f"step {k}\nt = {schedule.timesteps[20 - k]}" for k in shown]
    sheet("sampling.png", [rows[k] for k in shown], labels, FRAMES)


def guidance(model, vae, y, mask):
    """One caption from the same noise under more and more guidance."""
    values = (1, 2, 4, 7)
    rows = [film(model, vae, y, mask, [("figures", "guidance")], (4, 8, 8, 8), steps=20, guidance=g,
                 sampler="dpm")[0] for g in values]  # fmt: skip
    sheet("guidance.png", rows, [f"g = {g}" for g in values], FRAMES)


def losses(run):
    """The held-out loss in four bins of t, each on a scale of its own."""
    held = [(m["step"], m["held_out"]) for m in read_metrics(run) if "held_out" in m]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for b, axis in enumerate(figure.subplots(1, 4)):
        axis.plot([step for step, _ in held], [bins[b] for _, bins in held], "o-", ms=3)
        axis.set(title=f"t {250 * b} to {250 * b + 249}", xlabel="steps", ylim=(0, None))
        axis.grid(color="0.9")
    figure.suptitle("held-out loss of the noise")
    save(figure, "loss.png")


def designs():
    """The four designs: what a block does to the tokens, from below to above."""
    parts = {
        "full": [("all tokens", "C3"), ("caption", "0.75"), ("MLP", "0.88")],
        "sequential": [("space", "C0"), ("time", "C1"), ("caption", "0.75"), ("MLP", "0.88")],
        "parallel": [("space        time", None), ("caption", "0.75"), ("MLP", "0.88")],
        "latte": [("space", "C0"), ("caption", "0.75"), ("MLP", "0.88"), ("time", "C1"),
                  ("MLP", "0.88")],
    }  # fmt: skip
    figure = Figure(figsize=(9, 3.7))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 9), ylim=(-0.15, 3.55))
    axis.axis("off")

    def box(x, y, width, text, colour):
        axis.add_patch(FancyBboxPatch((x, y), width, 0.34, boxstyle="round,pad=0.04",
                                      facecolor=colour, edgecolor="0.3"))  # fmt: skip
        dark = colour in ("C0", "C1", "C3")
        axis.text(x + width / 2, y + 0.17, text, ha="center", va="center", fontsize=10,
                  color="white" if dark else "black")  # fmt: skip

    for k, (name, rows) in enumerate(parts.items()):
        left, width = 0.45 + 2.18 * k, 1.6
        axis.text(left + width / 2, 3.3, name, ha="center", fontsize=12, weight="bold")
        top = 0.3 + 0.56 * len(rows)
        axis.annotate("", (left + width / 2, top + 0.12), (left + width / 2, 0),
                      arrowprops={"arrowstyle": "->", "color": "0.3"}, zorder=0)  # fmt: skip
        for r, (text, colour) in enumerate(rows):
            y = 0.3 + 0.56 * r
            if colour:
                box(left, y, width, text, colour)
            else:
                box(left, y, 0.72, "space", "C0")
                box(left + 0.88, y, 0.72, "time", "C1")
        if name == "latte":
            for low, high, text in ((0.3, 1.76, "block of space"), (1.98, 2.88, "of time")):
                axis.plot([left - 0.12] * 2, [low, high], color="0.5")
                axis.text(left - 0.2, (low + high) / 2, text, rotation=90, ha="right", va="center",
                          fontsize=8)  # fmt: skip
    save(figure, "four_designs.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="out/toy", help="a run of the toy")
    run = parser.parse_args().run
    model, state = load_run(run)
    vae, t5 = VAE(state["encoders"]["vae"]), T5(state["encoders"]["t5"], 16)
    clip = draw_clip(TRIPLE, keyed_generator("figures", "film"))  # [T, 3, H, W]
    x0 = vae.encode(clip.transpose(0, 1)[None].float() / 127.5 - 1)  # [1, 4, 8, 8, 8]
    y, mask = t5.encode([caption_of(TRIPLE)])
    with torch.no_grad():
        noise(vae, x0)
        attention(model, vae, x0, y, mask)
        sampling(model, vae, y, mask, model.y_embedder.y_embedding)
        guidance(model, vae, y, mask)
    training(run)
    losses(run)
    designs()
    for path in sorted(FOLDER.glob("*.png")):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
