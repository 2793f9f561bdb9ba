"""Write the figures of the tutorial to assets/figures, and assets/toy.gif.

    python tools/make_figures.py --run out/toy        # a minute

Figures of samples are made with assets/toy; those of the course of training with a run of the
preset `toy`. The figures that compare designs are made by benchmarks/cost.py and designs.py.
"""

import io
import sys
from pathlib import Path

import torch
import tyro
from einops import rearrange
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import sample  # noqa: E402
from data import keyed_generator  # noqa: E402
from sample import TRAIN_SCHEDULE  # noqa: E402
from train import read_metrics  # noqa: E402

TRIPLE = ("red", "triangle", "up")  # an unseen caption
KEY = [("figures", "guidance")]
FRAMES = [f"frame {k}" for k in range(8)]
FOLDER = ROOT / "assets/figures"


def save(figure, name):
    """Write a PNG of 256 colors, a third of the size of one in full color."""
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=100)
    image = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    data.atomic_write(FOLDER / name, lambda tmp: image.save(tmp, format="PNG", optimize=True))


def write_rows(name, videos, labels, titles=(), size=88, title=""):
    """A figure with a labeled row for each video, uint8 [T, 3, H, W]."""
    n, T = len(videos), len(videos[0])
    above = 18 * (1 + max(text.count("\n") for text in titles)) + 12 + 24 * bool(title)
    width, height = T * size + 130, n * size + above  # pixels
    figure = Figure(figsize=(width / 100, height / 100))
    borders = {"left": 130 / width, "right": 0.998, "bottom": 0.002, "top": 1 - above / height}
    figure.subplots_adjust(**borders, wspace=0.04, hspace=0.04)
    figure.suptitle(title, y=0.995, fontsize=12)
    axes = figure.subplots(n, T, squeeze=False)
    for r, (video, label) in enumerate(zip(videos, labels)):
        for k, frame in enumerate(video):
            axes[r, k].imshow(frame.permute(1, 2, 0).numpy())
            axes[r, k].set(xticks=[], yticks=[])
            if r == 0:
                axes[r, k].set_title(titles[k], fontsize=10, pad=4)
        axes[r, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
    save(figure, name)


def decode(vae, latents):
    """Latents [B, C, T, H, W] -> uint8 [B, T, 3, H, W] in pixels."""
    return torch.stack([data.to_uint8(vae.decode(z)) for z in latents])


def one_dimension_figure():
    """x_t and the best guess of x_0 for 30 numbers on their way to the data, +1 and -1."""
    schedule = sample.make_schedule(100)
    x = torch.randn(30, 1, 1, 1, 1, generator=keyed_generator("figures", "numbers"))
    paths = {"$x_t$": [], "best guess of $x_0$": []}
    for i in reversed(range(100)):
        alpha, sigma = schedule.alpha[i], schedule.sigma[i]
        x0 = torch.tanh(alpha * x / sigma**2)
        for path, value in zip(paths.values(), (x, x0)):
            path.append(value.flatten())
        x = sample.ddim_step(schedule, x, i, x0, (x - alpha * x0) / sigma, None, None)
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axis, (name, path) in zip(figure.subplots(1, 2, sharey=True), paths.items()):
        axis.plot(schedule.timesteps.flip(0), torch.stack(path), lw=0.8)
        axis.set(xlabel="t", title=name, xlim=(999, 0), ylim=(-2.6, 2.6), yticks=(-1, 0, 1))
        axis.grid(color="0.9")
    save(figure, "one_dimension.png")


def schedule_figure():
    """The fraction of signal, and the signal-to-noise ratio, over t."""
    signal = TRAIN_SCHEDULE.alpha**2
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(signal, label="signal")
    left.plot(1 - signal, label="noise")
    left.set(xlabel="t", title="fraction of the variance of $x_t$", xlim=(0, 999))
    left.legend()
    right.plot(signal / (1 - signal), color="C2")
    right.axhline(0.03, color="0.5", ls="--", lw=1)
    right.text(30, 0.038, "0.03, section 10", color="0.35", fontsize=9)
    right.set(xlabel="t", title="signal-to-noise ratio", yscale="log", xlim=(0, 999))
    for axis in (left, right):
        axis.grid(color="0.9")
    save(figure, "schedule.png")


def noise_figure(vae, x0, frame=3):
    """x_t of one frame for rising t: a channel of the latents, and decoded."""
    timesteps = [0, 100, 250, 400, 600, 999]
    noise = torch.randn(x0.shape, generator=keyed_generator("figures", "noise"))
    noisy = [sample.q_sample(TRAIN_SCHEDULE, x0, torch.tensor([t]), noise) for t in timesteps]
    latents = torch.stack([x[0, 0, frame] for x in noisy])  # [6, h, w]
    latents = ((latents + 2.5) * 51).clamp(0, 255).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    decoded = torch.stack([decode(vae, x)[0, frame] for x in noisy])
    variance = 100 * TRAIN_SCHEDULE.alpha[timesteps] ** 2  # of the signal, percent
    titles = [f"t = {t}, {round(v.item(), 3):.3g}%" for t, v in zip(timesteps, variance)]
    write_rows(
        "noise.png", [latents, decoded], ["latents,\nchannel 0", "decoded"], titles, size=118
    )


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
    brightest = max(w[frame, s].max().item() for w in weights[::2])
    for i in range(n):
        space, time = weights[2 * i][frame, s].view(4, 4), weights[2 * i + 1][s, frame]
        axes[0, i].imshow(space, cmap="viridis", vmin=0, vmax=brightest)
        edge = {"fill": False, "edgecolor": "white", "linewidth": 2}
        axes[0, i].add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **edge))
        for k, weight in enumerate(space.flatten()):
            color = "white" if weight < 0.6 * brightest else "black"
            style = {"ha": "center", "va": "center", "color": color}
            axes[0, i].text(k % 4, k // 4, f"{100 * weight:.0f}", **style)
        axes[0, i].set(title=f"block {i}", xticks=[], yticks=[])
        axes[1, i].bar(range(T), 100 * time)
        axes[1, i].set(xticks=range(T), xlabel="frame", ylim=(0, 1.05 * highest))
        axes[1, i].get_xticklabels()[frame].set_weight("bold")
    axes[0, 0].set_ylabel(f"spatial, frame {frame}, %")
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
    """x_t and the predicted x_0 in the course of sampling, in the first and the last frame."""
    make, step = sample.SAMPLERS["dpm"]
    schedule, generator = make(20), keyed_generator(*KEY[0])
    drop, null = torch.tensor([False, True]), model.y_embedder.y_embedding
    y, mask = sample.drop_captions(y.repeat(2, 1, 1), mask.repeat(2, 1), drop, null)
    x, x0 = torch.randn(1, 4, 8, 8, 8, generator=generator), None
    columns, titles = [], []
    for i in reversed(range(20)):
        t = schedule.timesteps[i]
        eps, v = sample.predict_noise(model, x, t, y, mask, guidance=3.0 if t >= 600 else 1.0)
        x0_last, x0 = x0, sample.predict_x0(schedule, x, i, eps)
        if 20 - i in (1, 3, 5, 7, 9, 12, 16, 20):
            columns.append(torch.cat([decode(vae, x)[0, [0, 7]], decode(vae, x0)[0, [0, 7]]]))
            titles.append(f"{20 - i}: t = {t}")
        x = step(schedule, x, i, x0, eps, v, None, x0_last)
    labels = [f"{name}\nframe {k}" for name in ("decoded $x_t$", "predicted $x_0$") for k in (0, 7)]
    write_rows("sampling.png", torch.stack(columns, dim=1), labels, titles)


def guidance_figure(model, vae, y, mask):
    """One caption and one noise with rising guidance."""
    cases, inputs = ((0, 0), (1, 0), (3, 0), (3, 600), (7, 0)), (y, mask, KEY, (4, 8, 8, 8))
    options = {"steps": 20, "sampler": "dpm"}
    rows = [
        sample.generate(model, vae, *inputs, guidance=g, guidance_min_t=t, **options)[0]
        for g, t in cases
    ]
    labels = [f"g = {g}" + f"\nt ≥ {t}" * (t > 0) for g, t in cases]
    write_rows("guidance.png", rows, labels, FRAMES, title=data.caption_of(TRIPLE))


def generate_toy(model, vae, t5, captions):
    """One video per caption, with the toy's settings: uint8 [n, T, 3, 64, 64]."""
    options = {"steps": 10, "guidance": 3.0, "guidance_min_t": 600}
    keys = sample.video_keys(0, captions)
    y, mask = t5.encode(captions)
    return torch.stack(sample.generate(model, vae, y, mask, keys, (4, 8, 8, 8), 32, **options))


def nearest_figure(model, vae, t5):
    """Eight generated videos, and the training videos nearest to them in pixels."""
    captions = [data.caption_of(t) for t in (*data.UNSEEN[:4], *data.SEEN[5::11])]
    videos, toy = generate_toy(model, vae, t5, captions), data.Toy("train", 2048)
    clips = torch.stack([toy[row] for row in range(len(toy))])  # [2048, T, 3, 64, 64]
    distance = torch.cdist(videos.flatten(1).float(), clips.flatten(1).float())  # [8, 2048]
    rows = distance.argmin(1)
    found = [toy.captions[row] for row in rows]
    error = (distance.min(1).values ** 2 / videos[0].numel()).sqrt()
    for caption, other, e in zip(captions, found, error):
        print(f"{caption}: nearest is {other}, root mean squared difference {e:.0f} of 255")
    images = torch.cat([videos[:, [0, 7]], clips[rows][:, [0, 7]]], dim=1).transpose(0, 1)
    titles = [caption[2:].replace(" moving ", " ").replace(" ", "\n") for caption in captions]
    labels = [f"{kind}\nframe {k}" for kind in ("generated", "nearest") for k in (0, 7)]
    title = "four unseen captions, four seen ones"
    write_rows("nearest.png", images, labels, titles, title=title)


def toy_gif(model, vae, t5, size=160):
    """assets/toy.gif: eight captions drawn at random, each above its video."""
    order = torch.randperm(48, generator=keyed_generator("figures", "captions"))[:8]
    captions = [data.caption_of(data.TRIPLES[i]) for i in order]
    frames, font = [], ImageFont.load_default(12)
    for images in generate_toy(model, vae, t5, captions).transpose(0, 1):  # [8, 3, 64, 64] each
        sheet = Image.new("RGB", (4 * (size + 8), 2 * (size + 28)), "white")
        draw = ImageDraw.Draw(sheet)
        for k, (image, caption) in enumerate(zip(images, captions)):
            left, top = k % 4 * (size + 8) + 4, k // 4 * (size + 28)
            draw.text((left + size // 2, top + 12), caption[2:], "black", font, anchor="mm")
            tile = data.to_image(image, 64).resize((size, size), Image.Resampling.BICUBIC)
            sheet.paste(tile, (left, top + 24))
        frames.append(sheet.quantize(128, dither=Image.Dither.NONE))
    options = {"save_all": True, "append_images": frames[1:], "duration": 125, "loop": 0}
    path = ROOT / "assets/toy.gif"
    data.atomic_write(path, lambda tmp: frames[0].save(tmp, format="GIF", **options))


def loss_figure(run):
    """Caption accuracy and frames with the right shape, over steps and minutes; the validation loss
    in four bins of t, each with its own scale.
    """
    metrics = read_metrics(run)
    lines = [(m["step"], m["validation"]) for m in metrics if "validation" in m]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    axis = top.subplots()
    for name, color in (("seen", "C0"), ("unseen", "C1")):
        points = [(m["step"], *m["accuracy"][name]) for m in metrics if "accuracy" in m]
        steps, shares = zip(*[(step, 100 * n / total) for step, n, total in points])
        axis.plot(steps, shares, "o-", ms=4, color=color, label=f"{name} captions")
    points = [(m["step"], 100 * m["crispness"][0]) for m in metrics if m.get("crispness")]
    axis.plot(*zip(*points), "s--", ms=4, color="0.5", label="frames with the right shape")
    axis.set(xlim=(0, None), ylim=(-3, 103), xlabel="steps", ylabel="% of videos, frames")
    speeds = [m["clips_per_second"] for m in metrics if "loss" in m]
    minute = 60 * sum(speeds) / len(speeds) / 16  # steps of 16 clips
    top_axis = axis.secondary_xaxis("top", functions=(lambda x: x / minute, lambda x: x * minute))
    top_axis.set_xlabel("minutes of training")
    axis.grid(color="0.9")
    axis.legend(loc="upper left")
    for b, axis in enumerate(bottom.subplots(1, 4)):
        axis.plot([step for step, _ in lines], [bins[b] for _, bins in lines], "o-", ms=3)
        axis.set(title=f"t {250 * b} to {250 * b + 249}", xlabel="steps", ylim=(0, None))
        axis.grid(color="0.9")
    bottom.suptitle("validation loss of the noise", fontsize=11)
    save(figure, "loss.png")


def block_figure():
    """The operations of an STDiT block, and the six vectors from the timestep that they use."""
    names = ("shift", "scale", "gate")
    vectors = [f"{name}_{part}" for part in ("attn", "mlp") for name in names]
    colors = ["#cfe3f7", "#9cc7ee", "#5f9fd8", "#fbdcc0", "#f5b67f", "#e58a3c"]
    rows = [  # of boxes from left to right: (text, color)
        [("norm", "0.92"), ("× (1 + scale_attn)", colors[1]), ("+ shift_attn", colors[0])],
        [("+ position in time\n(first block only)", "0.92")],
        [("", None)],
        [("norm", "0.92"), ("× (1 + scale_mlp)", colors[4]), ("+ shift_mlp", colors[3])],
    ]
    operations = ["spatial attention", "temporal attention", "cross-attention", "MLP"]
    gates = [("× gate_attn", colors[2])] * 2 + [None, ("× gate_mlp", colors[5])]
    figure = Figure(figsize=(9, 4))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 9), ylim=(0, 4))
    axis.axis("off")

    def box(x, y, width, text, color):
        style = {"boxstyle": "round,pad=0.03", "facecolor": color, "edgecolor": "0.35"}
        axis.add_patch(FancyBboxPatch((x, y - 0.17), width, 0.34, **style))
        axis.text(x + width / 2, y, text, ha="center", va="center", fontsize=8.5, color="black")

    arrow = {"arrowprops": {"arrowstyle": "->", "color": "0.3"}, "zorder": 0}
    axis.annotate("", (0.4, 3.85), (0.4, 0.05), **arrow)
    axis.text(0.12, 0.1, "x", fontsize=11)
    for r, (boxes, operation, gate) in enumerate(zip(rows, operations, gates)):
        y = 0.45 + 0.85 * r
        axis.annotate("", (0.47, y + 0.45), (6.35, y + 0.45), **arrow)
        axis.plot([0.4, 6.35, 6.35], [y, y, y + 0.45], color="0.3", lw=1, zorder=0)
        axis.text(
            0.4,
            y + 0.45,
            "+",
            ha="center",
            va="center",
            fontsize=12,
            weight="bold",
            bbox={"boxstyle": "circle,pad=0.1", "facecolor": "white", "edgecolor": "0.3"},
        )
        for k, (text, color) in enumerate(boxes):
            if text:
                box(
                    (0.62, 1.3, 2.72)[k],
                    y,
                    (0.55, 1.3, 0.95)[k] if len(boxes) > 1 else 1.5,
                    text,
                    color,
                )
        box(3.85, y, 1.3, operation, "#d8ead3")
        if gate:
            box(5.3, y, 0.92, *gate)
    style = {"ha": "right", "va": "center", "fontsize": 8.5}
    axis.annotate("caption y", (3.81, 2.07), (3.3, 1.92), **style, **arrow)
    axis.text(7.85, 3.62, "table of the block\n+ modulation(t)", ha="center", fontsize=9)
    for k, (name, color) in enumerate(zip(vectors, colors)):
        box(7.1, 3.3 - 0.42 * k, 1.5, name, color)
    save(figure, "block.png")


def designs_figure():
    """The four designs: the operations of a block, from bottom to top."""
    space, time = ("spatial", "C0"), ("temporal", "C1")
    caption, mlp = ("cross-attention", "0.75"), ("MLP", "0.88")
    parts = {
        "full": [[("all tokens", "C3")], [caption], [mlp]],
        "sequential": [[space], [time], [caption], [mlp]],
        "parallel": [[space, time], [caption], [mlp]],
        "latte": [[space], [caption], [mlp], [time], [mlp]],
    }
    figure = Figure(figsize=(9, 5.1))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 9), ylim=(-1.55, 3.55))
    axis.axis("off")
    for k, (name, rows) in enumerate(parts.items()):
        left, middle = 0.45 + 2.18 * k, 1.25 + 2.18 * k
        axis.text(middle, 3.3, name, ha="center", fontsize=12, weight="bold")
        arrow = {"arrowprops": {"arrowstyle": "->", "color": "0.3"}, "zorder": 0}
        axis.annotate("", (middle, 0.42 + 0.56 * len(rows)), (middle, 0), **arrow)
        for r, boxes in enumerate(rows):
            width, y = (1.76 - 0.16 * len(boxes)) / len(boxes), 0.3 + 0.56 * r
            if len(boxes) == 2:  # the same input for both, and the sum of their outputs
                centers = [left + width / 2] * 2 + [left + 1.5 * width + 0.16] * 2
                axis.plot([middle] * 2, [y - 0.09, y + 0.43], color="white", lw=3, zorder=0)
                axis.plot(centers, [y, y - 0.1, y - 0.1, y], color="0.3", lw=1, zorder=0)
                axis.plot(centers, [y, y + 0.44, y + 0.44, y], color="0.3", lw=1, zorder=0)
            for i, (text, color) in enumerate(boxes):
                x = left + i * (width + 0.16)
                style = {"boxstyle": "round,pad=0.04", "facecolor": color, "edgecolor": "0.3"}
                axis.add_patch(FancyBboxPatch((x, y), width, 0.34, **style))
                style = {"ha": "center", "va": "center", "fontsize": 10 if len(boxes) == 1 else 9}
                dark = color in ("C0", "C1", "C3")
                style |= {"color": "white" if dark else "black"}
                axis.text(x + width / 2, y + 0.17, text, **style)
        for row, kind in enumerate(["full"] if name == "full" else ["spatial", "temporal"]):
            if k < 2:  # of parallel and latte the rows are those of sequential
                style = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 8}
                text = "all tokens" if name == "full" else kind
                axis.text(left - 0.06, -0.53 - 0.62 * row, text, **style)
            for token in range(4 * 16):  # 4 frames of 4 x 4 patches; the one in red is in frame 1
                frame, i, j = token // 16, token // 4 % 4, token % 4
                seen = kind == "full" or (frame == 1 if kind == "spatial" else (i, j) == (1, 2))
                color = "#d62728" if (frame, i, j) == (1, 1, 2) else "#8fbfe8" if seen else "0.93"
                place = (left + 0.44 * frame + 0.1 * j, -0.42 - 0.1 * i - 0.62 * row)
                axis.add_patch(Rectangle(place, 0.09, 0.09, facecolor=color))
        if name == "latte":
            for low, high, text in ((0.3, 1.76, "spatial block"), (1.98, 2.88, "temporal")):
                axis.plot([left - 0.12] * 2, [low, high], color="0.5")
                style = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 8}
                axis.text(left - 0.2, (low + high) / 2, text, **style)
    save(figure, "four_designs.png")


def main(run: str = "out/toy"):
    """Write the figures of the tutorial to assets/figures, and assets/toy.gif.

    Args:
        run: a run of the toy, for the figures of the course of training
    """
    model = sample.load_model(ROOT / "assets/toy")
    vae, t5 = data.VAE("assets/vae"), data.T5("assets/t5", 16)
    clip = data.draw_clip(TRIPLE, keyed_generator("figures", "clip"))  # [T, 3, H, W]
    x0 = vae.encode(clip)[None]  # [1, 4, 8, 8, 8]
    y, mask = t5.encode([data.caption_of(TRIPLE)])
    one_dimension_figure(), schedule_figure(), block_figure(), designs_figure()
    with torch.no_grad():
        noise_figure(vae, x0)
        attention_figure(model, vae, x0, y, mask)
        sampling_figure(model, vae, y, mask)
        guidance_figure(model, vae, y, mask)
        nearest_figure(model, vae, t5)
        toy_gif(model, vae, t5)
    training_figure(run, 64)
    loss_figure(run)
    for path in (*sorted(FOLDER.glob("*.png")), ROOT / "assets/toy.gif"):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} KB")


if __name__ == "__main__":
    data.run_command(lambda: tyro.cli(main))
