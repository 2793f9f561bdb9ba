"""The diffusion process: noise schedule, training loss, samplers, and the command that films.

    python sample.py --run out/toy --prompt "a red circle moving left" --steps 50 --guidance 4

writes, for each prompt, an MP4 and a GIF, and one contact sheet of all. The process is IDDPM's
(Nichol and Dhariwal 2021, arXiv 2102.09672): 1000 small steps of noise forward; back, the network
predicts the noise and, in the second half of its channels, the variance of the step.

Shapes, in this file:
    B batch    C latent channels    T frames    L caption tokens    E caption channels
    H, W latent height and width (in the section "Films to look at": pixels)
    N steps of a schedule, 1000 in training
"""

import argparse
import contextlib
import hashlib
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from data import (
    T5, VAE, BadInput, command, keyed_generator, pick_device, read_json, write_video, write_whole,
)  # fmt: skip
from stdit import STDiT, STDiTConfig, drop_captions

# ---------------------------------------------------------------------------------------------
# The schedule
#
# Noise is added in N = 1000 steps, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, with beta
# from 1e-4 to 2e-2. Any number of steps at once is again one such step (DDPM, arXiv 2006.11239, eq.
# 4):
#     x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise,    abar_t = product of (1 - beta) up to t,
# so sampling may skip: a shorter schedule through the same abar is a schedule of its own (IDDPM,
# section 4).


@dataclass(frozen=True)
class Schedule:
    """Tables over the N steps, float64. Index 0 is the step from x_0's neighbour to x_0."""

    timesteps: torch.Tensor  # [N]  the training timestep that the network is told
    abar: torch.Tensor  # [N]  share of the signal's variance that is left after the step
    abar_prev: torch.Tensor  # [N]  the same one step nearer to x_0; 1 at index 0
    beta: torch.Tensor  # [N]  variance added in this step; also the upper bound of the step back
    # [N]  log of beta-tilde, the variance of q(x_{t-1} | x_t, x_0): the lower bound
    log_posterior: torch.Tensor


def make_schedule(steps=1000):
    """The training schedule, or one of `steps` of its timesteps, evenly spread from 0 to 999."""
    if not 2 <= steps <= 1000:
        raise BadInput(f"steps={steps}: expected 2 to 1000")
    abar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), dim=0)
    timesteps = torch.linspace(0, 999, steps, dtype=torch.float64).round().long()
    abar = abar[timesteps]
    abar_prev = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    beta = 1 - abar / abar_prev
    # beta-tilde: 0 at index 0, where the step back is certain
    posterior = beta * (1 - abar_prev) / (1 - abar)
    posterior[0] = posterior[1]  # and its logarithm -inf: IDDPM takes the next one
    return Schedule(timesteps, abar, abar_prev, beta, posterior.log())


TRAINING = make_schedule(1000)


def at(table, t, like):
    """table[t] for indices t [B] on the CPU, as [B, 1, 1, 1, 1] of `like`'s dtype and device.

    Coefficients are worked out in float64 and rounded once, here: 1 - abar is 1e-4 at t = 0, of
    which fp32 would keep three digits. Timesteps live on the CPU, where they are drawn, so this
    never waits for a GPU.
    """
    return table[t].to(like.dtype).to(like.device).view(-1, 1, 1, 1, 1)


def q_sample(schedule, x0, t, noise):
    """Jump from x_0 to x_t (DDPM, eq. 4). x0, noise [B, C, T, H, W], t [B] indices -> [B, C, T, H,
    W].
    """
    return at(schedule.abar.sqrt(), t, x0) * x0 + at((1 - schedule.abar).sqrt(), t, x0) * noise


def predict_x0(schedule, x_t, t, eps):
    """The x_0 from which this noise would have led to x_t: q_sample, solved for x0."""
    return (x_t - at((1 - schedule.abar).sqrt(), t, x_t) * eps) / at(schedule.abar.sqrt(), t, x_t)


def posterior_mean(schedule, x0, x_t, t):
    """The mean of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7)."""
    abar, abar_prev, beta = schedule.abar, schedule.abar_prev, schedule.beta
    weight_0 = abar_prev.sqrt() * beta / (1 - abar)
    weight_t = (1 - beta).sqrt() * (1 - abar_prev) / (1 - abar)
    return at(weight_0, t, x0) * x0 + at(weight_t, t, x_t) * x_t


def log_variance(schedule, v, t):
    """The model's variance: v in [-1, 1] goes from log beta-tilde to log beta (IDDPM, eq. 15)."""
    share = (v + 1) / 2
    return share * at(schedule.beta.log(), t, v) + (1 - share) * at(schedule.log_posterior, t, v)


# ---------------------------------------------------------------------------------------------
# The loss
#
# Predicting the noise with squared error is a reweighted bound on the likelihood and gives the
# better pictures; but it says nothing about the variance of a step. So the bound itself (VLB) is
# added, and only the variance channels learn from it: the mean inside it is detached (IDDPM,
# section 3.1). A loss of 0.1 says little: most of it is noise that nobody could predict. What to
# watch is in train.py, "Is it learning?".


def diffusion_loss(schedule, out, x0, x_t, t, noise):
    """Two losses per sample, [B] each: {"mse": of the noise, "vlb": in bits per latent value}.
    Train on their sum.

    out [B, 2C, T, H, W]: the network's answer to x_t = q_sample(schedule, x0, t, noise).
    """
    eps, v = out.to(x0.dtype).chunk(2, dim=1)  # 2 x [B, C, T, H, W]; fp32 from here on
    mse = (eps - noise).square().flatten(1).mean(1)
    x0_guess = predict_x0(schedule, x_t, t, eps.detach())
    mean = posterior_mean(schedule, x0_guess, x_t, t)
    log_var = log_variance(schedule, v, t)
    true_mean = posterior_mean(schedule, x0, x_t, t)
    true_log_var = at(schedule.log_posterior, t, x_t)
    kl = 0.5 * (log_var - true_log_var + (true_log_var - log_var).exp() - 1
                + (true_mean - mean).square() * (-log_var).exp())  # fmt: skip
    nll = -discretized_log_likelihood(x0, mean, 0.5 * log_var)
    bits = torch.where((t == 0).view(-1, 1, 1, 1, 1).to(x0.device), nll, kl) / math.log(2)
    return {"mse": mse, "vlb": bits.flatten(1).mean(1)}


def discretized_log_likelihood(x, mean, log_std):
    """log of a Gaussian's mass in the bin of width 2/255 around x; outermost bins reach to infinity
    (DDPM, eq. 13).

    For pixels in [-1, 1]. Latents are no pixels, so this last of 1000 terms means little; kept as
    v1 has it.
    """
    upper = normal_cdf((x - mean + 1 / 255) * (-log_std).exp())
    lower = normal_cdf((x - mean - 1 / 255) * (-log_std).exp())
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def normal_cdf(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


# ---------------------------------------------------------------------------------------------
# One step back
#
# From x_t and the predicted noise to x_{t-1}. Ancestral sampling (DDPM) draws from the model's
# Gaussian. DDIM follows the ODE that has the same marginals: no noise, so fewer steps do, and films
# of the same noise agree between step counts. i is an index into the schedule; x̂0 is not clipped:
# latents have no bounds.


def ddpm_step(schedule, x, i, eps, v, noise):
    """Ancestral step with learned variance. x, eps, v, noise [B, C, T, H, W], i int -> x one step
    nearer to x_0.
    """
    t = torch.full((len(x),), i)
    mean = posterior_mean(schedule, predict_x0(schedule, x, t, eps), x, t)
    return mean + (i > 0) * (0.5 * log_variance(schedule, v, t)).exp() * noise


def ddim_step(schedule, x, i, eps, v, noise, eta=0.0):
    """DDIM (arXiv 2010.02502, eq. 12). eta 0: deterministic; 1: as noisy as DDPM. v is not used."""
    t = torch.full((len(x),), i)
    abar, abar_prev = schedule.abar, schedule.abar_prev
    variance = eta**2 * (1 - abar_prev) / (1 - abar) * schedule.beta  # sigma squared
    x0, direction = predict_x0(schedule, x, t, eps), (1 - abar_prev - variance).sqrt()
    return (
        at(abar_prev.sqrt(), t, x) * x0
        + at(direction, t, x) * eps
        + at(variance.sqrt(), t, x) * noise
    )


SAMPLERS = {"ddpm": ddpm_step, "ddim": ddim_step}


# ---------------------------------------------------------------------------------------------
# Sampling with guidance
#
# Training replaces 10% of the captions by the null caption, so one network predicts the noise with
# and without a caption. Sampling walks away from the second (classifier-free guidance, arXiv
# 2207.12598, eq. 6):
#     eps = eps_null + g (eps_caption - eps_null),    g = 1: as predicted; more: closer to it.
# v1 did so for 3 of the 4 latent channels only, a leftover of RGB; here all are guided.


def autocast(device):
    """bf16 autocast on CUDA: weights stay fp32, matrix products run in bf16. On CPU and MPS:
    nothing, fp32.
    """
    return (
        torch.autocast("cuda", torch.bfloat16)
        if torch.device(device).type == "cuda"
        else contextlib.nullcontext()
    )


def guided(model, x, t, y, mask, guidance):
    """eps and v, [B, C, T, H, W] each, for x [B, C, T, H, W] at timestep t, a tensor of one number.
    y [2B, L, E], mask [2B, L]: B captions, then B nulls."""
    with autocast(x.device):
        out = model(torch.cat([x, x]), t.expand(2 * len(x)).to(x.device), y, mask).to(x.dtype)
    out, out_null = out.chunk(2)  # 2 x [B, 2C, T, H, W]
    (eps, v), (eps_null, _) = out.chunk(2, dim=1), out_null.chunk(2, dim=1)
    return eps_null + guidance * (eps - eps_null), v


@torch.no_grad()
def sample(model, y, mask, shape, keys, steps, guidance, sampler="ddpm", bar=False):
    """Film B captions. y [B, L, E], mask [B, L]; shape (C, T, H, W) of one film's latents -> [B, C,
    T, H, W].

    keys: a tuple per film: all noise of a film is drawn by a generator keyed on it, so the film is
    the same, within rounding, whatever else is in the batch. v1's configs have steps 100 and
    guidance 7.
    """
    schedule, step = make_schedule(steps), SAMPLERS[sampler]
    generators = [keyed_generator(*key) for key in keys]

    def noise():  # [B, C, T, H, W]
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(y)

    drop = torch.arange(2 * len(y), device=y.device) >= len(y)  # [2B]  B captions, then B nulls
    y, mask = drop_captions(
        y.repeat(2, 1, 1), mask.repeat(2, 1), drop, model.y_embedder.y_embedding
    )
    x = noise()
    for i in tqdm(
        reversed(range(steps)), total=steps, disable=None if bar else True, desc="sampling"
    ):
        eps, v = guided(model, x, schedule.timesteps[i], y, mask, guidance)
        x = step(schedule, x, i, eps, v, noise())
    return x


# ---------------------------------------------------------------------------------------------
# Films to look at


def to_uint8(video):
    """[..., 3, H, W] in [-1, 1] -> uint8."""
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def enlarge(video):
    """Repeat the pixels of a small film until it is about 256 high: for looking at. uint8 [T, 3, H,
    W].
    """
    k = max(1, round(256 / video.shape[-2]))
    return video.repeat_interleave(k, -1).repeat_interleave(k, -2)


def write_gif(path, video, fps):
    """uint8 [T, 3, H, W] -> an endless GIF."""
    from PIL import Image

    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in enlarge(video)]
    duration = round(1000 / fps)  # ms per frame
    write_whole(path, lambda p: images[0].save(
        p, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0,
    ))  # fmt: skip


def write_sheet(path, videos, captions):
    """A PNG with a row per film, uint8 [T, 3, H, W], time to the right (at most 8 frames of it),
    its caption above.
    """
    from PIL import Image, ImageDraw, ImageFont

    T = videos[0].shape[0]
    rows = [
        enlarge(v[torch.linspace(0, T - 1, min(T, 8)).round().long()])[..., ::2, ::2]
        for v in videos
    ]
    h, w = rows[0].shape[-2:]
    sheet = Image.new("RGB", (len(rows[0]) * (w + 4) + 4, len(rows) * (h + 24) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (frames, caption) in enumerate(zip(rows, captions)):
        draw.text((6, r * (h + 24) + 4), caption, fill="black", font=ImageFont.load_default(14))
        for k, frame in enumerate(frames):
            sheet.paste(
                Image.fromarray(frame.permute(1, 2, 0).numpy()),
                (4 + k * (w + 4), r * (h + 24) + 24),
            )
    write_whole(path, lambda p: sheet.save(p, format="PNG"))


# ---------------------------------------------------------------------------------------------
# Reading a run
#
# A run folder holds checkpoints/step_N/, each with model.safetensors (raw weights), ema.safetensors
# (their moving average, which films better), optimizer.safetensors, and state.json with everything
# else and a hash of each file. A checkpoint is written beside and renamed, so one that is there was
# written whole.


def newest_checkpoint(run):
    """The folder of a run's newest checkpoint, or None."""
    found = sorted(Path(run).glob("checkpoints/step_*"))
    return found[-1] if found else None


def read_checkpoint(folder, *names):
    """(state, tensors of each named file) of a checkpoint, each file checked against its hash
    first.
    """
    advice = f"delete {folder} to go on from the checkpoint before it"
    state = read_json(folder / "state.json", advice)
    tensors = []
    for name in names:
        path = folder / f"{name}.safetensors"
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != state["sha256"][name]:
                raise BadInput(
                    f"{path} is damaged (its sha256 is not the one in state.json); {advice}"
                )
            tensors.append(load_file(path))
        except (OSError, SafetensorError, KeyError) as error:
            raise BadInput(f"{path} can't be read ({error}); {advice}") from None
    return state, *tensors


def load_run(run, weights="ema"):
    """(model in eval mode, state) of a run's newest checkpoint; state holds the run's
    configuration.
    """
    folder = newest_checkpoint(run)
    if folder is None:
        raise BadInput(
            f"{run} holds no run: no checkpoints/step_* in it; train one with: python train.py "
            f"--out {run}"
        )
    state, tensors = read_checkpoint(folder, weights)
    model = STDiT(config_from(state["model"]))
    model.load_state_dict(tensors)  # strict: every tensor is there, and no other
    return model.eval(), state


def config_from(fields):
    """STDiTConfig from its JSON, where tuples have become lists."""
    return STDiTConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


# ---------------------------------------------------------------------------------------------
# The command line


def check_encoder(encoder, names, what):
    """BadInput if an encoder is not the one that the run was trained with, whose name and
    fingerprint `names` holds.
    """
    expected = names[f"{what}_fingerprint"]
    if encoder.fingerprint != expected:
        raise BadInput(
            f"{encoder.source} does not fit the run: its {what} has fingerprint "
            f"{encoder.fingerprint}, the run was trained with {names[what]} ({expected}); give "
            f"that one with --{what}"
        )


def film_keys(seed, prompts):
    """A key per film for its noise: the seed, the prompt, and how often the prompt has come
    before.
    """
    return [(seed, "film", prompt, prompts[:i].count(prompt)) for i, prompt in enumerate(prompts)]


def film(model, vae, t5, prompts, keys, shape, batch=8, **options):
    """Film prompts: a list of uint8 [T, 3, H, W]. keys as in sample(), shape (C, T, H, W) of the
    latents.
    """
    films, device = [], next(model.parameters()).device
    for i in range(0, len(prompts), batch):
        y, mask = t5.encode(prompts[i : i + batch])
        latents = sample(
            model, y.to(device), mask.to(device), shape, keys[i : i + batch], **options
        )
        films += list(to_uint8(vae.decode(latents).transpose(1, 2)))  # [T, 3, H, W] each
    return films


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="run folder that train.py wrote")
    parser.add_argument(
        "--prompt", action="append", default=[], help="what to film; may be given several times"
    )
    parser.add_argument("--prompts", help="text file with a prompt a line")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps, 2 to 1000; v1: 100")
    parser.add_argument("--guidance", type=float, default=4.0, help="1: none; v1's configs have 7")
    parser.add_argument("--sampler", choices=list(SAMPLERS), default="ddpm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="samples", help="folder to write")
    parser.add_argument(
        "--weights", choices=["ema", "model"], default="ema", help="moving average, or raw"
    )
    parser.add_argument(
        "--batch", type=int, default=8, help="films at a time; more need more memory"
    )
    parser.add_argument("--frames", type=int, help="default: as trained")
    parser.add_argument("--size", type=int, help="pixels; default: as trained")
    parser.add_argument("--vae", help="default: the run's")
    parser.add_argument("--t5", help="default: the run's")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args()

    prompts = list(args.prompt)
    if args.prompts:
        if not Path(args.prompts).is_file():
            raise BadInput(
                f"--prompts {args.prompts} is not there; give a text file with a prompt a line"
            )
        lines = Path(args.prompts).read_text(encoding="utf-8", errors="replace").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BadInput(
            'nothing to film: give --prompt "a red circle moving left" or --prompts file.txt'
        )
    for name in ("batch", "frames", "size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise BadInput(f"{name}={value}: expected 1 or more")
    make_schedule(args.steps)  # complain before loading anything
    device, start = pick_device(args.device), time.time()
    model, state = load_run(args.run, args.weights)
    config, encoders = state["config"], state["encoders"]
    vae, t5 = (
        VAE(args.vae or encoders["vae"], device),
        T5(args.t5 or encoders["t5"], model.config.caption_length, device),
    )
    check_encoder(vae, encoders, "vae")
    check_encoder(t5, encoders, "t5")
    frames, size = args.frames or config["frames"], args.size or config["size"]
    pt, ph, pw = model.config.patch_size
    if frames % pt or size % (vae.factor * math.lcm(ph, pw)):
        raise BadInput(
            f"frames={frames} must divide by {pt} and size={size} by "
            f"{vae.factor * math.lcm(ph, pw)}"
        )
    shape = (model.config.in_channels, frames, size // vae.factor, size // vae.factor)
    keys = film_keys(args.seed, prompts)
    films = film(model.to(device), vae, t5, prompts, keys, shape, args.batch, bar=True,
                 steps=args.steps, guidance=args.guidance, sampler=args.sampler)  # fmt: skip
    out = Path(args.out)
    for i, (prompt, video) in enumerate(zip(prompts, films)):
        name = f"{i:02d}_{re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60]}"
        write_video(out / f"{name}.mp4", video, config["fps"])
        write_gif(out / f"{name}.gif", video, config["fps"])
        print(f"{out / name}.mp4 and .gif")
    write_sheet(out / "sheet.png", films, prompts)
    print(
        f"{out / 'sheet.png'}\n{len(films)} films of {frames} frames at {size}x{size}, "
        f"{args.steps} steps of {args.sampler}, guidance {args.guidance:g}: "
        f"{time.time() - start:.1f} s on {device}"
    )


if __name__ == "__main__":
    command(main)
