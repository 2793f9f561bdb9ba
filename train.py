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
import atexit
import difflib
import gc
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import NormalDist

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
from data import (
    BadInput, Process, command, keyed_generator, require, set_up_process, sha256_of, warn,
    write_gif, write_json, write_sheet, write_whole,
)  # fmt: skip
from sample import (
    TRAINING, autocast, caption_accuracy, check_encoder, describe, diffusion_loss, film, film_keys,
    q_sample,
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
    space_scale: float = 0.0  # place = index / scale; 0: sqrt(size * width) / 512, as in v1
    time_scale: float = 0.0  # likewise; 0: the model's (stdit.MODELS)
    trained: str = "all"  # which weights: all, temporal, not-temporal or not-cross(-attention)
    data: str = "toy"  # a cache, clips (a folder or CSV, encoded in every step), or the toy
    held_out: str = ""  # the same, of clips not trained on; empty: 1 in 20 of data's, at most 64
    out: str = "out/toy"  # the run's folder
    vae: str = "assets/vae"  # folder or Hub name of the frozen AutoencoderKL; a cache knows its own
    t5: str = "assets/t5"  # folder or Hub name of the frozen T5 encoder and tokenizer; likewise
    toy_clips: int = 2048  # films that the toy draws
    frames: int = 8  # frames of a clip
    size: int = 64  # height in pixels
    width: int = 0  # in pixels; 0: the height
    stride: int = 1  # source frames per kept frame
    fps: int = 8  # of the films that are written: source rate / stride
    flip: bool = False  # mirror half of the clips; a cache knows its own, as of the next
    clean: bool = True  # take out of captions what says nothing about the film
    max_bad: float = 0.5  # share of unusable clips at which the run ends
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
    sp: int = 1  # processes that share each film: for films that are too large for one GPU
    workers: int = 0  # processes per rank that read data; a small cache needs none
    checkpointing: str = "none"  # what blocks compute twice to save memory: all, or but-products
    compile: bool = False  # torch.compile the blocks: minutes at the start, then faster on GPUs
    log_every: int = 50  # steps between lines of metrics.jsonl
    eval_every: int = 500  # steps between evaluations of the held-out loss
    film_every: int = 1500  # steps between films, always of the same captions and noise
    films: int = 6  # captions to film; 0: no films, and no accuracy of the toy
    film_steps: int = 20  # denoising steps of those films, of DPM-Solver++
    guidance: float = 2.0  # of all films; on the toy 4 is less often right, v1 has 7 for its own
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # newest checkpoints that are kept


# Open-Sora v1's settings, stage by stage: each begins with the weights of the one before. Time: v1
# has scale 2/3 in its last stage, which is upside down. Frames 2 apart instead of 3 lie 2/3 as far
# from each other, and place = index / scale, so corresponding places agree at 3/2. Memory: v1's
# third stage took 8 clips at a time without recomputing, which by predicted_memory no GPU holds
# here; so it is 1 at a time, and the same batch.
V1 = TrainConfig(
    model="STDiT-XL/2", space_scale=0.5, time_scale=1.0, data="", stride=3,
    vae="PixArt-alpha/PixArt-XL-2-512x512", t5="PixArt-alpha/PixArt-XL-2-512x512",
    image_share=0.0, batch_size=512, micro_batch=8, lr=2e-5, warmup=0, cosine=False, beta2=0.999,
    ema=0.9999, t_std=0.0, min_snr=0.0, workers=4, checkpointing="all", log_every=10,
    eval_every=1000, film_every=1000, guidance=7.0,
)  # fmt: skip
PRESETS = {
    "toy": TrainConfig(),
    "16x256x256": replace(V1, frames=16, size=256, steps=80_000, out="out/16x256x256",
                          init="PixArt-alpha/PixArt-XL-2-512x512"),
    "16x256x256-hq": replace(V1, frames=16, size=256, steps=24_000, out="out/16x256x256-hq",
                             init="out/16x256x256"),
    "16x512x512": replace(V1, frames=16, size=512, steps=20_000, out="out/16x512x512",
                          init="out/16x256x256-hq", space_scale=1.0, batch_size=128,
                          checkpointing="none", micro_batch=1),
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
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--preset", default="toy", help=f"one of: {', '.join(PRESETS)}")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out, whose options hold; begin if none")
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
    given = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    return {k: v for k, v in given.items() if v is not None}, args.preset, args.resume


def configuration(given, preset, resume, world=1):
    """(configuration, checked; whether there is a run to go on with). It is the preset's or, to
    resume, that of the run in `out`; over it what was given. BadInput, BadWeights.
    """
    out = given.get("out", PRESETS[preset].out)
    last = newest_checkpoint(out)
    require(resume or not last,
            f"{out} holds a run already; go on with --resume, or give another --out")  # fmt: skip
    if not last:
        config = replace(PRESETS[preset], **given)
        check(config, world)
        if config.init:
            find_weights(config.init)  # complain now if there are none
        if resume:
            warn(f"{out} holds no run to resume, no checkpoints/step_*; it begins now")
        return config, False
    state = read_state(last)
    other = sorted(state["config"].keys() ^ {f.name for f in fields(TrainConfig)})
    require(not other, f"{out} is a run of another version, that differs in {', '.join(other)}")
    config = TrainConfig(**state["config"])
    for k, v in given.items():
        require(k in MAY_CHANGE or v == getattr(config, k),
                f"{k}={v!r}: the run in {out} has {getattr(config, k)!r}; for another, start a new "
                f"run with --init {out}")  # fmt: skip
    config = replace(config, **given)
    require(config.steps >= state["step"],
            f"steps={config.steps}: {out} has done {state['step']}; ask for more")  # fmt: skip
    check(config, world)
    return config, True


# What may differ when a run goes on: how long, where, how often, and what one may have to turn when
# it goes wrong. (More steps stretch the cosine and the share of images.) Data and encoders may have
# moved; that they are the same is checked.
MAY_CHANGE = {"out", "steps", "data", "held_out", "vae", "t5", "micro_batch", "bad_steps", "device",
              "workers", "checkpointing", "compile", "log_every", "eval_every", "film_every", "lr",
              "films", "film_steps", "guidance", "save_every", "keep", "max_bad", "cosine", "clip",
              "warmup", "ema", "fps", "sp"}  # fmt: skip


def true_or_false(text):
    return ("false", "true").index(text.lower()) == 1


def nearest(name, names):
    found = difflib.get_close_matches(name, names, cutoff=0.4)
    return f"nearest: {', '.join(found)}" if found else "see --help"


RANGES = (
    (1, math.inf, "steps stride fps log_every eval_every film_every save_every keep bad_steps "
                  "toy_clips batch_size sp"),
    (0, math.inf, "films workers warmup min_snr lr weight_decay t_std space_scale time_scale "
                  "micro_batch width guidance"),
    (0, 1, "image_share drop_caption max_bad ema"),
    (0, 0.99999, "beta2"), (1e-9, math.inf, "clip"), (2, 999, "film_steps"),
)  # fmt: skip


def check(config, world):
    """BadInput where a field, or two together, can't be right."""
    c = config
    kinds = {"model": MODELS, "variant": VARIANTS, "trained": TRAINED,
             "checkpointing": ("none", "all", "but-products")}  # fmt: skip
    for field, names in kinds.items():
        value = getattr(c, field)
        require(value in names, f"{field}={value!r} is unknown; {nearest(value, names)}")
    for low, high, names in RANGES:
        for name in names.split():
            value = getattr(c, name)
            require(low <= value <= high, f"{name}={value}: expected {low} to {high}")
    pt, *spatial = MODELS[c.model].patch_size
    unit = 8 * math.lcm(*spatial)  # 8 is the VAE's factor
    for name in ("size", "width"):
        value = getattr(c, name) or c.size
        near = max(unit, round(value / unit) * unit)
        require(value == near, f"{name}={value} must be a multiple of {unit} (VAE 8 x patch "
                               f"{unit // 8}); try --{name} {near}")  # fmt: skip
    require(c.frames > 0 and c.frames % pt == 0,
            f"frames={c.frames} must be a multiple of the patch's {pt}")  # fmt: skip
    require(pt == 1 or c.image_share == 0, f"image_share={c.image_share}: a single frame makes no "
            f"patch of {pt} frames; give --image_share 0")  # fmt: skip
    replicas = max(1, world // c.sp)
    group = replicas * (c.micro_batch or 1)
    batch = math.ceil(max(c.batch_size, 1) / group) * group
    require(c.batch_size == batch,
            f"batch_size={c.batch_size} must be a multiple of {replicas} process(es) x micro_batch "
            f"{c.micro_batch or 1}; try --batch_size {batch} or a smaller --micro_batch")
    require(c.data, "no data: give --data, a cache that data.py made, a folder of clips or a CSV")
    require(c.trained != "temporal" or (c.image_share == 0 and c.variant != "full"),
            f"trained=temporal needs image_share=0 and a variant with temporal attention; found "
            f"{c.image_share}, {c.variant}")  # fmt: skip
    require(c.sp == 1 or c.variant != "full", f"sp={c.sp}: variant=full attends to all tokens at "
                                              "once and can't be shared; give --sp 1")  # fmt: skip
    if c.data == "toy":
        require(c.frames > 1 and c.stride == 1, f"frames={c.frames}, stride={c.stride}: the toy is "
                "about motion, in films as long as a sample; give 2 or more, and 1")  # fmt: skip
        require(c.width in (0, c.size), f"width={c.width}: the toy is square")
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
    `rows`. In place of a clip that can't be decoded after all comes the next one of the epoch that
    can; "replaced" counts. It is named once, by each process that meets it.
    """

    def __init__(self, source, rows, seed):
        self.source, self.rows, self.seed, self.named = source, rows, seed, set()

    def __getitem__(self, position):
        epoch, i = divmod(position, len(self.rows))
        order = permutation(self.seed, len(self.rows), epoch)
        for k in range(len(order)):
            row = self.rows[order[(i + k) % len(order)]]
            try:
                return self.source[row, position] | {"replaced": k}
            except data.BadClip as error:
                if row not in self.named:
                    warn(f"{self.source.rows[row][1]} {error}; another clip takes its place")
                self.named.add(row)
        raise BadInput(f"none of the {len(order)} clips can be decoded")


def split(config, replicas):
    """(n, B): a step is n micro-batches of B clips on each replica."""
    B = config.micro_batch or config.batch_size // replicas
    return config.batch_size // (B * replicas), B


def positions_of(step, k, config, process):
    """What this process takes in micro-batch k of a step: B positions of the stream."""
    _, B = split(config, process.replicas)
    first = step * config.batch_size + (k * process.replicas + process.replica) * B
    return range(first, first + B)


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


def draw_noise(config, keys, shape):
    """Noise [B, C, T, H, W] in fp32; a key per sample: its position in the stream, or a name."""
    generators = [keyed_generator(config.seed, "noise", key) for key in keys]
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def draw_choice(config, purpose, keys):
    """A number in [0, 1) per sample: [B]."""
    generators = [keyed_generator(config.seed, purpose, key) for key in keys]
    return torch.cat([torch.rand(1, generator=g) for g in generators])


# ---------------------------------------------------------------------------------------------
# Data and encoders


class Encoders:
    """The frozen encoders, loaded when they are first used: a cache needs them for films alone.

    names: {"vae": source, "t5": source}; once the data is open also the fingerprints of the
    encoders that it was made with, which these must have, and whether captions were cleaned.
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
        gc.collect()

    def checked(self, encoder, what):
        if f"{what}_fingerprint" in self.names:
            check_encoder(encoder, self.names, what)
        return encoder


def prepare_toy(config, encoders):
    """Draw and encode the toy where that is not done yet -> its folder."""
    c = config
    folder = Path(f"out/toy-data-{c.toy_clips}x{c.frames}x{c.size}x{c.size}")
    data.make_toy(folder, c.toy_clips, c.frames, c.size)
    for part in ("train", "held_out"):
        frozen = encoders.vae, encoders.t5
        data.write_cache(
            folder / f"{part}.csv", folder / f"cache_{part}", *frozen, c.frames, 1, c.size
        )
    return folder


def open_source(path, config, process):
    """A cache, or a folder or CSV of clips -> LatentCache or Clips that fits the configuration."""
    c = config
    if not process.share(lambda: data.is_cache(path)):  # the first looks through the clips, for all
        clips = path, c.frames, c.stride, c.size, c.seed, c.max_bad
        options = {"width": c.width, "flip": c.flip, "clean": c.clean}
        return process.share(lambda: data.Clips(*clips, **options))
    cache, model = data.LatentCache(path), MODELS[c.model]
    wanted = {"frames": c.frames, "size": c.size, "width": c.width or c.size, "stride": c.stride}
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
    -> (Stream, held-out Stream, encoders).
    """
    length = MODELS[config.model].caption_length
    encoders = Encoders({"vae": config.vae, "t5": config.t5}, length, process.device)
    paths = config.data, config.held_out
    if config.data == "toy":
        folder = process.share(lambda: prepare_toy(config, encoders))
        paths = folder / "cache_train", folder / "cache_held_out"
    source = held_source = open_source(paths[0], config, process)
    clips = list(dict.fromkeys(source.numbers))  # a cache may have several samples of a clip
    k = min(len(clips) // 20, 64)
    held = {clips[i] for i in permutation(config.seed, len(clips), "split")[:k]}
    held_rows = [row for row, number in enumerate(source.numbers) if number in held]
    rows = [row for row, number in enumerate(source.numbers) if number not in held]
    if paths[1]:
        held_source = open_source(paths[1], config, process)
        rows, held_rows = range(len(source)), range(len(held_source))
    elif k == 0:
        held_rows = rows
        process.say(f"{len(source)} clips are too few to hold any out: the held-out loss is of "
                    "training clips")  # fmt: skip
    names, held_names = (encoder_names(config, s, encoders) for s in (source, held_source))
    same = all(names[k] == held_names[k] for k in names if "fingerprint" in k)
    require(same, f"data was encoded with {names}, held_out with {held_names}; use the same")
    names |= {"clips": f"{len(rows)} of {len(source)}, {source.identity}"}
    first = process.share(lambda: names["clips"])
    require(names["clips"] == first, f"{config.data} is not the same everywhere: the first process "
                                     f"has {first}, this one {names['clips']}")  # fmt: skip
    encoders.names = names
    if config.films:  # they are wanted later: complain now if they are not there
        data.locate(names["vae"], "vae"), data.locate(names["t5"], "text_encoder")
    return Stream(source, rows, config.seed), Stream(held_source, held_rows, config.seed), encoders


def encoder_names(config, source, encoders):
    """What sample.py needs to know of the encoders of the latents: names and fingerprints."""
    if isinstance(source, data.LatentCache):
        return {"vae": source.vae, "vae_fingerprint": source.settings["vae"],
                "t5": source.t5, "t5_fingerprint": source.settings["t5"],
                "clean": source.settings["clean"]}  # fmt: skip
    return {"vae": config.vae, "vae_fingerprint": encoders.vae.fingerprint,
            "t5": config.t5, "t5_fingerprint": encoders.t5.fingerprint,
            "clean": config.clean}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Checkpoints
#
# Weights, their average, the optimizer's state, and the step. That is all: the data position
# follows from the step, and no random generator has a state to keep, since every draw is keyed. The
# first process alone writes and reads; the others are told.


def tensors_of(model, learning, ema, optimizer):
    """All tensors of a checkpoint, {file: {name: tensor}}: not copies, but what training works on.
    learning, ema: {name: weight} of what learns. The other weights are their own average.
    """
    moments = {f"{name}.{key}": value for name, weight in learning.items()
               for key, value in optimizer.state[weight].items()}  # fmt: skip
    weights = model.state_dict()
    return {"model": weights, "ema": weights | ema, "optimizer": moments}


def save_checkpoint(config, step, model_config, encoders, tensors):
    """Write out/checkpoints/step_N beside, then rename; delete all but the newest `keep`. If the
    disk is full, the checkpoint before it stays, and BadInput says so.
    """
    folder = Path(config.out) / "checkpoints" / f"step_{step:08d}"
    beside, hashes = folder.with_name(f".{folder.name}"), {}
    if folder.exists():
        return
    try:
        for rest in folder.parent.glob(".step_*"):  # of a save or a deletion that was killed
            shutil.rmtree(rest)
        beside.mkdir(parents=True)
        for name, content in tensors.items():
            path = beside / f"{name}.safetensors"
            save_file({k: v.detach().contiguous() for k, v in content.items()}, path)
            hashes[name] = sha256_of(path)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        write_json(beside / "state.json", {
            "step": step, "config": asdict(config), "model": asdict(model_config),
            "encoders": encoders, "sha256": hashes, "torch": torch.__version__,
        })  # fmt: skip
        os.replace(beside, folder)
        for old in sorted(folder.parent.glob("step_*"))[: -config.keep]:
            os.replace(old, beside)  # renamed first: what is half deleted is no checkpoint any more
            shutil.rmtree(beside)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        last = newest_checkpoint(config.out)
        raise BadInput(
            f"{folder} can't be written ({error}); the last whole checkpoint is {last}: make room, "
            "and --resume"
        ) from None


def read_state(folder):
    """state.json of a checkpoint: everything but its tensors."""
    advice = f"delete {folder} to go on from the checkpoint before it"
    return data.read_json(folder / "state.json", advice)


def load_checkpoint(config, model_config, encoders, tensors):
    """Copy the newest checkpoint of config.out into these tensors -> its step."""
    folder = newest_checkpoint(config.out)
    state, here = read_state(folder), json.loads(json.dumps(asdict(model_config)))
    wrong = [k for k, v in here.items() if state["model"][k] != v]
    named = encoders.keys() - {"vae", "t5"}  # places may change, fingerprints not
    wrong += [k for k in sorted(named) if state["encoders"].get(k) != encoders[k]]
    require(not wrong, f"{config.out} was trained with another {', '.join(wrong)}: give it the "
                       "same data, or start a new run with --init")  # fmt: skip
    try:
        for file, content in tensors.items():
            stored = open_weights(folder / f"{file}.safetensors")  # compares it with its hash
            for name, tensor in content.items():
                tensor.detach().copy_(stored[name])
    except BadWeights as error:
        raise BadInput(f"{error}; delete {folder} to go on from the checkpoint before it") from None
    return state["step"]


# ---------------------------------------------------------------------------------------------
# Is it learning?
#
# The loss hardly falls while films get better: most of it is noise that nobody could predict. Three
# things do tell. The loss on held-out clips with noise and timesteps that are always the same, in
# four bins of t: the bins of large t, where the film is decided, move by little but move. Films of
# the same captions from the same noise, which sharpen. And, on the toy, the share of films that
# show what their caption says, as data.detect sees them.


@torch.no_grad()
def held_out_loss(config, model, stream, encoders, process):
    """[4] losses of the noise on held-out clips (64 of them at most), by t: 0-249, 250-499,
    500-749, 750-999. The clips are shared among the processes.
    """
    sums, clips = [0.0] * 5, process.mine(range(min(64, len(stream.rows))))
    at_once = config.micro_batch or 8
    for part in (clips[i : i + at_once] for i in range(0, len(clips), at_once)):
        batch = torch.utils.data.default_collate([stream[p] for p in part])
        generators = [keyed_generator(config.seed, "held-out posterior", p) for p in part]
        x0, y, mask = to_device(batch, encoders, generators, process.device)
        sums[4] += len(part)
        for b in range(4):
            keys = [f"held out {p} {b}" for p in part]
            t = 250 * b + (250 * draw_choice(config, "held-out t", keys)).long()  # [B]
            noise = draw_noise(config, keys, x0.shape[1:]).to(x0)
            x_t = q_sample(TRAINING, x0, t, noise)
            with autocast(process.device):
                out = model(x_t, t.to(x0.device), y, mask)
            sums[b] += diffusion_loss(TRAINING, out, x0, x_t, t, noise)["mse"].sum().item()
    *sums, count = process.sum(sums)
    return [total / count for total in sums]


def evaluate(config, model, held_out, encoders, captions, step, metrics, process):
    """Measure what is due after this step: held-out loss, films, the toy's caption accuracy."""
    last, shape = step == config.steps, latent_shape(config)
    if (step % config.eval_every == 0 or last) and (step, "held_out") not in metrics.done:
        bins = held_out_loss(config, model, held_out, encoders, process)
        metrics.write(step=step, held_out=bins)
        process.say(f"step {step}  held-out loss by t: {'  '.join(f'{b:.4f}' for b in bins)}")
        if process.rank == 0:
            plot_losses(config)
    films_due = config.films and (step % config.film_every == 0 or last)
    if not films_due or (step, "films") in metrics.done:
        return
    # Always the same captions and the same noise, so that one sees the same films sharpen.
    options = {"steps": config.film_steps, "guidance": config.guidance, "sampler": "dpm"}
    texts, *embedded = captions  # y [N, L, E], mask [N, L]
    y, mask, keys = (process.mine(part) for part in (*embedded, film_keys(config.seed, texts)))
    videos = film(model, encoders.vae, y, mask, keys, shape, config.micro_batch or 8, **options)
    videos, path = process.gather(videos), Path(config.out)
    path = path / ("films" if last else f"films/step_{step:08d}")
    if process.rank == 0:
        columns = min(3, len(videos))
        tiles = videos + [torch.zeros_like(videos[0])] * (-len(videos) % columns)
        rows = [torch.cat(tiles[i : i + columns], dim=-1) for i in range(0, len(tiles), columns)]
        grid = torch.cat(rows, dim=-2)  # [T, 3, rows * H, columns * W]
        write_gif(path.with_suffix(".gif"), grid, config.fps)
        write_sheet(path.with_suffix(".png"), videos, texts)
    accuracy = None
    if config.data == "toy":
        times = (2, 8) if last else (1, 1)  # films of a seen and of an unseen caption
        part = caption_accuracy(model, encoders.vae, encoders.t5, times, config.seed, shape,
                                process.replica, process.replicas, **options)  # fmt: skip
        accuracy = [int(count) for count in process.sum(part)]
        process.say(f"step {step}: {describe(accuracy)}")
    metrics.write(step=step, films=f"{path}.gif", accuracy=accuracy)


def captions_to_film(config, stream, encoders, process):
    """(texts, y [N, L, E], mask [N, L]): of the toy the captions that training never shows."""
    texts = [data.caption_of(triple) for triple in data.HELD_OUT] if config.data == "toy" else []
    for row in stream.rows if not texts else ():
        if len(texts) < config.films and stream.source.text(row) not in texts:
            texts.append(stream.source.text(row))
    texts = texts[: config.films]
    if not texts:
        return texts, None, None
    return texts, *process.share(lambda: [v.cpu() for v in encoders.t5.encode(texts)])


def latent_shape(config):
    """(C, T, H, W) of one film."""
    height, width = config.size // 8, (config.width or config.size) // 8
    return MODELS[config.model].in_channels, config.frames, height, width


def read_metrics(out):
    """The lines of a run's metrics.jsonl; the last may have been cut off by a kill."""
    path = Path(out) / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]


def plot_losses(config):
    """loss.png of a run and of those it went on from, its stages: the training loss, smoothed, and
    the held-out loss in its four bins of t.
    """
    from matplotlib.figure import Figure

    stages, init = [read_metrics(config.out)], config.init
    while init and (lines := read_metrics(init)) and len(stages) < 9:
        stages.insert(0, lines)
        last = newest_checkpoint(init)
        init = read_state(last)["config"].get("init") if last else ""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    begin, mse, held = 0, [], []  # the last two: pairs (step from the first stage on, value)
    for lines in stages:
        mse += [(begin + m["step"], m["mse"]) for m in lines if m.get("mse") is not None]
        held += [(begin + m["step"], m["held_out"]) for m in lines if "held_out" in m]
        begin += max((m["step"] for m in lines), default=0)
        for axis in (left, right):
            axis.axvline(begin, color="0.8", linestyle=":")
    smooth = mse[:1]
    for step, loss in mse[1:]:
        smooth.append((step, 0.9 * smooth[-1][1] + 0.1 * loss))
    for points, color in ((mse, "0.8"), (smooth, "C0")):
        left.plot([step for step, _ in points], [loss for _, loss in points], color=color)
    for b in range(4):
        label = f"t {b * 250}-{b * 250 + 249}"
        right.plot([step for step, _ in held], [bins[b] for _, bins in held], label=label)
    left.set(title="training: loss of the noise", xlabel="step", yscale="log")
    right.set(title="held-out clips: loss of the noise, by t", xlabel="step", yscale="log")
    figure.legend(loc="outside right center")
    write_whole(Path(config.out) / "loss.png", lambda p: figure.savefig(p, format="png", dpi=100))


class Metrics:
    """out/metrics.jsonl, a JSON object per line, written by the first process alone: the interface
    for other tools. Of a resumed run's lines, those of what is to be done again are dropped.
    """

    def __init__(self, out, step, process):
        self.path, self.is_main = Path(out) / "metrics.jsonl", process.rank == 0
        kept = process.share(lambda: [m for m in read_metrics(out) if m["step"] <= step])
        self.done = {(m["step"], name) for m in kept if m["step"] == step for name in m}
        if self.is_main:
            text = "".join(json.dumps(m) + "\n" for m in kept)
            write_whole(self.path, lambda p: p.write_text(text))

    def write(self, **line):
        if self.is_main:
            text = re.sub(r"\b(NaN|-?Infinity)\b", "null", json.dumps(line))  # JSON knows neither
            with open(self.path, "a") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())  # before a checkpoint that counts on it


# ---------------------------------------------------------------------------------------------
# What a step costs
#
# FLOPs are counted by torch on tensors without content; the backward pass costs twice the forward,
# and recomputed blocks do not count as work done. Memory is added up before the run, so that a
# setting that can't fit is seen at once.

PEAK = {"H100": 989, "H200": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362,
        "RTX 4090": 165, "RTX 3090": 71}  # fmt: skip
# TFLOP/s of dense bf16, from the maker's data sheets, of SXM modules; PCIe cards have less


class Cost:
    """What a rate of clips is in tokens and in shares of the GPU's peak."""

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
        """Of `rate` whole clips a second, on all processes together."""
        cost = {"tokens_per_second": rate * self.tokens}
        if self.cuda:
            cost["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        if self.peak:
            cost["share_of_peak"] = rate * self.flops / self.world / self.peak
        return cost


def predicted_memory(config, model, process):
    """GB on each device: fp32 weights; of those that learn, gradient, AdamW's two moments, average;
    and what the blocks keep for the backward pass, measured on few tokens and scaled up. Not in it:
    encoders and films, and the copies that a step makes in passing.
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
    tokens *= split(config, process.replicas)[1] / process.sp
    blocks = model.config.depth
    product = 4 if process.device == "cpu" else 2  # bytes; under autocast, in bf16
    stored = {"none": blocks * inside, "all": blocks * 4 * D + inside,
              "but-products": blocks * (4 + 18 * product) * D + inside}  # fmt: skip
    return (fixed + tokens * stored[config.checkpointing]) / 1e9


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
    """[B] weights for t [B]. The loss of the noise at small t is hundreds of times that at large
    t, where the film's content is decided; min-SNR weights (arXiv 2303.09556, eq. 7, for
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


@contextmanager
def averaged(learning, ema):
    """Inside the `with`, the model has the averaged weights. Nothing may be saved there: learning
    and ema are exchanged.
    """
    pairs = [(p, ema[name]) for name, p in learning.items()]
    for p, average in pairs:
        p.data, average.data = average.data, p.data
    try:
        yield
    finally:
        for p, average in pairs:
            p.data, average.data = average.data, p.data


@contextmanager
def interruptible():
    """Inside the `with`, SIGTERM and Ctrl-C only set a flag: the step is finished first. A second
    Ctrl-C ends at once.
    """
    asked, signals = [], (signal.SIGTERM, signal.SIGINT)

    def ask(number, _):
        if number in asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = [signal.signal(s, ask) for s in signals]
    try:
        yield asked
    finally:
        for s, handler in zip(signals, before):
            signal.signal(s, handler)


def leave_signals(_):
    """For data workers, which have to go on until their process has finished its step. As they
    ignore the signal by which Python would stop them at its end, train() has them killed there.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def train(config, resume=False, process=Process(0, 1, "cpu")):
    """The whole run, from a configuration to films."""
    start = time.time()
    stream, held_out, encoders = open_data(config, process)
    torch.manual_seed(config.seed)  # the initial weights, the same everywhere
    model = STDiT(model_config(config)).to(process.device)
    for name, p in model.named_parameters():
        p.requires_grad_(TRAINED[config.trained](name))
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in learning.items()}
    optimizer = torch.optim.AdamW(
        learning.values(), lr=config.lr, betas=(0.9, config.beta2),
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    for p in learning.values():  # AdamW would make these at its first step
        zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] |= {"step": torch.zeros((), device=p.device), **zeros}
    tensors = tensors_of(model, learning, ema, optimizer)

    def begin():  # on the first process: weights and checkpoints may lie on its machine alone
        if resume:
            return load_checkpoint(config, model.config, encoders.names, tensors)
        if config.init:
            process.say(initialize(config, model, encoders))
            for name, p in learning.items():
                ema[name].copy_(p)
        return 0

    def save():
        save_checkpoint(config, step, model.config, encoders.names, tensors)

    with torch.no_grad():
        step = process.share(begin)
        for tensor in [t for content in tensors.values() for t in content.values()]:
            if process.world > 1:
                dist.broadcast(tensor, 0)
    captions = captions_to_film(config, held_out, encoders, process)
    if isinstance(stream.source, data.LatentCache):  # the text encoder has done its work
        encoders.forget_t5()
    process.say(banner(config, model, step, stream, held_out, process))
    if config.checkpointing != "none":
        checkpoint_blocks(model, config.checkpointing == "but-products")
    if config.compile:
        for block in model.blocks:
            block.forward = torch.compile(block.forward)
    parallel, model.group = model, process.sequence
    if process.world > 1:
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    metrics = Metrics(config.out, step, process)
    (n, _), cost = split(config, process.replicas), Cost(config, process)
    atexit.register(lambda: [worker.kill() for worker in multiprocessing.active_children()])
    loader = iter(DataLoader(
        stream, pin_memory=process.device.startswith("cuda"), num_workers=config.workers,
        batch_sampler=(positions_of(s, k, config, process)
                       for s in range(step, config.steps) for k in range(n)),
        multiprocessing_context="spawn" if config.workers else None, worker_init_fn=leave_signals,
    ))  # fmt: skip
    quiet = None if process.rank == 0 else True  # None: a bar on a terminal, else lines (report)
    bar = tqdm(initial=step, total=config.steps, disable=quiet, unit="step")
    skipped = in_a_row = replaced = 0  # since this start
    begun, since, clock = step, step, time.time()

    with interruptible() as asked:
        while True:
            due = any(step % every == 0 for every in (config.eval_every, config.film_every))
            due = step and (due or step == config.steps)
            stop, failed, failure = due and process.sum([len(asked)])[0], False, None
            if due and not stop:
                with averaged(learning, ema), torch.compiler.set_stance("force_eager"):
                    evaluate(config, model, held_out, encoders, captions, step, metrics, process)
                since, clock = step, time.time()
                if step == config.steps:
                    break
            # The data of a whole step first; then all processes go on, or all stop.
            if not stop:
                try:
                    batches = [next(loader) for _ in range(n)]
                except Exception as error:  # raised again below, when all have stopped and saved
                    failure = error
                stop, failed = process.sum([len(asked), failure is not None])
            if stop or failed:
                break

            losses, images = torch.zeros(3, device=process.device), on_images(config, step)
            for k, batch in enumerate(batches):  # gradients add up; DDP averages with the last
                replaced += batch["replaced"].sum().item()
                positions = positions_of(step, k, config, process)
                more = process.world > 1 and k < n - 1
                with parallel.no_sync() if more else nullcontext():
                    parts = training_loss(
                        config, parallel, model, batch, encoders, positions, images
                    )  # [3]
                    (parts[0] / n).backward()  # shards are equal, so the mean of means is the mean
                losses += parts.detach() / n
            if images and config.variant not in ("full", "latte"):
                for block in model.blocks:  # one frame has nothing to connect, so it learns nothing
                    block.attn_temp.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            # After DDP's mean the norm is the same number everywhere, so all do the same with it.
            norm = clip_grad_norm_(learning.values(), config.clip).item()  # waits for the GPU
            step += 1
            if math.isfinite(norm):
                optimizer.step()
                decay = min(config.ema, (1 + step) / (10 + step))  # short at first, as weights move
                with torch.no_grad():  # ema = decay * ema + (1 - decay) * weights, in fp32
                    torch._foreach_lerp_([*ema.values()], [*learning.values()], 1 - decay)
                in_a_row = 0
            else:
                skipped, in_a_row = skipped + 1, in_a_row + 1
                process.say(f"step {step}: its gradient is {norm}; skipped ({in_a_row} in a row)")
                if in_a_row == config.bad_steps:
                    last = newest_checkpoint(config.out)
                    advice = f"the last checkpoint is {last}: --resume" if last else "start anew"
                    raise BadInput(f"{in_a_row} steps in a row had a gradient that is not finite; "
                                   f"{advice} with a smaller --lr or --clip")  # fmt: skip
            optimizer.zero_grad()
            bar.update()
            if step % config.log_every == 0 or step == config.steps:
                loss, mse, vlb = (v / process.replicas for v in process.sum(losses.tolist()))
                rate = (step - since) * config.batch_size / (time.time() - clock)
                line = {"step": step, "loss": loss, "mse": mse, "vlb": vlb, "grad_norm": norm,
                        "lr": learning_rate(config, step - 1), "clips_per_second": rate,
                        **cost.of(rate / config.frames if images else rate), "skipped": skipped,
                        "replaced": int(process.sum([replaced])[0]),
                        "seconds": time.time() - start}  # fmt: skip
                metrics.write(**line)
                report(line, bar, config, process)
                since, clock = step, time.time()
            if step % config.save_every == 0 or step == config.steps:
                process.share(save)
                since, clock = step, time.time()
        bar.close()
        if stop or failed:
            process.share(save)
            process.say(f"stopped after step {step}, saved; go on: --resume --out {config.out}")
    if failed:
        raise failure or SystemExit(2)  # the process that failed says why
    if not stop:
        films = ", films.gif, films.png" if config.films else ""
        process.say(f"{config.steps} steps, the last {config.steps - begun} in "
                    f"{time.time() - start:.0f} s, in {config.out}: "
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
        first = math.ceil(config.image_share * config.steps)  # these cost 1 / frames of the others
        images = max(0, first - line["step"])
        films = config.steps - line["step"] - images
        share = config.frames if line["step"] <= first else 1
        left = (films * share + images) * config.batch_size / line["clips_per_second"] / 60
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        process.say(f"step {line['step']} of {config.steps}  {text}  {left:.1f} min left")


def model_config(config):
    """The network's configuration: that of its name, with this run's variant and scales."""
    model = MODELS[config.model]
    space = config.space_scale or math.sqrt(config.size * (config.width or config.size)) / 512
    time = config.time_scale or model.time_scale
    return replace(model, variant=config.variant, space_scale=space, time_scale=time)


def initialize(config, model, encoders):
    """Begin with the weights of config.init -> a line that says what they are. Positions follow
    from this run's scales, whatever the weights were trained with: that is how a model of small
    films goes on with large ones (report, T1).
    """
    new = load_weights(model, config.init, lambda: encoders.t5.null_caption())
    stored = stored_config(config.init)
    was = f"{stored.space_scale}, {stored.time_scale}" if stored else "none"
    now = f"space_scale={model.config.space_scale}, time_scale={model.config.time_scale}"
    return f"from {config.init}: {len(new)} tensors are new; {now} (stored: {was})"


def banner(config, model, step, stream, held_out, process):
    """The resolved run, once."""
    count = sum(p.numel() for p in model.parameters())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    precision = "bf16 over fp32 weights" if process.device.startswith("cuda") else "fp32"
    (n, B), (_, _, h, w) = split(config, process.replicas), latent_shape(config)
    resolved = asdict(config) | {k: getattr(model.config, k) for k in ("space_scale", "time_scale")}
    return (
        f"{config.model}, {config.variant}: {count:,} parameters, {learning:,} of them learn; "
        f"{len(stream.rows)} clips of {config.frames}x{8 * h}x{8 * w}, {len(held_out.rows)} held "
        f"out; {process.world} process(es) on {process.device}, {precision}, {n} x {B} clips a "
        f"step each, about {predicted_memory(config, model, process):.2f} GB; steps {step} to "
        f"{config.steps}\n" + " ".join(f"{k}={v}" for k, v in resolved.items())
    )


def main():
    given, preset, resume = parse_command_line()
    process = set_up_process(given.get("device", PRESETS[preset].device), given.get("sp", 1))
    config, resume = process.share(lambda: configuration(given, preset, resume, process.world))
    require(config.device == "auto" or process.device.startswith(config.device),
            f"the run in {config.out} has device={config.device}: give --device {config.device}, "
            "or auto for what is here")  # fmt: skip
    require(config.sp == process.sp, f"the run in {config.out} has sp={config.sp}: give --sp, that "
                                     "or another")  # fmt: skip
    train(config, resume, process)
    if process.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main, BadWeights, OSError)
