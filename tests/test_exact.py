"""Every part against an independent implementation: diffusers' networks, schedulers and VAE,
transformers' T5, an explicit softmax, eager fp32.

All weights are random, also biases and temporal attention; nothing is downloaded. Positions and the
sinusoids of timesteps are rounded to fp32 on both sides, also where the rest is float64.
"""

import copy
import math
import sys

import pytest
import torch
from conftest import ROOT, assert_close, hand_attention, randomize
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.models import LatteTransformer3DModel, PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import (
    get_1d_sincos_pos_embed_from_grid,
    get_2d_sincos_pos_embed,
)
from torch.distributions import Normal
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import data
import sample as S
import stdit
from stdit import BLOCKS, CrossAttention, SelfAttention, STDiT, STDiTConfig, set_up_scaling

sys.path.insert(0, str(ROOT / "tools"))
from convert_weights import convert_state_dict  # noqa: E402

pytestmark = pytest.mark.quick
F64 = torch.float64
TINY = dict(depth=2, hidden_size=32, num_heads=4, caption_channels=24, caption_length=10)
THEIRS = dict(num_attention_heads=4, attention_head_dim=8, num_layers=2, cross_attention_dim=32)
THEIRS |= dict(in_channels=4, out_channels=8, patch_size=2, sample_size=16, caption_channels=24)
THEIRS |= dict(attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000)
THEIRS |= dict(norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6)
PRECISIONS = [(torch.float32, 1e-5, "fp32, two blocks"), (torch.float64, 1e-9, "float64")]
# Latent height and width, diffusers' interpolation_scale, and our space_scale. THEIRS is made for
# 8x8 patches and spreads n patches over an axis of 8, so our scale is interpolation_scale * n / 8.
# Where height and width differ see set_positions.
GRIDS = [
    (16, 16, 1, 1.0),  # as PixArt at 512x512
    (8, 8, 1, 0.5),  # as at 256x256
    (8, 16, 1, 0.5),
    (24, 24, 2, 3.0),  # diffusers computes positions in fp32, which cannot represent 1/3
    (24, 4, 1, 1.5),
]


def converted(theirs, **config):
    """Our model with a state dict of one of diffusers'."""
    config = STDiTConfig(**TINY | config)
    null = torch.zeros(config.caption_length, config.caption_channels)
    model = randomize(STDiT(config), seed=9)
    model.load_state_dict(convert_state_dict(theirs, config, null))
    return model


def set_positions(theirs, H, W, scale):
    """On a grid that is not square diffusers would spread each axis by itself. Give it a part of
    its positions of a square grid, index / scale on both axes.
    """
    h, w = H // 2, W // 2
    n = max(h, w)
    options = dict(base_size=n, interpolation_scale=scale, output_type="pt")
    square = get_2d_sincos_pos_embed(32, n, **options).view(n, n, 32)
    theirs.pos_embed.pos_embed = square[:h, :w].reshape(1, h * w, 32).float()
    theirs.pos_embed.height, theirs.pos_embed.width = h, w


def inputs(T, H, W, dtype=torch.float32, channels=24, lengths=(10, 6, 1)):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(len(lengths), 4, T, H, W, generator=g)
    y = torch.randn(len(lengths), 10, channels, generator=g)
    mask = torch.arange(10)[None] < torch.tensor(lengths)[:, None]
    return x.to(dtype), torch.tensor([0, 17, 999])[: len(lengths)], y.to(dtype), mask


def frame_by_frame(pixart, x, t, y, mask):
    """PixArt, an image model, on each frame. [B, 4, T, H, W] -> [B, 8, T, H, W]."""
    options = dict(encoder_hidden_states=y, encoder_attention_mask=mask, timestep=t)
    frames = [pixart(frame, **options).sample for frame in x.unbind(2)]
    return torch.stack(frames, dim=2)


# ------------------------------------------------------------------------------------- the networks
@pytest.mark.parametrize("dtype, atol, cause", PRECISIONS)
@pytest.mark.parametrize("H, W, interpolation, scale", GRIDS)
@pytest.mark.parametrize("variant, T", [("sequential", 3), ("parallel", 3), ("full", 1)])
@torch.no_grad()
def test_image_model_is_pixart(variant, T, H, W, interpolation, scale, dtype, atol, cause):
    pixart = randomize(PixArtTransformer2DModel(**THEIRS, interpolation_scale=interpolation))
    if H != W:
        set_positions(pixart, H, W, scale)
    model = converted(pixart.state_dict(), variant=variant, space_scale=scale)
    batch = inputs(T, H, W, dtype)
    found, expected = model.to(dtype)(*batch), frame_by_frame(pixart.to(dtype), *batch)
    assert expected.std() > 0.1  # there is something to compare
    if scale in (1.5, 3.0):
        atol, cause = max(atol, 1e-6), "positions, in fp32 there and in float64 here"
    assert_close(found, expected, atol, cause)


@torch.no_grad()
def test_at_the_width_of_xl_it_is_diffusers_pixart():
    wide = dict(attention_head_dim=72, num_attention_heads=16, cross_attention_dim=1152)
    pixart = randomize(PixArtTransformer2DModel(**THEIRS | wide | dict(caption_channels=4096)))
    model = converted(pixart.state_dict(), hidden_size=1152, num_heads=16, caption_channels=4096)
    batch = inputs(2, 16, 16, channels=4096, lengths=(10, 3))
    assert_close(model(*batch), frame_by_frame(pixart, *batch), 2e-5, "fp32, sums of 4608 terms")


def latte_mask(mask, T, dtype):
    """diffusers' Latte takes a mask as a bias, with a row for each frame: [B*T, 1, L]."""
    return ((1 - mask.to(dtype)) * -10000)[:, None].repeat_interleave(T, dim=0)


@pytest.mark.parametrize("dtype, atol, cause", PRECISIONS)
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("H, W, interpolation, scale", [GRIDS[0], GRIDS[2]])
@torch.no_grad()
def test_the_latte_variant_is_diffusers_latte(T, H, W, interpolation, scale, dtype, atol, cause):
    latte = randomize(LatteTransformer3DModel(**THEIRS, video_length=T))
    if H != W:
        set_positions(latte, H, W, scale)
    model = converted(latte.state_dict(), variant="latte", space_scale=scale)
    x, t, y, mask = inputs(T, H, W, dtype)
    expected = latte.to(dtype)(x, t, y, encoder_attention_mask=latte_mask(mask, T, dtype)).sample
    assert_close(model.to(dtype)(x, t, y, mask), expected, atol, cause)


def from_parts(pixart, temporal, variant, time_scale, x, t, y, mask):
    """The three variants that the report compares with Latte, from the parts of diffusers' PixArt
    and one more of diffusers' attentions per block.
    """
    (B, _, T, H, W), bias = x.shape, latte_mask(mask, 1, x.dtype)
    modulation, embedded = pixart.adaln_single(t, None, batch_size=B, hidden_dtype=x.dtype)
    y = pixart.caption_projection(y)
    z = torch.stack([pixart.pos_embed(frame) for frame in x.unbind(2)], dim=1)  # [B, T, S, D]
    positions = torch.arange(T, dtype=F64) / time_scale
    pos = get_1d_sincos_pos_embed_from_grid(32, positions, output_type="pt")[:, None].float()
    for i, block in enumerate(pixart.transformer_blocks):
        m = (block.scale_shift_table[None] + modulation.reshape(B, 6, -1))[:, :, None, None]
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = m.unbind(1)
        z = z + pos if variant == "full" and i == 0 else z
        x_attn = block.norm1(z) * (1 + scale_attn) + shift_attn
        if variant == "full":
            z = z + gate_attn * block.attn1(x_attn.flatten(1, 2)).view_as(z)
        else:
            space = torch.stack([block.attn1(frame) for frame in x_attn.unbind(1)], dim=1)
            after = z + gate_attn * space
            x_temp = (after if variant == "sequential" else z) + (pos if i == 0 else 0)
            time = torch.stack([temporal[i](patch) for patch in x_temp.unbind(2)], dim=2)
            z = after + gate_attn * time
        z = z + block.attn2(z.flatten(1, 2), y, bias).view_as(z)
        z = z + gate_mlp * block.ff(block.norm2(z) * (1 + scale_mlp) + shift_mlp)
    shift, scale = (pixart.scale_shift_table[None] + embedded[:, None])[:, :, None, None].unbind(1)
    z = pixart.proj_out(pixart.norm_out(z) * (1 + scale) + shift)  # [B, T, S, 2*2*8]
    z = z.view(B, T, H // 2, W // 2, 2, 2, 8)  # b t h w ph pw c
    return z.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, 8, T, H, W)  # b c t h ph w pw


@pytest.mark.parametrize("dtype, atol, cause", PRECISIONS)
@pytest.mark.parametrize("time_scale", [1.0, 1.5])
@pytest.mark.parametrize("variant", ["full", "sequential", "parallel"])
@torch.no_grad()
def test_video_model_is_built_from_diffusers_parts(variant, time_scale, dtype, atol, cause):
    pixart = randomize(PixArtTransformer2DModel(**THEIRS))
    set_positions(pixart, 8, 16, 0.5)
    temporal = [randomize(Attention(32, heads=4, dim_head=8, bias=True), seed=i) for i in range(2)]
    theirs = pixart.state_dict()
    for i, attention in enumerate(temporal if variant != "full" else []):
        prefix = f"temporal_transformer_blocks.{i}.attn1."  # Latte's
        theirs |= {prefix + name: value for name, value in attention.state_dict().items()}
        attention.to(dtype)
    model = converted(theirs, variant=variant, time_scale=time_scale, space_scale=0.5)
    batch = inputs(5, 8, 16, dtype)
    expected = from_parts(pixart.to(dtype), temporal, variant, time_scale, *batch)
    assert_close(model.to(dtype)(*batch), expected, atol, cause)


# ----------------------------------------------------------------------------- parts of the network
@pytest.mark.parametrize("kind", ["self", "cross", "cross without mask"])
def test_attention_and_its_gradient_are_an_explicit_softmax(kind):
    """Cross-attention folds frames into the batch: here one attention per whole video."""
    layer = SelfAttention(32, 4, "b (t s) d") if kind == "self" else CrossAttention(32, 4)
    randomize(layer).double()
    torch.manual_seed(1)
    x = torch.randn(2, 3, 7, 32, dtype=F64, requires_grad=True)  # [B, T, S, D]
    y = torch.randn(2, 5, 32, dtype=F64, requires_grad=True)
    mask = torch.arange(5)[None] < torch.tensor([[5], [3]]) if kind == "cross" else None
    leaves, flat = [x, *layer.parameters()], x.flatten(1, 2)  # [B, T*S, D]
    if kind == "self":
        q, k, v = layer.qkv(flat).chunk(3, dim=-1)
        found = layer(x).flatten(1, 2)
    else:
        q, (k, v) = layer.q_linear(flat), layer.kv_linear(y).chunk(2, dim=-1)
        found, leaves = layer(x, y, mask).flatten(1, 2), [*leaves, y]
    expected = layer.proj(hand_attention(q, k, v, 4, mask))
    assert_close(found, expected, 1e-12, "float64 rounding")
    direction = torch.randn_like(found)
    grads = (torch.autograd.grad(out, leaves, direction) for out in (found, expected))
    for ours, theirs in zip(*grads):
        assert_close(ours, theirs, 1e-11, "float64 rounding, sums of 42 terms")


def loss_and_gradients(model, batch):
    loss = model(*batch).float().square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.stack([loss, *(g.double().norm() for g in grads)]).double(), grads


@pytest.mark.parametrize("variant", BLOCKS)
def test_activation_checkpointing_changes_no_number(variant):
    """FLOPs: "full" adds a forward pass, a third; "selective" recomputes no product."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    also = {attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}  # else not counted
    flops, found = {}, {}
    for mode in ("none", "full", "selective"):
        model = randomize(STDiT(STDiTConfig(**TINY, variant=variant)))
        set_up_scaling(model, activation_checkpointing=mode)
        with FlopCounterMode(display=False, custom_mapping=also) as counter:
            _, found[mode] = loss_and_gradients(model, inputs(3, 4, 6))
        flops[mode] = counter.get_total_flops()
        assert all(torch.equal(a, b) for a, b in zip(found[mode], found["none"]))
    assert flops["selective"] == flops["none"] and 1.2 < flops["full"] / flops["none"] < 1.34


@pytest.mark.parametrize("variant", BLOCKS)
def test_autocast_stays_within_bf16s_rounding_of_eager_fp32(variant):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = randomize(STDiT(STDiTConfig(**TINY, variant=variant))).to(device)
    batch = [v.to(device) for v in inputs(3, 4, 6)]
    expected, _ = loss_and_gradients(model, batch)
    with torch.autocast(device, torch.bfloat16):
        found, _ = loss_and_gradients(model, batch)
    assert not torch.equal(found, expected)  # bf16 was at work
    # bf16 keeps 8 bits: 0.4% per product, in some dozens of products one after the other
    assert_close(found / expected, torch.ones_like(found), 0.03, "bf16")


def test_only_the_blocks_compute_in_bf16(monkeypatch):
    """The context that CUDA gets, on a CPU."""
    model, dtypes = randomize(STDiT(STDiTConfig(**TINY))), {}
    for name, module in model.named_modules():
        record = lambda m, x, out, name=name: dtypes.update({name: out.dtype})  # noqa: E731
        module.register_forward_hook(record)
    monkeypatch.setattr(stdit, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    assert model(*inputs(3, 4, 6)).dtype == torch.float32
    half = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert len(half) > 20 and all(name.startswith("blocks.") for name in half)


# ---------------------------------------------------------------------------- the diffusion process
def exactly(scheduler_class, **options):
    """One of diffusers' schedulers, with tables in float64."""
    options |= dict(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")
    scheduler = scheduler_class(num_train_timesteps=1000, **options)
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=F64)
    assert_close(scheduler.betas.double(), betas, 1e-8, "diffusers' fp32")
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=F64)
    return scheduler


def randn(channels=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, 2, 3, 3, dtype=F64, generator=generator)


def test_q_sample_is_diffusers_add_noise():
    x0, noise, t = randn(), randn(seed=1), torch.tensor([0, 613])
    expected = exactly(DDPMScheduler).add_noise(x0, noise, t)
    assert_close(S.q_sample(S.TRAIN_SCHEDULE, x0, t, noise), expected, 1e-9, "float64")


@pytest.mark.parametrize("steps", [7, 100, 1000])
def test_ddpm_steps_and_learned_variance_are_diffusers(steps):
    schedule = S.make_schedule(steps)
    scheduler = exactly(DDPMScheduler, variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(timesteps=schedule.timesteps.flip(0).tolist())
    for i in {0, 1, 2, steps // 2, steps - 1}:
        t, x, out = schedule.timesteps[i], randn(seed=i), randn(8, seed=i + 1)
        eps, v = out.chunk(2, dim=1)
        if i > 0:  # at 0 diffusers has its own floor for log 0, and neither uses it in a step
            found = S.log_variance(schedule, v, torch.tensor([i, i]))
            expected = scheduler._get_variance(t, predicted_variance=v)
            assert_close(found, expected, 1e-9, "float64")
        noise = torch.randn(eps.shape, dtype=F64, generator=torch.Generator().manual_seed(i))
        expected = scheduler.step(out, t, x, generator=torch.Generator().manual_seed(i))
        x0 = S.predict_x0(schedule, x, torch.tensor([i, i]), eps)
        found = S.ddpm_step(schedule, i, x, x0, v, lambda: noise)
        assert_close(found, expected.prev_sample, 1e-9, "float64")
        assert_close(x0, expected.pred_original_sample, 1e-9, "float64")


@pytest.mark.parametrize("steps", [10, 100])
def test_ddim_steps_are_diffusers(steps):
    scheduler = exactly(DDIMScheduler, clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    schedule = S.schedule_from_timesteps(scheduler.timesteps.flip(0))
    for i in (0, 1, steps // 2, steps - 1):
        x, eps = randn(seed=1), randn(seed=2)
        expected = scheduler.step(eps, schedule.timesteps[i], x).prev_sample
        found = S.ddim_step(schedule, i, S.predict_x0(schedule, x, i, eps), eps)
        assert_close(found, expected, 1e-9, "float64")


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_dpm_solver_steps_are_diffusers(steps):
    scheduler = exactly(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++", solver_order=2)
    scheduler.set_timesteps(steps)
    schedule = S.dpm_schedule(steps)
    assert torch.equal(schedule.timesteps, scheduler.timesteps.flip(0))
    sigmas = (schedule.sigma / schedule.alpha).flip(0)
    scheduler.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=F64)])  # in float64
    x, x0_last = randn(), None
    for i in reversed(range(steps)):
        eps = torch.tanh(x * (1 + i / steps))  # some function of x and t
        scheduler._step_index = steps - 1 - i
        x0 = scheduler.convert_model_output(eps, sample=x)
        ours = S.predict_x0(schedule, x, i, eps)
        found = S.dpm_step(schedule, i, x, ours, x0_last)
        # its parts in float64, since its step() goes through fp32 ...
        if i in (0, steps - 1):
            expected = scheduler.dpm_solver_first_order_update(x0, sample=x)
        else:
            expected = scheduler.multistep_dpm_solver_second_order_update([x0_last, x0], sample=x)
        assert_close(found, expected, 1e-9, "float64")
        # ... and the whole of it, which decides on the order itself
        expected = scheduler.step(eps, schedule.timesteps[i], x).prev_sample
        assert_close(found, expected.double(), 1e-4, "diffusers' fp32, x_0 of up to 500")
        x, x0_last = found, x0


@pytest.mark.parametrize("steps, i", [(1000, 1), (1000, 500), (50, 1), (50, 49)])
def test_vlb_is_the_numerical_integral_of_the_kl(steps, i):
    """Of q(x_{t-1} | x_t, x_0) against the model's Gaussian, for one latent value, on a grid."""
    schedule, t = S.make_schedule(steps), torch.tensor([i])
    x0, x_t, eps, v = torch.tensor([0.4, -0.7, 0.9, 0.3], dtype=F64).view(4, 1, 1, 1, 1, 1)
    scheduler = exactly(DDPMScheduler, variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(timesteps=schedule.timesteps.flip(0).tolist())
    # the model's Gaussian, from diffusers: its mean is a step minus the step's noise
    out, timestep = torch.cat([eps, v], 1), schedule.timesteps[i]
    std = scheduler._get_variance(timestep, predicted_variance=v).flatten().exp().sqrt()
    noise = torch.randn(1, dtype=F64, generator=torch.Generator().manual_seed(0))
    step = scheduler.step(out, timestep, x_t, generator=torch.Generator().manual_seed(0))
    mean = step.prev_sample.flatten() - noise * std
    # the true one, up to a factor, is q(x_{t-1} | x_0) q(x_t | x_{t-1}), a product of two Gaussians
    # in x_{t-1}; the grid lies around its mode
    alphas_cumprod = scheduler.alphas_cumprod[schedule.timesteps]
    prev, alpha = alphas_cumprod[i - 1], alphas_cumprod[i] / alphas_cumprod[i - 1]
    precision = 1 / (1 - prev) + alpha / (1 - alpha)
    mode = (prev.sqrt() * 0.4 / (1 - prev) - alpha.sqrt() * 0.7 / (1 - alpha)) / precision
    grid = mode + torch.linspace(-14, 14, 20001, dtype=F64) / precision.sqrt()
    log_q = Normal(prev.sqrt() * 0.4, (1 - prev).sqrt()).log_prob(grid)
    log_q = log_q + Normal(alpha.sqrt() * grid, (1 - alpha).sqrt()).log_prob(x_t.flatten())
    q, log_p = (log_q - log_q.max()).exp(), Normal(mean, std).log_prob(grid)
    q = q / torch.trapezoid(q, grid)
    kl = torch.trapezoid(torch.special.xlogy(q, q) - q * log_p, grid) / math.log(2)
    loss = S.diffusion_loss(schedule, out, x0, x_t, t, torch.zeros_like(x0))
    assert_close(loss["vlb"] / kl, torch.ones(1, dtype=F64), 1e-9, "float64, relative")


def test_vlb_at_t_0_is_the_numerical_integral_over_a_bin():
    x0 = torch.tensor([-0.2, 0.1, 0.7], dtype=F64).view(1, 3, 1, 1, 1)
    x_t, eps, v = x0 + 0.004, torch.full_like(x0, -0.3), torch.full_like(x0, 0.6)
    scheduler, t = exactly(DDPMScheduler, clip_sample=False), torch.tensor([0])
    mean = scheduler.step(eps, 0, x_t).prev_sample
    a = scheduler.alphas_cumprod[:2]
    lower = torch.log((1 - a[1] / a[0]) * (1 - a[0]) / (1 - a[1]))  # beta-tilde at 1
    log_var = 0.8 * torch.log(1 - a[0]) + 0.2 * lower
    grid = x0.flatten()[:, None] + torch.linspace(-1, 1, 20001, dtype=F64) / 255  # [3, 20001]
    density = torch.exp(-((grid - mean.flatten()[:, None]) ** 2) / (2 * log_var.exp()))
    mass = torch.trapezoid(density, grid) / (2 * torch.pi * log_var.exp()).sqrt()
    loss = S.diffusion_loss(S.TRAIN_SCHEDULE, torch.cat([eps, v], 1), x0, x_t, t, eps)
    assert_close(loss["vlb"], -mass.log2().mean()[None], 1e-9, "trapezoids of width 4e-7")


# ------------------------------------------------------------------------------ the frozen encoders
def random_video(T, H, W):
    return torch.randint(256, (T, 3, H, W), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize("micro_batch", [1, 3, 16])
@torch.no_grad()
def test_vae_is_diffusers_vae_frame_by_frame(micro_batch, tmp_path):
    theirs = AutoencoderKL.from_pretrained(ROOT / "assets/vae", low_cpu_mem_usage=False)
    theirs.register_to_config(scaling_factor=0.7)  # the toy's is 1
    theirs.save_pretrained(tmp_path)
    vae, video = data.VAE(tmp_path, micro_batch=micro_batch), random_video(5, 64, 48)
    frames = [theirs.encode(frame[None] / 127.5 - 1).latent_dist for frame in video]
    mean, std = (torch.cat([getattr(f, name) for f in frames], 0) for name in ("mean", "std"))
    mean, std = 0.7 * mean.transpose(0, 1), 0.7 * std.transpose(0, 1)  # [C, T, h, w]
    assert_close(vae.encode(video), mean, 1e-5, "fp32, convolutions of another batch size")
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(4, 5, 8, 6, generator=copy.deepcopy(generator))
    assert_close(vae.encode(video, generator), mean + std * noise, 1e-5, "fp32")
    decoded = torch.cat([theirs.decode(z[None] / 0.7).sample for z in mean.unbind(1)])
    assert_close(vae.decode(mean), decoded.clamp(-1, 1), 1e-5, "fp32")


@torch.no_grad()
def test_t5_is_transformers_t5(encoders):
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/t5")
    theirs = T5EncoderModel.from_pretrained(ROOT / "assets/t5", dtype=torch.float32).eval()

    def expected(caption):  # [tokens, E], without padding
        return theirs(tokenizer(caption, return_tensors="pt")["input_ids"]).last_hidden_state[0]

    words = "a red circle moving left "  # 16 tokens: three times, and the end
    y, mask = encoders[1].encode([words, "", words * 5] * 20)  # more than one micro-batch
    for row, caption in ((0, words), (1, ""), (2, words * 3), (59, words * 3)):
        e = expected(caption)
        assert mask[row].sum() == len(e) and y[row, len(e) :].abs().sum() == 0
        assert_close(y[row, : len(e)], e, 1e-4, "fp32; the padding's scores are -3e38")


def test_bf16_encoders_stay_within_bf16s_rounding_and_have_the_same_fingerprint(encoders):
    video, captions = random_video(2, 64, 64), ["a yellow triangle moving down"]
    vae = data.VAE("assets/vae", dtype=torch.bfloat16)
    t5 = data.T5("assets/t5", 16, dtype=torch.bfloat16)
    pairs = [(vae.encode(video), encoders[0].encode(video))]
    pairs += [(t5.encode(captions)[0], encoders[1].encode(captions)[0])]
    for found, expected in pairs:
        assert found.dtype == torch.float32 and not torch.equal(found, expected)
        # 0.4% per product, over a dozen layers
        assert ((found - expected).norm() / expected.norm()).item() < 0.05
    assert data.hash_encoders(vae, t5) == data.hash_encoders(*encoders)
