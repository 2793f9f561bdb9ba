"""Train STDiT on a laptop's CPU or on many GPUs.

    python train.py                             # the toy: makes its data, trains, generates videos
    torchrun --nproc-per-node 2 train.py        # the same with two processes, up to rounding
    torchrun --nproc-per-node 8 train.py --preset 16x256x256 --data CACHE

A run is a folder: checkpoints, metrics.jsonl, loss.png, samples. --resume continues from its newest
checkpoint, on a CPU bit for bit as if it had never stopped.

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
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Iterator, Literal

import torch
import tyro
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

import data
import sample
from data import keyed_generator, print0, require
from stdit import BLOCKS, MODELS, STDiT, set_up_scaling

# ---------------------------------------------------------------------------------------------
# Configuration
#
# The fields of TrainConfig are the options of the command line. Their defaults are the first stage
# of Open-Sora v1; the command line starts from a preset, by default the toy.


@dataclass(frozen=True)
class TrainConfig:
    preset: str = "16x256x256"  # sets the defaults of all other options, see PRESETS in train.py
    resume: bool = False  # continue the run in --out with its options; if there is none, start one
    out: str | None = None  # folder of the run; None: out/PRESET
    # model
    model: Literal[tuple(MODELS)] = "STDiT-XL/2"  # size of the network, see MODELS in stdit.py
    variant: Literal[tuple(BLOCKS)] = "sequential"  # design of the block, see BLOCKS in stdit.py
    init: str | None = "weights/PixArt-XL-2-512x512"  # weights or a run; None: random
    space_scale: float | None = None  # position = index / scale; None: sqrt(size * width) / 512
    time_scale: float | None = None  # temporal position = index / scale; None: the model's
    trainable: Literal["all", "temporal"] = "all"  # weights to train; temporal: names with _temp
    # data
    data: str | None = None  # toy, or a cache of data.py; 1 clip in 20, at most 64, is held out
    toy_clips: int = 2048  # training clips of the toy
    frames: int = 16  # frames of a clip
    size: int = 256  # height in pixels
    width: int | None = None  # width in pixels; None: the height
    stride: int = 3  # source frames per frame
    # optimization
    steps: int = 80_000  # optimizer steps
    batch_size: int = 512  # clips per step, over all processes
    micro_batch: int | None = 8  # clips per forward pass of a process; None: its whole share
    lr: float = 2e-5  # peak learning rate of AdamW; the report found 1e-4 too large
    warmup: int = 0  # steps of linear warm-up of the learning rate
    decay: bool = False  # linear decay of the learning rate to 0; else it is constant
    weight_decay: float = 0.0  # AdamW's weight decay
    beta2: float = 0.999  # AdamW's second beta
    grad_clip: float = 1.0  # maximum norm of the gradient
    ema_decay: float = 0.9999  # exponential moving average of the weights
    drop_caption: float = 0.1  # fraction of captions replaced by the null caption, for guidance
    t_std: float | None = None  # logit-normal t: 1000 sigmoid(t_mean + t_std normal); None: uniform
    t_mean: float = 0.0  # see t_std
    min_snr: float | None = None  # loss weights min(1, min_snr / SNR); None: all 1
    seed: int = 0  # random seed
    # hardware
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else MPS, else CPU
    sp: int = 1  # processes that share each video (sequence parallelism)
    activation_checkpointing: Literal["none", "selective", "full"] = "full"  # see set_up_scaling
    compile: bool = True  # torch.compile the blocks
    # output; an interval of 0 means at the end only
    log_every: int = 10  # steps between lines of metrics.jsonl; losses are those of one step
    eval_every: int = 500  # steps between validation losses
    sample_every: int = 1500  # steps between sample videos, always of the same captions and noise
    save_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2  # number of newest checkpoints to keep; 0: all
    num_samples: int = 6  # sample videos to write (the toy generates more, to count); 0: none
    sample_steps: int = 100  # denoising steps of sample videos
    guidance: float = 7.0  # classifier-free guidance of sample videos
    guidance_min_t: int = 0  # use guidance only at timesteps >= this
    output_fps: int = 8  # frames per second of sample videos


# The stages of v1, each from the EMA weights of the one before. time_scale 1.5: index 3 at stride 2
# and index 2 at stride 3 are both source frame 6: 3 / 1.5 = 2. (v1 has 2/3, which stretches time.)
STAGE1 = TrainConfig()
STAGE2 = replace(STAGE1, init="out/16x256x256", steps=24_000)  # on clips of higher quality
STAGE3 = replace(STAGE1, init="out/16x256x256-hq", size=512, steps=20_000, batch_size=128)
STAGE3 = replace(STAGE3, micro_batch=1, activation_checkpointing="none")  # should fit in 80 GB
STAGE4 = replace(STAGE3, init="out/16x512x512", frames=64, stride=2, time_scale=1.5, output_fps=12)
STAGE4 = replace(STAGE4, activation_checkpointing="full")
TOY = TrainConfig(
    model="toy",
    init=None,  # random weights, so a larger learning rate, and warm-up
    lr=4e-3,
    warmup=100,
    decay=True,  # a short run should end with small steps
    beta2=0.99,  # averages over the last 100 steps, not 1000
    ema_decay=0.99,
    data="toy",
    frames=8,
    size=64,
    stride=1,
    steps=2200,
    batch_size=16,
    micro_batch=None,
    t_std=1.0,  # fewer timesteps at the ends
    t_mean=0.4,  # more large ones, where the content of a video is decided
    min_snr=0.05,  # weights below 1 for t < 547, found by trial; the paper has 5
    activation_checkpointing="none",
    compile=False,  # on a CPU the toy's steps take as long compiled
    log_every=50,
    sample_every=500,
    sample_steps=10,
    guidance=3.0,
    guidance_min_t=600,  # at small t guidance distorts the shapes
)
PRESETS = {
    "toy": TOY,
    "16x256x256": STAGE1,
    "16x256x256-hq": STAGE2,
    "16x512x512": STAGE3,
    "64x512x512": STAGE4,
    # for a GPU of 24 GB: the temporal attention alone is trained
    "16x256x256-24gb": replace(STAGE1, trainable="temporal", batch_size=32, steps=20_000),
}
PRESETS = {name: replace(config, preset=name) for name, config in PRESETS.items()}


def derive(config):
    """Replace the None of out, width and the two scales by their values. At any size, positions are
    those of 512x512 pixels, on which PixArt-alpha was trained.
    """
    c = config
    width = c.width or c.size
    space_scale = c.space_scale or math.sqrt(c.size * width) / 512
    time_scale = c.time_scale or MODELS[c.model].time_scale
    out = c.out or f"out/{c.preset}"
    return replace(c, out=out, width=width, space_scale=space_scale, time_scale=time_scale)


def model_config(config):
    """Return the STDiTConfig of a run."""
    c = derive(config)
    model = MODELS[c.model]
    return replace(model, variant=c.variant, space_scale=c.space_scale, time_scale=c.time_scale)


# ---------------------------------------------------------------------------------------------
# Samples and draws
#
# Training samples form an endless stream. Step s takes those with the indices s * batch_size to
# (s + 1) * batch_size - 1, shared among processes. All that is random about a sample follows from
# its index: its clip (in a new order every epoch), timestep, noise, and whether its caption is
# dropped. So any number of processes, and a resumed run, see the same samples.


class Stream:
    """An endless stream of clips: the rows of a LatentCache, in a new order every epoch."""

    def __init__(self, cache, rows, seed):
        self.cache, self.rows, self.seed = cache, rows, seed

    def batch(self, indices):
        """Read the clips at these indices: x0 [B, C, T, H, W], y [B, L, E], mask [B, L]."""
        n = len(self.rows)
        rows = [self.rows[permutation(self.seed, n, i // n)[i % n]] for i in indices]
        return default_collate([self.cache[row] for row in rows])


@lru_cache(maxsize=4)  # a batch may reach into the next epoch
def permutation(seed, n, epoch):
    return torch.randperm(n, generator=keyed_generator(seed, "order", epoch)).tolist()


def draw(rand, seed, purpose, keys, *shape):
    """Draw once per key with rand, which is torch.rand or torch.randn: [B, *shape]."""
    generators = [keyed_generator(seed, purpose, key) for key in keys]
    return torch.stack([rand(shape, generator=g) for g in generators])


def draw_timesteps(config, indices):
    """Draw timesteps [B], 0 to 999: uniform, or logit-normal (arXiv 2403.03206). They are
    stratified: sample k of a step is drawn from the k-th of batch_size equal parts of [0, 1), so
    the timesteps of a step are spread evenly, and its mean loss varies less from step to step.
    """
    u = draw(torch.rand, config.seed, "timestep", indices)
    stratum = torch.tensor(indices) % config.batch_size
    u = (stratum + u) / config.batch_size
    if config.t_std is not None:
        u = torch.sigmoid(config.t_mean + config.t_std * torch.special.ndtri(u))
    return (1000 * u).long().clamp(max=999)


def training_batch(config, stream, indices):
    """Return what a training step needs, on the CPU: x0 [B, C, T, H, W], y [B, L, E], mask [B, L],
    timesteps [B], noise [B, C, T, H, W], and drop [B], True where a caption is dropped.
    """
    x0, y, mask = stream.batch(indices)
    t = draw_timesteps(config, indices)
    noise = draw(torch.randn, config.seed, "noise", indices, *x0.shape[1:])
    drop = draw(torch.rand, config.seed, "drop", indices) < config.drop_caption
    return x0, y, mask, t, noise, drop


def indices_from(step, batch_size, B, dp_rank, dp_size):
    """Yield the indices of each micro-batch of a process, from a step on. With batch_size 8, B 2
    and 2 processes, rank 0 gets 0-1, 4-5, then 8-9, 12-13 in the next step; rank 1 gets 2-3, 6-7.
    """
    for first in count(step * batch_size + dp_rank * B, B * dp_size):
        yield range(first, first + B)


def prefetch(read, keys):
    """Yield read(key) for each of endlessly many keys; a thread reads the next one meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(read, next(keys))
        for key in keys:
            result = pending.result()
            pending = pool.submit(read, key)
            yield result


def to_device(tensor, device):
    """Copy a CPU tensor; to a GPU from pinned memory, so that the CPU need not wait."""
    if str(device).startswith("cuda"):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# ---------------------------------------------------------------------------------------------
# The training step


@dataclass
class Run:
    """The state of a run on one process."""

    config: TrainConfig
    distributed: data.Distributed
    training: Stream
    validation: Stream
    model: STDiT  # to be trained
    ddp_model: torch.nn.Module  # the same, wrapped in DDP if there are several processes
    ema: STDiT  # moving average of its weights
    optimizer: torch.optim.Optimizer
    schedule: sample.Schedule  # on the device
    step: int  # optimizer steps done
    micro_batches: int  # forward passes per step on this process
    batches: Iterator  # results of training_batch
    vae: data.VAE | None  # decodes sample videos; loaded at the start, so that an error shows there


def train_step(run):
    """Do one optimizer step. Return the means of loss, MSE and VLB over the step's samples on this
    process, [3], and the norm of the gradient.
    """
    c = run.config
    losses = torch.zeros(3, device=run.distributed.device)
    for k in range(run.micro_batches):
        # x0, y, mask, t, noise, drop: see training_batch
        batch = [to_device(tensor, run.distributed.device) for tensor in next(run.batches)]
        # DDP averages gradients over processes in the backward pass of the last micro-batch only.
        run.ddp_model.require_backward_grad_sync = k == run.micro_batches - 1  # as no_sync()
        loss_mse_vlb = training_loss(run, *batch) / run.micro_batches  # [3]
        # DDP takes the mean over all processes. Where sp of them share a video, each has the
        # gradient of its own frames, and their sum is needed: sp times the mean.
        (loss_mse_vlb[0] * c.sp).backward()
        losses += loss_mse_vlb.detach()
    grad_norm = clip_grad_norm_(run.model.parameters(), c.grad_clip).item()  # waits for the GPU
    if math.isfinite(grad_norm):  # the same on all processes, as DDP has averaged
        run.optimizer.param_groups[0]["lr"] = learning_rate(c, run.step)
        run.optimizer.step()
        update_ema(c, run.step, run.ema, run.model)
    else:
        print0(f"step {run.step + 1}: skipped, its gradient norm is {grad_norm}")
    run.optimizer.zero_grad(set_to_none=False)  # in place: gradients are views of DDP's buckets
    return losses, grad_norm


def training_loss(run, x0, y, mask, t, noise, drop):
    """Return [3]: the loss to minimize, the mean MSE and the mean VLB. x0, noise [B, C, T, H, W];
    y [B, L, E]; mask [B, L]; t [B]; drop [B], True where the caption is dropped.
    """
    y, mask = drop_captions(y, mask, drop, run.model.y_embedder.y_embedding)
    x_t = sample.q_sample(run.schedule, x0, t, noise)
    out = run.ddp_model(x_t, t, y, mask)  # [B, 2C, T, H, W]
    terms = sample.diffusion_loss(run.schedule, out, x0, x_t, t, noise)  # [B] each
    loss = loss_weights(run.config, run.schedule, t) * (terms["mse"] + terms["vlb"])  # [B]
    return torch.stack([loss.mean(), terms["mse"].mean(), terms["vlb"].mean()])


def drop_captions(y, mask, drop, null):
    """Replace captions by the null caption. y [B, L, E]; mask [B, L] bool; drop [B] bool; null
    [L, E]. Returns the new y and mask. The null caption is not masked. (v1 keeps the mask of the
    replaced caption, so there "no caption" depends on that caption's length.)
    """
    return torch.where(drop[:, None, None], null, y), mask | drop[:, None]


def loss_weights(config, schedule, t):
    """Return Min-SNR weights [B] for both terms of the loss (arXiv 2303.09556, section 3.4,
    prediction of noise): min(SNR, min_snr) / SNR. They are small at small t, where the loss is
    hundreds of times larger than at large t, although large t decides the content of a video.
    """
    snr = (schedule.alpha[t] / schedule.sigma[t]).square()  # [B]
    return (config.min_snr / snr).clamp(max=1) if config.min_snr else torch.ones_like(snr)


def learning_rate(config, step):
    """Return the learning rate: linear warm-up, then constant or linear decay to 0."""
    decay = 1 - step / config.steps if config.decay else 1.0
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup)) * decay


@torch.no_grad()
def update_ema(config, step, ema, model):
    """Set ema = decay * ema + (1 - decay) * weights. In the n-th step the decay is
    (1 + n) / (10 + n), at most ema_decay, so that the initial weights are soon forgotten.
    """
    n = step + 1
    decay = min(config.ema_decay, (1 + n) / (10 + n))
    # all of them in a few kernels
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---------------------------------------------------------------------------------------------
# The loop

started = stop_requested = False


def train(config, distributed=data.Distributed()):
    """Train from the first step, or from the newest checkpoint, to the last."""
    global started
    begin = time.time()
    run = start_run(config, distributed)
    started = True
    c = run.config
    start = logged = run.step
    seconds = 0.0  # of the steps since `logged`

    def due(every):
        return run.step >= c.steps or (run.step > 0 and every > 0 and run.step % every == 0)

    while True:
        # Saving comes first, because a process that has to stop may have little time.
        flag = torch.tensor(int(stop_requested), device=distributed.device)
        stop = data.all_reduce_sum(flag).item() > 0  # on any process
        if run.step > start and (stop or due(c.save_every)):
            save_checkpoint(run)
        if stop:
            saved = f"continue with --resume --out {c.out}" if run.step else "no checkpoint"
            print0(f"stopped after step {run.step}; {saved}")
            return
        if due(c.eval_every):
            evaluate(run)
        if c.num_samples and due(c.sample_every):
            write_samples(run)
        if run.step >= c.steps:
            break

        clock = time.time()
        losses, grad_norm = train_step(run)
        seconds += time.time() - clock
        run.step += 1
        if due(c.log_every):
            log_step(run, losses, grad_norm, (run.step - logged) * c.batch_size / seconds)
            logged, seconds = run.step, 0.0
    data.barrier()
    print0(f"{c.out}: checkpoints, metrics.jsonl, loss.png, samples; {time.time() - begin:.0f} s")


# FLOP/s in bf16, dense; the first key found in the GPU's name applies
PEAK = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 990e12, "H200": 990e12, "B200": 2250e12}


def log_step(run, losses, grad_norm, clips_per_second):
    """Print the loss of this step, averaged over processes, and write the losses to metrics.jsonl.
    On CUDA these have also tokens per second, memory, and MFU if the GPU's peak rate is known.
    """
    c, d = run.config, run.distributed
    loss, mse, vlb = (data.all_reduce_sum(losses) / d.world_size).tolist()
    line = dict(step=run.step, loss=loss, mse=mse, vlb=vlb, grad_norm=grad_norm)
    line |= dict(lr=learning_rate(c, run.step - 1), clips_per_second=clips_per_second)
    minutes = (c.steps - run.step) * c.batch_size / clips_per_second / 60
    speed = f"{clips_per_second:.1f} clips/s  about {minutes:.0f} min left"
    if d.device.startswith("cuda"):
        name = torch.cuda.get_device_name()
        tokens, flop = (clips_per_second * cost for cost in cost_of_clip(c))  # per second
        memory = torch.cuda.max_memory_allocated() / 1e9
        line |= dict(tokens_per_second=tokens, memory_gb=memory)
        speed += f"  {tokens:,.0f} tokens/s  {memory:.1f} GB"
        if peak := next((v for k, v in PEAK.items() if k in name), None):
            line["mfu"] = flop / peak / d.world_size  # model FLOPs utilization
            speed += f"  MFU {line['mfu']:.1%}"
    print0(f"step {run.step} of {c.steps}  loss {loss:.4f}  {speed}")
    if d.rank == 0:
        write_metrics(c.out, line)


@lru_cache(maxsize=1)
def cost_of_clip(config):
    """Return a clip's tokens, and the FLOP to train all weights on it, forward and backward."""
    m, (T, H, W) = model_config(config), (config.frames, config.size // 8, config.width // 8)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        y = torch.empty(1, m.caption_length, m.caption_channels)
        STDiT(m)(torch.empty(1, m.in_channels, T, H, W), torch.empty(1), y)
    return T * H * W // math.prod(m.patch_size), 3 * counter.get_total_flops()


# ---------------------------------------------------------------------------------------------
# Evaluation
#
# The mean loss over t says little, because it comes mostly from small t. Three measures of the EMA
# weights show progress: the validation loss in four bins of t, with fixed noise; sample videos,
# always of the same captions and noise; and, on the toy, how many of them match their captions.


def evaluate(run):
    """Print the validation loss, write it to metrics.jsonl and plot it."""
    losses = validation_loss(run)
    print0(f"step {run.step}  validation loss by t: " + "  ".join(f"{x:.4f}" for x in losses))
    if run.distributed.rank == 0:
        write_metrics(run.config.out, {"step": run.step, "validation": losses})
        plot_losses(run.config.out)


@torch.no_grad()
def validation_loss(run):
    """Return the mean squared error of the noise on at most 64 validation clips: 4 numbers, for t
    in 0-249, 250-499, 500-749, 750-999. Clips are shared among processes.
    """
    c, d = run.config, run.distributed
    sums = torch.zeros(4, dtype=torch.float64)
    rows = run.validation.rows[:64]
    share = rows[d.rank :: d.world_size]  # of this process
    B = c.micro_batch or 8
    for keys in (share[i : i + B] for i in range(0, len(share), B)):
        batch = default_collate([run.validation.cache[row] for row in keys])
        x0, y, mask = (to_device(tensor, d.device) for tensor in batch)
        for b in range(4):
            u = draw(torch.rand, c.seed, f"validation t {b}", keys)
            t = (250 * b + (250 * u).long()).to(d.device)
            noise = draw(torch.randn, c.seed, f"validation noise {b}", keys, *x0.shape[1:])
            noise = noise.to(d.device)
            x_t = sample.q_sample(run.schedule, x0, t, noise)
            eps, _ = run.ema(x_t, t, y, mask).chunk(2, dim=1)
            sums[b] += (eps - noise).square().flatten(1).mean(1).sum().item()
    return (data.all_reduce_sum(sums) / len(rows)).tolist()


def write_samples(run):
    """Generate sample videos, shared among processes, and write the first num_samples as a contact
    sheet and, next to each other, as a GIF (above 128 pixels an MP4).
    """
    c, d, validation = run.config, run.distributed, run.validation
    rows = sample_rows(c, validation, run.step >= c.steps)
    captions = [validation.cache.captions[row] for row in rows]
    keys = sample.video_keys(c.seed, captions)
    share = slice(d.rank, None, d.world_size)  # of this process
    videos = []
    if rows[share]:
        x0, y, mask = default_collate([validation.cache[row] for row in rows[share]])  # x0: shape
        options = dict(guidance=c.guidance, guidance_min_t=c.guidance_min_t)
        options |= dict(batch_size=c.micro_batch or 32, steps=c.sample_steps)
        videos = sample.generate(run.ema, run.vae, y, mask, keys[share], x0.shape[1:], **options)
    shares = data.all_gather(videos)
    if d.rank == 0:
        n = d.world_size  # undo the slices [rank::n]
        videos = [shares[i % n][i // n] for i in range(len(rows))]
        shown = videos[: c.num_samples]
        path = f"{c.out}/samples/step_{run.step:08d}"
        sample.write_sheet(f"{path}.png", shown, captions)
        write, suffix = (sample.write_gif, "gif") if c.size <= 128 else (sample.write_video, "mp4")
        write(f"{path}.{suffix}", torch.cat(shown, dim=-1), c.output_fps)
        line = {"step": run.step, "samples": f"{path}.{suffix}"}
        write_metrics(c.out, line | (evaluate_toy(captions, videos) if c.data == "toy" else {}))
    data.barrier()


def sample_rows(config, validation, last):
    """Return the rows of the validation captions to generate videos for: the first num_samples. On
    the toy, where row i has caption i, these are all, unseen ones first, and after the last step 2
    videos per seen caption and 8 per unseen one.
    """
    if config.data != "toy":
        return validation.rows[: config.num_samples]
    unseen = [data.LABELS.index(label) for label in data.UNSEEN]
    seen = [data.LABELS.index(label) for label in data.SEEN]
    return 2 * (unseen + seen) + 6 * unseen if last else unseen + seen


def evaluate_toy(captions, videos):
    """Count the videos that match their captions: {"accuracy": {"seen": [matches, videos],
    "unseen": the same}, "quality": means of data.shape_quality over the matching videos, or None}.
    """
    labels = {data.caption_of(label): label for label in data.LABELS}
    accuracy = {"seen": [0, 0], "unseen": [0, 0]}
    quality = []
    for caption, video in zip(captions, videos):
        label = labels[caption]
        counts = accuracy["unseen" if label in data.UNSEEN else "seen"]
        counts[1] += 1
        if data.detect(video) == label:
            counts[0] += 1
            quality.append(data.shape_quality(video, label))
    for name, (matches, n) in accuracy.items():
        print0(f"{matches} of {n} videos match {name} captions")
    means = torch.tensor(quality).nanmean(0).tolist() if quality else None
    return {"accuracy": accuracy, "quality": means}


def read_metrics(out):
    """Return the lines of a run's metrics.jsonl, if any, without a half-written last one. Of lines
    that a resumed run wrote again the last one counts.
    """
    path = Path(out) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    lines = [json.loads(line) for line in lines if line.endswith("\n")]
    return list({(m["step"], *m): m for m in lines}.values())


def write_metrics(out, line):
    """Append a line to metrics.jsonl."""
    with open(Path(out) / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def plot_losses(out):
    """Write loss.png: the MSE of the noise in training, and in validation by t."""
    from matplotlib.figure import Figure

    lines = read_metrics(out)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel="mean squared error of the noise", yscale="log")
    train = {m["step"]: m["mse"] for m in lines if "mse" in m}
    axes.plot(*zip(*train.items()), color="0.8", marker=".", label="training, single steps")
    validation = {m["step"]: m["validation"] for m in lines if "validation" in m}
    labels = [f"validation, t {b}-{b + 249}" for b in range(0, 1000, 250)]
    axes.plot(*zip(*validation.items()), marker=".", label=labels)
    figure.legend(loc="outside right upper")
    data.atomic_write(Path(out) / "loss.png", lambda tmp: figure.savefig(tmp, format="png"))


# ---------------------------------------------------------------------------------------------
# Checkpoints
#
# A checkpoint is a folder that sample.py and --init read: config.json, model.safetensors (the EMA
# weights) and sample.json. To resume, training.pt has the weights and the optimizer's state, and
# state.json the rest. The position in the data and all draws follow from the step.


def save_checkpoint(run):
    """Write out/checkpoints/tmp and rename it step_N, so that a checkpoint is never half-written.
    Delete all but the newest keep_checkpoints (0: keep all). Rank 0 writes, the others wait.
    """
    c = run.config
    if run.distributed.rank == 0:
        vae, t5 = run.training.cache.encoders  # names of their sources
        names = ("frames", "size", "width", "guidance", "guidance_min_t", "output_fps")
        settings = dict(vae=vae, t5=t5) | {name: getattr(c, name) for name in names}
        training = dict(model=run.model.state_dict(), optimizer=run.optimizer.state_dict())
        state = dict(step=run.step, config=asdict(c), data=run.training.cache.settings)
        folder = Path(c.out) / "checkpoints" / f"step_{run.step:08d}"
        tmp = folder.with_name("tmp")
        shutil.rmtree(tmp, ignore_errors=True)  # left by an interrupted save
        run.ema.save_pretrained(tmp)
        data.write_json(tmp / "sample.json", settings)
        torch.save(training, tmp / "training.pt")
        data.write_json(tmp / "state.json", state)
        os.replace(tmp, folder)
        checkpoints = sorted(folder.parent.glob(sample.STEP))
        for old in checkpoints[: -c.keep_checkpoints]:  # 0: [:0], none
            shutil.rmtree(old, ignore_errors=True)  # fails on NFS while sample.py reads it
    data.barrier()


def load_checkpoint(folder, config, model, ema, optimizer, data_settings):
    """Load the state of a run and return its step. UserError if its data, network or trainable
    weights were others. The options of the optimizer may be new.
    """
    state = json.loads((folder / "state.json").read_text())
    new = vars(model.config) | data_settings | {"trainable": config.trainable}
    old = state["config"] | vars(sample.read_config(folder)) | state["data"]
    changed = [f"{name} {old.get(name)}" for name in new if old.get(name) != new[name]]
    other = f"{folder} was trained with other options ({', '.join(changed)})"
    require(not changed, f"{other}: resume with the same, or use --init")
    training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True, mmap=True)
    training["optimizer"]["param_groups"] = optimizer.state_dict()["param_groups"]  # of this run
    model.load_state_dict(training["model"])
    optimizer.load_state_dict(training["optimizer"])
    ema.load_state_dict(load_file(folder / "model.safetensors"))
    return state["step"]


# ---------------------------------------------------------------------------------------------
# Setup


def start_run(config, distributed):
    """Open the data, create or load the model, and set up several processes."""
    check_ranges(config)
    c, d = derive(config), distributed
    check_options(c, d)
    data.require_folder(c.out)
    training, validation = open_data(c, d)
    model, ema, optimizer, step = create_model(c, d.device, training.cache.settings)
    steps = data.all_gather(step)
    require(len(set(steps)) == 1, f"ranks would start at steps {steps}: --out must be shared")
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print0(f"{c}\n{model.config}\n{parameters:,} trainable parameters")
    print0(f"{len(training.rows)} clips, {len(validation.rows)} for validation")
    print0(f"{d.world_size} process(es) on {d.device}")
    if d.rank == 0:
        Path(c.out).mkdir(parents=True, exist_ok=True)
        lines = [m for m in read_metrics(c.out) if m["step"] <= step]  # the rest comes again
        text = "".join(json.dumps(m) + "\n" for m in lines)
        data.atomic_write(Path(c.out) / "metrics.jsonl", lambda tmp: tmp.write_text(text))

    dp_size = d.world_size // c.sp
    B = c.micro_batch or c.batch_size // dp_size
    sp_mesh = None
    if c.sp > 1:  # sp consecutive ranks share each video
        device_type, names = d.device.split(":")[0], ("dp", "sp")
        sp_mesh = init_device_mesh(device_type, (dp_size, c.sp), mesh_dim_names=names)["sp"]
    set_up_scaling(model, c.activation_checkpointing, c.compile, sp_mesh)
    ddp_model = model
    if d.world_size > 1:
        # Blocks are compiled one by one, so DDP need not split graphs to reduce gradients early.
        torch._dynamo.config.optimize_ddp = False
        options = dict(gradient_as_bucket_view=True, forward_sync_buffers=False)
        ddp_model = DistributedDataParallel(model, **options)
    indices = indices_from(step, c.batch_size, B, d.rank // c.sp, dp_size)
    return Run(
        config=c,
        distributed=d,
        training=training,
        validation=validation,
        model=model,
        ddp_model=ddp_model,
        ema=ema,
        optimizer=optimizer,
        schedule=sample.TRAIN_SCHEDULE.to(d.device),
        step=step,
        micro_batches=c.batch_size // (B * dp_size),
        batches=prefetch(lambda i: training_batch(c, training, i), indices),
        vae=data.VAE(training.cache.encoders[0], d.device) if c.num_samples else None,
    )


def check_ranges(config):
    """Raise UserError for an option out of its range."""
    sizes = ("frames", "size", "width", "stride", "toy_clips", "batch_size", "micro_batch", "sp")
    data.require_range(config, 1, 10**9, *sizes, "output_fps")
    counts = ("log_every", "eval_every", "sample_every", "save_every", "keep_checkpoints")
    counts += ("steps", "warmup", "num_samples", "guidance_min_t")
    data.require_range(config, 0, 99_999_999, *counts)  # step_N has 8 digits
    data.require_range(config, 2, 1000, "sample_steps")
    data.require_range(config, 0, 1e6, "lr", "weight_decay")
    positive = ("grad_clip", "min_snr", "t_std", "space_scale", "time_scale")
    data.require_range(config, 1e-6, 1e6, *positive)
    data.require_range(config, 0, 1, "drop_caption", "ema_decay")
    data.require_range(config, 0, 0.999999, "beta2")
    data.require_range(config, -1e6, 1e6, "t_mean", "guidance")


def check_options(config, distributed):
    """Raise UserError for options that do not fit each other, before anything is made."""
    c, n = config, distributed.world_size
    require(n % c.sp == 0, f"sp={c.sp} must divide the {n} process(es)")
    unit = n // c.sp * (c.micro_batch or 1)
    expected = f"expected a multiple of {unit} (processes / sp x micro_batch)"
    require(c.batch_size % unit == 0, f"batch_size={c.batch_size}: {expected}")
    pt, ph, pw = MODELS[c.model].patch_size
    T, S = c.frames // pt, (c.size // 8 // ph) * (c.width // 8 // pw)
    found = f"sp={c.sp} with {T} frames and {S} patches a frame"
    require(T % c.sp == 0 and S % c.sp == 0, f"{found}: sp must divide both")
    possible = c.sp == 1 or c.variant in ("sequential", "parallel")
    require(possible, f"--sp {c.sp} needs --variant sequential or parallel")
    possible = c.trainable == "all" or c.variant != "full"
    require(possible, "--variant full has no temporal weights: use --trainable all")
    possible = c.trainable == "all" or c.init or sample.newest_checkpoint(c.out)
    require(possible, "--trainable temporal needs --init: a new network's final layer is zero")
    if c.compile:
        cxx, header = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include"), "Python.h")
        possible = shutil.which(cxx) and header.exists()
        require(possible, f"--compile needs {cxx} and {header}: install them, or use --no-compile")


def create_model(config, device, data_settings):
    """Return model, EMA model, optimizer and step. The weights are random, those of --init, or
    those of the newest checkpoint in config.out, if there is one.
    """
    torch.manual_seed(config.seed)
    c, stdit_config = config, model_config(config)
    checkpoint = sample.newest_checkpoint(c.out)
    if c.init is not None and not checkpoint:
        model = sample.load_model(c.init, **vars(stdit_config)).train()  # with this run's config
    else:
        model = STDiT(stdit_config)
    model.to(device)
    for name, p in model.named_parameters():
        p.requires_grad_(c.trainable == "all" or "_temp" in name)
    ema = deepcopy(model).requires_grad_(False).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    options = dict(betas=(0.9, c.beta2), weight_decay=c.weight_decay, fused=True)
    optimizer = torch.optim.AdamW(trained, **options)  # train_step sets its learning rate
    step = load_checkpoint(checkpoint, c, model, ema, optimizer, data_settings) if checkpoint else 0
    return model, ema, optimizer, step


def open_data(config, distributed):
    """Return the training and the validation Stream."""
    c = config
    if c.data == "toy":
        caches = [open_cache(path, c) for path in toy_caches(c, distributed)]
        return [Stream(cache, range(len(cache)), c.seed) for cache in caches]
    cache = open_cache(c.data, c)
    order = permutation(0, len(cache), epoch=-1)  # an order of no epoch, the same for every seed
    held_out = min(len(cache) // 20, 64)
    validation_rows = order[:held_out] or order  # with fewer than 20 clips: the training clips
    return [Stream(cache, rows, c.seed) for rows in (order[held_out:], validation_rows)]


def open_cache(path, config):
    """Return the LatentCache at `path`; UserError if it does not fit the config."""
    found = path and (Path(path) / "index.json").is_file()
    require(found, f"--data: expected a latent cache, made with data.py; found {path}")
    cache, model = data.LatentCache(path), MODELS[config.model]
    needed = {k: getattr(config, k) for k in ("frames", "size", "width", "stride")}
    needed |= {k: getattr(model, k) for k in ("caption_length", "caption_channels")}
    needed["channels"] = model.in_channels
    found = {name: cache.settings[name] for name in needed}
    require(found == needed, f"the cache {path} has {found}, the run needs {needed}")
    return cache


def toy_caches(config, distributed):
    """Make the toy's two caches next to the run's folder, or check those that exist. Returns
    their paths, for training and validation.
    """
    c, model = config, MODELS[config.model]
    square = c.stride == 1 and c.width == c.size
    require(square, "the toy has --stride 1 and square frames: drop --stride and --width")
    vae = data.VAE("assets/vae", distributed.device)
    vae.check_size(c.frames, c.size, c.size, model.patch_size)
    t5 = data.T5("assets/t5", model.caption_length, distributed.device)
    paths = []
    for split, clips in (("train", c.toy_clips), ("validation", 2 * len(data.LABELS))):
        path = Path(c.out).parent / f"toy-{split}-{clips}x{c.frames}x{c.size}"
        data.write_cache(data.Toy(split, clips, c.frames, c.size), path, vae, t5, distributed)
        paths.append(path)
    return paths


# ---------------------------------------------------------------------------------------------
# The command line


def parse_command_line(argv=None):
    """Return the TrainConfig of a command line. --preset, --out and --resume are parsed first,
    because they determine the defaults: those of the preset, or the options of the run to resume.
    A resumed run may change all but its data, network and trainable weights.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="toy")
    first.add_argument("--resume", action="store_true")
    first.add_argument("--out")
    args, _ = first.parse_known_args(argv)
    out = args.out or f"out/{args.preset}"
    default = replace(PRESETS[args.preset], out=out)
    checkpoint = sample.newest_checkpoint(out)
    if args.resume and checkpoint:
        stored = json.loads((checkpoint / "state.json").read_text())["config"]
        default = replace(TrainConfig(**stored), out=out)
    options = dict(default=default, description=__doc__.split("\n\nShapes")[0])
    config = tyro.cli(TrainConfig, args=argv, console_outputs=data.RANK == 0, **options)
    if args.resume and not checkpoint:
        print0(f"{out} has no checkpoint to resume: a new run starts")
    allowed = args.resume or not checkpoint
    require(allowed, f"{out} holds a run: continue it with --resume, or give another --out")
    return config


def request_stop(number, frame):
    """Handle SIGTERM and Ctrl-C: finish the step, save and stop. The next Ctrl-C stops at once, as
    does the first one before the first step; of the toy's clips those that are encoded are kept.
    """
    global stop_requested
    if not started:
        raise KeyboardInterrupt
    stop_requested = True
    print0("stopping after the current step; Ctrl-C again stops at once, without saving")
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main():
    config = parse_command_line()
    distributed = data.init_distributed(config.device)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)
    train(config, distributed)


if __name__ == "__main__":
    data.run_command(main)
