"""Every part against an independent implementation: diffusers' networks, schedulers and VAE,
transformers' T5, torch's eager fp32.

All weights are random, biases and the temporal attention too, and nothing is downloaded. Positions
and timestep sinusoids are rounded to fp32 on both sides, also where the rest is float64.
"""

import copy
import math
import shutil
import sys

import pytest
import torch
from conftest import assert_close, hand_attention, randomize
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    LatteTransformer3DModel,
    PixArtTransformer2DModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from torch.utils.flop_counter import FlopCounterMode

import data
import sample as S
from stdit import CrossAttention, SelfAttention, STDiT, STDiTConfig, checkpoint_blocks, load_weights

F64 = torch.float64
TINY = dict(depth=2, hidden_size=32, num_heads=4, caption_channels=24, caption_length=10)
THEIRS = dict(num_attention_heads=4, attention_head_dim=8, num_layers=2, cross_attention_dim=32,
              in_channels=4, out_channels=8, patch_size=2, caption_channels=24, sample_size=16,
              attention_bias=True, activation_fn="gelu-approximate", norm_type="ada_norm_single",
              num_embeds_ada_norm=1000, norm_elementwise_affine=False, norm_eps=1e-6)  # fmt: skip
PRECISIONS = [
    (torch.float32, 1e-5, "fp32 rounding over two blocks"),
    (torch.float64, 1e-9, "float64"),
]
# Latent height and width, interpolation of diffusers, and the scale that it comes to. THEIRS was
# made for 8x8 patches: an axis of n patches is spread over them, so its scale is interpolation*n/8.
GRIDS = [
    (16, 16, 1, 1.0),  # as PixArt at 512x512
    (8, 8, 1, 0.5),  # as at 256x256
    (8, 16, 1, (0.5, 1.0)),
    (24, 4, 2, (3.0, 0.5)),  # diffusers works places out in fp32, and a third is not exact there
]


def carried_over(theirs, folder, shards="10GB", **config):
    """Our model with the weights of one of diffusers', by way of the folder that it writes."""
    theirs.save_pretrained(folder / "transformer", max_shard_size=shards)
    model = randomize(STDiT(STDiTConfig(**TINY | config)), seed=9)  # not what it is to become
    load_weights(model, folder, lambda: torch.zeros_like(model.y_embedder.y_embedding))
    return model


def inputs(T, H, W, dtype, channels=24, lengths=(10, 6, 1)):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(len(lengths), 4, T, H, W, generator=g)
    y = torch.randn(len(lengths), 10, channels, generator=g)
    mask = torch.arange(10)[None] < torch.tensor(lengths)[:, None]
    return x.to(dtype), torch.tensor([0, 17, 999])[: len(lengths)], y.to(dtype), mask


def frame_by_frame(pixart, x, t, y, mask):
    """PixArt, an image model, on each frame alone. [B, 4, T, H, W] -> [B, 8, T, H, W]."""
    options = dict(encoder_hidden_states=y, encoder_attention_mask=mask, timestep=t)
    frames = [pixart(frame, **options).sample for frame in x.unbind(2)]
    return torch.stack(frames, dim=2)


# -------------------------------------------------------------------------------- the networks


@pytest.mark.parametrize("dtype, atol, cause", PRECISIONS)
@pytest.mark.parametrize("H, W, interpolation, scale", GRIDS)
@pytest.mark.parametrize("variant, T", [("sequential", 3), ("parallel", 3), ("full", 1)])
@torch.no_grad()
def test_without_time_it_is_pixart(
    variant, T, H, W, interpolation, scale, dtype, atol, cause, tmp_path
):
    pixart = randomize(PixArtTransformer2DModel(**THEIRS, interpolation_scale=interpolation))
    model = carried_over(pixart, tmp_path, variant=variant, space_scale=scale)
    batch = inputs(T, H, W, dtype)
    found, expected = model.to(dtype)(*batch), frame_by_frame(pixart.to(dtype), *batch)
    assert expected.std() > 0.1  # there is something to compare
    if interpolation == 2:
        atol, cause = max(atol, 1e-6), "places, in fp32 there and in float64 here"
    assert_close(found, expected, atol, cause)


@torch.no_grad()
def test_at_the_width_of_xl_it_is_pixart_from_shards(tmp_path):
    wide = dict(attention_head_dim=72, num_attention_heads=16, cross_attention_dim=1152)
    pixart = randomize(PixArtTransformer2DModel(**THEIRS | wide | dict(caption_channels=4096)))
    model = carried_over(pixart, tmp_path, "100MB", hidden_size=1152, num_heads=16,
                         caption_channels=4096)  # fmt: skip
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    batch = inputs(2, 16, 16, torch.float32, channels=4096, lengths=(10, 3))
    assert_close(model(*batch), frame_by_frame(pixart, *batch), 2e-5, "fp32, sums of 4608 terms")


@pytest.mark.parametrize("dtype, atol, cause", PRECISIONS)
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("H, W, interpolation, scale", [GRIDS[0], GRIDS[2]])
@torch.no_grad()
def test_the_latte_variant_is_latte(T, H, W, interpolation, scale, dtype, atol, cause, tmp_path):
    latte = randomize(LatteTransformer3DModel(**THEIRS, video_length=T))
    model = carried_over(latte, tmp_path, variant="latte", space_scale=scale)
    x, t, y, mask = inputs(T, H, W, dtype)
    # diffusers' Latte takes a mask only as a bias, and a row of it for each frame
    bias = ((1 - mask.to(dtype)) * -10000)[:, None].repeat_interleave(T, dim=0)  # [B*T, 1, L]
    expected = latte.to(dtype)(x, t, y, encoder_attention_mask=bias).sample
    assert_close(model.to(dtype)(x, t, y, mask), expected, atol, cause)


def of_parts(pixart, temporal, variant, time_scale, x, t, y, mask):
    """The three designs that Open-Sora compared with Latte's, put together from the parts of
    diffusers' PixArt and one more of diffusers' attentions for each block.
    """
    B, _, T, H, W = x.shape
    S = (H // 2) * (W // 2)
    bias = ((1 - mask.to(x.dtype)) * -10000)[:, None]  # [B, 1, L]
    rows, embedded = pixart.adaln_single(t, None, batch_size=B, hidden_dtype=x.dtype)
    y = pixart.caption_projection(y)
    z = torch.stack([pixart.pos_embed(frame) for frame in x.unbind(2)], dim=1)  # [B, T, S, D]
    places = torch.arange(T, dtype=F64) / time_scale
    time = get_1d_sincos_pos_embed_from_grid(32, places, output_type="pt").float().to(x.dtype)
    for i, block in enumerate(pixart.transformer_blocks):
        six = (block.scale_shift_table[None] + rows.reshape(B, 6, -1))[:, :, None, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six.unbind(1)
        if variant == "full":
            z = z + time[:, None] if i == 0 else z
            normed = block.norm1(z) * (1 + scale_a) + shift_a
            z = z + gate_a * block.attn1(normed.flatten(1, 2)).view_as(z)
        else:
            normed = block.norm1(z) * (1 + scale_a) + shift_a
            space = torch.stack([block.attn1(normed[:, f]) for f in range(T)], dim=1)
            after = z + gate_a * space
            seen = after if variant == "sequential" else z
            seen = seen + time[:, None] if i == 0 else seen
            through = torch.stack([temporal[i](seen[:, :, s]) for s in range(S)], dim=2)
            z = after + gate_a * through
        flat = z.flatten(1, 2)
        z = z + block.attn2(flat, encoder_hidden_states=y, attention_mask=bias).view_as(z)
        z = z + gate_m * block.ff(block.norm2(z) * (1 + scale_m) + shift_m)
    shift, scale = (pixart.scale_shift_table[None] + embedded[:, None])[:, :, None, None].unbind(1)
    z = pixart.proj_out(pixart.norm_out(z) * (1 + scale) + shift)  # [B, T, S, 2*2*8]
    z = z.view(B, T, H // 2, W // 2, 2, 2, 8)  # b t h w ph pw c
    return z.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, 8, T, H, W)  # b c t h ph w pw


@pytest.mark.parametrize("dtype, atol, cause", PRECISIONS)
@pytest.mark.parametrize("time_scale", [1.0, 1.5])
@pytest.mark.parametrize("variant", ["full", "sequential", "parallel"])
@torch.no_grad()
def test_with_time_it_is_put_together_of_diffusers_parts(
    variant, time_scale, dtype, atol, cause, tmp_path
):
    pixart = randomize(PixArtTransformer2DModel(**THEIRS))
    temporal = [Attention(32, heads=4, dim_head=8, bias=True) for _ in range(2)]
    options = dict(variant=variant, time_scale=time_scale, space_scale=(0.5, 1.0))
    model = carried_over(pixart, tmp_path, **options)
    for i, theirs in enumerate(temporal):
        randomize(theirs, seed=i).to(dtype)
        if variant != "full":
            ours = model.blocks[i].attn_temp
            for kind in ("weight", "bias"):
                parts = [getattr(layer, kind) for layer in (theirs.to_q, theirs.to_k, theirs.to_v)]
                getattr(ours.qkv, kind).copy_(torch.cat(parts))
                getattr(ours.proj, kind).copy_(getattr(theirs.to_out[0], kind))
    batch = inputs(5, 8, 16, dtype)
    expected = of_parts(pixart.to(dtype), temporal, variant, time_scale, *batch)
    assert_close(model.to(dtype)(*batch), expected, atol, cause)


def released_names(pixart):
    """diffusers' PixArt under the names of PixArt's own file, written out here once more."""
    old = pixart.state_dict()
    new = {"x_embedder.proj": "pos_embed.proj", "t_block.1": "adaln_single.linear",
           "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
           "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
           "y_embedder.y_proj.fc1": "caption_projection.linear_1",
           "y_embedder.y_proj.fc2": "caption_projection.linear_2",
           "final_layer.linear": "proj_out"}  # fmt: skip
    for i in range(2):
        theirs = f"transformer_blocks.{i}"
        new |= {f"blocks.{i}.attn.proj": f"{theirs}.attn1.to_out.0",
                f"blocks.{i}.cross_attn.q_linear": f"{theirs}.attn2.to_q",
                f"blocks.{i}.cross_attn.proj": f"{theirs}.attn2.to_out.0",
                f"blocks.{i}.mlp.fc1": f"{theirs}.ff.net.0.proj",
                f"blocks.{i}.mlp.fc2": f"{theirs}.ff.net.2"}  # fmt: skip
    weights = {f"{n}.{k}": old[f"{o}.{k}"] for n, o in new.items() for k in ("weight", "bias")}
    for i in range(2):
        theirs = f"transformer_blocks.{i}"
        for k in ("weight", "bias"):
            q, key, v = (old[f"{theirs}.attn1.to_{part}.{k}"] for part in "qkv")
            weights[f"blocks.{i}.attn.qkv.{k}"] = torch.cat([q, key, v])
            key, v = (old[f"{theirs}.attn2.to_{part}.{k}"] for part in "kv")
            weights[f"blocks.{i}.cross_attn.kv_linear.{k}"] = torch.cat([key, v])
        weights[f"blocks.{i}.scale_shift_table"] = old[f"{theirs}.scale_shift_table"]
    weights["final_layer.scale_shift_table"] = old["scale_shift_table"]
    return weights | {"y_embedder.y_embedding": torch.randn(10, 24), "pos_embed": torch.ones(1, 3)}


@pytest.mark.parametrize("nested", ["state_dict", "ema", None])
@pytest.mark.parametrize("of_films", [False, True])
@torch.no_grad()
def test_pth_files_with_the_released_names(nested, of_films, tmp_path):
    pixart = randomize(PixArtTransformer2DModel(**THEIRS))
    weights = released_names(pixart)
    if of_films:  # Open-Sora's file: one dimension more, the temporal attention, another buffer
        weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"][:, :, None]
        weights["pos_embed_temporal"] = torch.ones(1, 16, 32)
        for i in range(2):
            parts = {"qkv": torch.randn(96, 32), "proj": torch.zeros(32, 32)}
            for part, weight in parts.items():
                weights[f"blocks.{i}.attn_temp.{part}.weight"] = weight
                weights[f"blocks.{i}.attn_temp.{part}.bias"] = torch.zeros(len(weight))
    torch.save({nested: weights, "epoch": 3} if nested else weights, tmp_path / "weights.pth")
    model = randomize(STDiT(STDiTConfig(**TINY)), seed=9)
    new = load_weights(model, tmp_path / "weights.pth")
    assert len(new) == (0 if of_films else 8) and all("attn_temp" in name for name in new)
    assert torch.equal(model.y_embedder.y_embedding, weights["y_embedder.y_embedding"])
    if of_films:
        name = "blocks.1.attn_temp.qkv.weight"
        assert torch.equal(model.state_dict()[name], weights[name])
    batch = inputs(3, 16, 16, torch.float32)
    assert_close(model(*batch), frame_by_frame(pixart, *batch), 2e-5, "fp32 over two blocks")


# ------------------------------------------------------------------------ parts of the network


@pytest.mark.parametrize("cross", [False, True])
def test_attention_and_its_gradient_against_an_explicit_softmax(cross):
    layer = randomize(CrossAttention(32, 4) if cross else SelfAttention(32, 4)).double()
    torch.manual_seed(1)
    x = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5)[None] < torch.tensor([[5], [3]]) if cross else None
    if cross:
        k, v = layer.kv_linear(y).chunk(2, dim=-1)
        q, found = layer.q_linear(x), layer(x, y, mask)
    else:
        q, k, v = layer.qkv(x).chunk(3, dim=-1)
        found = layer(x)
    expected = layer.proj(hand_attention(q, k, v, 4, mask))
    assert_close(found, expected, 1e-12, "float64 rounding")
    leaves = [x, *layer.parameters()] + [y] * cross
    direction = torch.randn_like(found)
    grads = (torch.autograd.grad(out, leaves, direction) for out in (found, expected))
    for ours, theirs in zip(*grads):
        assert_close(ours, theirs, 1e-11, "float64 rounding, sums of 14 terms")


def loss_and_gradients(model, batch):
    loss = model(*batch).float().square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.stack([loss, *(g.double().norm() for g in grads)]).double(), grads


@pytest.mark.parametrize("variant", ["full", "sequential", "parallel", "latte"])
def test_gradient_checkpointing_changes_no_number(variant):
    model = randomize(STDiT(STDiTConfig(**TINY, variant=variant)))
    batch = inputs(3, 4, 6, torch.float32)
    _, expected = loss_and_gradients(model, batch)
    kept = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: kept.append(1))
    checkpoint_blocks(model)
    _, found = loss_and_gradients(model, batch)
    assert len(kept) == 2  # it did run twice, forward and again
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_kept_products_are_not_computed_twice():
    """FLOPs of forward and backward, counted: recomputed blocks add a forward pass, a third; where
    products are kept, nothing is added.
    """
    flops, found = {}, {}
    for name, options in (("none", None), ("all", {}), ("but", {"keep_products": True})):
        model = randomize(STDiT(STDiTConfig(**TINY)))
        if options is not None:
            checkpoint_blocks(model, **options)
        with FlopCounterMode(display=False) as counter:
            _, found[name] = loss_and_gradients(model, inputs(3, 4, 6, torch.float32))
        flops[name] = counter.get_total_flops()
    assert all(torch.equal(a, b) for a, b in zip(found["none"], found["but"]))
    assert flops["none"] == flops["but"] and 1.2 < flops["all"] / flops["none"] < 1.34


compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(not compiler or sys.platform == "win32", reason="no C++ compiler here")
def test_a_compiled_block_gives_the_numbers_of_eager_fp32():
    model = randomize(STDiT(STDiTConfig(**TINY | dict(depth=1))))  # half a minute a block
    batch = inputs(3, 4, 6, torch.float32)
    expected, _ = loss_and_gradients(model, batch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in model.blocks:
        block.compile()
    found, _ = loss_and_gradients(model, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # in one piece
    assert_close(found / expected, torch.ones_like(found), 1e-4, "fp32, fused in another order")


@pytest.mark.parametrize("variant", ["full", "sequential", "parallel", "latte"])
def test_autocast_stays_within_bf16s_rounding_of_eager_fp32(variant):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = randomize(STDiT(STDiTConfig(**TINY, variant=variant))).to(device)
    batch = [v.to(device) for v in inputs(3, 4, 6, torch.float32)]
    expected, _ = loss_and_gradients(model, batch)
    with torch.autocast(device, torch.bfloat16):
        found, _ = loss_and_gradients(model, batch)
    assert not torch.equal(found, expected)  # bf16 was at work
    # bf16 keeps 8 bits: 0.4% a product, in some dozens of products one after the other
    assert_close(found / expected, torch.ones_like(found), 0.03, "bf16")


# ------------------------------------------------------------------------ the diffusion process

def exactly(scheduler_class, **options):
    """One of diffusers' schedulers, its tables in float64."""
    scheduler = scheduler_class(
        beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", num_train_timesteps=1000, **options
    )
    beta = torch.linspace(1e-4, 2e-2, 1000, dtype=F64)
    assert_close(scheduler.betas.double(), beta, 1e-8, "diffusers' fp32")
    scheduler.alphas_cumprod = torch.cumprod(1 - beta, dim=0)
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=F64)
    return scheduler


def film(channels=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, 2, 3, 3, dtype=F64, generator=g)


def test_q_sample_is_add_noise():
    scheduler, t = exactly(DDPMScheduler), torch.tensor([0, 613])
    assert_close(S.q_sample(S.TRAINING, film(), t, film(seed=1)),
                 scheduler.add_noise(film(), film(seed=1), t), 1e-9, "float64")  # fmt: skip


@pytest.mark.parametrize("steps", [7, 100, 1000])
def test_ancestral_steps_and_learned_variance_are_ddpm_schedulers(steps):
    schedule = S.make_schedule(steps)
    scheduler = exactly(DDPMScheduler, variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(timesteps=schedule.timesteps.flip(0).tolist())
    for i in {0, 1, 2, steps // 2, steps - 1}:
        t, x, out = schedule.timesteps[i], film(seed=i), film(8, seed=i + 1)
        eps, v = out.chunk(2, dim=1)
        if i > 0:  # at 0 diffusers has its own floor for log 0, and neither uses it in a step
            found = S.log_variance(schedule, v, torch.tensor([i, i]))
            expected = scheduler._get_variance(t, predicted_variance=v)
            assert_close(found, expected, 1e-9, "float64")
        noise = torch.randn(eps.shape, dtype=F64, generator=torch.Generator().manual_seed(i))
        expected = scheduler.step(out, t, x, generator=torch.Generator().manual_seed(i))
        found = S.ddpm_step(schedule, x, i, eps, v, noise)
        assert_close(found, expected.prev_sample, 1e-9, "float64")
        x0 = S.predict_x0(schedule, x, torch.tensor([i, i]), eps)
        assert_close(x0, expected.pred_original_sample, 1e-9, "float64")


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("steps", [10, 100])
def test_ddim_steps_are_ddim_schedulers(steps, eta):
    scheduler = exactly(DDIMScheduler, clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    schedule = S.respaced(scheduler.timesteps.flip(0))
    for i in (0, 1, steps // 2, steps - 1):
        x, eps, noise = film(seed=1), film(seed=2), film(seed=3)
        expected = scheduler.step(
            eps, schedule.timesteps[i], x, eta=eta, variance_noise=noise
        ).prev_sample
        found = S.ddim_step(schedule, x, i, eps, None, noise, eta=eta)
        assert_close(found, expected, 1e-9, "float64")


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_dpm_solver_steps_are_dpm_solver_multistep_schedulers(steps):
    scheduler = exactly(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++", solver_order=2)
    scheduler.set_timesteps(steps)
    schedule = S.dpm_schedule(steps)
    assert torch.equal(schedule.timesteps, scheduler.timesteps.flip(0))
    sigma = ((1 - schedule.abar) / schedule.abar).sqrt().flip(0)
    scheduler.sigmas = torch.cat([sigma, torch.zeros(1, dtype=F64)])  # in float64
    x = film()
    x0_before = None
    for i in reversed(range(steps)):
        eps = torch.tanh(x * (1 + i / steps))  # some function of x and t
        scheduler._step_index = steps - 1 - i
        x0 = scheduler.convert_model_output(eps, sample=x)
        found = S.dpm_step(schedule, x, i, eps, None, None, x0_before)
        # its parts in float64, for its step() goes through fp32 ...
        if i in (0, steps - 1):
            expected = scheduler.dpm_solver_first_order_update(x0, sample=x)
        else:
            expected = scheduler.multistep_dpm_solver_second_order_update([x0_before, x0], sample=x)
        assert_close(found, expected, 1e-9, "float64")
        # ... and the whole of it, which decides on the order itself
        expected = scheduler.step(eps, schedule.timesteps[i], x).prev_sample
        assert_close(found, expected.double(), 1e-4, "diffusers' fp32, x_0 of up to 500")
        x, x0_before = found, x0


@pytest.mark.parametrize("steps, i", [(1000, 1), (1000, 500), (50, 1), (50, 49)])
def test_vlb_is_the_numerical_integral_of_the_kl(steps, i):
    """Of q(x_{t-1} | x_t, x_0) against the model's Gaussian, for one latent value, on a grid."""
    schedule, t = S.make_schedule(steps), torch.tensor([i])
    values = (0.4, -0.7, 0.9, 0.3)
    x0, x_t, eps, v = (torch.full((1, 1, 1, 1, 1), value, dtype=F64) for value in values)
    scheduler = exactly(DDPMScheduler, variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(timesteps=schedule.timesteps.flip(0).tolist())
    # the model's Gaussian, from diffusers: its mean is a step less the step's noise
    out, told = torch.cat([eps, v], 1), schedule.timesteps[i]
    log_var = scheduler._get_variance(told, predicted_variance=v).flatten()
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(1, dtype=F64, generator=copy.deepcopy(g))
    mean = scheduler.step(out, told, x_t, generator=g).prev_sample.flatten()
    mean = mean - noise * (log_var / 2).exp()
    # the true one, up to a factor, is q(x_{t-1} | x_0) q(x_t | x_{t-1}), a product of two Gaussians
    # in x_{t-1}; the grid lies around its top, and its value there is divided off
    before, beta = schedule.abar_prev[i], schedule.beta[i]
    precision = 1 / (1 - before) + (1 - beta) / beta
    top = (before.sqrt() * 0.4 / (1 - before) - (1 - beta).sqrt() * 0.7 / beta) / precision
    grid = top + torch.linspace(-14, 14, 20001, dtype=F64) / precision.sqrt()
    q = torch.exp(-((grid - before.sqrt() * 0.4) ** 2 / (1 - before)
                    + (-0.7 - (1 - beta).sqrt() * grid) ** 2 / beta) / 2
                  + (before.sqrt() * 0.4 - top) ** 2 / (1 - before) / 2
                  + (-0.7 - (1 - beta).sqrt() * top) ** 2 / beta / 2)  # fmt: skip
    q = q / torch.trapezoid(q, grid)
    log_p = -((grid - mean) ** 2) / log_var.exp() / 2 - (log_var + math.log(2 * math.pi)) / 2
    kl = torch.trapezoid(torch.special.xlogy(q, q) - q * log_p, grid) / math.log(2)
    loss = S.diffusion_loss(schedule, out, x0, x_t, t, torch.zeros_like(x0))
    assert_close(loss["vlb"] / kl, torch.ones(1, dtype=F64), 1e-9, "float64, relative")


def test_vlb_at_t_0_is_the_numerical_integral_over_a_bin():
    x0 = torch.tensor([-0.2, 0.1, 0.7], dtype=F64).view(1, 3, 1, 1, 1)
    x_t, eps, v = x0 + 0.004, torch.full_like(x0, -0.3), torch.full_like(x0, 0.6)
    scheduler = exactly(DDPMScheduler, clip_sample=False)
    mean = scheduler.step(eps, 0, x_t).prev_sample
    abar = scheduler.alphas_cumprod[:2]
    low = torch.log((1 - abar[1] / abar[0]) * (1 - abar[0]) / (1 - abar[1]))  # beta-tilde at 1
    log_var = 0.8 * torch.log(1 - abar[0]) + 0.2 * low
    grid = x0.flatten()[:, None] + torch.linspace(-1, 1, 20001, dtype=F64) / 255  # [3, 20001]
    density = torch.exp(-((grid - mean.flatten()[:, None]) ** 2) / (2 * log_var.exp()))
    mass = torch.trapezoid(density, grid) / (2 * torch.pi * log_var.exp()).sqrt()
    loss = S.diffusion_loss(S.TRAINING, torch.cat([eps, v], 1), x0, x_t, torch.tensor([0]), eps)
    assert_close(loss["vlb"], -mass.log2().mean()[None], 1e-9, "trapezoids of width 4e-7")


# ------------------------------------------------------------------------ the frozen encoders


def test_vae_wrapper_is_diffusers_vae_frame_by_frame(encoders):
    vae = encoders[0]
    theirs = AutoencoderKL.from_pretrained(data.ASSETS / "vae", low_cpu_mem_usage=False)
    video = torch.rand(2, 3, 5, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    frames = [theirs.encode(video[:, :, f]).latent_dist for f in range(5)]
    mean = torch.stack([f.mode() for f in frames], dim=2) * theirs.config.scaling_factor
    assert_close(vae.encode(video), mean, 1e-5, "fp32, convolutions of another batch size")
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    noise = torch.stack([torch.randn(4, 5, 8, 6, generator=g) for g in copy.deepcopy(generators)])
    std = torch.stack([f.std for f in frames], dim=2) * theirs.config.scaling_factor
    assert_close(vae.encode(video, generators), mean + std * noise, 1e-5, "fp32")
    latents = (mean / theirs.config.scaling_factor).unbind(2)
    decoded = torch.stack([theirs.decode(z).sample for z in latents], dim=2)
    assert_close(vae.decode(mean), decoded.clamp(-1, 1), 1e-5, "fp32")


def test_micro_batches_of_any_size_give_the_same_latents(encoders):
    video = torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    results = []
    for size in (1, 3, 8):
        vae = data.VAE("assets/vae", micro_batch=size)
        latents = vae.encode(video, [torch.Generator().manual_seed(s) for s in (1, 2)])
        results.append((latents, vae.decode(latents)))
    for latents, frames in results[1:]:
        assert_close(latents, results[0][0], 1e-5, "fp32, convolutions of another batch size")
        assert_close(frames, results[0][1], 1e-5, "fp32")


def test_t5_wrapper_is_transformers_t5(encoders):
    from transformers import AutoTokenizer, T5EncoderModel

    captions = ["a red circle moving left", "a square"] * 20  # more than one micro-batch
    y, mask = encoders[1].encode(captions)
    tokenizer = AutoTokenizer.from_pretrained(data.ASSETS / "t5")
    theirs = T5EncoderModel.from_pretrained(data.ASSETS / "t5", dtype=torch.float32).eval()
    for row in (0, 1, 39):
        ids = tokenizer(captions[row], return_tensors="pt")["input_ids"]  # no padding at all
        with torch.no_grad():
            expected = theirs(ids).last_hidden_state[0]
        assert mask[row].sum() == ids.shape[1] and y[row, ids.shape[1] :].abs().sum() == 0
        assert_close(y[row, : ids.shape[1]], expected, 1e-4, "fp32; the padding's scores are -3e38")


def test_bf16_encoders_stay_within_bf16s_rounding(encoders):
    video = torch.rand(1, 3, 2, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captions = ["a yellow triangle moving down"]
    vae = data.VAE("assets/vae", dtype=torch.bfloat16)
    t5 = data.T5("assets/t5", 16, dtype=torch.bfloat16)
    for found, expected in ((vae.encode(video), encoders[0].encode(video)),
                            (t5.encode(captions)[0], encoders[1].encode(captions)[0])):  # fmt: skip
        assert found.dtype == torch.float32 and not torch.equal(found, expected)
        # 0.4% a product, over a dozen layers
        assert ((found - expected).norm() / expected.norm()).item() < 0.05
    assert vae.fingerprint == encoders[0].fingerprint and t5.fingerprint == encoders[1].fingerprint
