"""Training: one file from the command line to the loss, on a laptop's CPU or on many GPUs.

    python train.py                             # the toy: makes its data, learns, films
    torchrun --nproc-per-node 2 train.py        # the same numbers from two processes
    torchrun --nproc-per-node 8 train.py --data CACHE --model STDiT-XL/2 --out DIR

Every field of TrainConfig is an option of the command line, over the values of a preset. A run
lives in the folder `out`: checkpoints, metrics.jsonl, loss.png, films. --resume goes on from its
newest checkpoint, on the CPU bit for bit as if it had never stopped.

Shapes, in this file:
    B clips of this process in one step    C latent channels    T frames
    H, W latent height and width    L caption tokens    E caption channels
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from data import BadInput, command, keyed_generator, warn, write_json, write_whole
from sample import (
    TRAINING, autocast, check_encoder, diffusion_loss, film, film_keys, pick_device, q_sample,
    write_gif, write_sheet,
)  # fmt: skip
from stdit import (
    MODELS, VARIANTS, BadWeights, STDiT, checkpoint_blocks, config_from, drop_captions,
    load_weights, newest_checkpoint, open_weights, stored_config,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------
# Configuration
#
# A run is one frozen dataclass. A preset is an instance of it; the command line is made from its
# fields.


@dataclass(frozen=True)
class TrainConfig:
    # what is learned from what
    model: str = "toy"  # a name in stdit.MODELS
    variant: str = "sequential"  # one of stdit.VARIANTS
    init: str = ""  # weights to begin with: whatever stdit.load_weights reads; empty: random ones
    space_scale: float = 0.0  # place = index / scale; 0: size / 512, as in v1
    time_scale: float = 0.0  # likewise; 0: the model's (stdit.MODELS)
    data: str = "toy"  # a cache, a CSV (then the encoders run in every step), or "toy": made here
    held_out: str = ""  # the same, of clips not trained on; empty: 1 in 20 of data's, at most 64
    out: str = "out/toy"  # the run's folder
    vae: str = "assets/vae"  # folder or Hub name of the frozen AutoencoderKL; a cache knows its own
    t5: str = "assets/t5"  # folder or Hub name of the frozen T5 encoder and tokenizer; likewise
    frames: int = 8  # frames of a clip
    size: int = 64  # height and width in pixels
    stride: int = 1  # source frames per kept frame
    fps: int = 8  # of the films that are written: source rate / stride
    max_bad: float = 0.5  # share of unusable clips in a CSV at which the run ends
    # how
    steps: int = 5000  # optimizer steps, in all
    image_share: float = 0.1  # the first share of them sees single frames, for 1 / frames the cost
    batch_size: int = 16  # clips per step over all processes: their number changes nothing
    lr: float = 2e-3  # AdamW's peak; v1: 2e-5, for 760M parameters that were trained before
    warmup: int = 100  # steps in which the learning rate rises from 0
    cosine: bool = True  # let it fall to 0 along a half cosine; v1 keeps it constant
    weight_decay: float = 0.0  # AdamW's
    beta2: float = 0.99  # AdamW's memory of squared gradients: about 1 / (1 - beta2) steps
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.99  # moving average of the weights, over about 1 / (1 - ema) steps; v1: 0.9999
    drop_caption: float = 0.1  # share of captions replaced by the null caption, for guidance
    t_mean: float = 0.4  # timesteps are 1000 sigmoid(t_mean + t_std normal), arXiv 2403.03206
    t_std: float = 1.0  # ... or uniform, as in v1, if t_std is 0
    min_snr: float = 0.03  # loss weights min(1, min_snr / SNR(t)), arXiv 2303.09556; 0: 1, as in v1
    # where and how often
    seed: int = 0  # of every random draw in training (the toy's films and cache keep theirs, 0)
    device: str = "auto"  # auto, cpu, cuda or mps; fp32, on cuda bf16 over fp32 weights
    checkpointing: bool = False  # recompute blocks in the backward pass: less memory, more work
    workers: int = 0  # processes per rank that read data; a cache needs none
    log_every: int = 50  # steps between lines of metrics.jsonl
    eval_every: int = 500  # steps between evaluations of the held-out loss
    film_every: int = 1500  # steps between quick measurements of the toy's caption accuracy
    films: int = 6  # captions to film at the end; 0: no films, and no accuracy
    film_steps: int = 50  # denoising steps of those films (DDPM)
    guidance: float = 2.5  # of all films; on the toy 4 is less often right, v1 has 7 for its own
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # newest checkpoints that are kept


PRESETS = {"toy": TrainConfig()}


def parse_command_line():
    """(configuration, whether to resume) from a preset or the resumed run, and the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="toy", help=f"one of: {', '.join(PRESETS)}")
    parser.add_argument("--resume", action="store_true", help="go on from --out's last checkpoint")
    for f in fields(TrainConfig):
        names = f"--{f.name}", f"--{f.name.replace('_', '-')}"
        parser.add_argument(
            *names, type=true_or_false if f.type is bool else f.type, metavar=f.type.__name__
        )
    args, unknown = parser.parse_known_args()
    options = [f"--{f.name}" for f in fields(TrainConfig)] + ["--preset", "--resume"]
    for option in unknown:
        name = "--" + option.split("=")[0].strip("-").replace("-", "_")
        require(False, f"unknown option {option}; {nearest(name, options)}")
    require(
        args.preset in PRESETS, f"unknown preset {args.preset!r}; {nearest(args.preset, PRESETS)}"
    )

    chosen = {
        k: v for k, v in vars(args).items() if v is not None and k not in ("preset", "resume")
    }
    config = PRESETS[args.preset]
    out = chosen.setdefault("out", config.out)
    last = newest_checkpoint(out)
    if args.resume:
        require(
            last, f"{out} holds no run to resume, no checkpoints/step_*; start without --resume"
        )
        state = read_state(last)
        other = sorted(state["config"].keys() - vars(config).keys())
        require(not other, f"{out} is a run of another version, with the fields {', '.join(other)}")
        config = TrainConfig(**state["config"])
        for name in ("model", "variant", "init", "space_scale", "time_scale"):
            require(name not in chosen or chosen[name] == getattr(config, name),
                    f"{name}={chosen.get(name)!r}: {out} has {getattr(config, name)!r}; for "
                    f"another, start a new run with --init {out}")  # fmt: skip
        steps = chosen.get("steps", config.steps)
        require(
            steps >= state["step"], f"steps={steps}: {out} has done {state['step']}; ask for more"
        )
    else:
        require(not last, f"{out} holds a run already; go on with --resume, or give another --out")
    config = replace(config, **chosen)
    check(config)
    return config, args.resume


def true_or_false(text):
    return ("false", "true").index(text.lower()) == 1


def require(ok, message):
    if not ok:
        raise BadInput(message)


def nearest(name, names):
    return (
        f"nearest: {', '.join(difflib.get_close_matches(name, names, cutoff=0.4)) or 'see --help'}"
    )


def check(config):
    """BadInput where a field, or two together, can't be right."""
    c, world = config, int(os.environ.get("WORLD_SIZE", 1))
    require(c.model in MODELS, f"model={c.model!r} is unknown; {nearest(c.model, MODELS)}")
    for name in (
        "steps",
        "stride",
        "fps",
        "log_every",
        "eval_every",
        "film_every",
        "save_every",
        "keep",
    ):
        require(getattr(c, name) >= 1, f"{name}={getattr(c, name)}: expected 1 or more")
    require(
        c.variant in VARIANTS, f"variant={c.variant!r} is unknown; {nearest(c.variant, VARIANTS)}"
    )
    for name in ("films", "workers", "warmup", "min_snr", "lr", "weight_decay", "t_std",
                 "space_scale", "time_scale"):  # fmt: skip
        require(getattr(c, name) >= 0, f"{name}={getattr(c, name)}: expected 0 or more")
    for name in ("image_share", "drop_caption", "max_bad", "ema"):
        require(0 <= getattr(c, name) <= 1, f"{name}={getattr(c, name)}: expected a share, 0 to 1")
    require(2 <= c.film_steps <= 1000, f"film_steps={c.film_steps}: expected 2 to 1000")
    pt, ph, pw = MODELS[c.model].patch_size
    unit = 8 * math.lcm(ph, pw)  # 8 is the VAE's factor
    near, batch = (
        max(unit, round(c.size / unit) * unit),
        math.ceil(max(c.batch_size, 1) / world) * world,
    )
    require(c.size == near, f"size={c.size} must divide by {unit} (VAE 8 x patch {unit // 8}); "
                            f"try --size {near}")  # fmt: skip
    require(
        c.frames > 0 and c.frames % pt == 0, f"frames={c.frames} must divide by the patch's {pt}"
    )
    require(c.batch_size == batch, f"batch_size={c.batch_size} must divide by the {world} "
                                   f"processes; try --batch_size {batch}")  # fmt: skip
    if c.data == "toy":
        require(
            c.frames > 1, f"frames={c.frames}: the toy is about motion; give 2 or more, or --data"
        )
        require(
            c.stride == 1, f"stride={c.stride}: the toy's films are as long as a sample; give 1"
        )
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
    `rows`. In place of a clip that can't be decoded after all comes the clip of the next
    position that can.
    """

    def __init__(self, source, rows, seed):
        self.source, self.rows, self.seed = source, rows, seed

    def __getitem__(self, position):
        for p in range(position, position + len(self.rows)):
            epoch, i = divmod(p, len(self.rows))
            row = self.rows[permutation(self.seed, len(self.rows), epoch)[i]]
            try:
                return self.source[row, position]
            except data.BadClip as error:
                warn(f"{self.source.rows[row][1]} {error}; another clip takes its place")
        raise BadInput(f"none of the {len(self.rows)} clips can be decoded")


def positions_of(step, config, process):
    """This process's share of the positions of a step: B = batch_size / world of them."""
    B = config.batch_size // process.world
    first = step * config.batch_size + process.rank * B
    return range(first, first + B)


class Batches:
    """The positions of this process for every step from `start` on, as DataLoader wants them."""

    def __init__(self, config, start, process):
        self.config, self.start, self.process = config, start, process

    def __len__(self):
        return self.config.steps - self.start

    def __iter__(self):
        for step in range(self.start, self.config.steps):
            yield list(positions_of(step, self.config, self.process))


def draw_timesteps(config, positions):
    """Timesteps t [B], spread evenly over any run of positions: the golden ratio's multiples leave
    no gaps.
    """
    start = torch.rand(1, generator=keyed_generator(config.seed, "timesteps")).item()
    u = [(start + p * 0.6180339887498949) % 1 for p in positions]  # in [0, 1)
    if config.t_std > 0:  # denser where it matters, and rarer elsewhere
        u = [
            1 / (1 + math.exp(-config.t_mean - config.t_std * NormalDist().inv_cdf(max(v, 1e-9))))
            for v in u
        ]
    return torch.tensor([min(int(1000 * v), 999) for v in u])


def draw_noise(config, positions, shape):
    """Noise [B, C, T, H, W] in fp32, a generator per sample."""
    return torch.stack(
        [torch.randn(shape, generator=keyed_generator(config.seed, "noise", p)) for p in positions]
    )


def draw_choice(config, purpose, positions):
    """A number in [0, 1) per sample: [B]."""
    return torch.cat(
        [torch.rand(1, generator=keyed_generator(config.seed, purpose, p)) for p in positions]
    )


# ---------------------------------------------------------------------------------------------
# Set-up: data, encoders, processes


class Encoders:
    """The frozen encoders, loaded when first used: training from a cache needs them for its films
    alone.

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

    def checked(self, encoder, what):
        if f"{what}_fingerprint" in self.names:
            check_encoder(encoder, self.names, what)
        return encoder


def prepare_toy(config, encoders):
    """Draw and encode the toy where that is not done yet."""
    folder = toy_folder(config)
    data.make_toy(folder, frames=config.frames, size=config.size)
    for split in ("train", "held_out"):
        cache = folder / f"cache_{split}"
        data.write_cache(
            folder / f"{split}.csv", cache, encoders.vae, encoders.t5, config.frames, 1, config.size
        )


def toy_folder(config):
    return Path(f"out/toy-data-{config.frames}x{config.size}x{config.size}")


def open_source(path, config):
    """A cache folder or a CSV -> LatentCache or Clips that fits the configuration."""
    if not Path(path).is_dir():
        return data.Clips(
            path, config.frames, config.stride, config.size, config.seed, config.max_bad
        )
    cache, model = data.LatentCache(path), MODELS[config.model]
    wanted = {
        "frames": config.frames,
        "size": config.size,
        "stride": config.stride,
        "caption_length": model.caption_length,
    }
    found = {k: cache.settings[k] for k in wanted} | {
        "channels": cache.channels,
        "captions": cache.caption_channels,
    }
    wanted |= {"channels": model.in_channels, "captions": model.caption_channels}
    different = [f"{k}: {found[k]} there, {v} here" for k, v in wanted.items() if found[k] != v]
    if different:
        raise BadInput(
            f"the cache {path} does not fit the run ({'; '.join(different)}); make another with "
            "data.py cache, or change the run's fields"
        )
    return cache


def split_rows(config, n, process):
    """(rows to train on, rows to hold out) of n clips, if no held-out set is given."""
    order = permutation(config.seed, n, "split")
    k = min(n // 20, 64)
    if k == 0:
        if process.rank == 0 and not config.held_out and config.data != "toy":
            warn(f"{n} clips are too few to hold any out: the held-out loss is of training clips")
        return range(n), range(n)
    return sorted(order[k:]), sorted(order[:k])


class Process(NamedTuple):
    """Which of the processes this one is, how many there are, and its device."""

    rank: int
    world: int
    device: str

    def sum(self, values):
        """Sum a list of numbers over all processes."""
        total = torch.tensor(values, dtype=torch.float32, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def say(self, text):
        """Print, on the first process alone, without cutting through the progress bar."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()


def set_up_process(device):
    """Read torchrun's variables; without torchrun, one process."""
    rank, world, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = pick_device(device)
    require(
        device != "mps" or world == 1, "MPS is one device: start one process, or give --device cpu"
    )
    if device == "cuda":
        gpus = torch.cuda.device_count()
        require(
            local < gpus,
            f"process {local} has no GPU, this machine has {gpus}; start fewer processes",
        )
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Process(rank, world, device)


def open_data(config, process):
    """Make the toy if it is asked for and not there; open what is to be trained on and held out
    -> (source, its rows, held-out source, its rows, encoders)."""
    length = MODELS[config.model].caption_length
    encoders = Encoders({"vae": config.vae, "t5": config.t5}, length, process.device)
    paths = config.data, config.held_out
    if config.data == "toy":
        if process.rank == 0:
            prepare_toy(config, encoders)
        if process.world > 1:
            dist.barrier()  # the others wait
        paths = toy_folder(config) / "cache_train", toy_folder(config) / "cache_held_out"
    source = held_source = open_source(paths[0], config)
    rows, held_rows = split_rows(config, len(source), process)
    if paths[1]:
        held_source = open_source(paths[1], config)
        rows, held_rows = range(len(source)), range(len(held_source))
    names, held_names = (encoder_names(config, s, encoders) for s in (source, held_source))
    require(
        names == held_names,
        f"data was encoded with {names}, held_out with {held_names}; use the same",
    )
    encoders.names = names
    if config.films:  # they are wanted at the end: complain now if they are not there
        data.locate(names["vae"], "vae"), data.locate(names["t5"], "text_encoder")
    return source, rows, held_source, held_rows, encoders


# ---------------------------------------------------------------------------------------------
# Checkpoints
#
# Weights, their average, the optimizer's state, and the step. That is all: the data position
# follows from the step, and no random generator has a state to keep, since every draw is keyed.


def save_checkpoint(config, step, model, ema, optimizer, encoders):
    """Write out/checkpoints/step_… beside, then rename; delete all but the newest `keep`."""
    folder = Path(config.out) / "checkpoints" / f"step_{step:08d}"
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    names = [name for name, _ in model.named_parameters()]
    moments = {
        f"{names[i]}.{key}": value
        for i, s in optimizer.state_dict()["state"].items()
        for key, value in s.items()
    }
    hashes = {}
    for name, tensors in (("model", model.state_dict()), ("ema", ema), ("optimizer", moments)):
        path = beside / f"{name}.safetensors"
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path)
        with open(path, "rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    write_json(beside / "state.json", {
        "step": step, "config": asdict(config), "model": asdict(model.config), "encoders": encoders,
        "sha256": hashes, "torch": torch.__version__,
    })  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
    for old in sorted(folder.parent.glob("step_*"))[: -config.keep]:
        shutil.rmtree(old)


def read_state(folder):
    """state.json of a checkpoint: everything but its tensors."""
    advice = f"delete {folder} to go on from the checkpoint before it"
    return data.read_json(folder / "state.json", advice)


def load_checkpoint(config, model, ema, optimizer, encoders):
    """Put the newest checkpoint of config.out into model, ema and optimizer -> step."""
    folder = newest_checkpoint(config.out)
    state = read_state(folder)
    try:  # open_weights compares each file with its hash
        weights, average, moments = (
            open_weights(folder / f"{name}.safetensors") for name in ("model", "ema", "optimizer")
        )
    except BadWeights as error:
        raise BadInput(f"{error}; delete {folder} to go on from the checkpoint before it") from None
    require(config_from(state["model"]) == model.config,
            f"{config.out} is a {state['model']}, not model={config.model!r}")  # fmt: skip
    require(state["encoders"] == encoders,
            f"{config.out} has {state['encoders']}, its data {encoders}")  # fmt: skip
    model.load_state_dict(weights)
    for name, tensor in ema.items():
        tensor.copy_(average[name])
    saved = optimizer.state_dict()
    for i, (name, _) in enumerate(model.named_parameters()):
        if f"{name}.step" in moments:  # AdamW has no state for what had no gradient yet
            saved["state"][i] = {
                key: moments[f"{name}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
            }
    optimizer.load_state_dict(saved)
    return state["step"]


# ---------------------------------------------------------------------------------------------
# Is it learning?
#
# The loss hardly falls while films get better: most of it is noise that nobody could predict. Two
# things do tell. The loss on held-out clips with noise and timesteps that are always the same, in
# four bins of t: the bins of large t, where the film is decided, move by little but move. And, on
# the toy, the share of films that show what their caption says, as data.detect sees them.


@torch.no_grad()
def held_out_loss(config, model, source, rows, encoders, process):
    """[4] losses of the noise on held-out clips (64 of them at most), by t: 0-249, 250-499,
    500-749, 750-999. The clips are shared among the ranks.
    """
    device, sums = process.device, [0.0] * 8
    model.eval()
    work = [(row, b) for row in rows[:64] for b in range(4)][process.rank :: process.world]
    for part in (work[i : i + 32] for i in range(0, len(work), 32)):
        batch = torch.utils.data.default_collate([source[row, row] for row, _ in part])
        generators = [keyed_generator(config.seed, "held-out posterior", row) for row, _ in part]
        x0, y, mask = to_device(batch, encoders, generators, device)
        keys = [f"held out {row} {b}" for row, b in part]
        t = (
            torch.tensor([b for _, b in part]) * 250
            + (250 * draw_choice(config, "held-out t", keys)).long()
        )
        noise = draw_noise(config, keys, x0.shape[1:]).to(device)
        x_t = q_sample(TRAINING, x0, t, noise)
        with autocast(device):
            out = model(x_t, t.to(device), y, mask)
        for (_, b), mse in zip(
            part, diffusion_loss(TRAINING, out, x0, x_t, t, noise)["mse"].tolist()
        ):
            sums[b] += mse
            sums[4 + b] += 1
    model.train()
    sums = process.sum(sums)
    return [sums[b] / sums[4 + b] for b in range(4)]


def caption_accuracy(config, model, encoders, films, process, **options):
    """Film every toy caption, films[0] times if it was seen in training, else films[1] times, and
    let the detector judge. -> {"seen": ..., "held_out": ...}, each with the counts right in all,
    and in colour, shape and direction.
    """
    triples = [t for t in data.TRIPLES for _ in range(films[t in data.HELD_OUT])]
    prompts = [data.caption_of(t) for t in triples]
    # films are shared among the ranks
    keys, mine = film_keys(config.seed, prompts), slice(process.rank, None, process.world)
    shape = (model.config.in_channels, config.frames, config.size // 8, config.size // 8)
    model.eval()
    y, mask = encoders.t5.encode(prompts[mine])
    videos = film(model, encoders.vae, y, mask, keys[mine], shape, batch=32, **options)
    counts = [0.0] * 10
    for triple, video in zip(triples[mine], videos):
        found, base = data.detect(video) or ("none",) * 3, 5 * (triple in data.HELD_OUT)
        right = [a == b for a, b in zip(triple, found)]
        for k, hit in enumerate([True, all(right), *right]):
            counts[base + k] += hit
    model.train()
    counts = [int(c) for c in process.sum(counts)]
    names = ("films", "right", "colour", "shape", "direction")
    return {"seen": dict(zip(names, counts[:5])), "held_out": dict(zip(names, counts[5:]))}


def interval(k, n):
    """95% interval of a share of k in n (Wilson 1927)."""
    z = 1.96
    centre = (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return centre - half, centre + half


def describe(accuracy):
    """The accuracy in words, a line for each kind of caption."""
    lines = []
    for kind, a in accuracy.items():
        n = max(a["films"], 1)
        low, high = interval(a["right"], n)
        parts = ", ".join(f"{k} {a[k] / n:.0%}" for k in ("colour", "shape", "direction"))
        lines.append(f"caption accuracy, {kind.replace('_', '-')} captions: {a['right'] / n:.1%} "
                     f"of {n} films (95% interval {low:.0%} to {high:.0%}); {parts}")  # fmt: skip
    return "\n".join(lines)


def plot_losses(out):
    """loss.png from metrics.jsonl: training loss, smoothed, and the held-out loss in its four bins
    of t.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    train, held = [m for m in lines if "loss" in m], [m for m in lines if "held_out" in m]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    losses, smooth = [m["mse"] for m in train], []
    for loss in losses:
        smooth.append(loss if not smooth else 0.9 * smooth[-1] + 0.1 * loss)
    axes[0].plot([m["step"] for m in train], losses, color="0.8")
    axes[0].plot([m["step"] for m in train], smooth, color="C0")
    axes[0].set(title="training: loss of the noise", xlabel="step", yscale="log")
    for b in range(4):
        axes[1].plot(
            [m["step"] for m in held],
            [m["held_out"][b] for m in held],
            label=f"t {b * 250}-{b * 250 + 249}",
        )
    axes[1].set(title="held-out clips: loss of the noise, by t", xlabel="step", yscale="log")
    figure.legend(loc="outside right center")
    write_whole(Path(out) / "loss.png", lambda p: figure.savefig(p, format="png", dpi=100))
    plt.close(figure)


# ---------------------------------------------------------------------------------------------
# The loop


def to_device(batch, encoders, generators, device):
    """A collated batch -> x0 [B, C, T, H, W], y [B, L, E], mask [B, L] on the device; encodes clips
    if need be.
    """
    if "latents" in batch:  # of a cache: {"latents" [B, C, T, H, W], "y" [B, L, E], "mask" [B, L]}
        return (batch[k].to(device, non_blocking=True) for k in ("latents", "y", "mask"))
    return (v.to(device) for v in data.encode_batch(batch, encoders.vae, encoders.t5, generators))


def training_loss(config, parallel, model, batch, encoders, step, process):
    """From a batch to the scalar loss; also its two parts. parallel: the model as DDP wraps it.

    All that is random about a sample hangs on its position in the stream.
    """
    device, positions = process.device, positions_of(step, config, process)
    generators = [keyed_generator(config.seed, "posterior", p) for p in positions]
    # [B, C, T, H, W], [B, L, E], [B, L]
    x0, y, mask = to_device(batch, encoders, generators, device)
    if on_images(config, step):  # x0 becomes [B, C, 1, H, W]
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
    loss = (loss_weights(config, t).to(device) * (parts["mse"] + parts["vlb"])).mean()
    return loss, {name: part.mean() for name, part in parts.items()}


def on_images(config, step):
    """Whether a step trains on single frames: the first share of a run, as v1 began from an image
    model (report, A5).
    """
    return step < config.image_share * config.steps


def loss_weights(config, t):
    """[B] weights for t [B]. The loss of the noise at small t is ten to a hundred times that at
    large t, where the film's content is decided; min-SNR weights (arXiv 2303.09556, eq. 7, for
    noise prediction) keep it from drowning the rest.
    """
    if config.min_snr == 0:
        return torch.ones(len(t))
    abar = TRAINING.abar[t]
    return (config.min_snr * (1 - abar) / abar).clamp(max=1).float()


@torch.no_grad()
def update_average(ema, model, decay):
    """ema = decay * ema + (1 - decay) * weights, in fp32."""
    weights = model.state_dict()
    torch._foreach_lerp_(list(ema.values()), [weights[name] for name in ema], 1 - decay)


@contextmanager
def averaged(model, ema):
    """Inside the `with`, the model has the averaged weights."""
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(ema)
    yield
    model.load_state_dict(raw)


def needs_average(config, step):
    """Whether something after this step wants the averaged weights."""
    return step % config.eval_every == 0 or step % config.film_every == 0 or step == config.steps


class Metrics:
    """out/metrics.jsonl, a JSON object per line, written by the first process alone. Of a resumed
    run's lines, those of what is to be done again are dropped."""

    def __init__(self, out, step, process):
        self.path, self.is_main = Path(out) / "metrics.jsonl", process.rank == 0
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        whole = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
        kept = "".join(line for line, m in whole if m["step"] <= step and "films" not in m)
        if self.is_main:
            write_whole(self.path, lambda p: p.write_text(kept))

    def write(self, **values):
        if self.is_main:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")


def encoder_names(config, source, encoders):
    """What sample.py needs to know of the encoders that made the latents: names and
    fingerprints.
    """
    if isinstance(source, data.LatentCache):
        return {"vae": source.vae, "vae_fingerprint": source.settings["vae"],
                "t5": source.t5, "t5_fingerprint": source.settings["t5"]}  # fmt: skip
    return {"vae": config.vae, "vae_fingerprint": encoders.vae.fingerprint,
            "t5": config.t5, "t5_fingerprint": encoders.t5.fingerprint}  # fmt: skip


def learning_rate(config, step):
    """Linear warm-up, then constant or a half cosine down to 0."""
    decay = 0.5 * (1 + math.cos(math.pi * step / config.steps)) if config.cosine else 1.0
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup)) * decay


def train(config, resume):
    """The whole run, from a configuration to films."""
    process, start = set_up_process(config.device), time.time()
    source, rows, held_source, held_rows, encoders = open_data(config, process)

    torch.manual_seed(config.seed)  # the initial weights, the same on every rank
    model = STDiT(model_config(config)).to(process.device)
    if config.init and not resume:
        process.say(initialize(config, model, encoders))
    if config.checkpointing:
        checkpoint_blocks(model)
    ema = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, config.beta2),
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    step = load_checkpoint(config, model, ema, optimizer, encoders.names) if resume else 0
    parallel = (
        DistributedDataParallel(model, broadcast_buffers=False) if process.world > 1 else model
    )
    metrics = Metrics(config.out, step, process)
    process.say(banner(config, model, step, len(rows), len(held_rows), process))

    loader = DataLoader(
        Stream(source, rows, config.seed),
        batch_sampler=Batches(config, step, process),
        num_workers=config.workers,
        pin_memory=process.device.startswith("cuda"),
        multiprocessing_context="spawn" if config.workers else None,
    )
    quiet = None if process.rank == 0 else True  # None: a bar on a terminal, else lines (below)
    bar = tqdm(loader, initial=step, total=config.steps, disable=quiet, unit="step")
    clock = time.time()
    for batch in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss, parts = training_loss(config, parallel, model, batch, encoders, step, process)
        loss.backward()  # DDP averages over ranks: the mean of the whole batch, as shards are equal
        if on_images(config, step) and config.variant in ("sequential", "parallel"):
            for block in model.blocks:  # one frame has nothing to connect: let it be as it is
                block.attn_temp.zero_grad()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        update_average(ema, model, min(config.ema, (1 + step) / (10 + step)))  # short at first

        last = step == config.steps
        if step % config.log_every == 0 or last:
            losses = [loss.item(), parts["mse"].item(), parts["vlb"].item()]
            loss, mse, vlb = (v / process.world for v in process.sum(losses))
            require(math.isfinite(loss + norm.item()), f"step {step}: the loss is {loss}, its "
                    f"gradient {norm.item()}; --resume with a smaller --lr")  # fmt: skip
            rate = config.log_every * config.batch_size / (time.time() - clock)
            metrics.write(step=step, loss=loss, mse=mse, vlb=vlb, grad_norm=norm.item(),
                          lr=learning_rate(config, step - 1), clips_per_second=rate,
                          seconds=time.time() - start)  # fmt: skip
            bar.set_postfix(loss=f"{loss:.4f}", clips_per_s=f"{rate:.1f}")
            if bar.disable:
                left = (config.steps - step) * config.batch_size / rate / 60
                process.say(f"step {step} of {config.steps}  loss {loss:.4f}  {rate:.1f} clips/s  "
                            f"{left:.1f} min left")  # fmt: skip
            clock = time.time()
        with averaged(model, ema) if needs_average(config, step) else nullcontext():
            if step % config.eval_every == 0 or last:
                bins = held_out_loss(config, model, held_source, held_rows, encoders, process)
                metrics.write(step=step, held_out=bins)
                shown = "  ".join(f"{b:.4f}" for b in bins)
                process.say(f"step {step}  held-out loss by t: {shown}")
                clock = time.time()
            if config.data == "toy" and config.films and step % config.film_every == 0 and not last:
                options = {"steps": 20, "guidance": config.guidance, "sampler": "ddim"}
                accuracy = caption_accuracy(config, model, encoders, (1, 1), process, **options)
                metrics.write(step=step, accuracy=accuracy)
                process.say(f"step {step}, a film per caption\n{describe(accuracy)}")
                clock = time.time()
        if (step % config.save_every == 0 or last) and process.rank == 0:
            save_checkpoint(config, step, model, ema, optimizer, encoders.names)

    with averaged(model, ema):
        finish(config, model, held_source, held_rows, encoders, metrics, process)
    films = ", films.gif, films.png" if config.films else ""
    process.say(f"{config.steps} steps in {time.time() - start:.0f} s, in {config.out}: "
                f"checkpoints, metrics.jsonl, loss.png{films}")  # fmt: skip
    if process.world > 1:
        dist.destroy_process_group()


def banner(config, model, step, clips, held_out, process):
    """The resolved run, once."""
    size, parameters = (
        f"{config.frames}x{config.size}x{config.size}",
        sum(p.numel() for p in model.parameters()),
    )
    precision = "bf16 over fp32 weights" if process.device.startswith("cuda") else "fp32"
    fields_ = " ".join(f"{k}={v}" for k, v in asdict(config).items())
    return (f"{config.model}: {parameters:,} parameters; {clips} clips of {size}, {held_out} held "
            f"out; {process.world} process(es) on {process.device}, {precision}; steps {step} to "
            f"{config.steps} of {config.batch_size} clips\n{fields_}")  # fmt: skip


def finish(config, model, source, rows, encoders, metrics, process):
    """loss.png, the run's films, and its caption accuracy if it is the toy."""
    if process.rank == 0:
        plot_losses(config.out)
    if config.films == 0:
        return
    options = {"steps": config.film_steps, "guidance": config.guidance, "sampler": "ddpm"}
    prompts = list(dict.fromkeys(source.text(row) for row in rows))  # in order, each once
    if config.data == "toy":
        accuracy = caption_accuracy(config, model, encoders, (2, 8), process, **options)
        metrics.write(step=config.steps, accuracy=accuracy, films="final")
        process.say(describe(accuracy))
        prompts = [data.caption_of(t) for t in data.HELD_OUT]  # combinations that were never seen
    if process.rank == 0:
        prompts = prompts[: config.films]
        shape = (model.config.in_channels, config.frames, config.size // 8, config.size // 8)
        keys = film_keys(config.seed, prompts)
        y, mask = encoders.t5.encode(prompts)
        videos = film(model, encoders.vae, y, mask, keys, shape, **options)
        threes = [torch.cat(videos[i : i + 3], dim=-1) for i in range(0, len(videos) // 3 * 3, 3)]
        write_gif(
            Path(config.out) / "films.gif", torch.cat(threes or videos[:1], dim=-2), config.fps
        )
        write_sheet(Path(config.out) / "films.png", videos, prompts)


def model_config(config):
    """The network's configuration: that of its name, with this run's variant and scales."""
    model = MODELS[config.model]
    return replace(
        model,
        variant=config.variant,
        space_scale=config.space_scale or config.size / 512,
        time_scale=config.time_scale or model.time_scale,
    )


def initialize(config, model, encoders):
    """Begin with the weights of config.init -> a line that says what they are. Positions follow
    from this run's scales, whatever the weights were trained with: that is how a model of small
    films goes on with large ones (report, T1).
    """
    new, was = load_weights(model, config.init, lambda: encoders.t5.null_caption()), "none"
    vars(encoders).pop("t5", None)  # training from a cache has no room for 10 GB of T5-XXL
    if (stored := stored_config(config.init)) is not None:
        was = f"{stored.space_scale}, {stored.time_scale}"
    return (f"from {config.init}: {len(new)} tensors are new; space_scale="
            f"{model.config.space_scale}, time_scale={model.config.time_scale} (stored: {was})")


def main():
    train(*parse_command_line())


if __name__ == "__main__":
    command(main, BadWeights)
