"""The diffusion process: noise schedule, training loss, samplers, and the command that films.

    python sample.py --run out/toy --prompt "a red circle moving left" --guidance 2

writes, for each prompt, an MP4 and a GIF (with --frames 1, a PNG), and one contact sheet of all;
with --weights, from released weights or any that stdit.load_weights reads. The process is IDDPM's
(Nichol and Dhariwal 2021, arXiv 2102.09672): 1000 small steps of noise forward; back, the network
predicts the noise and, in the second half of its channels, the variance of the step.

Shapes, in this file:
    B batch    C latent channels    T frames    L caption tokens    E caption channels
    H, W latent height and width (in the section "Films to look at": pixels)
    N steps of a schedule, 1000 in training
"""

import argparse
import contextlib
import gc
import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from data import (
    HELD_OUT, T5, TRIPLES, VAE, BadInput, caption_of, clean_caption, command, detect,
    keyed_generator, read_json, require, set_up_process, to_uint8, write_gif, write_png,
    write_sheet, write_video,
)  # fmt: skip
from stdit import (
    MODELS, VARIANTS, BadWeights, STDiT, config_from, drop_captions, load_weights,
    newest_checkpoint, stored_config,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------
# The schedule
#
# Noise is added in N = 1000 steps, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, with beta
# from 1e-4 to 2e-2. Any number of steps at once is again one such step (DDPM, arXiv 2006.11239,
# eq. 4):
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
    log_posterior: torch.Tensor  # [N]  log beta-tilde, of q(x_{t-1} | x_t, x_0): the lower bound


def make_schedule(steps=1000):
    """The training schedule, or one of `steps` of its timesteps, evenly spread from 0 to 999."""
    if not 2 <= steps <= 1000:
        raise BadInput(f"steps={steps}: expected 2 to 1000")
    return respaced(torch.linspace(0, 999, steps, dtype=torch.float64).round().long())


def respaced(timesteps):
    """The schedule through these timesteps of the training's 1000: int64 [N], N >= 2, rising."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), dim=0)
    abar = abar[timesteps]
    abar_prev = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    beta = 1 - abar / abar_prev
    posterior = beta * (1 - abar_prev) / (1 - abar)  # beta-tilde
    posterior[0] = posterior[1]  # not 0, whose logarithm is -inf: IDDPM takes the next one
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
    """Jump from x_0 to x_t (DDPM, eq. 4). x0, noise [B, C, T, H, W], t [B] indices -> x_t."""
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
    """{"mse": of the noise, "vlb": in bits per latent value}, [B] each. Train on their sum.

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
    """log of a Gaussian's mass in the bin of width 2/255 around x; the outermost bins reach to
    infinity (DDPM, eq. 13). Made for pixels in [-1, 1]: for latents, this last of 1000 terms means
    little. Kept as v1 has it.
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
# of the same noise agree between step counts. DPM-Solver++ follows it with second order: it guesses
# from the last two predictions of x_0 where x_0 will be in the middle of the step.
#
# All take the same: x, eps, v and noise [B, C, T, H, W]; i, an index into the schedule; x0_before,
# the x_0 predicted in the step before, None in the first. -> x one step nearer to x_0. No
# prediction of x_0 is clipped: latents have no bounds.


def ddpm_step(schedule, x, i, eps, v, noise, x0_before=None):
    """Ancestral step with learned variance (DDPM, algorithm 2; IDDPM, eq. 15)."""
    t = torch.full((len(x),), i)
    mean = posterior_mean(schedule, predict_x0(schedule, x, t, eps), x, t)
    return mean + (i > 0) * (0.5 * log_variance(schedule, v, t)).exp() * noise


def ddim_step(schedule, x, i, eps, v, noise, x0_before=None, eta=0.0):
    """DDIM (arXiv 2010.02502, eq. 12). eta 0: deterministic; 1: as noisy as DDPM."""
    t = torch.full((len(x),), i)
    abar, abar_prev = schedule.abar, schedule.abar_prev
    variance = eta**2 * (1 - abar_prev) / (1 - abar) * schedule.beta  # sigma squared
    x0, direction = predict_x0(schedule, x, t, eps), (1 - abar_prev - variance).sqrt()
    return (
        at(abar_prev.sqrt(), t, x) * x0
        + at(direction, t, x) * eps
        + at(variance.sqrt(), t, x) * noise
    )


def dpm_step(schedule, x, i, eps, v, noise, x0_before=None):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2). With x_0 as it is, this is DDIM's step.

    Its clock is log(alpha / sigma), half the log SNR; that is infinite at x_0 itself, so the last
    step is of first order, like the first.
    """
    t = torch.full((len(x),), i)
    x0 = predict_x0(schedule, x, t, eps)
    if x0_before is not None and i > 0:
        clock = 0.5 * torch.log(schedule.abar / (1 - schedule.abar))  # [N]
        this, last = clock[i - 1] - clock[i], clock[i] - clock[i + 1]  # lengths of two steps
        x0 = x0 + 0.5 * (this / last).item() * (x0 - x0_before)
    shrink = ((1 - schedule.abar_prev) / (1 - schedule.abar)).sqrt()  # of sigma
    weight = schedule.abar_prev.sqrt() - shrink * schedule.abar.sqrt()
    return at(shrink, t, x) * x + at(weight, t, x) * x0


def dpm_schedule(steps):
    """`steps` timesteps evenly spread from 0 to 999, without the 0, as in diffusers. By this
    sampler's clock it is far to t = 0, and a guess from the last two predictions would overshoot;
    the last step, which guesses nothing, may start from further out.
    """
    if not 2 <= steps <= 999:
        raise BadInput(f"steps={steps}: expected 2 to 999 with the sampler dpm")
    return respaced(make_schedule(steps + 1).timesteps[1:])


SAMPLERS = {  # name: (its schedule, its step)
    "ddpm": (make_schedule, ddpm_step),
    "ddim": (make_schedule, ddim_step),
    "dpm": (dpm_schedule, dpm_step),
}


# ---------------------------------------------------------------------------------------------
# Sampling with guidance
#
# Training replaces 10% of the captions by the null caption, so one network predicts the noise with
# and without a caption. Sampling walks away from the second (classifier-free guidance, arXiv
# 2207.12598, eq. 6):
#     eps = eps_null + g (eps_caption - eps_null),    g = 1: as predicted; more: closer to it.
# v1 did so for 3 of the 4 latent channels only, a leftover of RGB; here all are guided.

GUIDED = slice(None)  # slice(3): v1's three, to compare with films that its code made


def autocast(device):
    """On CUDA bf16 autocast: fp32 weights, matrix products in bf16. On CPU and MPS nothing."""
    on_cuda = torch.device(device).type == "cuda"
    return torch.autocast("cuda", torch.bfloat16) if on_cuda else contextlib.nullcontext()


def guided(model, x, t, y, mask, guidance):
    """eps and v, [B, C, T, H, W] each, for x [B, C, T, H, W] at training timestep t, a tensor [].
    y [2B, L, E], mask [2B, L]: B captions, then B nulls."""
    with autocast(x.device):
        out = model(torch.cat([x, x]), t.expand(2 * len(x)).to(x.device), y, mask).to(x.dtype)
    out, out_null = out.chunk(2)  # 2 x [B, 2C, T, H, W]
    (eps, v), (eps_null, _) = out.chunk(2, dim=1), out_null.chunk(2, dim=1)
    far, near, eps = eps[:, GUIDED], eps_null[:, GUIDED], eps.clone()
    eps[:, GUIDED] = near + guidance * (far - near)
    return eps, v


@torch.no_grad()
def sample(model, y, mask, shape, keys, steps, guidance, sampler="ddpm", bar=False):
    """Film B captions. y [B, L, E], mask [B, L]; shape (C, T, H, W) of one film's latents
    -> [B, C, T, H, W].

    keys: a tuple per film: all noise of a film is drawn by a generator keyed on it, so the film is
    the same, within rounding, whatever else is in the batch. v1's configs have steps 100 and
    guidance 7.
    """
    make, step = SAMPLERS[sampler]
    schedule = make(steps)
    generators = [keyed_generator(*key) for key in keys]

    def noise():  # [B, C, T, H, W]
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(y)

    null = model.y_embedder.y_embedding
    drop = torch.arange(2 * len(y), device=y.device) >= len(y)  # [2B]  B captions, then B nulls
    y, mask = drop_captions(y.repeat(2, 1, 1), mask.repeat(2, 1), drop, null)
    x, x0_before = noise(), None
    hidden = None if bar else True  # None: a bar on a terminal
    for i in tqdm(range(steps)[::-1], disable=hidden, desc="sampling"):
        eps, v = guided(model, x, schedule.timesteps[i], y, mask, guidance)
        x0 = predict_x0(schedule, x, torch.full((len(x),), i), eps)
        x, x0_before = step(schedule, x, i, eps, v, noise(), x0_before), x0
    return x


# ---------------------------------------------------------------------------------------------
# Reading a run
#
# A run folder holds checkpoints/step_N/, each with model.safetensors (raw weights), ema.safetensors
# (their moving average, which films better), optimizer.safetensors, and state.json with everything
# else and a hash of each file. A checkpoint is written beside and renamed, so one that is there was
# written whole.


def load_run(run):
    """(model in eval mode with the averaged weights, state) of a run's newest checkpoint, or of a
    checkpoint's folder; state holds the run's configuration. BadInput, BadWeights.
    """
    folder = newest_checkpoint(run)
    if folder is None:
        raise BadInput(
            f"{run} holds no run: no checkpoints/step_* in it; train one with: python train.py "
            f"--out {run}"
        )
    state = read_json(folder / "state.json", f"delete {folder} to use the checkpoint before it")
    model = STDiT(config_from(state["model"]))
    load_weights(model, folder)
    return model.eval(), state


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


def film(model, vae, y, mask, keys, shape, batch=8, **options):
    """Film captions y [N, L, E], mask [N, L]: a list of N uint8 [T, 3, H, W].

    keys, options: as in sample(). shape: (C, T, H, W) of the latents. batch: films at a time.
    """
    films, device = [], next(model.parameters()).device
    for i in range(0, len(keys), batch):
        y_part, mask_part = (v[i : i + batch].to(device) for v in (y, mask))
        latents = sample(model, y_part, mask_part, shape, keys[i : i + batch], **options)
        films += list(to_uint8(vae.decode(latents).transpose(1, 2)))  # [T, 3, H, W] each
    return films


def caption_accuracy(model, vae, t5, times, seed, shape, rank=0, world=1, **options):
    """Film every caption of the toy, times[0] times if training showed it, else times[1] times, and
    let data.detect judge. -> 10 counts: of seen captions the films, and those right in all, in
    colour, shape and direction; then the same of unseen ones. Of `world` processes each films its
    part; counts are to be summed.
    """
    triples = [t for t in TRIPLES for _ in range(times[t in HELD_OUT])]
    prompts = [caption_of(t) for t in triples]
    keys, mine, counts = film_keys(seed, prompts), slice(rank, None, world), [0] * 10
    y, mask = t5.encode(prompts[mine])
    videos = film(model, vae, y, mask, keys[mine], shape, batch=32, **options)
    for triple, video in zip(triples[mine], videos):
        found, base = detect(video) or ("none",) * 3, 5 * (triple in HELD_OUT)
        right = [a == b for a, b in zip(triple, found)]
        for k, hit in enumerate([True, all(right), *right]):
            counts[base + k] += hit
    return counts


def describe(counts):
    """The counts of caption_accuracy in words, a line for each kind of caption."""
    lines = []
    for kind, (n, right, *parts) in (("seen", counts[:5]), ("held-out", counts[5:])):
        low, high = interval(right, max(n, 1))
        shares = zip(("colour", "shape", "direction"), parts)
        shown = ", ".join(f"{name} {part / max(n, 1):.0%}" for name, part in shares)
        lines.append(f"caption accuracy, {kind} captions: {right / max(n, 1):.1%} of {n} films "
                     f"(95% interval {low:.0%} to {high:.0%}); {shown}")  # fmt: skip
    return "\n".join(lines)


def interval(k, n):
    """95% interval of a share of k in n (Wilson 1927)."""
    z = 1.96
    centre = (k + z * z / 2) / (n + z * z)
    half = z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return centre - half, centre + half


def parse_command_line():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", help="run folder of train.py: its averaged weights, model, encoders and sizes")
    add("--weights", help="a run (under torchrun, which takes --run for its own), or other weights:"
                          " a file, folder, Hub name or Hub name/file")  # fmt: skip
    add("--model", help=f"what the weights are ({', '.join(MODELS)}); default: STDiT-XL/2")
    add("--variant", choices=VARIANTS, help="their design; default: sequential")
    add("--vae", help="folder or Hub name; default: the run's")
    add("--t5", help="folder or Hub name; default: the run's")
    add("--prompt", action="append", default=[], help="what to film; may be given several times")
    add("--prompts", help="text file with a prompt a line")
    add("--frames", type=int, help="default: the run's, or 16")
    add("--size", type=int, help="height in pixels; default: the run's, or 256")
    add("--width", type=int, help="in pixels; default: the run's, or the height")
    add("--fps", type=int, help="frames per second of the files; default: the run's, or 8")
    add("--space-scale", type=float, help="place = index / scale; default: as stored, or size/512")
    add("--time-scale", type=float, help="default: as stored with the weights, or 1 (toy: 0.25)")
    add("--steps", type=int, default=50, help="denoising steps, 2 to 1000 (dpm: 999); v1: 100")
    add("--guidance", type=float, default=4.0, help="1: none; v1's configs have 7")
    add("--sampler", choices=list(SAMPLERS), default="ddpm")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=8, help="films at a time; more need more memory")
    add("--sp", type=int, default=1, help="processes that share each film, as torchrun starts")
    add("--out", default="samples", help="folder to write")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser.parse_args()


def read_prompts(args):
    prompts = list(args.prompt)
    if args.prompts:
        if not Path(args.prompts).is_file():
            raise BadInput(
                f"--prompts {args.prompts} is not there; give a text file with a prompt a line"
            )
        lines = Path(args.prompts).read_text(encoding="utf-8", errors="replace").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BadInput('nothing to film: give --prompt "a red circle moving left", or --prompts')
    return prompts


def main():
    args, start = parse_command_line(), time.time()
    prompts = read_prompts(args)
    for name in ("batch", "frames", "size", "width", "fps", "space_scale", "time_scale"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise BadInput(f"{name}={value}: expected more than 0")
    SAMPLERS[args.sampler][0](args.steps)  # complain before anything is loaded
    process = set_up_process(args.device, args.sp)
    require(process.replicas == 1, f"sp={args.sp}: torchrun started {process.world} processes, and "
                                   f"all have to share; give --sp {process.world}")  # fmt: skip
    device = process.device

    # What is filmed with: a run knows its model, encoders and sizes; weights know at most a model.
    run, weights = args.run, args.weights
    if weights and not run and newest_checkpoint(weights):
        run, weights = weights, None
    # Also vae and t5; of a run their fingerprints too. Released weights know cleaned captions.
    settings = {"frames": 16, "size": 256, "width": 0, "fps": 8, "clean": True}
    if run:
        model, state = load_run(run)
        settings |= state["config"] | state["encoders"]
    elif not weights:
        raise BadInput("nothing to film with: give --run out/toy, or --weights")
    stored = model.config if run else stored_config(weights)
    for name in ("model", "variant"):
        if stored and getattr(args, name):
            raise BadInput(f"{name}={getattr(args, name)}: {run or weights} knows its own; omit it")
    if args.model and args.model not in MODELS:
        raise BadInput(f"model={args.model!r} is unknown; expected one of {', '.join(MODELS)}")
    given = {k: getattr(args, k) for k in ("frames", "size", "width", "fps", "vae", "t5")}
    if args.size:
        settings["width"] = 0
    settings |= {k: v for k, v in given.items() if v is not None}
    for what in ("vae", "t5"):
        if what not in settings:
            raise BadInput(f"weights alone bring no {what}: give --{what}, a folder or a Hub name")
    frames, size = settings["frames"], settings["size"]
    width = settings["width"] or size
    c = stored or replace(MODELS[args.model or "STDiT-XL/2"], variant=args.variant or "sequential",
                          space_scale=math.sqrt(size * width) / 512)  # fmt: skip
    scales = {k: getattr(args, k) for k in ("space_scale", "time_scale") if getattr(args, k)}

    require(args.sp == 1 or c.variant != "full", f"sp={args.sp}: variant=full attends to all "
            "tokens at once and can't be shared; give --sp 1")  # fmt: skip
    vae = VAE(settings["vae"], device)
    unit = vae.factor * math.lcm(*c.patch_size[1:])
    if frames % c.patch_size[0] or size % unit or width % unit:
        raise BadInput(f"frames={frames} must divide by {c.patch_size[0]}, size={size} and "
                       f"width={width} by {unit}")  # fmt: skip
    t5 = T5(settings["t5"], c.caption_length, device)
    if run:
        check_encoder(vae, settings, "vae"), check_encoder(t5, settings, "t5")
    if t5.channels != c.caption_channels or vae.channels != c.in_channels:
        raise BadInput(
            f"the model takes captions of {c.caption_channels} channels and latents of "
            f"{c.in_channels}; --t5 gives {t5.channels}, --vae {vae.channels}: give fitting ones"
        )
    if weights:
        torch.manual_seed(args.seed)  # of what an image model does not bring
        model = STDiT(c).eval()
        new = load_weights(model, weights, t5.null_caption)
        if new:
            process.say(f"{weights} is an image model: {len(new)} temporal tensors are as at the "
                        "start of a training")  # fmt: skip
    model.config, model.group = replace(c, **scales), process.sequence
    y, mask = t5.encode([clean_caption(p) for p in prompts] if settings["clean"] else prompts)
    del t5  # T5-XXL's 9.5 GB in bf16 are not needed any more
    gc.collect()
    was = f"stored: {stored.space_scale}, {stored.time_scale}" if stored else "none are stored"
    process.say(f"{weights or run}: {c.variant}, space_scale={model.config.space_scale}, "
                f"time_scale={model.config.time_scale} ({was})")  # fmt: skip

    shape = (c.in_channels, frames, size // vae.factor, width // vae.factor)
    keys, options = film_keys(args.seed, prompts), {"steps": args.steps, "bar": process.rank == 0}
    options |= {"guidance": args.guidance, "sampler": args.sampler}
    films = film(model.to(device), vae, y, mask, keys, shape, args.batch, **options)
    if process.rank > 0:
        return
    out = Path(args.out)
    for i, (prompt, video) in enumerate(zip(prompts, films)):
        name = f"{i:02d}_{re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60]}"
        if frames == 1:
            write_png(out / f"{name}.png", video[0])
            print(f"{out / name}.png")
            continue
        write_video(out / f"{name}.mp4", video, settings["fps"])
        write_gif(out / f"{name}.gif", video, settings["fps"])
        print(f"{out / name}.mp4 and .gif")
    write_sheet(out / "sheet.png", films, prompts)
    print(
        f"{out / 'sheet.png'}\n{len(films)} x {frames} frames at {size}x{width}, "
        f"{args.steps} steps of {args.sampler}, guidance {args.guidance:g}: "
        f"{time.time() - start:.1f} s on {device}"
    )


if __name__ == "__main__":
    command(main, BadWeights)
