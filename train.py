"""Training: one file from the command line to the loss, on a laptop's CPU or on many GPUs.

    python train.py                                # the toy: makes its data, learns, films (about 15 minutes)
    torchrun --nproc-per-node 2 train.py           # the same numbers from two processes
    torchrun --nproc-per-node 8 train.py --preset NAME --data CACHE --out DIR

Every field of TrainConfig is an option of the command line, over the values of a preset. A run lives in the
folder `out`: checkpoints, metrics.jsonl, loss.png, films. --resume goes on from its newest checkpoint, on
the CPU bit for bit as if it had never stopped.

Shapes, in this file:
    B clips of this process in one step    C latent channels    T frames    H, W latent height and width
    L caption tokens    E caption channels
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from statistics import NormalDist

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from data import BadInput, command, keyed_generator, warn, write_json, write_whole
from sample import (
    TRAINING, autocast, config_from, diffusion_loss, film, film_keys, newest_checkpoint, pick_device, q_sample,
    read_checkpoint, write_gif, write_sheet,
)  # fmt: skip
from stdit import MODELS, STDiT, drop_captions

# ---------------------------------------------------------------------------------------------
# Configuration
#
# A run is one frozen dataclass. A preset is an instance of it; the command line is made from its fields.


@dataclass(frozen=True)
class TrainConfig:
    # what is learned from what
    model: str = "toy"  # a name in stdit.MODELS
    data: str = "toy"  # a cache folder, a CSV (then the encoders run in every step), or "toy": made here
    held_out: str = ""  # cache or CSV of clips not trained on; empty: one in 20 of data's, at most 64, is held out
    out: str = "out/toy"  # the run's folder
    vae: str = "assets/vae"  # folder or Hub name of the frozen AutoencoderKL
    t5: str = "assets/t5"  # folder or Hub name of the frozen T5 encoder and tokenizer
    frames: int = 8  # frames of a clip
    size: int = 64  # height and width in pixels
    stride: int = 1  # source frames per kept frame
    fps: int = 8  # of the films that are written: source rate / stride
    max_bad: float = 0.5  # share of unusable clips in a CSV at which the run ends
    # how
    steps: int = 6000  # optimizer steps, in all
    image_steps: int = 600  # the first of them on single frames: all but motion is learned at 1/frames of the cost
    batch_size: int = 16  # clips per step over all processes, so that their number changes nothing
    lr: float = 2e-3  # AdamW's peak learning rate; v1: 2e-5 for 760M parameters that were trained before
    warmup: int = 100  # steps in which the learning rate rises from 0
    cosine: bool = True  # let it fall to 0 along a half cosine; v1 keeps it constant
    weight_decay: float = 0.0  # AdamW's
    beta2: float = 0.99  # AdamW's memory of squared gradients, 1 / (steps it looks back); the usual 0.999 is for longer runs
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.99  # decay of the moving average of the weights, about 1 / (steps it looks back); v1: 0.9999
    drop_caption: float = 0.1  # share of captions replaced by the null caption, for guidance
    t_mean: float = 0.4  # timesteps are 1000 sigmoid(t_mean + t_std * normal), arXiv 2403.03206 section 3.1 ...
    t_std: float = 1.0  # ... or uniform, as in v1, if t_std is 0
    min_snr: float = 0.03  # weight each sample's loss by min(1, min_snr / SNR(t)), arXiv 2303.09556; 0: not, as in v1
    # where and how often
    seed: int = 0  # of every random draw
    device: str = "auto"  # auto, cpu, cuda or mps; fp32 on cpu and mps, bf16 autocast over fp32 weights on cuda
    workers: int = 0  # processes per rank that read data; a cache needs none
    log_every: int = 50  # steps between lines of metrics.jsonl
    eval_every: int = 500  # steps between evaluations of the held-out loss
    film_every: int = 1500  # steps between quick measurements of the toy's caption accuracy
    films: int = 6  # captions to film at the end, into films.gif and films.png; 0: none, and no accuracy
    film_steps: int = 50  # denoising steps of those films (DDPM)
    guidance: float = 4.0  # guidance of all films
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # newest checkpoints that are kept


PRESETS = {"toy": TrainConfig()}


def parse_command_line():
    """(configuration, whether to resume) from a preset, a resumed run's own configuration, and the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="toy", help=f"one of: {', '.join(PRESETS)}")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    for f in fields(TrainConfig):
        kind = {"True": True, "False": False}.__getitem__ if f.type is bool else f.type
        parser.add_argument(f"--{f.name}", f"--{f.name.replace('_', '-')}", type=kind, metavar=f.type.__name__)
    args, unknown = parser.parse_known_args()
    if unknown:
        names = [f"--{f.name}" for f in fields(TrainConfig)] + ["--preset", "--resume"]
        near = difflib.get_close_matches(unknown[0].split("=")[0].replace("-", "_").replace("__", "--", 1), names)
        raise BadInput(f"unknown option {unknown[0]}; nearest: {', '.join(near) or 'none, see --help'}")
    if args.preset not in PRESETS:
        near = difflib.get_close_matches(args.preset, PRESETS, cutoff=0) or PRESETS
        raise BadInput(f"unknown preset {args.preset!r}; nearest: {', '.join(near)}")
    config = PRESETS[args.preset]
    chosen = {f.name: getattr(args, f.name) for f in fields(TrainConfig) if getattr(args, f.name) is not None}
    out = chosen.get("out", config.out)
    if args.resume:
        if newest_checkpoint(out) is None:
            raise BadInput(f"{out} holds no run to resume: no checkpoints/step_* in it; start one without --resume")
        state, = read_checkpoint(newest_checkpoint(out))
        config = TrainConfig(**state["config"])
    elif newest_checkpoint(out):
        raise BadInput(f"{out} holds a run already; go on with --resume, or give another --out")
    config = replace(config, **chosen)
    check(config)
    return config, args.resume


def check(config):
    """BadInput where a field, or two together, can't be right."""
    if config.model not in MODELS:
        near = difflib.get_close_matches(config.model, MODELS, cutoff=0)
        raise BadInput(f"model={config.model!r} is unknown; nearest: {', '.join(near)}")
    pt, ph, pw = MODELS[config.model].patch_size
    unit = 8 * math.lcm(ph, pw)  # 8 is the VAE's factor
    if config.size < unit or config.size % unit:
        near = max(unit, round(config.size / unit) * unit)
        raise BadInput(f"size={config.size} must divide by {unit} (VAE 8 x patch {unit // 8}); try --size {near}")
    if config.frames < 1 or config.frames % pt:
        raise BadInput(f"frames={config.frames} must divide by the patch's {pt} frames")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size < 1 or config.batch_size % world:
        raise BadInput(f"batch_size={config.batch_size} must divide by the {world} processes; "
                       f"try --batch_size {math.ceil(config.batch_size / world) * world}")
    for name in ("steps", "stride", "fps", "log_every", "eval_every", "film_every", "save_every", "keep"):
        if getattr(config, name) < 1:
            raise BadInput(f"{name}={getattr(config, name)}: expected 1 or more")


# ---------------------------------------------------------------------------------------------
# The data stream
#
# The stream is endless: step s of training takes positions s * batch_size … (s + 1) * batch_size - 1, of which
# every process takes its part. A position decides everything random about its sample: which clip (a new
# permutation every epoch), which span, timestep, noise, whether the caption is dropped. So any number of
# processes and workers, and a resumed run, see the same samples.


@lru_cache(maxsize=2)
def permutation(seed, n, epoch):
    return torch.randperm(n, generator=keyed_generator(seed, "order", epoch)).tolist()


class Stream:
    """stream[position] -> a sample of `source` (data.Clips or data.LatentCache), restricted to `rows`."""

    def __init__(self, source, rows, seed):
        self.source, self.rows, self.seed = source, rows, seed

    def __getitem__(self, position):
        epoch, i = divmod(position, len(self.rows))
        row = self.rows[permutation(self.seed, len(self.rows), epoch)[i]]
        return self.source[row, position]


def positions_of(step, config, rank, world):
    """This process's share of the positions of a step."""
    B = config.batch_size // world
    return range(step * config.batch_size + rank * B, step * config.batch_size + (rank + 1) * B)


def draw_timesteps(config, positions):
    """Timesteps t [B], spread evenly over any run of positions: the golden ratio's multiples leave no gaps."""
    start = torch.rand(1, generator=keyed_generator(config.seed, "timesteps")).item()
    u = [(start + p * 0.6180339887498949) % 1 for p in positions]  # in [0, 1)
    if config.t_std > 0:  # denser where it matters, and rarer elsewhere
        u = [1 / (1 + math.exp(-config.t_mean - config.t_std * NormalDist().inv_cdf(max(v, 1e-9)))) for v in u]
    return torch.tensor([min(int(1000 * v), 999) for v in u])


def draw_noise(config, positions, shape):
    """Noise [B, C, T, H, W] in fp32, a generator per sample."""
    return torch.stack([torch.randn(shape, generator=keyed_generator(config.seed, "noise", p)) for p in positions])


def draw_choice(config, purpose, positions):
    """A number in [0, 1) per sample: [B]."""
    return torch.cat([torch.rand(1, generator=keyed_generator(config.seed, purpose, p)) for p in positions])


# ---------------------------------------------------------------------------------------------
# Set-up: data, encoders, processes


class Encoders:
    """The frozen encoders, loaded when first used: training from a finished cache needs neither."""

    def __init__(self, config, device):
        self.config, self.device = config, device

    @cached_property
    def vae(self):
        return data.VAE(self.config.vae, self.device)

    @cached_property
    def t5(self):
        return data.T5(self.config.t5, MODELS[self.config.model].caption_length, self.device)


def prepare_toy(config, encoders):
    """Draw and encode the toy where that is not done yet -> (cache, cache of held-out clips)."""
    folder = Path("out/toy-data")
    data.make_toy(folder, frames=config.frames, size=config.size)
    caches = []
    for split in ("train", "held_out"):
        caches.append(folder / f"cache_{split}")
        data.write_cache(folder / f"{split}.csv", caches[-1], encoders.vae, encoders.t5, config.frames, 1, config.size)
    return caches


def open_source(path, config):
    """A cache folder or a CSV -> LatentCache or Clips that fits the configuration."""
    if not Path(path).is_dir():
        return data.Clips(path, config.frames, config.stride, config.size, config.seed, config.max_bad)
    cache, model = data.LatentCache(path), MODELS[config.model]
    wanted = {"frames": config.frames, "size": config.size, "caption_length": model.caption_length}
    found = {k: cache.settings[k] for k in wanted} | {"channels": cache.channels, "captions": cache.caption_channels}
    wanted |= {"channels": model.in_channels, "captions": model.caption_channels}
    different = [f"{k}: {found[k]} there, {v} here" for k, v in wanted.items() if found[k] != v]
    if different:
        raise BadInput(f"the cache {path} does not fit the run ({'; '.join(different)}); "
                       "make another with data.py cache, or change the run's fields")
    return cache


def split_rows(config, n):
    """(rows to train on, rows to hold out) of n clips, if no held-out set is given."""
    order = permutation(config.seed, n, "split")
    k = min(n // 20, 64)
    if k == 0:
        warn(f"{n} clips are too few to hold any out: the held-out loss is that of training clips")
        return list(range(n)), list(range(n))
    return sorted(order[k:]), sorted(order[:k])


def set_up_processes(device):
    """(rank, number of processes, device of this one) from torchrun's variables; 0, 1 without torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device)
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return rank, world, device


def sum_over_ranks(values, device, world):
    """Sum a list of numbers over all processes."""
    total = torch.tensor(values, dtype=torch.float32, device=device)
    if world > 1:
        dist.all_reduce(total)
    return total.tolist()


# ---------------------------------------------------------------------------------------------
# Checkpoints
#
# Weights, their average, the optimizer's state, and the step. That is all: the data position follows from
# the step, and no random generator has a state to keep, since every draw is keyed.


def save_checkpoint(config, step, model, ema, optimizer, encoders):
    """Write out/checkpoints/step_… beside, then rename; delete all but the newest `keep`."""
    folder = Path(config.out) / "checkpoints" / f"step_{step:08d}"
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    names = [name for name, _ in model.named_parameters()]
    moments = {
        f"{names[i]}.{key}": value for i, s in optimizer.state_dict()["state"].items() for key, value in s.items()
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


def load_checkpoint(config, model, ema, optimizer):
    """Put the newest checkpoint of config.out into model, ema and optimizer -> (step, encoders)."""
    state, weights, average, moments = read_checkpoint(newest_checkpoint(config.out), "model", "ema", "optimizer")
    if config_from(state["model"]) != model.config:
        raise BadInput(f"{config.out} was trained as {state['model']}, which is not model={config.model!r}")
    model.load_state_dict(weights)
    for name, tensor in ema.items():
        tensor.copy_(average[name])
    saved = optimizer.state_dict()
    for i, (name, _) in enumerate(model.named_parameters()):
        saved["state"][i] = {key: moments[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict(saved)
    return state["step"], state["encoders"]


# ---------------------------------------------------------------------------------------------
# Is it learning?
#
# The loss hardly falls while films get better: most of it is noise that nobody could predict. Two things
# do tell. The loss on held-out clips with noise and timesteps that are always the same, in four bins of t: the
# bins of large t, where the film is decided, move by little but move. And, on the toy, the share of films that show
# what their caption says, as data.detect sees them.


@torch.no_grad()
def held_out_loss(config, model, source, rows, encoders, rank, world):
    """[4] losses of the noise on held-out clips, by t: 0-249, 250-499, 500-749, 750-999. Shared among ranks."""
    device, sums = next(model.parameters()).device, [0.0] * 8
    model.eval()
    work = [(row, b) for row in rows[:64] for b in range(4)][rank::world]
    for part in (work[i : i + 32] for i in range(0, len(work), 32)):
        batch = torch.utils.data.default_collate([source[row, row] for row, _ in part])
        generators = [keyed_generator(config.seed, "held-out posterior", row) for row, _ in part]
        x0, y, mask = to_device(batch, encoders, generators, device)
        keys = [f"held out {row} {b}" for row, b in part]
        t = torch.tensor([b for _, b in part]) * 250 + (250 * draw_choice(config, "held-out t", keys)).long()
        noise = draw_noise(config, keys, x0.shape[1:]).to(device)
        x_t = q_sample(TRAINING, x0, t, noise)
        with autocast(device):
            out = model(x_t, t.to(device), y, mask)
        for (_, b), mse in zip(part, diffusion_loss(TRAINING, out, x0, x_t, t, noise)["mse"].tolist()):
            sums[b] += mse
            sums[4 + b] += 1
    model.train()
    sums = sum_over_ranks(sums, device, world)
    return [sums[b] / sums[4 + b] for b in range(4)]


def caption_accuracy(config, model, encoders, films, rank, world, **options):
    """Film every toy caption, films[0] times if it was seen in training, else films[1] times, and let the detector
    judge. -> {"seen": …, "held_out": …}, each with the counts right in all, and in colour, shape and direction."""
    triples = [t for t in data.TRIPLES for _ in range(films[t in data.HELD_OUT])]
    prompts = [data.caption_of(t) for t in triples]
    keys, mine = film_keys(config.seed, prompts), slice(rank, None, world)  # films are shared among the ranks
    shape = (model.config.in_channels, config.frames, config.size // 8, config.size // 8)
    model.eval()
    videos = film(model, encoders.vae, encoders.t5, prompts[mine], keys[mine], shape, batch=32, **options)
    counts = [0.0] * 10
    for triple, video in zip(triples[mine], videos):
        found, base = data.detect(video) or ("none",) * 3, 5 * (triple in data.HELD_OUT)
        right = [a == b for a, b in zip(triple, found)]
        for k, hit in enumerate([True, all(right), *right]):
            counts[base + k] += hit
    model.train()
    counts = [int(c) for c in sum_over_ranks(counts, next(model.parameters()).device, world)]
    names = ("films", "right", "colour", "shape", "direction")
    return {"seen": dict(zip(names, counts[:5])), "held_out": dict(zip(names, counts[5:]))}


def interval(k, n):
    """95% interval of a share of k in n (Wilson 1927)."""
    z = 1.96
    centre, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return centre - half, centre + half


def describe(accuracy):
    """The accuracy in words, a line for each kind of caption."""
    for kind, a in accuracy.items():
        if a["films"]:
            low, high = interval(a["right"], a["films"])
            yield (f"caption accuracy, {kind.replace('_', '-')} captions: {a['right'] / a['films']:.1%} of {a['films']} films "
                   f"(95% interval {low:.1%} to {high:.1%}); colour {a['colour'] / a['films']:.1%}, "
                   f"shape {a['shape'] / a['films']:.1%}, direction {a['direction'] / a['films']:.1%}")


def plot_losses(out):
    """loss.png from metrics.jsonl: training loss, smoothed, and the held-out loss in its four bins of t."""
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
        axes[1].plot([m["step"] for m in held], [m["held_out"][b] for m in held], label=f"t {b * 250}-{b * 250 + 249}")
    axes[1].set(title="held-out clips: loss of the noise, by t", xlabel="step", yscale="log")
    axes[1].legend()
    write_whole(Path(out) / "loss.png", lambda p: figure.savefig(p, format="png", dpi=100))
    plt.close(figure)


# ---------------------------------------------------------------------------------------------
# The loop


def to_device(batch, encoders, generators, device):
    """A collated batch -> x0 [B, C, T, H, W], y [B, L, E], mask [B, L] on the device; encodes clips if need be."""
    if "latents" in batch:
        return (batch[k].to(device, non_blocking=True) for k in ("latents", "y", "mask"))
    return (v.to(device) for v in data.encode_batch(batch, encoders.vae, encoders.t5, generators))


def training_loss(config, model, null, batch, encoders, positions, step, device):
    """From a batch to the scalar loss; also its two parts. All that is random about a sample hangs on its position."""
    generators = [keyed_generator(config.seed, "posterior", p) for p in positions]
    x0, y, mask = to_device(batch, encoders, generators, device)  # [B, C, T, H, W], [B, L, E], [B, L]
    if step < config.image_steps:  # single frames first: x0 becomes [B, C, 1, H, W]
        frame = (draw_choice(config, "frame", positions) * x0.shape[2]).long().to(device)
        x0 = torch.stack([clip[:, f, None] for clip, f in zip(x0, frame)])
    t = draw_timesteps(config, positions)  # [B]
    noise = draw_noise(config, positions, x0.shape[1:]).to(device)
    drop = (draw_choice(config, "drop", positions) < config.drop_caption).to(device)  # [B]
    y, mask = drop_captions(y, mask, drop, null)
    x_t = q_sample(TRAINING, x0, t, noise)
    with autocast(device):
        out = model(x_t, t.to(device), y, mask)  # [B, 2C, T, H, W]
    parts = diffusion_loss(TRAINING, out, x0, x_t, t, noise)  # [B] each
    loss = (loss_weights(config, t).to(device) * (parts["mse"] + parts["vlb"])).mean()
    return loss, {name: part.mean() for name, part in parts.items()}


def loss_weights(config, t):
    """[B] weights for t [B]. The loss of the noise at small t is ten to a hundred times that at large t, where the film's
    content is decided; min-SNR weights (arXiv 2303.09556, eq. 7, for noise prediction) keep it from drowning the rest."""
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
    """Inside the with, the model has the averaged weights."""
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(ema)
    yield
    model.load_state_dict(raw)


class Metrics:
    """out/metrics.jsonl, a JSON object per line. On a resumed run, lines of steps to be done again are dropped."""

    def __init__(self, out, step):
        self.path = out / "metrics.jsonl"
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
        write_whole(self.path, lambda p: p.write_text(kept))

    def write(self, **values):
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")


def encoder_names(config, source, encoders):
    """What sample.py needs to know of the encoders that made the latents: names and fingerprints."""
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
    rank, world, device = set_up_processes(config.device)
    is_main, out, start = rank == 0, Path(config.out), time.time()
    encoders = Encoders(config, device)
    say = partial(print, flush=True) if is_main else lambda *args: None

    # Data. Rank 0 makes what is missing; the others wait.
    paths = [config.data, config.held_out]
    if config.data == "toy":
        if is_main:
            prepare_toy(config, encoders)
        if world > 1:
            dist.barrier()
        paths = ["out/toy-data/cache_train", "out/toy-data/cache_held_out"]
    source = held_source = open_source(paths[0], config)
    if paths[1]:
        held_source = open_source(paths[1], config)
        rows, held_rows = list(range(len(source))), list(range(len(held_source)))
    else:
        rows, held_rows = split_rows(config, len(source))

    # Model, average, optimizer
    torch.manual_seed(config.seed)  # the initial weights, the same on every rank
    model = STDiT(MODELS[config.model]).to(device)
    null = model.y_embedder.y_embedding
    ema = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay,
                                  betas=(0.9, config.beta2), fused=True)  # fmt: skip
    step, names = load_checkpoint(config, model, ema, optimizer) if resume else (0, encoder_names(config, source, encoders))
    parallel = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model

    say(f"{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters; {len(rows)} clips of "
        f"{config.frames}x{config.size}x{config.size}, {len(held_rows)} held out; {world} process(es) on {device}, "
        f"{'bf16' if device.startswith('cuda') else 'fp32'}; steps {step} to {config.steps} of {config.batch_size} clips")
    say(" ".join(f"{k}={v}" for k, v in asdict(config).items()))
    metrics = Metrics(out, step) if is_main else None

    loader = DataLoader(
        Stream(source, rows, config.seed),
        batch_sampler=[list(positions_of(s, config, rank, world)) for s in range(step, config.steps)],
        num_workers=config.workers, pin_memory=device.startswith("cuda"),
        multiprocessing_context="spawn" if config.workers else None, persistent_workers=config.workers > 0,
    )  # fmt: skip
    bar = tqdm(loader, initial=step, total=config.steps, disable=None if is_main else True, unit="step")
    model.train()
    tick, done = time.time(), 0
    for batch in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        positions = positions_of(step, config, rank, world)
        loss, parts = training_loss(config, parallel, null, batch, encoders, positions, step, device)
        loss.backward()  # DDP averages the gradients over ranks; shards are equal, so that is the whole batch's mean
        if step < config.image_steps:  # nothing to connect yet: the temporal attention stays as it is, its output zero
            for block in model.blocks:
                block.attn_temp.zero_grad()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        step, done = step + 1, done + 1
        update_average(ema, model, min(config.ema, (1 + step) / (10 + step)))

        if step % config.log_every == 0 or step == config.steps:
            values = sum_over_ranks([loss.item(), parts["mse"].item(), parts["vlb"].item()], device, world)
            loss, mse, vlb = (v / world for v in values)
            rate = done * config.batch_size / (time.time() - tick)
            tick, done = time.time(), 0
            if is_main:
                metrics.write(step=step, loss=loss, mse=mse, vlb=vlb, grad_norm=norm.item(),
                              lr=learning_rate(config, step - 1), clips_per_second=round(rate, 1))  # fmt: skip
                bar.set_postfix(loss=f"{loss:.4f}", clips_per_s=f"{rate:.1f}")
                if bar.disable:
                    say(f"step {step} of {config.steps}  loss {loss:.4f}  {rate:.1f} clips/s")
        if step % config.eval_every == 0 or step == config.steps:
            with averaged(model, ema):
                bins = held_out_loss(config, model, held_source, held_rows, encoders, rank, world)
            if is_main:
                metrics.write(step=step, held_out=bins)
                say(f"step {step}  held-out loss by t: " + "  ".join(f"{b:.4f}" for b in bins))
            tick, done = time.time(), 0
        if config.data == "toy" and step % config.film_every == 0 and step > config.image_steps:
            with averaged(model, ema):
                accuracy = caption_accuracy(config, model, encoders, (1, 1), rank, world,
                                            steps=20, guidance=config.guidance, sampler="ddim")  # fmt: skip
            if is_main:
                metrics.write(step=step, accuracy=accuracy)
                say(f"step {step}  quick look, a film per caption\n  " + "\n  ".join(describe(accuracy)))
            tick, done = time.time(), 0
        if step % config.save_every == 0 or step == config.steps:
            if is_main:
                save_checkpoint(config, step, model, ema, optimizer, names)
            tick, done = time.time(), 0
    bar.close()

    # Films
    with averaged(model, ema):
        finish(config, model, held_source, held_rows, encoders, rank, world, metrics, say)
    say(f"{config.steps} steps in {time.time() - start:.0f} s, in {out}: checkpoints, metrics.jsonl, loss.png, films")
    if world > 1:
        dist.destroy_process_group()


def finish(config, model, source, rows, encoders, rank, world, metrics, say):
    """loss.png, the run's films, and its caption accuracy if it is the toy."""
    if rank == 0:
        plot_losses(config.out)
    if config.films == 0:
        return
    options = {"steps": config.film_steps, "guidance": config.guidance, "sampler": "ddpm"}
    texts = [source.text(row) for row in rows]
    prompts = sorted(set(texts), key=texts.index)
    if config.data == "toy":
        accuracy = caption_accuracy(config, model, encoders, (2, 8), rank, world, **options)
        if rank == 0:
            metrics.write(step=config.steps, accuracy=accuracy, films="final")
        say("\n".join(describe(accuracy)))
        prompts = [data.caption_of(t) for t in data.HELD_OUT]  # combinations that were never seen
    if rank == 0:
        prompts = prompts[: config.films]
        shape = (model.config.in_channels, config.frames, config.size // 8, config.size // 8)
        videos = film(model, encoders.vae, encoders.t5, prompts, film_keys(config.seed, prompts), shape, **options)
        rows = [torch.cat(videos[i : i + 3], dim=-1) for i in range(0, len(videos) - len(videos) % 3, 3)]
        write_gif(Path(config.out) / "films.gif", torch.cat(rows, dim=-2) if rows else videos[0], config.fps)
        write_sheet(Path(config.out) / "films.png", videos, prompts)


def main():
    train(*parse_command_line())


if __name__ == "__main__":
    command(main)
