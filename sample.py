"""The diffusion process: noise schedule, training loss, samplers, and the command to sample.

    python sample.py --weights assets/toy --prompt "a red circle moving left"

writes an MP4 and a GIF for each prompt (with --frames 1 a PNG) and a contact sheet. The process is
IDDPM (Nichol and Dhariwal 2021, arXiv 2102.09672): 1000 forward steps add noise; in reverse the
network predicts the noise and, by the second half of its channels, the variance of each step.

Shapes in this file:
    B batch    C latent channels    T frames    L caption tokens    E caption channels
    H, W height and width of latents; in videos [T, 3, H, W] of pixels
    N steps of a schedule, 1000 in training
    t [B] timesteps, which are the indices into the training schedule
    i     an int, the index into a schedule of sampling, which may have fewer steps
"""

import gc
import json
import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import av
import torch
import tyro
from av.video.reformatter import Colorspace
from huggingface_hub import snapshot_download
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.functional import pad

import data
from data import UserError, keyed_generator, print0, progress, require
from stdit import STDiT, STDiTConfig

# ---------------------------------------------------------------------------------------------
# Noise schedule
#
# Noise is added in N = 1000 steps, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, with beta
# rising linearly from 1e-4 to 2e-2. Several steps combined are again Gaussian (DDPM, arXiv
# 2006.11239, eq. 4):
#     x_t = alpha_t x_0 + sigma_t noise,   alpha_t^2 = alphas_cumprod_t = prod_{s <= t} (1 - beta_s)
# with sigma_t^2 = 1 - alpha_t^2. So a subset of the timesteps is a schedule of its own, with larger
# betas, for sampling in fewer steps (IDDPM, section 4).


class Schedule(NamedTuple):
    """Tables over N steps of increasing noise. Index 0, t = 1 in the papers, is the last step of
    sampling. They are float64; to(device) makes them fp32. alpha and sigma are those of DPM-Solver;
    DDPM writes alpha_t for 1 - beta_t.
    """

    timesteps: torch.Tensor  # [N]  timestep given to the network, 0 to 999
    alpha: torch.Tensor  # [N]  sqrt(alphas_cumprod), scale of the signal
    sigma: torch.Tensor  # [N]  sqrt(1 - alphas_cumprod), scale of the noise
    alpha_prev: torch.Tensor  # [N]  _prev: one step closer to x_0; 1 at index 0
    sigma_prev: torch.Tensor  # [N]  0 at index 0
    posterior_mean_coef1: torch.Tensor  # [N]  of x_0 in the mean of q(x_{t-1} | x_t, x_0)
    posterior_mean_coef2: torch.Tensor  # [N]  of x_t (DDPM, eq. 7)
    log_betas: torch.Tensor  # [N]  upper bound of the log variance of a reverse step
    posterior_log_variance: torch.Tensor  # [N]  lower bound, log beta-tilde

    def to(self, device):
        return Schedule(self.timesteps.to(device), *(t.float().to(device) for t in self[1:]))


def schedule_from_timesteps(timesteps):
    """Return the Schedule of a subset of the training timesteps: int64 [N], ascending, N >= 2."""
    train_betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    alphas_cumprod = torch.cumprod(1 - train_betas, dim=0)[timesteps]
    alphas_cumprod_prev = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    betas = 1 - alphas_cumprod / alphas_cumprod_prev
    variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)  # beta-tilde
    variance[0] = variance[1]  # the true value is 0, its logarithm -inf; IDDPM does the same
    return Schedule(
        timesteps=timesteps,
        alpha=alphas_cumprod.sqrt(),
        sigma=(1 - alphas_cumprod).sqrt(),
        alpha_prev=alphas_cumprod_prev.sqrt(),
        sigma_prev=(1 - alphas_cumprod_prev).sqrt(),
        posterior_mean_coef1=alphas_cumprod_prev.sqrt() * betas / (1 - alphas_cumprod),
        posterior_mean_coef2=(1 - betas).sqrt() * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod),
        log_betas=betas.log(),
        posterior_log_variance=variance.log(),
    )


def make_schedule(steps=1000):
    """Return the training schedule, or `steps` of its timesteps, evenly spaced from 0 to 999."""
    require(2 <= steps <= 1000, f"steps={steps}: expected 2 to 1000")
    timesteps = torch.linspace(0, 999, steps, dtype=torch.float64).round().long()
    return schedule_from_timesteps(timesteps)


TRAIN_SCHEDULE = make_schedule(1000)


def extract(table, t, x):
    """Return table[t], shaped to multiply x [B, C, T, H, W]; t [B], or i in place of t."""
    return table[t].to(x).view(-1, 1, 1, 1, 1)


def q_sample(schedule, x0, t, noise):
    """Return x_t, a sample of q(x_t | x_0) (DDPM, eq. 4). x0, noise [B, C, T, H, W]; t [B]."""
    return extract(schedule.alpha, t, x0) * x0 + extract(schedule.sigma, t, x0) * noise


def predict_x0(schedule, x_t, t, eps):
    """Return x_0 for x_t and the predicted noise eps: q_sample solved for x0."""
    return (x_t - extract(schedule.sigma, t, x_t) * eps) / extract(schedule.alpha, t, x_t)


def posterior_mean(schedule, x0, x_t, t):
    """Return the mean of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7)."""
    coef1, coef2 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    return extract(coef1, t, x0) * x0 + extract(coef2, t, x_t) * x_t


def log_variance(schedule, var, t):
    """Return the log variance of a reverse step, interpolated between its bounds by the network's
    channels `var`: log beta-tilde where they are -1, log beta where they are 1 (IDDPM, eq. 15).
    """
    v = (var + 1) / 2
    lower = extract(schedule.posterior_log_variance, t, var)
    return v * extract(schedule.log_betas, t, var) + (1 - v) * lower


# ---------------------------------------------------------------------------------------------
# Loss
#
# The mean squared error of the predicted noise is a reweighted variational lower bound (VLB) and
# gives better images than the VLB itself, but it does not train the variance. So the VLB is added
# for the variance channels alone: the mean inside it is detached (IDDPM, section 3.1).


def diffusion_loss(schedule, out, x0, x_t, t, noise):
    """Return a dict of two tensors [B]: "mse", the error of the predicted noise, and "vlb", the
    term of the VLB at t, in bits per dimension. Training minimizes their sum. (IDDPM weights the
    sum over 1000 t by 0.001; on the term of one random t that is 1.) out [B, 2C, T, H, W]: the
    network's output for x_t = q_sample(schedule, x0, t, noise).
    """
    eps, var = out.chunk(2, dim=1)  # 2 x [B, C, T, H, W]
    mse = (eps - noise).square().flatten(1).mean(1)
    x0_pred = predict_x0(schedule, x_t, t, eps.detach())  # the VLB trains var alone
    mean = posterior_mean(schedule, x0_pred, x_t, t)
    log_var = log_variance(schedule, var, t)
    true_mean = posterior_mean(schedule, x0, x_t, t)
    true_log_var = extract(schedule.posterior_log_variance, t, x_t)  # of q(x_{t-1} | x_t, x_0)
    mean_term = (true_mean - mean).square() * (-log_var).exp()
    variance_term = log_var - true_log_var + (true_log_var - log_var).exp() - 1
    kl = 0.5 * (variance_term + mean_term)  # of q(x_{t-1} | x_t, x_0) from the prediction
    nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_var)
    # at t = 0 the step ends at x_0 itself
    vlb = torch.where((t == 0).view(-1, 1, 1, 1, 1), nll, kl) / math.log(2)
    return {"mse": mse, "vlb": vlb.flatten(1).mean(1)}


def discretized_gaussian_log_likelihood(x, mean, log_std):
    """Return the log probability of a bin of width 2/255 around x; the outer bins extend to
    infinity (DDPM, eq. 13). It is made for pixels in [-1, 1], but v1 uses it for latents.
    """
    upper = torch.special.ndtr((x - mean + 1 / 255) * (-log_std).exp())  # CDF of the normal
    lower = torch.special.ndtr((x - mean - 1 / 255) * (-log_std).exp())
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


# ---------------------------------------------------------------------------------------------
# Sampler steps
#
# DDPM draws x_{t-1} from the predicted Gaussian. DDIM adds no noise and needs fewer steps: it
# integrates the probability-flow ODE, whose x_t are distributed as q_sample's, by Euler's method
# for x / alpha as a function of sigma / alpha. DPM-Solver++ integrates it to second order,
# extrapolating x_0 from its last two predictions.
#
# A step takes what it uses of these arguments, and returns x, one step closer to x_0:
#     i        index into the schedule
#     x        x_t [B, C, T, H, W]
#     x0       the predicted x_0, not clipped, since latents have no bounds
#     eps      the predicted noise, with guidance
#     var      the network's variance channels, for log_variance
#     noise    a function that draws standard normal noise
#     x0_last  x0 of the step before, None in the first


def ddpm_step(schedule, i, x, x0, var, noise, **_):
    """Ancestral sampling with learned variance (DDPM, algorithm 2; IDDPM, eq. 15)."""
    mean = posterior_mean(schedule, x0, x, i)
    if i == 0:
        return mean
    return mean + (0.5 * log_variance(schedule, var, i)).exp() * noise()


def ddim_step(schedule, i, x0, eps, **_):
    """Deterministic DDIM (arXiv 2010.02502, eq. 12 without noise)."""
    return schedule.alpha_prev[i] * x0 + schedule.sigma_prev[i] * eps


def dpm_step(schedule, i, x, x0, x0_last, **_):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2). Without the extrapolation it is DDIM. Its
    time is lambda = log(alpha / sigma), which is infinite at x_0: so the last step is of first
    order, like the first, which has no earlier prediction.
    """
    if x0_last is not None and i > 0:
        lambdas = (schedule.alpha / schedule.sigma).log()  # [N]; i + 1: the noisier step before
        h = lambdas[i - 1] - lambdas[i]
        h_last = lambdas[i] - lambdas[i + 1]
        x0 = x0 + 0.5 * h / h_last * (x0 - x0_last)  # the paper's r is h_last / h
    sigma_ratio = schedule.sigma_prev[i] / schedule.sigma[i]
    # sigma_ratio x + alpha_prev (1 - exp(-h)) x0; exp(-h) = sigma_ratio alpha / alpha_prev
    return sigma_ratio * x + (schedule.alpha_prev[i] - sigma_ratio * schedule.alpha[i]) * x0


def dpm_schedule(steps):
    """Return the schedule of `steps` timesteps: of steps + 1 evenly spaced ones from 0 to 999 the 0
    is left out, as in diffusers: near it lambda changes so fast that extrapolation overshoots.
    """
    require(2 <= steps <= 999, f"steps={steps}: expected 2 to 999 with --sampler dpm")
    return schedule_from_timesteps(make_schedule(steps + 1).timesteps[1:])


SAMPLERS = {  # name: (its schedule, its step)
    "ddpm": (make_schedule, ddpm_step),
    "ddim": (make_schedule, ddim_step),
    "dpm": (dpm_schedule, dpm_step),
}

# ---------------------------------------------------------------------------------------------
# Sampling with classifier-free guidance
#
# Training replaces 10% of the captions by the null caption, so the network predicts the noise with
# and without a caption. Sampling extrapolates from one to the other and beyond (arXiv 2207.12598):
#     eps = eps_uncond + guidance (eps_cond - eps_uncond),
# where guidance 1 is the plain conditional prediction. On the toy, guidance at small t distorts
# shapes and colors, so it can be limited to large t (arXiv 2404.07724 also leaves out the largest).


def predict_noise_and_variance(model, x, t, y, mask, guidance, v1_guidance=False):
    """Return the guided eps and the var of the captions, [B, C, T, H, W] each. x
    [B, C, T, H, W]; t a scalar tensor; y [2B, L, E], mask [2B, L] of B captions, then B null
    captions; if guidance is 1, B captions are enough. v1_guidance: guide 3 of the 4 channels,
    as v1 and DiT.
    """
    B = len(x)
    if guidance == 1:
        return model(x, t.expand(B), y[:B], mask[:B]).chunk(2, dim=1)
    eps, var = model(torch.cat([x, x]), t.expand(2 * B), y, mask).chunk(2, dim=1)
    eps_cond, eps_uncond = eps.chunk(2)  # 2 x [B, C, T, H, W]
    eps = eps_uncond + guidance * (eps_cond - eps_uncond)
    if v1_guidance:
        eps = torch.cat([eps[:, :3], eps_cond[:, 3:]], dim=1)
    return eps, var[:B]


@torch.no_grad()
def sample_latents(
    model,
    y,  # [B, L, E]
    mask,  # [B, L]
    shape,  # (C, T, H, W) of the latents of a video
    keys,  # for each video a tuple that seeds its noise, see video_keys
    steps,  # v1: 100
    guidance,  # v1: 7
    guidance_min_t=0,  # use guidance only at timesteps >= this
    sampler="ddpm",
    v1_guidance=False,  # as v1: guide three channels, null caption with the mask of the prompt
):
    """Generate latents [B, C, T, H, W] for B captions. Up to rounding, a video does not depend on
    the rest of its batch.
    """
    make, step = SAMPLERS[sampler]
    schedule = make(steps).to(y.device)
    timesteps = schedule.timesteps.tolist()  # once, so that no step waits for the GPU
    generators = [keyed_generator(*key) for key in keys]

    def noise():  # [B, C, T, H, W]
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(y.device)

    if guidance != 1:
        y = torch.cat([y, model.y_embedder.y_embedding.expand_as(y)])  # [2B, L, E]
        null_mask = mask if v1_guidance else torch.ones_like(mask)  # nothing in it is padding
        mask = torch.cat([mask, null_mask])  # [2B, L]
    x = noise()
    x0_last = None
    for i in progress(range(steps - 1, -1, -1), "sampling"):
        g = guidance if timesteps[i] >= guidance_min_t else 1
        t = schedule.timesteps[i]
        eps, var = predict_noise_and_variance(model, x, t, y, mask, g, v1_guidance)
        x0 = predict_x0(schedule, x, i, eps)
        x = step(schedule, i, x=x, x0=x0, eps=eps, var=var, noise=noise, x0_last=x0_last)
        x0_last = x0
    return x


def video_keys(seed, prompts):
    """Return the key of each video's noise: seed, prompt, and how often it occurred before."""
    return [(seed, "video", prompt, prompts[:i].count(prompt)) for i, prompt in enumerate(prompts)]


def generate(model, vae, y, mask, keys, shape, batch_size=8, **options):
    """Generate and decode n videos, a list of uint8 [T, 3, H, W] in pixels, batch_size at a time.
    y [n, L, E], mask [n, L]; keys, shape, options: as for sample_latents.
    """
    device = next(model.parameters()).device
    videos = []
    for i in range(0, len(keys), batch_size):
        part = slice(i, i + batch_size)
        captions = y[part].to(device), mask[part].to(device)
        latents = sample_latents(model, *captions, shape, keys[part], **options)
        videos += [data.to_uint8(vae.decode(z)) for z in latents]
    return videos


# ---------------------------------------------------------------------------------------------
# Writing videos and images


def write_video(path, frames, fps):
    """Write frames, uint8 [T, 3, H, W], as an H.264 MP4, in the colors of BT.709. The file says so,
    since players guess those of an untagged file.
    """

    def write(tmp):
        with av.open(str(tmp), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "16"})
            stream.height, stream.width = frames.shape[-2:]
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = 1  # limited
            for image in frames.permute(0, 2, 3, 1).contiguous().numpy():  # [H, W, 3]
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())

    data.atomic_write(path, write)


def to_image(frame, height=0):
    """Convert a frame, uint8 [3, H, W], to a PIL image, enlarged to about that height if small."""
    factor = max(1, round(height / frame.shape[-2]))
    image = Image.fromarray(frame.permute(1, 2, 0).numpy())
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def write_gif(path, video, fps):
    """Write a video, uint8 [T, 3, H, W], as a looping GIF, enlarged to about 256 pixels."""
    first, *rest = [to_image(frame, 256) for frame in video]
    options = {"save_all": True, "append_images": rest, "duration": round(1000 / fps), "loop": 0}
    data.atomic_write(path, lambda tmp: first.save(tmp, format="GIF", **options))


def write_sheet(path, videos, captions):
    """Write a PNG with a row per video, uint8 [T, 3, H, W]: its caption above up to 8 frames."""
    T = len(videos[0])
    shown = torch.linspace(0, T - 1, min(T, 8)).round().long()
    framed = [pad(video[shown], (1, 1, 1, 1), value=255) for video in videos]  # in white
    rows = [to_image(torch.cat([*video], dim=-1), 128) for video in framed]
    height = rows[0].height + 20  # with the caption
    sheet = Image.new("RGB", (rows[0].width, len(rows) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for r, (row, caption) in enumerate(zip(rows, captions)):
        draw.text((4, r * height + 2), caption, fill="black", font=font)
        sheet.paste(row, (0, r * height + 20))
    data.atomic_write(path, lambda tmp: sheet.save(tmp, format="PNG"))


# ---------------------------------------------------------------------------------------------
# Loading a model
#
# Weights are a folder: config.json (STDiTConfig), model.safetensors and sample.json, the other
# settings of sampling (vae, t5, frames, size, width, output_fps, guidance, guidance_min_t). A
# checkpoint of train.py is one, with the EMA weights; tools/convert_weights.py makes others.


STEP = "step_" + 8 * "[0-9]"  # pattern of the names of a run's checkpoints


def newest_checkpoint(run):
    """Return the newest checkpoint folder of a run of train.py, or None."""
    return max(Path(run).glob(f"checkpoints/{STEP}"), default=None)


def find_weights(source):
    """Return the local folder with the weights of a run of train.py, a folder, or a Hub name."""
    help = "tools/convert_weights.py converts released weights; runs save every --save-every steps"
    folder = data.local_folder(source)
    if folder is None:
        files = ["config.json", "model.safetensors", "sample.json"]
        try:
            folder = Path(snapshot_download(source, allow_patterns=files))
        except (OSError, ValueError) as error:
            reason = f"could not be downloaded from the Hub ({type(error).__name__})"
            raise UserError(f"{source} is not a local folder, and {reason}; {help}") from None
    folder = newest_checkpoint(folder) or folder
    found = (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
    require(found, f"{source} lacks config.json or model.safetensors; {help}")
    return folder


def read_config(folder):
    """Return the STDiTConfig of a folder of weights."""
    config = json.loads((folder / "config.json").read_text())
    other = config.keys() - vars(STDiTConfig()).keys()
    require(not other, f"{folder}: config.json is not that of an STDiT, it has {sorted(other)[:3]}")
    return STDiTConfig(**config)


def load_model(source, **changes):
    """Load the model of a run, folder or Hub name, in eval mode and fp32. changes: new values for
    fields of its config. UserError if a tensor is missing, unexpected or of the wrong shape.
    """
    folder = find_weights(source)
    with torch.device("meta"):  # nothing is allocated and initialized
        model = STDiT(replace(read_config(folder), **changes))
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder} does not fit the network {model.config}: {reason}") from None
    return model.float().eval()


# ---------------------------------------------------------------------------------------------
# The command line


@dataclass(frozen=True)
class SampleConfig:
    weights: str  # run of train.py, folder of tools/convert_weights.py, or Hub name
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # text of a video; may be repeated
    out: str = "samples"  # folder to write
    # None means as in training, unless a comment says otherwise
    frames: int | None = None  # frames of a video, 1 for an image
    size: int | None = None  # height in pixels
    width: int | None = None  # in pixels; None: as in training, or the height if --size is set
    space_scale: float | None = None  # position = index / scale; None: in proportion to the size
    time_scale: float | None = None  # temporal position = index / scale
    output_fps: int | None = None  # frames per second of the files
    guidance: float | None = None  # classifier-free guidance, 1: none; v1: 7
    guidance_min_t: int | None = None  # use guidance only at timesteps >= this; v1: 0
    vae: str | None = None  # folder or Hub name of the VAE
    t5: str | None = None  # folder or Hub name of T5 encoder and tokenizer
    # denoising
    steps: int = 50  # denoising steps; v1: 100
    sampler: Literal[tuple(SAMPLERS)] = "ddpm"  # dpm: DPM-Solver++(2M)
    v1_guidance: bool = False  # as v1: guide 3 of 4 channels, null caption with the prompt's mask
    seed: int = 0  # random seed
    batch_size: int = 8  # videos at a time
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else MPS, else CPU


def resolve(config):
    """Replace the fields that are None by the settings of the weights. As in train.derive, the
    spatial scale grows with sqrt(size * width).
    """
    folder = find_weights(config.weights)
    network = read_config(folder)
    file = folder / "sample.json"
    require(file.is_file(), f"{file} is missing; train.py and tools/convert_weights.py write it")
    trained = json.loads(file.read_text())
    settings = trained | {k: v for k, v in vars(config).items() if v is not None}
    if config.size and not config.width:
        settings["width"] = config.size
    ratio = settings["size"] * settings["width"] / (trained["size"] * trained["width"])
    settings.setdefault("space_scale", network.space_scale * math.sqrt(ratio))
    settings.setdefault("time_scale", network.time_scale)
    return SampleConfig(**settings)


def write_videos(out, prompts, videos, fps):
    """Write each video (uint8 [T, 3, H, W]) and a contact sheet, and print their names."""
    for i, (prompt, video) in enumerate(zip(prompts, videos)):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        path = Path(out) / f"{i:02d}_{slug}"
        if len(video) == 1:
            image = to_image(video[0])
            data.atomic_write(f"{path}.png", lambda tmp: image.save(tmp, format="PNG"))
            print(f"{path}.png")
        else:
            write_video(f"{path}.mp4", video, fps)
            write_gif(f"{path}.gif", video, fps)
            print(f"{path}.mp4 and .gif")
    write_sheet(Path(out) / "sheet.png", videos, prompts)
    print(Path(out) / "sheet.png")


def main():
    start = time.time()
    c = tyro.cli(SampleConfig, description=__doc__.split("\n\nShapes")[0])
    require(c.prompt, 'nothing to generate: give --prompt "a red circle moving left"')
    SAMPLERS[c.sampler][0](c.steps)  # a wrong number of steps fails before anything is loaded
    data.require_range(c, 1, 100_000, "frames", "size", "width", "batch_size", "output_fps")
    data.require_range(c, 1e-6, 1e6, "space_scale", "time_scale")
    data.require_range(c, -1e6, 1e6, "guidance")
    data.require_folder(c.out)
    c = resolve(c)
    device, _, world_size = data.init_distributed(c.device)
    require(world_size == 1, "sample.py runs on one device: start it without torchrun")
    model = load_model(c.weights, space_scale=c.space_scale, time_scale=c.time_scale)
    vae = data.VAE(c.vae, device)
    found, expected = vae.channels, model.config.in_channels
    require(found == expected, f"{c.vae} has {found} latent channels, expected {expected}")
    vae.check_size(c.frames, c.size, c.width, model.config.patch_size)
    prompts = [data.clean_caption(prompt) for prompt in c.prompt]
    y, mask = data.T5(c.t5, model.config.caption_length, device).encode(prompts)
    gc.collect()  # frees T5; the XXL takes 9.5 GB in bf16

    print0(f"{c.weights}: {model.config}")
    print0(f"{c.frames} frames of {c.size}x{c.width}, guidance {c.guidance:g}")
    shape = (vae.channels, c.frames, c.size // vae.factor, c.width // vae.factor)
    keys = video_keys(c.seed, prompts)
    names = ("steps", "sampler", "guidance", "guidance_min_t", "v1_guidance")
    options = {name: getattr(c, name) for name in names}
    videos = generate(model.to(device), vae, y, mask, keys, shape, c.batch_size, **options)
    write_videos(c.out, c.prompt, videos, c.output_fps)
    print0(f"{c.steps} steps of {c.sampler} on {device}: {time.time() - start:.1f} s with loading")


if __name__ == "__main__":
    data.run_command(main)
