"""Train STDiT on a laptop's CPU or on many GPUs.

    python train.py                             # the toy: makes its data, trains, generates videos
    torchrun --nproc-per-node 2 train.py        # the same with two processes, up to rounding
    torchrun --nproc-per-node 8 train.py --preset 16x256x256 --data CACHE

A run is a folder: checkpoints, metrics.jsonl, loss.png, samples. --resume continues from its newest
checkpoint, on the CPU bit for bit as if it had never stopped.

Shapes in this file:
    B clips in one forward pass on one process    C latent channels    T frames
    H, W latent height and width    L caption tokens    E caption channels
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import default_collate
from tqdm import tqdm

import data
import sample
from data import UserError, keyed_generator, print0
from stdit import MODELS, VARIANTS, STDiT

# ---------------------------------------------------------------------------------------------
# Configuration
#
# TrainConfig holds all options of a run and a preset is an instance of it. tyro turns the fields
# into command-line options. The defaults are the toy's.


# torch.compile needs a C++ compiler and Python's headers.
HEADERS = Path(sysconfig.get_path("include"), "Python.h")
HAS_COMPILER = sys.platform == "linux" and shutil.which("g++") is not None and HEADERS.exists()


@dataclass(frozen=True)
class TrainConfig:
    preset: str = "toy"  # sets the defaults of all other options, see PRESETS in train.py
    resume: bool = False  # continue the run in --out with its options; if there is none, start one
    out: str = ""  # folder of the run; default: out/PRESET
    # model
    model: Literal[tuple(MODELS)] = "toy"  # size of the network, see MODELS in stdit.py
    variant: Literal[VARIANTS] = "sequential"  # design of the block, see stdit.py
    init: str = ""  # pretrained weights: run, folder of tools/convert_weights.py, or Hub name
    space_scale: float = 0.0  # spatial position = index / scale; 0: sqrt(size * width) / 512
    time_scale: float = 0.0  # temporal position = index / scale; 0: that of the model
    trainable: Literal["all", "temporal"] = "all"  # weights to train; temporal: those named *_temp
    # data
    data: str = "toy"  # toy, or a latent cache of data.py; 1 in 20 of its clips is held out
    toy_clips: int = 2048  # training clips of the toy
    frames: int = 8  # frames of a clip
    size: int = 64  # height in pixels
    width: int = 0  # width in pixels; 0: the height
    stride: int = 1  # source frames per frame
    # optimization
    steps: int = 4500  # optimizer steps
    batch_size: int = 16  # clips per step, over all processes
    micro_batch: int = 0  # clips per forward pass of a process; 0: its whole share
    lr: float = 4e-3  # peak learning rate of AdamW; v1: 2e-5, from pretrained weights
    warmup: int = 100  # steps of linear warm-up of the learning rate
    cosine: bool = True  # cosine decay of the learning rate to 0; v1: constant
    weight_decay: float = 0.0  # AdamW's weight decay
    beta2: float = 0.99  # AdamW's second beta
    grad_clip: float = 1.0  # maximum norm of the gradient
    ema_decay: float = 0.99  # exponential moving average of the weights; v1: 0.9999
    drop_caption: float = 0.1  # fraction of captions replaced by the null caption, for guidance
    t_mean: float = 0.4  # timesteps are 1000 sigmoid(t_mean + t_std * normal)
    t_std: float = 1.0  # 0: uniform timesteps, as in v1
    min_snr: float = 0.03  # loss weights min(1, min_snr / SNR) (arXiv 2303.09556); v1: 0, none
    seed: int = 0  # random seed
    # hardware
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # fp32; with bf16 autocast on CUDA
    sp: int = 1  # processes that share each video (sequence parallelism)
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # stdit.STDiTBlock
    compile: bool = HAS_COMPILER  # torch.compile the blocks, where there is a C++ compiler
    # output; an interval of 0 means: only at the end of the run
    log_every: int = 50  # steps between lines of metrics.jsonl; losses are those of one step
    eval_every: int = 500  # steps between validation losses
    sample_every: int = 1500  # steps between sample videos, always of the same captions and noise
    save_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2  # number of newest checkpoints to keep; 0: all
    num_samples: int = 6  # sample videos to write (the toy generates more, to count); 0: none
    sample_steps: int = 10  # denoising steps of sample videos; v1: 100
    guidance: float = 3.0  # classifier-free guidance of sample videos; v1's configs: 7
    guidance_min_t: int = 600  # use guidance only at timesteps >= this; v1: 0
    output_fps: int = 8  # frames per second of sample videos


# The stages of Open-Sora v1, each from the EMA weights of the one before, and one for a smaller
# GPU. At stride 2 instead of 3, frames are 2/3 as far apart in time. Position = index / scale, so
# the time scale is 3/2; v1 has the inverse, 2/3. At 512x512 pixels a micro-batch is one clip.
V1 = TrainConfig(
    model="STDiT-XL/2",
    init="weights/PixArt-XL-2-512x512",
    data="",
    frames=16,
    size=256,
    stride=3,
    steps=80_000,
    batch_size=512,
    micro_batch=8,
    lr=2e-5,
    warmup=0,
    cosine=False,
    beta2=0.999,
    ema_decay=0.9999,
    t_std=0.0,
    min_snr=0.0,
    activation_checkpointing="full",
    log_every=10,
    sample_steps=100,
    guidance=7.0,
    guidance_min_t=0,
)
LARGE = replace(V1, size=512, steps=20_000, batch_size=128, micro_batch=1)
LONG = replace(LARGE, frames=64, stride=2, time_scale=1.5, output_fps=12)
PRESETS = {
    "toy": TrainConfig(),
    "16x256x256": V1,
    "16x256x256-hq": replace(V1, init="out/16x256x256", steps=24_000),
    "16x512x512": replace(LARGE, init="out/16x256x256-hq", activation_checkpointing="none"),
    "64x512x512": replace(LONG, init="out/16x512x512"),
    "16x256x256-24gb": replace(V1, trainable="temporal", batch_size=32, steps=20_000),
}


def parse_command_line(argv=None):
    """The TrainConfig of a command line. --preset, --out and --resume are parsed first, because
    they determine the defaults: those of the preset, or of the run to resume.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="toy")
    first.add_argument("--resume", action="store_true")
    first.add_argument("--out")
    args, _ = first.parse_known_args(argv)
    out = args.out or f"out/{args.preset}"
    default, checkpoint = replace(PRESETS[args.preset], out=out), sample.newest_checkpoint(out)
    if args.resume and checkpoint:
        stored = json.loads((checkpoint / "state.json").read_text())["config"]
        default = replace(TrainConfig(**stored), out=out)
    rank0 = os.environ.get("RANK", "0") == "0"
    config = tyro.cli(
        TrainConfig,
        args=argv,
        default=default,
        description=__doc__.split("\n\nShapes")[0],
        console_outputs=rank0,
    )
    if checkpoint and not args.resume:
        raise UserError(f"{out} holds a run: continue it with --resume, or give another --out")
    return config


def model_config(config):
    """The STDiTConfig of a run."""
    model, width = MODELS[config.model], config.width or config.size
    return replace(
        model,
        variant=config.variant,
        space_scale=config.space_scale or math.sqrt(config.size * width) / 512,
        time_scale=config.time_scale or model.time_scale,
    )


# ---------------------------------------------------------------------------------------------
# Data
#
# Training samples form an endless stream; a position is the global index of a sample in it. Step s
# takes positions s * batch_size to (s + 1) * batch_size - 1, shared among processes. The position
# determines everything random about a sample: clip (a new permutation every epoch), timestep,
# noise, dropped caption. So any number of processes, and a resumed run, see the same samples. There
# is no DataLoader with workers: a clip is one small file (16x256x256: 0.4 ms to read).


@lru_cache(maxsize=2)
def permutation(seed, n, epoch):
    return torch.randperm(n, generator=keyed_generator(seed, "order", epoch)).tolist()


def positions_of_step(config, step, distributed):
    """The positions of a step's samples on this process: a range for each of its micro-batches."""
    d = distributed
    B = config.micro_batch or config.batch_size // d.dp_size
    first = step * config.batch_size + d.dp_rank * B
    end = (step + 1) * config.batch_size
    return [range(i, i + B) for i in range(first, end, B * d.dp_size)]


class Stream:
    """An endless stream of samples: the rows of a LatentCache, in a new order every epoch."""

    def __init__(self, cache, rows, seed):
        self.cache, self.rows, self.seed = cache, rows, seed

    def __len__(self):
        return len(self.rows)

    def batch(self, positions, device):
        """The samples at these positions: x0 [B, C, T, H, W], y [B, L, E], mask [B, L]."""
        samples = []
        for position in positions:
            epoch, i = divmod(position, len(self.rows))
            samples.append(self.cache[self.rows[permutation(self.seed, len(self.rows), epoch)[i]]])
        return [to_device(v, device) for v in default_collate(samples)]


def to_device(tensor, device):
    """Copy a CPU tensor; to a GPU from pinned memory, so that the CPU does not wait for it."""
    if str(device).startswith("cuda"):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def toy_caches(config, distributed):
    """Make the toy's two caches next to the run's folder, or check those that exist. Returns their
    paths, for training and validation.
    """
    c, d, model = config, distributed, MODELS[config.model]
    if c.stride != 1 or c.width not in (0, c.size):
        raise UserError("the toy has --stride 1 and square frames: drop --stride and --width")
    vae = data.VAE("assets/vae")
    vae.check_size(c.frames, c.size, c.size, model.patch_size)
    t5 = data.T5("assets/t5", model.caption_length)
    paths = []
    for split, clips in (("train", c.toy_clips), ("validation", 2 * len(data.TRIPLES))):
        path = Path(c.out).parent / f"toy-{split}-{clips}x{c.frames}x{c.size}"
        data.write_cache(data.Toy(split, clips, c.frames, c.size), path, vae, t5, d)
        paths.append(path)
    return paths


def open_cache(path, config):
    """The LatentCache at `path`; UserError if it does not fit the config."""
    if not path or not (Path(path) / "index.json").is_file():
        raise UserError(f"--data {path!r} is not a latent cache: make one with data.py")
    cache, c, model = data.LatentCache(path), config, MODELS[config.model]
    needed = dict(frames=c.frames, size=c.size, width=c.width or c.size, stride=c.stride)
    needed |= dict(caption_length=model.caption_length, caption_channels=model.caption_channels)
    found = {name: cache.settings[name] for name in needed}
    if found != needed:
        raise UserError(f"the cache {path} has {found}, the run needs {needed}")
    return cache


def open_data(config, distributed):
    """The training and the validation Stream."""
    if config.data == "toy":
        caches = [open_cache(path, config) for path in toy_caches(config, distributed)]
        return [Stream(cache, range(len(cache)), config.seed) for cache in caches]
    cache = open_cache(config.data, config)
    order = permutation(0, len(cache), epoch=-1)  # the same for every seed
    held_out = min(len(cache) // 20, 64)
    validation_rows = order[:held_out] or order  # with fewer than 20 clips: the training clips
    return [Stream(cache, rows, config.seed) for rows in (order[held_out:], validation_rows)]


# ---------------------------------------------------------------------------------------------
# Random draws, each a function of the seed and the sample's position in the stream


def draw(random, config, purpose, keys, *shape):
    """One draw per key from random, torch.rand or torch.randn: [B, *shape]."""
    generators = [keyed_generator(config.seed, purpose, key) for key in keys]
    return torch.stack([random(shape, generator=g) for g in generators])


def draw_timesteps(config, positions):
    """Timesteps t [B], 0 to 999: logit-normal (arXiv 2403.03206), or uniform if t_std is 0.

    They are a low-discrepancy sequence: multiples of the golden ratio, modulo 1, are spread evenly
    over any range of positions, so the mean loss of a batch varies less from step to step.
    """
    start = torch.rand((), generator=keyed_generator(config.seed, "timesteps")).item()
    u = torch.tensor([(start + p * 0.6180339887498949) % 1 for p in positions])  # [B]
    if config.t_std > 0:
        u = torch.sigmoid(config.t_mean + config.t_std * torch.special.ndtri(u))
    return (1000 * u).long().clamp(max=999)


# ---------------------------------------------------------------------------------------------
# The training step


def training_loss(config, model, null, batch, positions):
    """The loss of a batch, [3]: the loss to minimize, the mean MSE and the mean VLB. model: wrapped
    in DDP if there are several processes. null [L, E]: its null caption.
    """
    x0, y, mask = batch  # [B, C, T, H, W], [B, L, E], [B, L]
    device = x0.device
    t = to_device(draw_timesteps(config, positions), device)  # [B]
    noise = to_device(draw(torch.randn, config, "noise", positions, *x0.shape[1:]), device)
    drop = draw(torch.rand, config, "drop", positions) < config.drop_caption  # [B]
    y, mask = sample.drop_captions(y, mask, to_device(drop, device), null)
    schedule = schedule_on(device)
    x_t = sample.q_sample(schedule, x0, t, noise)
    out = model(x_t, t, y, mask)  # [B, 2C, T, H, W]
    losses = sample.diffusion_loss(schedule, out, x0, x_t, t, noise)  # [B] each
    loss = loss_weights(config, t) * (losses["mse"] + losses["vlb"])  # [B]
    return torch.stack([loss.mean(), losses["mse"].mean(), losses["vlb"].mean()])


@lru_cache(maxsize=4)
def schedule_on(device):
    return sample.TRAIN_SCHEDULE.to(device)


def loss_weights(config, t):
    """Min-SNR weights [B] for both terms of the loss (arXiv 2303.09556, section 3.4, prediction of
    noise). The content of a video is decided at large t, where the loss without weights is hundreds
    of times smaller than at small t. The paper uses min_snr = 5; 0.03 was found on the toy.
    """
    schedule = schedule_on(t.device)
    snr = (schedule.alpha[t] / schedule.sigma[t]).square()  # [B]
    return (config.min_snr / snr).clamp(max=1) if config.min_snr else torch.ones_like(snr)


def learning_rate(config, step):
    """Linear warm-up, then constant or half-cosine decay to 0."""
    decay = 0.5 * (1 + math.cos(math.pi * step / config.steps)) if config.cosine else 1.0
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup)) * decay


@torch.no_grad()
def update_ema(config, step, ema, model):
    """ema = decay * ema + (1 - decay) * weights. After n steps the decay is (1 + n) / (10 + n), but
    at most ema_decay, so that the initial weights are soon forgotten.
    """
    decay = min(config.ema_decay, (2 + step) / (11 + step))
    for average, p in zip(ema.parameters(), model.parameters()):
        if p.requires_grad:
            average.lerp_(p, 1 - decay)


# ---------------------------------------------------------------------------------------------
# Evaluation
#
# The mean loss over t says little, because it comes mostly from small t. Three other measures show
# progress: the validation loss in four bins of t, with fixed noise; sample videos, always of the
# same captions and noise; and, on the toy, the number of videos that match their caption according
# to data.detect.


@torch.no_grad()
def validation_loss(config, model, stream, distributed):
    """Mean squared error of the noise on at most 64 validation clips: 4 numbers, for t in 0-249,
    250-499, 500-749, 750-999. Clips are shared among processes.
    """
    d, sums = distributed, torch.zeros(4, dtype=torch.float64)
    clips, size = min(64, len(stream)), config.micro_batch or 8
    share = range(clips)[d.rank :: d.world_size]  # of this process
    for start in range(0, len(share), size):
        positions = share[start : start + size]
        x0, y, mask = stream.batch(positions, d.device)
        for b in range(4):
            keys = [("validation", p, b) for p in positions]
            t = 250 * b + (250 * draw(torch.rand, config, "t", keys)).long().to(d.device)
            noise = draw(torch.randn, config, "noise", keys, *x0.shape[1:]).to(d.device)
            x_t = sample.q_sample(schedule_on(d.device), x0, t, noise)
            eps, _ = model(x_t, t, y, mask).chunk(2, dim=1)
            sums[b] += (eps - noise).square().flatten(1).mean(1).sum().item()
    return (data.all_reduce_sum(sums) / clips).tolist()


def sample_rows(config, validation, last):
    """Rows of the validation cache whose captions are sampled: the first num_samples. On the toy
    one row per caption, unseen ones first; after the last step 2 videos per seen caption and 8 per
    unseen one.
    """
    if config.data != "toy":
        return validation.rows[: config.num_samples]
    unseen = [data.TRIPLES.index(triple) for triple in data.UNSEEN]
    seen = [data.TRIPLES.index(triple) for triple in data.SEEN]
    return 2 * (unseen + seen) + 6 * unseen if last else unseen + seen


def evaluate_toy(captions, videos):
    """{"accuracy": {"seen": [matches, videos], "unseen": the same}, "crispness": the means of
    data.crispness over the videos that match their captions, None if no video does}.
    """
    triples = {data.caption_of(triple): triple for triple in data.TRIPLES}
    accuracy, crispness = {"seen": [0, 0], "unseen": [0, 0]}, []
    for caption, video in zip(captions, videos):
        triple = triples[caption]
        count = accuracy["unseen" if triple in data.UNSEEN else "seen"]
        count[1] += 1
        if data.detect(video) == triple:
            count[0] += 1
            crispness.append(data.crispness(video, triple))
    means = torch.tensor(crispness).nanmean(0).tolist() if crispness else None
    return {"accuracy": accuracy, "crispness": means}


def write_samples(config, step, ema, vae, validation):
    """Generate sample videos and write the first num_samples as GIF and contact sheet. Returns
    their line of metrics.jsonl.
    """
    from torchvision.utils import make_grid

    rows = sample_rows(config, validation, step == config.steps)
    captions = [validation.cache.captions[row] for row in rows]
    x0, y, mask = default_collate([validation.cache[row] for row in rows])
    keys, batch_size = sample.video_keys(config.seed, captions), config.micro_batch or 32
    options = dict(guidance=config.guidance, guidance_min_t=config.guidance_min_t)
    options |= dict(steps=config.sample_steps, sampler="ddpm")
    videos = sample.generate(ema, vae, y, mask, keys, x0.shape[1:], batch_size, **options)
    shown = videos[: config.num_samples]
    grid = torch.stack([make_grid(frames, nrow=3) for frames in torch.stack(shown, dim=1)])
    path = Path(config.out) / "samples" / f"step_{step:08d}"
    data.write_gif(path.with_suffix(".gif"), grid, config.output_fps)
    data.write_sheet(path.with_suffix(".png"), shown, captions)
    metrics = evaluate_toy(captions, videos) if config.data == "toy" else {}
    for name, (matches, count) in metrics.get("accuracy", {}).items():
        print0(f"step {step}  {matches} of {count} videos match {name} captions")
    return {"step": step, "samples": f"{path}.gif"} | metrics


def read_metrics(out):
    """The lines of a run's metrics.jsonl. After a crash it has the lines after the last checkpoint
    twice, on the CPU with the same losses.
    """
    text = (Path(out) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def write_metrics(out, line):
    """Append a line to metrics.jsonl. JSON has no NaN and no infinity: they become null."""
    line = json.loads(json.dumps(line), parse_constant=lambda constant: None)
    with open(Path(out) / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def log_step(config, step, losses, grad_norm, clips_per_second, distributed):
    """Average the losses of this step over processes, print them, write them to metrics.jsonl."""
    c, d = config, distributed
    loss, mse, vlb = (data.all_reduce_sum(losses) / d.world_size).tolist()
    minutes = (c.steps - step) * c.batch_size / clips_per_second / 60
    speed = f"{clips_per_second:.1f} clips/s  about {minutes:.0f} min left"
    print0(f"step {step} of {c.steps}  loss {loss:.4f}  {speed}")
    line = dict(step=step, loss=loss, mse=mse, vlb=vlb, grad_norm=grad_norm)
    line |= dict(lr=learning_rate(c, step - 1), clips_per_second=clips_per_second)
    if d.device.startswith("cuda"):
        line["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if d.rank == 0:
        write_metrics(c.out, line)


def plot_losses(out):
    """Write loss.png: the MSE of the noise in training, and in validation by t."""
    from matplotlib.figure import Figure

    lines, figure = read_metrics(out), Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel="mean squared error of the noise", yscale="log")
    train = {m["step"]: m["mse"] for m in lines if m.get("mse") is not None}
    axes.plot(*zip(*train.items()), color="0.8", label="training, single steps")
    validation = {m["step"]: m["validation"] for m in lines if "validation" in m}
    labels = [f"validation, t {b}-{b + 249}" for b in range(0, 1000, 250)]
    axes.plot(*zip(*validation.items()), label=labels)
    figure.legend(loc="outside right upper")
    data.atomic_write(Path(out) / "loss.png", lambda tmp: figure.savefig(tmp, format="png"))


# ---------------------------------------------------------------------------------------------
# Checkpoints
#
# A checkpoint is a folder that sample.py and --init read: config.json, model.safetensors (the EMA
# weights) and sample.json. To resume, training.pt has the weights and the optimizer's state, and
# state.json the rest. No generator state and no data position are saved: every draw is keyed on the
# position in the stream, which follows from the step.


def save_checkpoint(config, step, model, ema, optimizer, cache):
    """Write out/checkpoints/step_N atomically; delete all but the newest keep_checkpoints."""
    c = config
    vae, t5 = cache.encoders  # names of their sources
    settings = dict(vae=vae, t5=t5, frames=c.frames, size=c.size, width=c.width or c.size)
    settings |= dict(guidance=c.guidance, guidance_min_t=c.guidance_min_t)
    settings |= dict(output_fps=c.output_fps)
    training = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
    state = dict(step=step, config=asdict(c), data=cache.settings)
    folder = Path(c.out) / "checkpoints" / f"step_{step:08d}"
    tmp = folder.with_name("tmp")
    shutil.rmtree(tmp, ignore_errors=True)  # left by an interrupted save
    ema.save_pretrained(tmp)
    data.write_json(tmp / "sample.json", settings)
    torch.save(training, tmp / "training.pt")
    data.write_json(tmp / "state.json", state)
    os.replace(tmp, folder)
    for old in sorted(folder.parent.glob("step_*"))[: -c.keep_checkpoints]:
        shutil.rmtree(old)


def load_checkpoint(folder, model, ema, optimizer, data_settings):
    """Load the state of a run. Returns its step."""
    state = json.loads((folder / "state.json").read_text())
    if state["data"] != data_settings:
        raise UserError(f"{folder} was trained on other data: resume with the same, or use --init")
    training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True, mmap=True)
    model.load_state_dict(training["model"])
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}  # may be new
    optimizer.load_state_dict(training["optimizer"])
    optimizer.param_groups[0].update(options)
    ema.load_state_dict(load_file(folder / "model.safetensors"))
    return state["step"]


# ---------------------------------------------------------------------------------------------
# Setup

stop_requested = False


def request_stop(number, frame):
    """Handler of SIGTERM and Ctrl-C: the run finishes its step, saves and stops. The next Ctrl-C
    stops it immediately.
    """
    global stop_requested
    stop_requested = True
    print0("stopping after the current step; Ctrl-C again stops at once, without saving")
    signal.signal(signal.SIGINT, signal.default_int_handler)


def create_model(config, device, data_settings):
    """Returns model, EMA model, optimizer and step. The weights are random, those of --init, or
    those of the newest checkpoint in config.out, if there is one.
    """
    torch.manual_seed(config.seed)
    stdit_config = model_config(config)
    checkpoint = sample.newest_checkpoint(config.out)
    if config.init and not checkpoint:
        model = sample.load_model(config.init, **vars(stdit_config)).train()
    else:
        model = STDiT(stdit_config)
    model.to(device)
    for name, p in model.named_parameters():
        p.requires_grad_(config.trainable == "all" or "_temp" in name)
    ema = deepcopy(model).requires_grad_(False).eval()  # copied before parallelize
    trainable_params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable_params, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True
    )  # train_step sets the learning rate
    step = load_checkpoint(checkpoint, model, ema, optimizer, data_settings) if checkpoint else 0
    return model, ema, optimizer, step


def parallelize(model, config, distributed):
    """Set up activation checkpointing, compilation, groups and DDP. Returns the model to call."""
    model.sp_group = distributed.sp_group
    for block in model.blocks:
        block.activation_checkpointing = config.activation_checkpointing
        if config.compile:
            block.compile(dynamic=False)
    if distributed.world_size == 1:
        return model
    # Blocks are compiled one by one, so DDP need not split graphs to reduce gradients early.
    torch._dynamo.config.optimize_ddp = False
    return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


# ---------------------------------------------------------------------------------------------
# The loop
#
# `step` is the number of optimizer steps done; train_step does the next one. model is the bare
# STDiT; ddp_model is the one to call, the same or wrapped in DDP.


def train_step(config, step, model, ddp_model, ema, optimizer, stream, distributed):
    """One optimizer step, after `step` others. Returns the means of loss, MSE and VLB over this
    process's samples, [3], and the gradient norm.
    """
    null = model.y_embedder.y_embedding
    losses = torch.zeros(3, device=distributed.device)
    micro_batches = positions_of_step(config, step, distributed)
    n = len(micro_batches)
    for k, positions in enumerate(micro_batches):
        batch = stream.batch(positions, distributed.device)
        accumulate = ddp_model is not model and k < n - 1  # DDP all-reduces in the last one
        with ddp_model.no_sync() if accumulate else nullcontext():
            means = training_loss(config, ddp_model, null, batch, positions)  # [3]
            (means[0] / n).backward()  # micro-batches are equal, so the mean of means is the mean
        losses += means.detach() / n
    # DDP has averaged the gradients, so all processes see the same norm and take the same branch.
    params = [p for p in model.parameters() if p.requires_grad]
    grad_norm = clip_grad_norm_(params, config.grad_clip).item()  # waits for the GPU
    if math.isfinite(grad_norm):
        optimizer.param_groups[0]["lr"] = learning_rate(config, step)
        optimizer.step()
        update_ema(config, step, ema, model)
    else:
        print0(f"step {step + 1}: skipped, its gradient norm is {grad_norm}")
    optimizer.zero_grad(set_to_none=False)  # keeps them in DDP's buckets, without a second copy
    return losses, grad_norm


def train(config, distributed=data.Distributed("cpu")):
    """The whole run. Only rank 0 saves and generates samples; the others wait in the next
    all-reduce.
    """
    c, d, begin = config, distributed, time.time()
    stream, validation = open_data(c, d)
    model, ema, optimizer, start = create_model(c, d.device, stream.cache.settings)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print0(f"{c}\n{model.config}\n{trainable:,} trainable parameters")
    print0(f"{len(stream)} clips, {len(validation)} for validation")
    print0(f"{d.world_size} process(es) on {d.device}")
    ddp_model = parallelize(model, c, d)
    vae = data.VAE(stream.cache.encoders[0], d.device) if d.rank == 0 and c.num_samples else None

    if d.rank == 0 and start == 0:
        Path(c.out).mkdir(parents=True, exist_ok=True)
        (Path(c.out) / "metrics.jsonl").write_text("")

    step, timed_steps, seconds = start, 0, 0.0
    bar = tqdm(total=c.steps, initial=start, disable=None if d.rank == 0 else True)

    def due(every):
        return step >= c.steps or (step > 0 and every > 0 and step % every == 0)

    while True:
        # After `step` steps: save, stop, evaluate, sample; then train. Saving comes first, because
        # a process that has to stop may have little time.
        stop = data.all_reduce_sum(torch.tensor(int(stop_requested), device=d.device)).item()
        if d.rank == 0 and step > start and (stop or due(c.save_every)):
            save_checkpoint(c, step, model, ema, optimizer, stream.cache)
        if stop:
            saved = f"continue with --resume --out {c.out}" if step else "no checkpoint"
            print0(f"stopped after step {step}; {saved}")
            return

        if due(c.eval_every):
            losses = validation_loss(c, ema, validation, d)
            print0(f"step {step}  validation loss by t: {'  '.join(f'{v:.4f}' for v in losses)}")
            if d.rank == 0:
                write_metrics(c.out, {"step": step, "validation": losses})
                plot_losses(c.out)
        if vae and due(c.sample_every):
            write_metrics(c.out, write_samples(c, step, ema, vae, validation))
        if step >= c.steps:
            break

        clock = time.time()
        losses, grad_norm = train_step(c, step, model, ddp_model, ema, optimizer, stream, d)
        step, timed_steps, seconds = step + 1, timed_steps + 1, seconds + time.time() - clock
        bar.update()
        if due(c.log_every):
            log_step(c, step, losses, grad_norm, timed_steps * c.batch_size / seconds, d)
            timed_steps, seconds = 0, 0.0
    bar.close()
    data.barrier()
    print0(f"{c.out}: checkpoints, metrics.jsonl, loss.png, samples; {time.time() - begin:.0f} s")


def main():
    config = parse_command_line()
    distributed = data.init_distributed(config.device, config.sp)
    unit = distributed.dp_size * max(1, config.micro_batch)
    if config.batch_size % unit:
        expected = f"expected a multiple of {unit} (processes / sp x micro_batch)"
        raise UserError(f"batch_size={config.batch_size}: {expected}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)
    train(config, distributed)


if __name__ == "__main__":
    data.run_command(main)
