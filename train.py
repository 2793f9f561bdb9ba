"""Training: one file from the command line to the loss, on a laptop's CPU or on many GPUs.

    python train.py                             # the toy: makes its data, learns, films
    torchrun --nproc-per-node 2 train.py        # the same numbers from two processes
    torchrun --nproc-per-node 8 train.py --preset 16x256x256 --data CACHE --out DIR

Every field of TrainConfig is an option of the command line, over the values of a preset. A run
lives in the folder `out`: checkpoints, metrics.jsonl, loss.png, films. --resume goes on from its
newest checkpoint, on the CPU bit for bit as if it had never stopped.

Shapes, in this file:
    B clips that one process takes at a time    C latent channels    T frames
    H, W latent height and width    L caption tokens    E caption channels
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from data import BadInput, command, keyed_generator, warn, write_json, write_whole
from sample import (
    TRAINING, autocast, caption_accuracy, check_encoder, describe, diffusion_loss, film, film_keys,
    pick_device, q_sample, write_gif, write_sheet,
)  # fmt: skip
from stdit import (
    MODELS, VARIANTS, BadWeights, Block, STDiT, checkpoint_blocks, drop_captions, find_weights,
    load_weights, newest_checkpoint, open_weights, stored_config,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------
# Configuration
#
# A run is one frozen dataclass. A preset is an instance of it; the command line is made from its
# fields. The defaults are the toy's.


@dataclass(frozen=True)
class TrainConfig:
    # what is learned from what
    model: str = "toy"  # a name in stdit.MODELS
    variant: str = "sequential"  # one of stdit.VARIANTS
    init: str = ""  # weights to begin with: whatever stdit.load_weights reads; empty: random ones
    space_scale: float = 0.0  # place = index / scale; 0: the model's (stdit.MODELS)
    time_scale: float = 0.0  # likewise
    trained: str = "all"  # which weights: all, temporal, not-temporal or not-cross(-attention)
    data: str = "toy"  # a cache, a CSV (then the encoders run in every step), or "toy": made here
    held_out: str = ""  # the same, of clips not trained on; empty: 1 in 20 of data's, at most 64
    out: str = "out/toy"  # the run's folder
    vae: str = "assets/vae"  # folder or Hub name of the frozen AutoencoderKL; a cache knows its own
    t5: str = "assets/t5"  # folder or Hub name of the frozen T5 encoder and tokenizer; likewise
    toy_clips: int = 2048  # films that the toy draws
    frames: int = 8  # frames of a clip
    size: int = 64  # height and width in pixels
    stride: int = 1  # source frames per kept frame
    fps: int = 8  # of the films that are written: source rate / stride
    max_bad: float = 0.5  # share of unusable clips in a CSV at which the run ends
    # how
    steps: int = 5000  # optimizer steps, in all
    image_share: float = 0.1  # the first share of them sees single frames, for 1 / frames the cost
    batch_size: int = 16  # clips per step, over all processes: their number changes nothing
    micro_batch: int = 0  # clips that a process takes at a time, as memory allows; 0: all at once
    lr: float = 2e-3  # AdamW's peak; v1: 2e-5, for 760M parameters that were trained before
    warmup: int = 100  # steps in which the learning rate rises from 0
    cosine: bool = True  # let it fall to 0 along a half cosine; v1 keeps it constant
    weight_decay: float = 0.0  # AdamW's
    beta2: float = 0.99  # AdamW's memory of squared gradients: about 1 / (1 - beta2) steps
    clip: float = 1.0  # largest norm of the gradient
    bad_steps: int = 10  # so many steps in a row with a gradient that is not finite end the run
    ema: float = 0.99  # moving average of the weights, over about 1 / (1 - ema) steps; v1: 0.9999
    drop_caption: float = 0.1  # share of captions replaced by the null caption, for guidance
    t_mean: float = 0.4  # timesteps are 1000 sigmoid(t_mean + t_std normal), arXiv 2403.03206
    t_std: float = 1.0  # ... or uniform, as in v1, if t_std is 0
    min_snr: float = 0.03  # loss weights min(1, min_snr / SNR(t)), arXiv 2303.09556; 0: 1, as in v1
    # where and how often
    seed: int = 0  # of every random draw in training (the toy's films and cache keep theirs, 0)
    device: str = "auto"  # auto, cpu, cuda or mps; fp32, on cuda bf16 over fp32 weights
    workers: int = 0  # processes per rank that read data; a small cache needs none
    checkpointing: bool = False  # recompute blocks in the backward pass: less memory, more work
    compile: bool = False  # torch.compile the blocks: minutes at the start, then faster on GPUs
    log_every: int = 50  # steps between lines of metrics.jsonl
    eval_every: int = 500  # steps between evaluations of the held-out loss
    film_every: int = 1500  # steps between films, always of the same captions and noise
    films: int = 6  # captions to film; 0: no films, and no accuracy of the toy
    film_steps: int = 20  # denoising steps of those films, of DPM-Solver++
    guidance: float = 2.5  # of all films; on the toy 4 is less often right, v1 has 7 for its own
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # newest checkpoints that are kept

    def due(self, step):
        """Whether something is to be measured after this step."""
        every = step % self.eval_every == 0 or step % self.film_every == 0
        return step > 0 and (every or step == self.steps)


# Open-Sora v1's settings, stage by stage: each begins with the weights of the one before. Time: v1
# has scale 2/3 in its last stage, which is upside down. Frames 2 apart instead of 3 lie 2/3 as far
# from each other, and place = index / scale, so corresponding places agree at 3/2. Memory: v1's
# third stage took 8 clips at a time without recomputing; by predicted_memory that is 295 GB here.
V1 = TrainConfig(
    model="STDiT-XL/2", space_scale=0.5, time_scale=1.0, data="", stride=3,
    vae="PixArt-alpha/PixArt-XL-2-512x512", t5="PixArt-alpha/PixArt-XL-2-512x512",
    image_share=0.0, batch_size=512, micro_batch=8, lr=2e-5, warmup=0, cosine=False, beta2=0.999,
    ema=0.9999, t_std=0.0, min_snr=0.0, workers=4, checkpointing=True, log_every=10,
    eval_every=1000, film_every=1000, film_steps=20, guidance=7.0, save_every=500,
)  # fmt: skip
PRESETS = {
    "toy": TrainConfig(),
    "16x256x256": replace(V1, frames=16, size=256, steps=80_000, out="out/16x256x256",
                          init="PixArt-alpha/PixArt-XL-2-512x512"),
    "16x256x256-hq": replace(V1, frames=16, size=256, steps=24_000, out="out/16x256x256-hq",
                             init="out/16x256x256"),
    "16x512x512": replace(V1, frames=16, size=512, steps=20_000, out="out/16x512x512",
                          init="out/16x256x256-hq", space_scale=1.0, batch_size=128,
                          checkpointing=False, micro_batch=1),
    "64x512x512": replace(V1, frames=64, size=512, steps=20_000, out="out/64x512x512",
                          init="out/16x512x512", space_scale=1.0, time_scale=1.5, stride=2, fps=12,
                          batch_size=128, micro_batch=4),
    "16x256x256-24gb": replace(V1, frames=16, size=256, steps=20_000, out="out/16x256x256-24gb",
                               init="PixArt-alpha/PixArt-XL-2-512x512", trained="temporal",
                               batch_size=32, workers=0),
}  # fmt: skip
TRAINED = {  # which weights learn, by name
    "all": lambda name: True,
    "temporal": lambda name: "_temp" in name,
    "not-temporal": lambda name: "_temp" not in name,
    "not-cross": lambda name: "cross_attn" not in name,
}


def parse_command_line():
    """(the options that were given, the preset's name, whether to resume)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="toy", help=f"one of: {', '.join(PRESETS)}")
    parser.add_argument("--resume", action="store_true", help="go on from --out's last checkpoint")
    for f in fields(TrainConfig):
        kind = true_or_false if f.type is bool else f.type
        names = {f"--{f.name}", f"--{f.name.replace('_', '-')}"}
        parser.add_argument(*sorted(names), dest=f.name, type=kind, metavar=f.type.__name__)
    args, unknown = parser.parse_known_args()
    options = [f"--{f.name}" for f in fields(TrainConfig)] + ["--preset", "--resume"]
    for option in unknown:
        name = "--" + option.split("=")[0].strip("-").replace("-", "_")
        require(False, f"unknown option {option}; {nearest(name, options)}")
    require(args.preset in PRESETS,
            f"unknown preset {args.preset!r}; {nearest(args.preset, PRESETS)}")  # fmt: skip
    given = {k: v for k, v in vars(args).items() if v is not None}
    return given, given.pop("preset"), given.pop("resume")


def resolve(given, preset, resume):
    """The configuration: of the preset or, to resume, of the run; over it what was given."""
    out = given.get("out", PRESETS[preset].out)
    last = newest_checkpoint(out)
    if not resume:
        require(not last, f"{out} holds a run already; go on with --resume, or give another --out")
        config = replace(PRESETS[preset], **given)
        if config.init:
            find_weights(config.init)  # complain now if there are none
        return config
    require(last, f"{out} holds no run to resume, no checkpoints/step_*; start without --resume")
    state = read_state(last)
    other = sorted(state["config"].keys() - {f.name for f in fields(TrainConfig)})
    require(not other, f"{out} is a run of another version, with the fields {', '.join(other)}")
    config = TrainConfig(**state["config"])
    for k, v in given.items():
        require(k in MAY_CHANGE or v == getattr(config, k), f"{k}={v!r}: the run in {out} has "
                f"{getattr(config, k)!r}; for another, start a new run with --init {out}")  # fmt: skip
    config = replace(config, **given)
    require(config.steps >= state["step"],
            f"steps={config.steps}: {out} has done {state['step']}; ask for more")  # fmt: skip
    return config


# What may differ when a run goes on: how long, where and how often. (More steps stretch the cosine
# of the learning rate and the share of images.) Data and encoders may have moved: they are checked.
MAY_CHANGE = {"out", "steps", "data", "held_out", "vae", "t5", "micro_batch", "bad_steps", "device",
              "workers", "checkpointing", "compile", "log_every", "eval_every", "film_every",
              "films", "film_steps", "guidance", "save_every", "keep", "max_bad"}  # fmt: skip


def true_or_false(text):
    return ("false", "true").index(text.lower()) == 1


def require(ok, message):
    if not ok:
        raise BadInput(message)


def nearest(name, names):
    found = difflib.get_close_matches(name, names, cutoff=0.4)
    return f"nearest: {', '.join(found) or 'see --help'}"


def check(config, world):
    """BadInput where a field, or two together, can't be right."""
    c = config
    for field, names in (("model", MODELS), ("variant", VARIANTS), ("trained", TRAINED)):
        value = getattr(c, field)
        require(value in names, f"{field}={value!r} is unknown; {nearest(value, names)}")
    for low, names in ((1, "steps stride fps log_every eval_every film_every save_every keep "
                           "bad_steps toy_clips"),
                       (0, "films workers warmup min_snr lr weight_decay t_std space_scale "
                           "time_scale micro_batch")):  # fmt: skip
        for name in names.split():
            require(getattr(c, name) >= low, f"{name}={getattr(c, name)}: expected {low} or more")
    for name in ("image_share", "drop_caption", "max_bad", "ema"):
        require(0 <= getattr(c, name) <= 1, f"{name}={getattr(c, name)}: expected a share, 0 to 1")
    require(2 <= c.film_steps <= 999, f"film_steps={c.film_steps}: expected 2 to 999")
    pt, *spatial = MODELS[c.model].patch_size
    unit = 8 * math.lcm(*spatial)  # 8 is the VAE's factor
    near = max(unit, round(c.size / unit) * unit)
    require(c.size == near, f"size={c.size} must divide by {unit} (VAE 8 x patch {unit // 8}); "
                            f"try --size {near}")  # fmt: skip
    require(c.frames > 0 and c.frames % pt == 0,
            f"frames={c.frames} must divide by the patch's {pt}")  # fmt: skip
    group = world * (c.micro_batch or 1)
    batch = math.ceil(max(c.batch_size, 1) / group) * group
    require(c.batch_size == batch,
            f"batch_size={c.batch_size} must divide by {world} process(es) x micro_batch "
            f"{c.micro_batch or 1}; try --batch_size {batch}")  # fmt: skip
    require(c.data, "no data: give --data, a cache that data.py made or a CSV with path,text")
    require(c.trained != "temporal" or (c.image_share == 0 and c.variant != "full"),
            f"trained=temporal needs image_share=0 and a variant with temporal attention; found "
            f"{c.image_share}, {c.variant}")  # fmt: skip
    if c.data == "toy":
        require(c.frames > 1 and c.stride == 1, f"frames={c.frames}, stride={c.stride}: the toy is "
                "about motion, in films as long as a sample; give 2 or more, and 1")  # fmt: skip
        require(not c.held_out, f"held_out={c.held_out!r}: the toy has held-out films of its own")


# ---------------------------------------------------------------------------------------------
# The data stream
#
# The stream is endless: step s of training takes positions s * batch_size to (s + 1) * batch_size -
# 1, of which every process takes its part. A position decides everything random about its sample:
# which clip (a new permutation every epoch), which span, timestep, noise, whether the caption is
# dropped. So any number of processes and workers, and a resumed run, see the same samples.


@lru_cache(maxsize=2)
def permutation(seed, n, epoch):
    return torch.randperm(n, generator=keyed_generator(seed, "order", epoch)).tolist()


class Stream:
    """stream[position] -> a sample of `source` (data.Clips or data.LatentCache), restricted to
    `rows`. In place of a clip that can't be decoded after all comes the clip of the next position
    that can; "replaced" counts.
    """

    def __init__(self, source, rows, seed):
        self.source, self.rows, self.seed = source, rows, seed

    def __getitem__(self, position):
        for p in range(position, position + len(self.rows)):
            epoch, i = divmod(p, len(self.rows))
            row = self.rows[permutation(self.seed, len(self.rows), epoch)[i]]
            try:
                return self.source[row, position] | {"replaced": p - position}
            except data.BadClip as error:
                warn(f"{self.source.rows[row][1]} {error}; another clip takes its place")
        raise BadInput(f"none of the {len(self.rows)} clips can be decoded")


def positions_of(step, k, config, process):
    """What this process takes in micro-batch k of a step: B positions of the stream."""
    B = config.micro_batch or config.batch_size // process.world
    first = step * config.batch_size + (k * process.world + process.rank) * B
    return range(first, first + B)


def micro_batches(config, process):
    """How many of them make a step on each process."""
    B = config.micro_batch or config.batch_size // process.world
    return config.batch_size // (B * process.world)


class Batches:
    """The positions of this process from step `start` on, in micro-batches, for a DataLoader."""

    def __init__(self, config, start, process):
        self.steps, self.config, self.process = range(start, config.steps), config, process

    def __len__(self):
        return len(self.steps) * micro_batches(self.config, self.process)

    def __iter__(self):
        for step in self.steps:
            for k in range(micro_batches(self.config, self.process)):
                yield list(positions_of(step, k, self.config, self.process))


def draw_timesteps(config, positions):
    """Timesteps t [B], spread evenly over any run of positions: the golden ratio's multiples leave
    no gaps.
    """
    start = torch.rand(1, generator=keyed_generator(config.seed, "timesteps")).item()
    u = [(start + p * 0.6180339887498949) % 1 for p in positions]  # in [0, 1)
    if config.t_std > 0:  # denser where it matters, and rarer elsewhere
        normal = [NormalDist().inv_cdf(max(v, 1e-9)) for v in u]
        u = [1 / (1 + math.exp(-config.t_mean - config.t_std * n)) for n in normal]
    return torch.tensor([min(int(1000 * v), 999) for v in u])


def draw_noise(config, positions, shape):
    """Noise [B, C, T, H, W] in fp32, a generator per sample."""
    keys = [(config.seed, "noise", p) for p in positions]
    return torch.stack([torch.randn(shape, generator=keyed_generator(*key)) for key in keys])


def draw_choice(config, purpose, positions):
    """A number in [0, 1) per sample: [B]."""
    keys = [(config.seed, purpose, p) for p in positions]
    return torch.cat([torch.rand(1, generator=keyed_generator(*key)) for key in keys])


# ---------------------------------------------------------------------------------------------
# Processes
#
# torchrun starts a process per GPU, on one machine or many, and tells each its rank. Every process
# has the same weights and its own clips; gradients are averaged over all. What has to be agreed on
# besides goes through the CPU (gloo), so that it never waits for a GPU.


class Process(NamedTuple):
    """Which of the processes this one is, how many there are, and its device."""

    rank: int
    world: int
    device: str

    def sum(self, values):
        """Sum a list of numbers over all processes."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def share(self, work):
        """What work() gives on the first process, for all: files may lie on its machine alone."""
        box = [work() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]

    def gather(self, items):
        """The lists of all processes, on the first: items 0, 1, ... were dealt out one by one."""
        if self.world == 1:
            return items
        lists = [None] * self.world if self.rank == 0 else None
        dist.gather_object(items, lists)
        most = len(lists[0]) if self.rank == 0 else 0
        return [part[i] for i in range(most) for part in lists if i < len(part)]

    def mine(self, items):
        """The part of a list that this process takes."""
        return items[self.rank :: self.world]

    def say(self, text):
        """Print, on the first process alone, without cutting through the progress bar."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()


def set_up_process(device):
    """Read torchrun's variables; without torchrun, one process."""
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)
    rank, world, local = (int(os.environ.get(name, default)) for name, default in names)
    device = pick_device(device)
    require(device != "mps" or world == 1,
            "MPS is one device: start one process, or give --device cpu")  # fmt: skip
    if device == "cuda":
        gpus = torch.cuda.device_count()
        require(local < gpus, f"process {local} of this machine has no GPU, for there are {gpus}; "
                              "start fewer processes")  # fmt: skip
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if world > 1:  # long: the others wait while the first makes the toy or reads a large model
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return Process(rank, world, device)


# ---------------------------------------------------------------------------------------------
# Data and encoders


class Encoders:
    """The frozen encoders, loaded when they are first used: a cache needs them for films alone.

    names: {"vae": source, "t5": source}, and after the first look at the data their fingerprints,
    which are checked.
    """

    def __init__(self, names, length, device):
        self.names, self.length, self.device = names, length, device

    @cached_property
    def vae(self):
        return self.checked(data.VAE(self.names["vae"], self.device), "vae")

    @cached_property
    def t5(self):
        return self.checked(data.T5(self.names["t5"], self.length, self.device), "t5")

    def forget_t5(self):
        """Free its memory, 10 GB for T5-XXL in bf16; it is loaded again if it is asked for."""
        vars(self).pop("t5", None)

    def checked(self, encoder, what):
        if f"{what}_fingerprint" in self.names:
            check_encoder(encoder, self.names, what)
        return encoder


def prepare_toy(config, encoders):
    """Draw and encode the toy where that is not done yet -> its folder."""
    c = config
    folder = Path(f"out/toy-data-{c.toy_clips}x{c.frames}x{c.size}x{c.size}")
    data.make_toy(folder, c.toy_clips, c.frames, c.size)
    for split in ("train", "held_out"):
        cache = folder / f"cache_{split}"
        frozen = encoders.vae, encoders.t5
        data.write_cache(folder / f"{split}.csv", cache, *frozen, c.frames, 1, c.size)
    return folder


def open_source(path, config, process):
    """A cache folder or a CSV -> LatentCache or Clips that fits the configuration."""
    if not Path(path).is_dir():  # the first process looks through the clips, for all
        c = config
        clips = path, c.frames, c.stride, c.size, c.seed, c.max_bad
        return process.share(lambda: data.Clips(*clips))
    cache, model = data.LatentCache(path), MODELS[config.model]
    wanted = {k: getattr(config, k) for k in ("frames", "size", "stride")}
    wanted |= {"caption_length": model.caption_length}
    found = {k: cache.settings[k] for k in wanted}
    found |= {"channels": cache.channels, "captions": cache.caption_channels}
    wanted |= {"channels": model.in_channels, "captions": model.caption_channels}
    different = [f"{k}: {found[k]} there, {v} here" for k, v in wanted.items() if found[k] != v]
    require(not different, f"the cache {path} does not fit the run ({'; '.join(different)}); make "
                           "another with data.py cache, or change the run's fields")  # fmt: skip
    return cache


def open_data(config, process):
    """Make the toy if it is asked for and not there; open what is to be trained on and held out
    -> (source, its rows, held-out source, its rows, encoders).
    """
    length = MODELS[config.model].caption_length
    encoders = Encoders({"vae": config.vae, "t5": config.t5}, length, process.device)
    paths = config.data, config.held_out
    if config.data == "toy":
        folder = process.share(lambda: prepare_toy(config, encoders))
        paths = folder / "cache_train", folder / "cache_held_out"
    source = held_source = open_source(paths[0], config, process)
    order = permutation(config.seed, len(source), "split")
    k = min(len(source) // 20, 64)
    rows, held_rows = sorted(order[k:]), sorted(order[:k])
    if paths[1]:
        held_source = open_source(paths[1], config, process)
        rows, held_rows = range(len(source)), range(len(held_source))
    elif k == 0:
        held_rows = rows
        process.say(f"{len(source)} clips are too few to hold any out: the held-out loss is of "
                    "training clips")  # fmt: skip
    names, held_names = (encoder_names(config, s, encoders) for s in (source, held_source))
    require(names == held_names,
            f"data was encoded with {names}, held_out with {held_names}; use the same")  # fmt: skip
    encoders.names = names
    if config.films:  # they are wanted later: complain now if they are not there
        data.locate(names["vae"], "vae"), data.locate(names["t5"], "text_encoder")
    return source, rows, held_source, held_rows, encoders


def encoder_names(config, source, encoders):
    """What sample.py needs to know of the encoders of the latents: names and fingerprints."""
    if isinstance(source, data.LatentCache):
        return {"vae": source.vae, "vae_fingerprint": source.settings["vae"],
                "t5": source.t5, "t5_fingerprint": source.settings["t5"]}  # fmt: skip
    return {"vae": config.vae, "vae_fingerprint": encoders.vae.fingerprint,
            "t5": config.t5, "t5_fingerprint": encoders.t5.fingerprint}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Checkpoints
#
# Weights, their average, the optimizer's state, and the step. That is all: the data position
# follows from the step, and no random generator has a state to keep, since every draw is keyed. The
# first process alone writes and reads; the others are told.


def save_checkpoint(config, step, model, ema, optimizer, encoders):
    """Write out/checkpoints/step_N beside, then rename; delete all but the newest `keep`. If the
    disk is full, the checkpoint before it stays, and BadInput says so.
    """
    folder = Path(config.out) / "checkpoints" / f"step_{step:08d}"
    beside = folder.with_name(f".{folder.name}")
    if folder.exists():
        return
    shutil.rmtree(beside, ignore_errors=True)
    moments = {f"{name}.{key}": value for name, weight in model.named_parameters()
               for key, value in optimizer.state.get(weight, {}).items()}  # fmt: skip
    weights, hashes = model.state_dict(), {}
    try:
        beside.mkdir(parents=True)
        for name, tensors in (("model", weights), ("ema", weights | ema), ("optimizer", moments)):
            path = beside / f"{name}.safetensors"
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)
            with open(path, "rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
        write_json(beside / "state.json", {
            "step": step, "config": asdict(config), "model": asdict(model.config),
            "encoders": encoders, "sha256": hashes, "torch": torch.__version__,
        })  # fmt: skip
        os.replace(beside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        last = newest_checkpoint(config.out)
        raise BadInput(f"checkpoint {folder} can't be written ({error}); the last whole one is "
                       f"{last}; make room and go on with --resume --out {config.out}") from None  # fmt: skip
    for old in sorted(folder.parent.glob("step_*"))[: -config.keep]:
        os.replace(old, beside)  # renamed first: what is half deleted is no checkpoint any more
        shutil.rmtree(beside)


def read_state(folder):
    """state.json of a checkpoint: everything but its tensors."""
    advice = f"delete {folder} to go on from the checkpoint before it"
    return data.read_json(folder / "state.json", advice)


def load_checkpoint(config, model, learning, ema, optimizer, encoders):
    """Put the newest checkpoint of config.out into all of these -> step. learning: {name: weight}."""
    folder = newest_checkpoint(config.out)
    state, names = read_state(folder), ("model", "ema", "optimizer")
    for what, here in (("model", asdict(model.config)), ("encoders", encoders)):
        there = json.loads(json.dumps(here)) if what == "model" else here  # tuples to lists
        different = [k for k in there if state[what].get(k) != there[k]]
        require(not different, f"{config.out} has another {what}: {', '.join(different)} differ(s); "
                               "start a new run, with --init to begin with its weights")  # fmt: skip
    try:  # open_weights compares each file with its hash
        weights, average, moments = (open_weights(folder / f"{n}.safetensors") for n in names)
    except BadWeights as error:
        raise BadInput(f"{error}; delete {folder} to go on from the checkpoint before it") from None
    model.load_state_dict(weights)
    for name, tensor in ema.items():
        tensor.copy_(average[name])
    for name, weight in learning.items():  # AdamW has no state for what had no gradient yet
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in moments]
        optimizer.state[weight] |= {
            key: moments[f"{name}.{key}"].to(weight.device, copy=True) for key in keys
        }
    return state["step"]


def tell_all(process, model, learning, ema, optimizer, step):
    """Give what the first process has loaded to the others, whose disks may not hold it -> step."""
    known = [name for name, weight in learning.items() if optimizer.state[weight]]
    step, known = process.share(lambda: (step, known))
    for name in known if process.rank else ():
        w = learning[name]
        optimizer.state[w] |= {"step": torch.zeros((), device=w.device),
                               "exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)}  # fmt: skip
    moments = [v for name in known for v in optimizer.state[learning[name]].values()]
    for tensor in [*model.state_dict().values(), *ema.values(), *moments]:
        dist.broadcast(tensor.detach(), 0)
    return step


# ---------------------------------------------------------------------------------------------
# Is it learning?
#
# The loss hardly falls while films get better: most of it is noise that nobody could predict. Three
# things do tell. The loss on held-out clips with noise and timesteps that are always the same, in
# four bins of t: the bins of large t, where the film is decided, move by little but move. Films of
# the same captions from the same noise, which sharpen. And, on the toy, the share of films that
# show what their caption says, as data.detect sees them.


@torch.no_grad()
def held_out_loss(config, model, source, rows, encoders, process):
    """[4] losses of the noise on held-out clips (64 of them at most), by t: 0-249, 250-499,
    500-749, 750-999. The clips are shared among the processes.
    """
    device, sums = process.device, [0.0] * 8
    work = process.mine([(row, b) for row in rows[:64] for b in range(4)])
    at_once = config.micro_batch or 32
    for part in (work[i : i + at_once] for i in range(0, len(work), at_once)):
        batch = torch.utils.data.default_collate([source[row, row] for row, _ in part])
        generators = [keyed_generator(config.seed, "held-out posterior", row) for row, _ in part]
        x0, y, mask = to_device(batch, encoders, generators, device)
        keys, bins = [f"held out {row} {b}" for row, b in part], [b for _, b in part]
        within = (250 * draw_choice(config, "held-out t", keys)).long()
        t = torch.tensor(bins) * 250 + within  # [B]
        noise = draw_noise(config, keys, x0.shape[1:]).to(device)
        x_t = q_sample(TRAINING, x0, t, noise)
        with autocast(device):
            out = model(x_t, t.to(device), y, mask)
        for b, mse in zip(bins, diffusion_loss(TRAINING, out, x0, x_t, t, noise)["mse"].tolist()):
            sums[b] += mse
            sums[4 + b] += 1
    sums = process.sum(sums)
    return [sums[b] / max(sums[4 + b], 1) for b in range(4)]


def evaluate(config, model, held_out, encoders, captions, step, metrics, process):
    """Measure what is due after this step: held-out loss, films, the toy's caption accuracy."""
    last, shape = step == config.steps, latent_shape(config)
    if (step % config.eval_every == 0 or last) and not metrics.has(step, "held_out"):
        bins = held_out_loss(config, model, *held_out, encoders, process)
        metrics.write(step=step, held_out=bins)
        process.say(f"step {step}  held-out loss by t: {'  '.join(f'{b:.4f}' for b in bins)}")
        if process.rank == 0:
            plot_losses(config.out)
    if not config.films or metrics.has(step, "films") or (step % config.film_every and not last):
        return
    # Always the same captions and the same noise, so that one sees the same films sharpen.
    options = {"steps": config.film_steps, "guidance": config.guidance, "sampler": "dpm"}
    texts, *embedded = captions  # y [N, L, E], mask [N, L]
    y, mask, keys = (process.mine(part) for part in (*embedded, film_keys(config.seed, texts)))
    videos = film(model, encoders.vae, y, mask, keys, shape, config.micro_batch or 8, **options)
    videos, path = process.gather(videos), Path(config.out)
    path = path / ("films" if last else f"films/step_{step:08d}")
    if process.rank == 0:
        rows = [videos[i : i + 3] for i in range(0, len(videos) // 3 * 3, 3)] or [videos[:1]]
        grid = torch.cat([torch.cat(row, dim=-1) for row in rows], dim=-2)  # side by side
        write_gif(path.with_suffix(".gif"), grid, config.fps)
        write_sheet(path.with_suffix(".png"), videos, texts)
    accuracy = None
    if config.data == "toy":
        times = (2, 8) if last else (1, 1)  # films of a seen and of an unseen caption
        part = caption_accuracy(model, encoders.vae, encoders.t5, times, config.seed, shape,
                                process.rank, process.world, **options)  # fmt: skip
        accuracy = [int(count) for count in process.sum(part)]
        process.say(f"step {step}: {describe(accuracy)}")
    metrics.write(step=step, films=f"{path}.gif", accuracy=accuracy)


def captions_to_film(config, source, rows, encoders, process):
    """(texts, y [N, L, E], mask [N, L]): of the toy the captions that training never shows."""
    texts = list(dict.fromkeys(source.text(row) for row in rows))  # in order, each once
    if config.data == "toy":
        texts = [data.caption_of(triple) for triple in data.HELD_OUT]
    texts = texts[: config.films]
    if not texts:
        return texts, None, None
    return texts, *process.share(lambda: [v.cpu() for v in encoders.t5.encode(texts)])


def latent_shape(config):
    """(C, T, H, W) of one film."""
    return MODELS[config.model].in_channels, config.frames, config.size // 8, config.size // 8


def plot_losses(out):
    """loss.png from metrics.jsonl of a run and of the runs that it went on from, each a stage:
    training loss, smoothed, and the held-out loss in its four bins of t.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages, run = [], Path(out)
    while run and (run / "metrics.jsonl").is_file() and len(stages) < 9:
        stages.insert(0, [json.loads(line) for line in (run / "metrics.jsonl").open()])
        last = newest_checkpoint(run)
        init = read_state(last)["config"].get("init") if last else None
        run = Path(init) if init else None
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    begin = 0
    for lines in stages:
        train, held = [m for m in lines if "loss" in m], [m for m in lines if "held_out" in m]
        smooth = []
        for m in train:
            smooth.append(0.9 * smooth[-1] + 0.1 * m["mse"] if smooth else m["mse"])
        steps = [begin + m["step"] for m in train]
        axes[0].plot(steps, [m["mse"] for m in train], color="0.8")
        axes[0].plot(steps, smooth, color="C0")
        for b in range(4):
            label = f"t {b * 250}-{b * 250 + 249}" if begin == 0 else None
            steps, losses = zip(*[(begin + m["step"], m["held_out"][b]) for m in held] or [((), ())])
            axes[1].plot(steps, losses, color=f"C{b}", label=label)
        begin += max((m["step"] for m in lines), default=0)
        for axis in axes if lines is not stages[-1] else ():
            axis.axvline(begin, color="0.5", linestyle=":")
    axes[0].set(title="training: loss of the noise", xlabel="step", yscale="log")
    axes[1].set(title="held-out clips: loss of the noise, by t", xlabel="step", yscale="log")
    figure.legend(loc="outside right center")
    write_whole(Path(out) / "loss.png", lambda p: figure.savefig(p, format="png", dpi=100))
    plt.close(figure)


class Metrics:
    """out/metrics.jsonl, a JSON object per line, written by the first process alone: the interface
    for other tools. Of a resumed run's lines, those of what is to be done again are dropped.
    """

    def __init__(self, out, step, process):
        self.path, self.is_main = Path(out) / "metrics.jsonl", process.rank == 0
        self.lines = process.share(lambda: self.up_to(step))
        if self.is_main:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            write_whole(self.path, lambda p: p.write_text(text))

    def up_to(self, step):
        text = self.path.read_text() if self.path.exists() else ""
        whole = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
        return [line for line in whole if line["step"] <= step]

    def has(self, step, name):
        return any(line["step"] == step and name in line for line in self.lines)

    def write(self, **line):
        if self.is_main:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------------------------------------
# What a step costs
#
# FLOPs are counted by torch on tensors without content; the backward pass costs twice the forward,
# and recomputed blocks do not count as work done. Memory is added up before the run, so that a
# setting that can't fit is seen at once.

PEAK = {"H100": 989, "H200": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362,
        "RTX 4090": 165, "RTX 3090": 71}  # fmt: skip
# TFLOP/s of dense bf16, from the maker's data sheets


class Cost:
    """Tokens and FLOPs of a clip, and what share of the GPU's peak a rate of clips is."""

    def __init__(self, config, process):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model, c = STDiT(model_config(config)), model_config(config)
            x = torch.empty(1, *latent_shape(config))
            model(x, torch.empty(1), torch.empty(1, c.caption_length, c.caption_channels))
        self.flops, self.world = 3 * counter.get_total_flops(), process.world
        self.tokens = x[0, 0].numel() // math.prod(c.patch_size)
        self.cuda = process.device.startswith("cuda")
        name = torch.cuda.get_device_name() if self.cuda else ""
        self.peak = next((1e12 * peak for gpu, peak in PEAK.items() if gpu in name), None)

    def of(self, rate):
        """Of `rate` clips a second, on all processes together."""
        cost = {"tokens_per_second": rate * self.tokens}
        if self.cuda:
            cost["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if self.peak:
            cost["share_of_peak"] = rate * self.flops / self.world / self.peak
        return cost


def predicted_memory(config, model, process):
    """GB on each device: fp32 weights; of those that learn, gradient, AdamW's two moments, average;
    and what the blocks keep for the backward pass, measured on few tokens and scaled up.
    """
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = 4 * sum(p.numel() for p in model.parameters()) + 16 * learning
    D, kept = model.config.hidden_size, []
    block = Block(model.config).to(process.device)
    for tokens in (64, 128):
        held = {}  # storages, each once

        def hold(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.zeros(1, 4, tokens // 4, D, device=process.device, requires_grad=True)
        y, rows = x[:, 0, :1], x[:, 0, :6]
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            with autocast(process.device):
                block(x, y, None, rows, None).sum()
        kept.append(sum(held.values()))
    inside = (kept[1] - kept[0]) / 64  # bytes a token, in one block
    tokens = math.prod(latent_shape(config)[1:]) // math.prod(model.config.patch_size)
    tokens *= config.micro_batch or config.batch_size // process.world
    blocks = model.config.depth
    stored = blocks * 4 * D + inside if config.checkpointing else blocks * inside
    return (fixed + tokens * stored) / 1e9


# ---------------------------------------------------------------------------------------------
# The loop


def to_device(batch, encoders, generators, device):
    """A collated batch -> x0 [B, C, T, H, W], y [B, L, E], mask [B, L] on the device; clips are
    encoded.
    """
    if "latents" in batch:  # of a cache: {"latents" [B, C, T, H, W], "y" [B, L, E], "mask" [B, L]}
        return (batch[k].to(device, non_blocking=True) for k in ("latents", "y", "mask"))
    return (v.to(device) for v in data.encode_batch(batch, encoders.vae, encoders.t5, generators))


def training_loss(config, parallel, model, batch, encoders, positions, images):
    """From a batch to the scalar loss -> [3]: the loss, and its parts mse and vlb. parallel: the
    model as DDP wraps it. All that is random about a sample hangs on its position in the stream.
    """
    device = next(model.parameters()).device
    generators = [keyed_generator(config.seed, "posterior", p) for p in positions]
    # [B, C, T, H, W], [B, L, E], [B, L]
    x0, y, mask = to_device(batch, encoders, generators, device)
    if images:  # x0 becomes [B, C, 1, H, W]
        frames = (draw_choice(config, "frame", positions) * x0.shape[2]).long().tolist()
        x0 = torch.stack([clip[:, f, None] for clip, f in zip(x0, frames)])
    t = draw_timesteps(config, positions)  # [B], on the CPU
    noise = draw_noise(config, positions, x0.shape[1:]).to(device)  # [B, C, T, H, W]
    drop = (draw_choice(config, "drop", positions) < config.drop_caption).to(device)  # [B]
    y, mask = drop_captions(y, mask, drop, model.y_embedder.y_embedding)
    x_t = q_sample(TRAINING, x0, t, noise)
    with autocast(device):
        out = parallel(x_t, t.to(device), y, mask)  # [B, 2C, T, H, W]
    parts = diffusion_loss(TRAINING, out, x0, x_t, t, noise)  # [B] each
    loss = loss_weights(config, t).to(device) * (parts["mse"] + parts["vlb"])  # [B]
    return torch.stack([loss.mean(), parts["mse"].mean(), parts["vlb"].mean()])


def loss_weights(config, t):
    """[B] weights for t [B]. The loss of the noise at small t is ten to a hundred times that at
    large t, where the film's content is decided; min-SNR weights (arXiv 2303.09556, eq. 7, for
    noise prediction) keep it from drowning the rest.
    """
    if config.min_snr == 0:
        return torch.ones(len(t))
    abar = TRAINING.abar[t]
    return (config.min_snr * (1 - abar) / abar).clamp(max=1).float()


def on_images(config, step):
    """Whether a step trains on single frames, as v1 began from an image model (report, A5)."""
    return step < config.image_share * config.steps


def learning_rate(config, step):
    """Linear warm-up, then constant or a half cosine down to 0."""
    decay = 0.5 * (1 + math.cos(math.pi * step / config.steps)) if config.cosine else 1.0
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup)) * decay


@torch.no_grad()
def update_average(ema, learning, decay):
    """ema = decay * ema + (1 - decay) * weights, in fp32."""
    torch._foreach_lerp_(list(ema.values()), [learning[name] for name in ema], 1 - decay)


@contextmanager
def averaged(learning, ema):
    """Inside the `with`, the model has the averaged weights."""
    raw = [p.detach().clone() for p in learning.values()]
    with torch.no_grad():
        torch._foreach_copy_(list(learning.values()), list(ema.values()))
        yield
        torch._foreach_copy_(list(learning.values()), raw)


@contextmanager
def interruptible():
    """Inside the `with`, SIGTERM and Ctrl-C only set a flag: the step is finished first."""
    asked, signals = [], (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(s, lambda *_: asked.append(True)) for s in signals]
    try:
        yield asked
    finally:
        for s, handler in zip(signals, before):
            signal.signal(s, handler)


def leave_signals(_):
    """Data workers leave it to their process to stop them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def train(config, resume=False, process=Process(0, 1, "cpu")):
    """The whole run, from a configuration to films."""
    start = time.time()
    source, rows, held_source, held_rows, encoders = open_data(config, process)

    torch.manual_seed(config.seed)  # the initial weights, the same everywhere
    model = STDiT(model_config(config)).to(process.device)
    for name, p in model.named_parameters():
        p.requires_grad_(TRAINED[config.trained](name))
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if config.init and not resume:
        process.say(initialize(config, model, encoders))
    ema = {name: p.detach().clone() for name, p in learning.items()}
    optimizer = torch.optim.AdamW(
        learning.values(), lr=config.lr, betas=(0.9, config.beta2),
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    step = 0
    if resume and process.rank == 0:
        step = load_checkpoint(config, model, learning, ema, optimizer, encoders.names)
    if resume and process.world > 1:
        step = tell_all(process, model, learning, ema, optimizer, step)
    captions = captions_to_film(config, held_source, held_rows, encoders, process)
    if isinstance(source, data.LatentCache):  # the text encoder has done its work
        encoders.forget_t5()
    process.say(banner(config, model, step, len(rows), len(held_rows), process))
    if config.checkpointing:
        checkpoint_blocks(model)
    if config.compile:
        for block in model.blocks:
            block.compile()
    parallel = model
    if process.world > 1:
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
    metrics = Metrics(config.out, step, process)

    def save():
        save_checkpoint(config, step, model, ema, optimizer, encoders.names)

    loader = iter(DataLoader(
        Stream(source, rows, config.seed), batch_sampler=Batches(config, step, process),
        num_workers=config.workers, pin_memory=process.device.startswith("cuda"),
        multiprocessing_context="spawn" if config.workers else None, worker_init_fn=leave_signals,
    ))  # fmt: skip
    n, cost = micro_batches(config, process), Cost(config, process)
    quiet = None if process.rank == 0 else True  # None: a bar on a terminal, else lines (report)
    bar = tqdm(initial=step, total=config.steps, disable=quiet, unit="step")
    skipped = in_a_row = replaced = 0
    since, clock = step, time.time()

    with interruptible() as asked:
        while True:
            # The data of a whole step first; then all processes go on, or all stop.
            batches, failure = [], None
            try:
                batches = [next(loader) for _ in range(n)] if step < config.steps else []
            except BadInput as error:
                failure = error
            stop, failed = process.sum([bool(asked), failure is not None])
            if stop or failed:
                break
            if config.due(step):
                with averaged(learning, ema):
                    evaluate(config, model, (held_source, held_rows), encoders, captions, step,
                             metrics, process)  # fmt: skip
                since, clock = step, time.time()
            if step == config.steps:
                break

            losses, images = torch.zeros(3, device=process.device), on_images(config, step)
            for k, batch in enumerate(batches):  # gradients add up; DDP averages with the last
                replaced += batch["replaced"].sum().item()
                positions = positions_of(step, k, config, process)
                wait = process.world > 1 and k < n - 1
                with parallel.no_sync() if wait else nullcontext():
                    parts = training_loss(
                        config, parallel, model, batch, encoders, positions, images
                    )  # [3]
                    (parts[0] / n).backward()  # shards are equal, so the mean of means is the mean
                losses += parts.detach() / n
            if images and config.variant in ("sequential", "parallel"):
                for block in model.blocks:  # one frame has nothing to connect: let it be as it is
                    block.attn_temp.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            # After DDP's mean the norm is the same number everywhere, so all do the same with it.
            norm = clip_grad_norm_(learning.values(), config.clip).item()  # waits for the GPU
            step += 1
            if math.isfinite(norm):
                optimizer.step()
                update_average(ema, learning, min(config.ema, (1 + step) / (10 + step)))
                in_a_row = 0
            else:
                skipped, in_a_row = skipped + 1, in_a_row + 1
                process.say(f"step {step}: its gradient is {norm}; skipped ({in_a_row} in a row)")
                require(in_a_row < config.bad_steps,
                        f"{in_a_row} steps in a row had a gradient that is not finite; the last "
                        f"checkpoint is {newest_checkpoint(config.out)}: --resume with other data, "
                        "or start anew with a smaller --lr")  # fmt: skip
            optimizer.zero_grad()
            bar.update()
            if step % config.log_every == 0 or step == config.steps:
                loss, mse, vlb = (v / process.world for v in process.sum(losses.tolist()))
                rate = (step - since) * config.batch_size / (time.time() - clock)
                line = {"step": step, "loss": loss, "mse": mse, "vlb": vlb, "grad_norm": norm,
                        "lr": learning_rate(config, step - 1), "clips_per_second": rate,
                        **cost.of(rate), "skipped": skipped, "seconds": time.time() - start,
                        "replaced": int(process.sum([replaced])[0])}  # fmt: skip
                metrics.write(**line)
                report(line, bar, config, process)
                since, clock = step, time.time()
            if step % config.save_every == 0 or step == config.steps:
                process.share(save)
        bar.close()
        if stop or failed:
            process.share(save)
            process.say(f"stopped after step {step}, saved; go on: --resume --out {config.out}")
    if failed:
        raise failure or SystemExit(2)
    if not stop:
        films = ", films.gif, films.png" if config.films else ""
        process.say(f"{config.steps} steps in {time.time() - start:.0f} s, in {config.out}: "
                    f"checkpoints, metrics.jsonl, loss.png{films}")  # fmt: skip


def report(line, bar, config, process):
    """Show a line of metrics: on the bar, or as text where there is no terminal."""
    shown = {"loss": f"{line['loss']:.4f}", "clips/s": f"{line['clips_per_second']:.1f}",
             "tokens/s": f"{line['tokens_per_second']:.0f}"}  # fmt: skip
    if line.get("share_of_peak"):
        shown["of peak"] = f"{line['share_of_peak']:.0%}"
    if "memory_gb" in line:
        shown["GB"] = f"{line['memory_gb']:.1f}"
    bar.set_postfix(shown)
    if bar.disable:
        left = (config.steps - line["step"]) * config.batch_size / line["clips_per_second"] / 60
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        process.say(f"step {line['step']} of {config.steps}  {text}  {left:.1f} min left")


def model_config(config):
    """The network's configuration: that of its name, with this run's variant and scales."""
    model = MODELS[config.model]
    space, time = config.space_scale or config.size / 512, config.time_scale or model.time_scale
    return replace(model, variant=config.variant, space_scale=space, time_scale=time)


def initialize(config, model, encoders):
    """Begin with the weights of config.init -> a line that says what they are. Positions follow
    from this run's scales, whatever the weights were trained with: that is how a model of small
    films goes on with large ones (report, T1).
    """
    new = load_weights(model, config.init, lambda: encoders.t5.null_caption())
    stored = stored_config(config.init)
    was = f"{stored.space_scale}, {stored.time_scale}" if stored else "none"
    return (f"from {config.init}: {len(new)} tensors are new; space_scale="
            f"{model.config.space_scale}, time_scale={model.config.time_scale} (stored: {was})")  # fmt: skip


def banner(config, model, step, clips, held_out, process):
    """The resolved run, once."""
    count = sum(p.numel() for p in model.parameters())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    precision = "bf16 over fp32 weights" if process.device.startswith("cuda") else "fp32"
    n, B = micro_batches(config, process), len(positions_of(0, 0, config, process))
    return (f"{config.model}, {config.variant}: {count:,} parameters, {learning:,} of them learn; "
            f"{clips} clips of {config.frames}x{config.size}x{config.size}, {held_out} held out; "
            f"{process.world} process(es) on {process.device}, {precision}, {n} x {B} clips a step "
            f"each, about {predicted_memory(config, model, process):.2f} GB; steps {step} to "
            f"{config.steps}\n"
            + " ".join(f"{k}={v}" for k, v in asdict(config).items()))  # fmt: skip


def main():
    given, preset, resume = parse_command_line()
    process = set_up_process(given.get("device", PRESETS[preset].device))
    config = process.share(lambda: resolve(given, preset, resume))
    check(config, process.world)
    train(config, resume, process)
    if process.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main, BadWeights)
