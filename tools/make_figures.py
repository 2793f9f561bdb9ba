"""Writes the figures of the tutorial to assets/figures, assets/title.gif and assets/toy.gif.

    python train.py --sample-every 250 && python tools/make_figures.py    # two minutes
    python tools/make_figures.py --only network block                     # some of them

Most figures are made with assets/toy. Those of the course of training need a run of the preset
`toy`, that of your own clips a run of the commands in the tutorial's section 15; a figure whose run
is missing is left as it is. The figures that compare designs are made in benchmarks.
"""

import io
import sys
from functools import cached_property
from pathlib import Path

import matplotlib
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
from train import TOY, read_metrics  # noqa: E402

FOLDER = ROOT / "assets/figures"
LABEL = ("red", "triangle", "up")  # an unseen caption
KEY = ("figures", "guidance")  # of the noise
SHAPE = (4, 8, 8, 8)  # of the toy's latents
FRAMES = [f"frame {k}" for k in range(8)]
GUIDED = dict(guidance=TOY.guidance, guidance_min_t=TOY.guidance_min_t)
DPM = dict(sampler="dpm", steps=20)

# One palette for the drawings of the network, the block and the designs.
SPACE, TIME, ALL, CAPTION, MLP = "#8db8e8", "#f5b46b", "#e58a8a", "#a5d19b", "#cfcfd8"
STEP, OTHER, LINE = "#c9b3e6", "#eeeef3", "#444450"  # the timestep, the rest, lines

matplotlib.rcParams["svg.hashsalt"] = "stdit"  # the same file in every run


class Context:
    """What several figures use; nothing is loaded before it is needed."""

    def __init__(self, run, own):
        self.run, self.own = Path(run), Path(own)

    @cached_property
    def model(self):
        return sample.load_model(ROOT / "assets/toy")

    @cached_property
    def vae(self):
        return data.VAE("assets/vae")

    @cached_property
    def t5(self):
        return data.T5("assets/t5", 16)

    @cached_property
    def clip(self):
        """The latents of a clip of LABEL, [1, 4, 8, 8, 8]."""
        clip = data.draw_clip(LABEL, keyed_generator("figures", "clip"))
        return self.vae.encode(clip)[None]

    def generate(self, captions, keys, model=None, **options):
        """Generates one video per caption, uint8 [n, T, 3, 64, 64]."""
        inputs = (*self.t5.encode(captions), keys, SHAPE, 32)
        return torch.stack(sample.generate(model or self.model, self.vae, *inputs, **options))

    def decode(self, latents):
        """Decodes latents [B, C, T, H, W] to uint8 [B, T, 3, H, W] in pixels."""
        return torch.stack([data.to_uint8(self.vae.decode(z)) for z in latents])


def save(figure, name):
    """Writes a PNG of 256 colors, a third of the size of one in full color."""
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=100)
    image = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    data.atomic_write(FOLDER / name, lambda tmp: image.save(tmp, format="PNG", optimize=True))


def write_rows(name, videos, labels, titles=(), size=100, title="", marks=None):
    """Writes a figure with a labeled row for each video, uint8 [T, 3, H, W]. marks [rows, T]: True
    where an image gets a red frame.
    """
    n, T = len(videos), len(videos[0])
    above = 19 * (1 + max(text.count("\n") for text in titles)) + 12 + 26 * bool(title)
    width, height = T * size + 120, n * size + above  # pixels
    figure = Figure(figsize=(width / 100, height / 100))
    borders = {"left": 120 / width, "right": 0.998, "bottom": 0.002, "top": 1 - above / height}
    figure.subplots_adjust(**borders, wspace=0.04, hspace=0.04)
    figure.suptitle(title, y=0.995, fontsize=12)
    axes = figure.subplots(n, T, squeeze=False)
    for r, (video, label) in enumerate(zip(videos, labels)):
        for k, frame in enumerate(video):
            axes[r, k].imshow(frame.permute(1, 2, 0).numpy())
            axes[r, k].set(xticks=[], yticks=[])
            if marks is not None and marks[r][k]:
                axes[r, k].add_patch(Rectangle((1, 1), 61, 61, fill=False, edgecolor="r", lw=3))
            if r == 0:
                axes[r, k].set_title(titles[k], fontsize=11, pad=4)
        axes[r, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11, labelpad=8)
    save(figure, name)


# ---------------------------------------------------------------------------------------------
# Diffusion


def one_dimension(c):
    """Paths of numbers to the data, +1 and -1, in the density of x_t: along the ODE, with new noise
    in each step, and the best guess of x_0 along the ODE.
    """
    x = torch.linspace(-2.8, 2.8, 281)
    alpha, sigma = TRAIN_SCHEDULE.alpha[:, None], TRAIN_SCHEDULE.sigma[:, None]
    density = sum((-0.5 * ((x - sign * alpha) / sigma) ** 2).exp() for sign in (1, -1))  # [1000, x]
    density = (density / density.max(1, keepdim=True).values) ** 0.6
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, step, steps, paths in (
        (axes[0], sample.ddim_step, 100, 12),
        (axes[1], sample.ddpm_step, 250, 6),
    ):
        start = torch.linspace(-2, 2, paths)[:, None, None, None, None]
        schedule, generator = sample.make_schedule(steps), keyed_generator("figures", "numbers")
        x, path, guesses = start, [], []
        for i in reversed(range(steps)):
            alpha, sigma = schedule.alpha[i], schedule.sigma[i]
            x0 = torch.tanh(alpha * x / sigma**2)
            path.append(x.flatten())
            guesses.append(x0.flatten())
            eps, var = (x - alpha * x0) / sigma, -torch.ones_like(x)

            def noise():
                return torch.randn(x.shape, generator=generator)

            x = step(schedule, i, x=x, x0=x0, eps=eps, var=var, noise=noise)
        axis.imshow(
            density.T.flip(0), extent=(0, 999, -2.8, 2.8), aspect="auto", cmap="Greys", vmax=1.8
        )
        axis.plot(schedule.timesteps.flip(0), torch.stack(path), lw=1)
        if step is sample.ddim_step:
            axes[2].plot(schedule.timesteps.flip(0), torch.stack(guesses), lw=1)
    names = ("smooth paths (DDIM)", "paths with new noise (DDPM)", "best guess of $x_0$ (DDIM)")
    for axis, name in zip(axes, names):
        axis.set(xlabel="t", title=name, xlim=(999, 0), ylim=(-2.8, 2.8), yticks=(-1, 0, 1))
    axes[0].set_ylabel("$x_t$, and its density in gray")
    axes[2].grid(color="0.9")
    save(figure, "one_dimension.png")


def schedule(c):
    """The fraction of signal, and the signal-to-noise ratio, over t."""
    signal = TRAIN_SCHEDULE.alpha**2
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(signal, label="signal")
    left.plot(1 - signal, label="noise")
    left.set(xlabel="t", title="fraction of the variance of $x_t$", xlim=(0, 999))
    left.legend()
    right.plot(signal / (1 - signal), color="C2")
    right.axhline(TOY.min_snr, color="0.5", ls="--", lw=1)
    right.text(30, 1.3 * TOY.min_snr, f"{TOY.min_snr}, section 11", color="0.3")
    right.set(xlabel="t", title="signal-to-noise ratio", yscale="log", xlim=(0, 999))
    for axis in (left, right):
        axis.grid(color="0.9")
    save(figure, "schedule.png")


def noise(c, frame=3):
    """x_t of one frame for rising t: a channel of the latents, and decoded."""
    timesteps = [0, 100, 250, 400, 600, 999]
    noise = torch.randn(c.clip.shape, generator=keyed_generator("figures", "noise"))
    noisy = [sample.q_sample(TRAIN_SCHEDULE, c.clip, torch.tensor([t]), noise) for t in timesteps]
    latents = torch.stack([x[0, 0, frame] for x in noisy])  # [6, h, w]
    latents = ((latents + 2.5) * 51).clamp(0, 255).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    decoded = torch.stack([c.decode(x)[0, frame] for x in noisy])
    variance = 100 * TRAIN_SCHEDULE.alpha[timesteps] ** 2  # of the signal, percent
    titles = [f"t = {t}, {round(v.item(), 3):.3g}%" for t, v in zip(timesteps, variance)]
    labels = ["latents,\nchannel 0", "decoded"]
    write_rows("noise.png", [latents, decoded], labels, titles, size=135)


def denoise(c, captions, keys, sampler):
    """Yields (t, x_t, predicted x_0), latents [B, C, T, H, W], at each of 20 steps, and at the end
    (None, x_0, x_0).
    """
    make, step = sample.SAMPLERS[sampler]
    schedule = make(20)
    generators = [keyed_generator(*key) for key in keys]

    def noise():
        return torch.stack([torch.randn(SHAPE, generator=g) for g in generators])

    y, mask = c.t5.encode(captions)
    null = c.model.y_embedder.y_embedding.expand_as(y)
    y, mask = torch.cat([y, null]), torch.cat([mask, torch.ones_like(mask)])
    x, x0 = noise(), None
    for i in reversed(range(20)):
        t, x0_last = schedule.timesteps[i], x0
        g = TOY.guidance if t >= TOY.guidance_min_t else 1.0
        eps, var = sample.predict_noise_and_variance(c.model, x, t, y, mask, g)
        x0 = sample.predict_x0(schedule, x, i, eps)
        yield t.item(), x, x0
        x = step(schedule, i, x=x, x0=x0, eps=eps, var=var, noise=noise, x0_last=x0_last)
    yield None, x, x


def sampling(c):
    """x_t and the predicted x_0 in the course of sampling, in the first and the last frame."""
    columns, titles = [], []
    for k, (t, x, x0) in enumerate(denoise(c, [data.caption_of(LABEL)], [KEY], "dpm"), 1):
        if k in (1, 3, 5, 7, 9, 12, 16, 20):
            columns.append(torch.cat([c.decode(x)[0, [0, 7]], c.decode(x0)[0, [0, 7]]]))
            titles.append(f"{k}: t = {t}")
    labels = [f"{name}\nframe {k}" for name in ("decoded $x_t$", "predicted $x_0$") for k in (0, 7)]
    write_rows("sampling.png", torch.stack(columns, dim=1), labels, titles)


def title(c, size=128):
    """assets/title.gif: four captions, the last one unseen. At each step of DDPM x_t and the
    predicted x_0, decoded, in frame 0; then the videos play twice.
    """
    labels = [data.SEEN[k] for k in (3, 20, 38)] + [LABEL]
    captions = [data.caption_of(label) for label in labels]
    keys = [("figures", "title", caption) for caption in captions]
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)

    def page(state, above, below):
        image = Image.new("RGB", (4 * (size + 8) + 96, 2 * (size + 6) + 82), "white")
        draw = ImageDraw.Draw(image)
        draw.text((8, 8), state, "black", font)
        for r, (name, images) in enumerate((("noisy: x_t", above), ("prediction", below))):
            top = 76 + r * (size + 6)
            draw.text((8, top + size // 2), name, "black", small, anchor="lm")
            for k in range(4):
                tile = data_image(images[k]).resize((size, size), Image.Resampling.NEAREST)
                image.paste(tile, (96 + k * (size + 8), top))
        for k, (caption, label) in enumerate(zip(captions, labels)):
            unseen = label in data.UNSEEN
            text = caption.replace(" moving", "\nmoving") + " (unseen)" * unseen
            place, color = (96 + k * (size + 8) + size // 2, 54), "#b03020" if unseen else "black"
            draw.text(place, text, color, small, anchor="mm", align="center")
        return image

    pages, durations = [], []
    for k, (t, x, x0) in enumerate(denoise(c, captions, keys, "ddpm"), 1):
        above, below = c.decode(x), c.decode(x0)
        if t is not None:
            last = above[:, 0]
            pages.append(page(f"step {k} of 20, t = {t}", last, below[:, 0]))
            durations.append(700 if k == 1 else 250)
    for frame in 2 * list(range(8)):
        pages.append(page("after 20 steps: the videos", last, below[:, frame]))
        durations.append(140)
    some = Image.new("RGB", (pages[0].width, 5 * pages[0].height))  # for colors of all pages
    for k, n in enumerate((0, 5, 10, 15, 24)):
        some.paste(pages[n], (0, k * pages[0].height))
    palette = some.quantize(192, dither=Image.Dither.NONE)
    pages = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in pages]
    options = dict(save_all=True, append_images=pages[1:], duration=durations, loop=0)
    path = ROOT / "assets/title.gif"
    data.atomic_write(path, lambda tmp: pages[0].save(tmp, format="GIF", **options))
    for caption, video in zip(captions, below):
        print(f"title.gif: {caption}: the detector finds {data.detect(video)}")


def data_image(frame):
    """Converts a frame, uint8 [3, H, W], to a PIL image."""
    return Image.fromarray(frame.permute(1, 2, 0).numpy())


def guidance(c):
    """One caption and one noise with rising guidance."""
    cases, caption = ((0, 0), (1, 0), (3, 0), (3, 600), (7, 0)), data.caption_of(LABEL)
    rows = [c.generate([caption], [KEY], guidance=g, guidance_min_t=t, **DPM)[0] for g, t in cases]
    labels = [f"g = {g}" + f"\nt ≥ {t}" * (t > 0) for g, t in cases]
    write_rows("guidance.png", rows, labels, FRAMES, title=caption)


def seeds(c):
    """The unseen caption that fails most often without guidance, with eight seeds."""
    captions = [data.caption_of(label) for label in data.UNSEEN for _ in range(8)]
    keys = [("figures", "seeds", k) for _ in data.UNSEEN for k in range(8)]
    plain = c.generate(captions, keys, guidance=1.0, **DPM).unflatten(0, (6, 8))

    def failed(videos, label):
        return [data.detect(video) != label for video in videos]

    counts = [sum(failed(v, label)) for v, label in zip(plain, data.UNSEEN)]
    worst = max(range(6), key=counts.__getitem__)
    label, caption = data.UNSEEN[worst], captions[8 * worst]
    guided = c.generate([caption] * 8, keys[:8], **GUIDED, **DPM)
    rows, marks, labels = [], [], []
    for name, videos in (("g = 1", plain[worst]), ("g = 3\nt ≥ 600", guided)):
        for k in (0, 7):
            rows.append(videos[:, k])
            marks.append(failed(videos, label))
            labels.append(f"{name}\nframe {k}")
    titles = [f"seed {k}" for k in range(8)]
    write_rows("seeds.png", rows, labels, titles, title=caption, marks=marks)
    print(f"seeds.png: {caption}: of 8 videos {sum(marks[0])} and {sum(marks[2])} fail")


def attention(c):
    """Attention weights of one patch in each block, in space and in time, averaged over heads."""
    (row, column), frame, weights = (1, 1), 3, []  # a patch of 4 x 4

    def record(module, inputs, output):
        x = inputs[0] if len(inputs) < 2 or inputs[1] is None else inputs[0] + inputs[1]
        qkv = module.qkv(rearrange(x, f"b t s d -> {module.pattern}"))  # [sequences, N, 3D]
        q, k, _ = rearrange(qkv, "b n (qkv h d) -> qkv b h n d", qkv=3, h=module.heads)
        weights.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1))  # [sequences, N, N]

    blocks = c.model.blocks
    hooks = [m.register_forward_hook(record) for b in blocks for m in (b.attn, b.attn_temp)]
    noise = torch.randn(c.clip.shape, generator=keyed_generator("figures", "attention"))
    t = torch.tensor([300])
    y, mask = c.t5.encode([data.caption_of(LABEL)])
    c.model(sample.q_sample(TRAIN_SCHEDULE, c.clip, t, noise), t, y, mask)
    for hook in hooks:
        hook.remove()
    video, s, n = c.decode(c.clip)[0], 4 * row + column, len(blocks)
    figure = Figure(figsize=(10, 6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 3.2))
    for k, (axis, image) in enumerate(zip(top.subplots(1, len(video)), video)):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(f"frame {k}", fontsize=11)
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
        axes[1, i].bar(range(len(time)), 100 * time, color=TIME)
        axes[1, i].set(xticks=range(len(time)), xlabel="frame", ylim=(0, 1.05 * highest))
        axes[1, i].get_xticklabels()[frame].set_weight("bold")
    axes[0, 0].set_ylabel(f"spatial, frame {frame}, %", fontsize=11)
    axes[1, 0].set_ylabel("temporal, %", fontsize=11)
    save(figure, "attention.png")


# ---------------------------------------------------------------------------------------------
# Training


def training(c):
    """The first sample video of a run, an unseen caption, at five of the steps at which it was
    written.
    """
    files = sorted(c.run.glob("samples/step_*.gif"))
    last = int(files[-1].stem[5:])
    chosen = [
        min(files, key=lambda file: abs(int(file.stem[5:]) - share * last))
        for share in (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
    ]
    rows, labels = [], []
    for file in sorted(set(chosen)):
        with Image.open(file) as gif:
            frames = []
            for k in range(gif.n_frames):
                gif.seek(k)
                tile = gif.convert("RGB").crop((0, 0, gif.height, gif.height)).resize((64, 64), 0)
                frames.append(torch.tensor(list(tile.tobytes())).view(64, 64, 3))
        rows.append(torch.stack(frames).permute(0, 3, 1, 2))
        labels.append(f"{int(file.stem[5:]):,} steps")
    write_rows("training.png", rows, labels, FRAMES, title=data.caption_of(data.UNSEEN[0]))


def loss(c):
    """Caption accuracy and frames with the right shape above the validation loss: its mean over t
    and its four bins on one axis, over the same steps. A new network generates no shape and has a
    loss of 1 at every t.
    """
    metrics = read_metrics(c.run)
    figure = Figure(figsize=(10, 5.8), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for name, color in (("seen", "C0"), ("unseen", "C1")):
        points = [(m["step"], *m["accuracy"][name]) for m in metrics if "accuracy" in m]
        points = [(0, 0)] + [(step, 100 * n / total) for step, n, total in points]
        top.plot(*zip(*points), "o-", ms=4, color=color, label=f"videos that match {name} captions")
    points = [(m["step"], 100 * m["quality"][0]) for m in metrics if m.get("quality")]
    if points:
        top.plot(*zip(*points), "s--", ms=4, color="0.5", label="of these, frames with the shape")
    top.set(ylim=(-3, 103), ylabel="%")
    speeds = [m["clips_per_second"] for m in metrics if "loss" in m]
    minute = 60 * sum(speeds) / len(speeds) / TOY.batch_size  # in steps
    axis = top.secondary_xaxis("top", functions=(lambda x: x / minute, lambda x: x * minute))
    axis.set_xlabel("minutes of training")
    lines = [(m["step"], m["validation"]) for m in metrics if "validation" in m]
    steps = [0, *(step for step, _ in lines)]
    bins = torch.tensor([[1.0] * 4, *(bins for _, bins in lines)])  # [points, 4]
    bottom.plot(steps, bins.mean(1), "o-", ms=4, lw=3, color="black", label="mean over t")
    for b, color in enumerate(("#f2c14e", "#e58a3c", "#c44e52", "#7b3f61")):
        name = f"t {250 * b} to {250 * b + 249}"
        bottom.plot(steps, bins[:, b], "o-", ms=3, color=color, label=name)
    bottom.set(yscale="log", ylabel="validation loss of the noise", xlabel="steps", xlim=(0, None))
    for axis in (top, bottom):
        axis.grid(color="0.9")
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    save(figure, "loss.png")


def generate_toy(c, captions):
    """Generates one video per caption with the toy's settings: uint8 [n, T, 3, 64, 64]."""
    keys = sample.video_keys(0, captions)
    return c.generate(captions, keys, steps=TOY.sample_steps, **GUIDED)


def nearest(c):
    """Eight generated videos, and the training videos nearest to them in pixels."""
    captions = [data.caption_of(label) for label in (*data.UNSEEN[:4], *data.SEEN[5::11])]
    videos, toy = generate_toy(c, captions), data.Toy("train", TOY.toy_clips)
    clips = torch.stack([toy[row] for row in range(len(toy))])  # [clips, T, 3, 64, 64]
    distance = torch.cdist(videos.flatten(1).float(), clips.flatten(1).float())  # [8, clips]
    rows = distance.argmin(1)
    error = (distance.min(1).values ** 2 / videos[0].numel()).sqrt()
    for caption, row, e in zip(captions, rows, error):
        print(f"nearest.png: {caption}: nearest is {toy.captions[row]}, by {e:.0f} of 255")
    images = torch.cat([videos[:, [0, 7]], clips[rows][:, [0, 7]]], dim=1).transpose(0, 1)
    titles = [caption[2:].replace(" moving ", " ").replace(" ", "\n") for caption in captions]
    labels = [f"{kind}\nframe {k}" for kind in ("generated", "nearest") for k in (0, 7)]
    heading = "four unseen captions, four seen ones"
    write_rows("nearest.png", images, labels, titles, title=heading)


def own_clips(c):
    """Four videos of the model of the tutorial's section 15, trained on clips made there."""
    words = ("red square moving up right", "blue circle moving down left")
    words += ("green triangle moving up left", "yellow square moving down right")
    captions = [f"a {text}" for text in words]
    keys = sample.video_keys(0, captions)
    model = sample.load_model(c.own)
    videos = c.generate(captions, keys, model=model, **GUIDED, **DPM)
    labels = [text.replace(" moving ", "\n").replace(" ", " ", 1) for text in words]
    write_rows("own_clips.png", videos, labels, FRAMES)


def toy(c, size=160):
    """assets/toy.gif: eight captions drawn at random, each above its video."""
    order = torch.randperm(48, generator=keyed_generator("figures", "captions"))[:8]
    captions = [data.caption_of(data.LABELS[i]) for i in order]
    frames, font = [], ImageFont.load_default(12)
    for images in generate_toy(c, captions).transpose(0, 1):  # [8, 3, 64, 64] each
        sheet = Image.new("RGB", (4 * (size + 8), 2 * (size + 28)), "white")
        draw = ImageDraw.Draw(sheet)
        for k, (image, caption) in enumerate(zip(images, captions)):
            left, top = k % 4 * (size + 8) + 4, k // 4 * (size + 28)
            draw.text((left + size // 2, top + 12), caption[2:], "black", font, anchor="mm")
            tile = data_image(image).resize((size, size), Image.Resampling.BICUBIC)
            sheet.paste(tile, (left, top + 24))
        frames.append(sheet.quantize(128, dither=Image.Dither.NONE))
    options = {"save_all": True, "append_images": frames[1:], "duration": 125, "loop": 0}
    path = ROOT / "assets/toy.gif"
    data.atomic_write(path, lambda tmp: frames[0].save(tmp, format="GIF", **options))


# ---------------------------------------------------------------------------------------------
# Drawings


class Drawing:
    """A drawing in SVG, in units of pixels, with y upwards. Its background is white, so that it can
    be read on a dark page.
    """

    def __init__(self, width, height):
        self.figure = Figure(figsize=(width / 100, height / 100))
        self.axis = self.figure.add_axes((0, 0, 1, 1))
        self.axis.set(xlim=(0, width), ylim=(0, height))
        self.axis.axis("off")

    def box(self, x, y, width, height, text, color, size=10.5, **style):
        """A box around the center (x, y)."""
        place = (x - width / 2, y - height / 2)
        style = {"boxstyle": "round,pad=0,rounding_size=5", "edgecolor": LINE} | style
        self.axis.add_patch(FancyBboxPatch(place, width, height, facecolor=color, **style))
        self.text(x, y, text, size)

    def text(self, x, y, text, size=10.5, ha="center", **style):
        style = {"va": "center", "color": "black", "linespacing": 1.15} | style
        self.axis.text(x, y, text, fontsize=size, ha=ha, **style)

    def arrow(self, *points, text="", above=8):
        """A line through points with a tip at the last; the text stands over its first part."""
        for a, b in zip(points[:-2], points[1:-1]):
            self.axis.plot(*zip(a, b), color=LINE, lw=1.2, zorder=0, solid_capstyle="round")
        tip = {"arrowstyle": "-|>", "color": LINE, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
        self.axis.annotate("", points[-1], points[-2], arrowprops=tip, zorder=0)
        (x, y), (x1, y1) = points[:2]
        if text:
            self.text((x + x1) / 2, (y + y1) / 2 + above, text, 9.5)

    def save(self, name):
        write = {"format": "svg", "metadata": {"Date": None}, "facecolor": "white"}
        data.atomic_write(FOLDER / name, lambda tmp: self.figure.savefig(tmp, **write))


def overview(c):
    """Training and sampling, with the sections that explain the parts."""
    d = Drawing(1000, 330)
    for y, name in ((285, "TRAINING"), (125, "SAMPLING")):
        d.text(14, y + 28, name, 10, ha="left", weight="bold", color="#666670")
        d.box(330, y, 84, 36, "T5 (7)", CAPTION)
        d.arrow((245, y), (288, y))
        d.text(208, y, "caption", 11)
        d.arrow((372, y), (610, y), (610, y - 42))
        d.box(610, y - 65, 132, 46, "STDiT\n(8, 9, 10)", OTHER)
        d.arrow((676, y - 65), (738, y - 65))
    d.text(48, 220, "video", 11)
    d.arrow((74, 220), (110, 220))
    d.box(160, 220, 100, 40, "VAE encoder\n(7)", MLP)
    d.arrow((210, 220), (256, 220))
    d.text(276, 220, "$x_0$", 13)
    d.arrow((296, 220), (330, 220))
    d.box(384, 220, 108, 40, "add noise\n(2)", STEP)
    d.arrow((438, 220), (544, 220), text="$x_t$, t", above=11)
    d.text(800, 220, "predicted\nnoise", 11)
    d.arrow((848, 220), (884, 220))
    d.box(936, 220, 104, 40, "loss\n(3, 11)", OTHER)
    d.axis.plot((10, 990), (178, 178), color="#d5d5dd", lw=1)
    d.text(48, 60, "noise", 11)
    d.arrow((80, 60), (544, 60), text="$x_t$, t", above=11)
    d.text(800, 60, "predicted\nnoise", 11)
    d.arrow((848, 60), (884, 60))
    d.box(936, 60, 104, 46, "remove part\n(4, 5, 6)", STEP)
    d.arrow((936, 37), (936, 14), (440, 14), (440, 57))
    d.text(690, 22, "the next $x_t$", 10)
    d.arrow((936, 83), (936, 110))
    d.text(936, 122, "at the end: $x_0$", 11)
    d.arrow((882, 122), (846, 122))
    d.box(796, 122, 100, 36, "VAE decoder", MLP)
    d.arrow((746, 122), (722, 122))
    d.text(696, 122, "video", 11)
    d.save("overview.svg")


def network(c):
    """The whole network, with the shapes of its tensors on the arrows."""
    d = Drawing(1000, 450)
    # from the latents to the output
    d.text(48, 250, "noisy\nlatents $x_t$", 11)
    d.arrow((96, 250), (164, 250), text="[B, C, T,\nH, W]", above=20)
    d.box(206, 250, 84, 54, "patches:\nlinear", OTHER)
    d.box(284, 164, 110, 44, "position\nin space", SPACE)
    d.arrow((284, 186), (284, 237))
    d.arrow((248, 250), (271, 250))
    d.box(284, 250, 26, 26, "+", "white", 13, boxstyle="circle,pad=0")
    d.arrow((297, 250), (377, 250), text="[B, T, S, D]")
    d.box(560, 250, 366, 130, "", "#fafafc", linestyle="--", linewidth=1.2, zorder=-1)
    d.text(388, 304, "block", 11, ha="left")
    d.text(734, 304, "× 28", 12, ha="right", weight="bold")
    parts = (("spatial\nattention", SPACE), ("temporal\nattention", TIME))
    parts += (("cross-\nattention", CAPTION), ("MLP", MLP))
    for k, (name, color) in enumerate(parts):
        d.box(428 + 88 * k, 250, 74, 54, name, color)
        if k:
            d.arrow((377 + 88 * k, 250), (391 + 88 * k, 250))
    d.arrow((743, 250), (820, 250), text="[B, T, S, D]")
    d.box(863, 250, 86, 54, "adaLN,\nlinear", OTHER)
    d.arrow((906, 250), (932, 250))
    d.text(966, 250, "noise,\nvariance\n[B, 2C, T,\nH, W]", 10)
    # the timestep
    d.text(48, 400, "timestep t", 11)
    d.arrow((96, 400), (164, 400), text="[B]")
    d.box(212, 400, 96, 48, "sinusoids,\nMLP", STEP)
    d.arrow((260, 400), (377, 400), text="[B, D]")
    d.box(430, 400, 106, 48, "t_block:\nSiLU, linear", STEP)
    d.arrow((483, 400), (560, 400), (560, 315), text="[B, 6, D]")
    d.text(570, 348, "shift, scale and gate for\nthe attentions and the MLP", 9.5, ha="left")
    d.arrow((346, 400), (346, 436), (863, 436), (863, 277))
    d.text(873, 348, "[B, D]", 9.5, ha="left")
    # the caption and the position in time
    d.text(48, 52, "caption,\nfrom T5", 11)
    d.arrow((96, 52), (164, 52), text="[B, L, E]")
    d.box(212, 52, 96, 48, "MLP", CAPTION)
    d.arrow((260, 52), (604, 52), (604, 223), text="[B, L, D], a mask marks padding")
    d.box(510, 128, 140, 44, "+ position in time\n(first block only)", TIME)
    d.arrow((510, 150), (510, 223))
    d.save("network.svg")


def block(c):
    """The operations of an STDiT block, and the six vectors from the timestep that they use."""
    shades = {"_a": ("#e9dff6", "#cfb9ea", "#aa86d8"), "_m": ("#f6dfec", "#eab9d3", "#d886b0")}
    colors = {n + p: v for p, s in shades.items() for n, v in zip(("shift", "scale", "gate"), s)}
    rows = [  # of a branch: operations before, its main part, its gate
        (("norm", "× (1 + scale_a)", "+ shift_a"), ("spatial attention", SPACE), "gate_a"),
        (("+ position in time\n(first block only)",), ("temporal attention", TIME), "gate_a"),
        ((), ("cross-attention", CAPTION), None),
        (("norm", "× (1 + scale_m)", "+ shift_m"), ("MLP", MLP), "gate_m"),
    ]
    d = Drawing(1000, 430)
    d.arrow((46, 10), (46, 420))
    d.text(58, 16, "x  [B, T, S, D]", 11, ha="left")
    for r, (before, (name, color), gate) in enumerate(rows):
        y = 50 + 95 * r
        d.arrow((46, y), (716, y), (716, y + 48), (60, y + 48))
        d.box(46, y + 48, 24, 24, "+", "white", 14, boxstyle="circle,pad=0")
        for text, x, width in zip(before, (100, 206, 326), (58, 128, 92)):
            shade = next((v for k, v in colors.items() if k in text), OTHER)
            if len(before) == 1:
                x, width, shade = 206, 160, TIME
            d.box(x, y, width, 38, text, shade)
        d.box(470, y, 160, 38, name, color)
        if gate:
            d.box(634, y, 104, 38, f"× {gate}", colors[gate])
    d.arrow((330, 216), (388, 232))
    d.text(322, 212, "caption y  [B, L, D]", 11, ha="right")
    d.text(866, 386, "six vectors: the block's own\ntable + t_block(timestep)", 10.5)
    for k, (name, color) in enumerate(colors.items()):
        d.box(866, 336 - 48 * k, 170, 38, name, color)
    d.text(866, 50, "_a: of the attentions,  _m: of the MLP", 9.5)
    d.save("block.svg")


def four_designs(c):
    """The four designs: the operations of a block, from bottom to top, and what a token sees."""
    space, time = ("spatial", SPACE), ("temporal", TIME)
    caption, mlp = ("cross-attention", CAPTION), ("MLP", MLP)
    parts = {
        "full": [[("all tokens", ALL)], [caption], [mlp]],
        "sequential": [[space], [time], [caption], [mlp]],
        "parallel": [[space, time], [caption], [mlp]],
        "latte": [[space], [caption], [mlp], [time], [mlp]],
    }
    d = Drawing(1000, 560)
    for k, (name, rows) in enumerate(parts.items()):
        middle = 142 + 242 * k
        d.text(middle, 540, name, 13, weight="bold")
        d.arrow((middle, 166), (middle, 214 + 62 * len(rows)))
        for r, boxes in enumerate(rows):
            y, width = 212 + 62 * r, (196 - 16 * (len(boxes) - 1)) / len(boxes)
            xs = [middle + (i - (len(boxes) - 1) / 2) * (width + 16) for i in range(len(boxes))]
            if len(boxes) == 2:  # both read the same input, and their outputs are added
                d.axis.plot((middle, middle), (y - 26, y + 26), color="white", lw=4, zorder=0)
                for edge in (-28, 28):
                    line = ([xs[0]] * 2 + [xs[1]] * 2, [y, y + edge, y + edge, y])
                    d.axis.plot(*line, color=LINE, lw=1.2, zorder=0)
            for x, (text, color) in zip(xs, boxes):
                d.box(x, y, width, 38, text, color, 11)
        kinds = ("all tokens",) if name == "full" else ("spatial", "temporal")
        for row, kind in enumerate(kinds):
            if k < 2:  # of parallel and latte the rows are those of sequential
                d.text(middle - 106, 116 - 66 * row, kind, 9.5, rotation=90)
            for token in range(4 * 16):  # 4 frames of 4 x 4 patches; the one in red is in frame 1
                frame, i, j = token // 16, token // 4 % 4, token % 4
                near = frame == 1 if kind == "spatial" else (i, j) == (1, 2)
                color = "#8fbfe8" if kind == "all tokens" or near else "#ededf0"
                color = "#d62728" if (frame, i, j) == (1, 1, 2) else color
                place = (middle - 92 + 49 * frame + 11 * j, 130 - 11 * i - 66 * row)
                d.axis.add_patch(Rectangle(place, 10, 10, facecolor=color))
        if name == "latte":
            for low, high, text in ((190, 358, "spatial block"), (376, 482, "temporal block")):
                d.axis.plot([middle - 110] * 2, [low, high], color="#888890", lw=1.2)
                d.text(middle - 120, (low + high) / 2, text, 9.5, rotation=90)
    d.save("four_designs.svg")


FIGURES = [one_dimension, schedule, noise, sampling, title, guidance, seeds, attention, training]
FIGURES += [loss, nearest, own_clips, toy, overview, network, block, four_designs]


def main(run: str = "out/toy", own: str = "out/mine", only: tuple[str, ...] = ()):
    """Writes the figures of the tutorial to assets/figures, assets/title.gif and assets/toy.gif.

    Args:
        run: a run of the toy with --sample-every 250, for the figures of the course of training
        own: the run of the tutorial's section 15
        only: names of figures, without the suffix of their files; by default all
    """
    c = Context(run, own)
    needed = {training: c.run / "metrics.jsonl", loss: c.run / "metrics.jsonl"}
    needed[own_clips] = c.own / "checkpoints"
    names = {figure.__name__: figure for figure in FIGURES}
    for name in only:
        data.require(name in names, f"no figure {name}: expected some of {', '.join(names)}")
    for figure in [names[name] for name in only] or FIGURES:
        if figure in needed and not needed[figure].exists():
            print(f"{figure.__name__}: left as it is, there is no {needed[figure]}")
            continue
        with torch.no_grad():
            figure(c)
    for path in (*sorted(FOLDER.iterdir()), *sorted((ROOT / "assets").glob("*.gif"))):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} KB")


if __name__ == "__main__":
    data.run_command(lambda: tyro.cli(main))
