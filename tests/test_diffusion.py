"""The diffusion process against closed forms: Gaussians, for which every step is known exactly."""

import math

import pytest
import torch
from conftest import assert_close, randomize
from torch.distributions import Normal, kl_divergence

import sample as S
from data import keyed_generator
from stdit import STDiT, STDiTConfig

pytestmark = pytest.mark.quick
F64 = torch.float64
BETAS = torch.linspace(1e-4, 2e-2, 1000, dtype=F64)
ALPHAS_CUMPROD = torch.cumprod(1 - BETAS, 0)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_schedule_is_the_product_of_two_gaussians():
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_{t-1} | x_0) q(x_t | x_{t-1}): precisions add.
    Index 0, where the first is a point, by hand.
    """
    s, prev = S.TRAIN_SCHEDULE, torch.cat([torch.ones(1, dtype=F64), ALPHAS_CUMPROD[:-1]])
    found = torch.stack([s.alpha, s.sigma, s.alpha_prev, s.sigma_prev]).square()
    expected = torch.stack([ALPHAS_CUMPROD, 1 - ALPHAS_CUMPROD, prev, 1 - prev])
    assert_close(found, expected, 1e-15, "float64")
    assert_close(s.log_betas, BETAS.log(), 1e-11, "float64: 1 - a / a_prev, relative to 1e-4")
    prev, betas = prev[1:], BETAS[1:]
    precision = 1 / (1 - prev) + (1 - betas) / betas
    coef1, coef2 = s.posterior_mean_coef1, s.posterior_mean_coef2
    assert coef2[0] == 0 and abs(coef1[0] - 1) < 1e-12
    assert_close(coef1[1:], prev.sqrt() / (1 - prev) / precision, 1e-11, "float64")
    assert_close(coef2[1:], (1 - betas).sqrt() / betas / precision, 1e-11, "float64")
    assert_close(s.posterior_log_variance[1:], -precision.log(), 1e-11, "float64, relative")
    assert s.posterior_log_variance[0] == s.posterior_log_variance[1]  # IDDPM


@pytest.mark.parametrize("steps", [2, 10, 100, 1000])
def test_a_shorter_schedule_has_the_same_alphas_cumprod(steps):
    short = S.make_schedule(steps)
    assert short.timesteps.tolist() == [round(i * 999 / (steps - 1)) for i in range(steps)]
    assert_close(short.alpha**2, ALPHAS_CUMPROD[short.timesteps], 1e-15, "float64")
    product = torch.cumprod(1 - short.log_betas.exp(), 0)
    assert_close(product, short.alpha**2, 1e-12, "float64")


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_vlb_is_the_closed_form_kl(t):
    x0, noise, eps, v = (randn(2, 4, 2, 3, 3, seed=seed) for seed in range(4))
    ts = torch.tensor([t, t])
    x_t = S.q_sample(S.TRAIN_SCHEDULE, x0, ts, noise)
    loss = S.diffusion_loss(S.TRAIN_SCHEDULE, torch.cat([eps, v], 1), x0, x_t, ts, noise)
    beta, a, prev = BETAS[t], ALPHAS_CUMPROD[t], ALPHAS_CUMPROD[t - 1]
    variance = beta * (1 - prev) / (1 - a)
    coef1, coef2 = prev.sqrt() * beta / (1 - a), (1 - beta).sqrt() * (1 - prev) / (1 - a)
    x0_predicted = (x_t - (1 - a).sqrt() * eps) / a.sqrt()
    mean, predicted = (coef1 * z + coef2 * x_t for z in (x0, x0_predicted))
    std = ((v + 1) / 2 * beta.log() + (1 - v) / 2 * variance.log()).mul(0.5).exp()
    kl = kl_divergence(Normal(mean, variance.sqrt()), Normal(predicted, std))
    kl = kl.flatten(1).mean(1) / math.log(2)
    assert_close(loss["vlb"] / kl, torch.ones(2, dtype=F64), 1e-9, "float64, relative")
    assert_close(loss["mse"], (eps - noise).square().flatten(1).mean(1), 1e-12, "float64")


def test_vlb_at_t_0_is_the_likelihood_of_a_bin():
    x0 = torch.tensor([-1.0, 0.3, 1.0], dtype=F64).view(1, 3, 1, 1, 1)
    mean, log_std = torch.full_like(x0, 0.2), torch.full_like(x0, math.log(0.6))
    normal, w = Normal(torch.tensor(0.2, dtype=F64), torch.tensor(0.6, dtype=F64)), 1 / 255
    edges = torch.tensor([[-9, -1 + w], [0.3 - w, 0.3 + w], [1 - w, 9]], dtype=F64)
    expected = (normal.cdf(edges[:, 1]) - normal.cdf(edges[:, 0])).clamp(min=1e-12).log()
    found = S.discretized_gaussian_log_likelihood(x0, mean, log_std).flatten()
    assert_close(found, expected, 1e-9, "float64")


def test_vlb_trains_the_variance_channels_only():
    x0, noise = randn(2, 4, 1, 2, 2), randn(2, 4, 1, 2, 2, seed=1)
    out = randn(2, 8, 1, 2, 2, seed=2).requires_grad_()
    t = torch.tensor([0, 400])
    x_t = S.q_sample(S.TRAIN_SCHEDULE, x0, t, noise)
    loss = S.diffusion_loss(S.TRAIN_SCHEDULE, out, x0, x_t, t, noise)
    (grad,) = torch.autograd.grad(loss["vlb"].sum(), out, retain_graph=True)
    assert grad[:, :4].abs().max() == 0 and grad[:, 4:].abs().min() > 0
    (grad,) = torch.autograd.grad(loss["mse"].sum(), out)
    assert grad[:, 4:].abs().max() == 0 and grad[:, :4].abs().min() > 0


STD = 0.5  # of the Gaussian data below: x_0 ~ N(0, STD^2)


def exact_eps(schedule, x, i):
    """E[noise | x_t] for Gaussian data."""
    alphas_cumprod = schedule.alpha[i] ** 2
    return (1 - alphas_cumprod).sqrt() / (alphas_cumprod * STD**2 + 1 - alphas_cumprod) * x


def solve(step, schedule, x, indices):
    """Take these steps of a schedule with the exact noise."""
    x0, generator = None, torch.Generator().manual_seed(0)
    for i in indices:
        noise = torch.randn(x.shape, dtype=F64, generator=generator)
        eps = exact_eps(schedule, x, i)
        x0_last, x0 = x0, S.predict_x0(schedule, x, i, eps)
        options = dict(x=x, x0=x0, eps=eps, var=torch.ones_like(x), x0_last=x0_last)
        x = step(schedule, i, noise=lambda: noise, **options)
    return x


@pytest.mark.parametrize("sampler, steps", [("ddpm", 250), ("ddim", 250), ("dpm", 50)])
def test_samples_of_gaussian_data_have_its_standard_deviation(sampler, steps):
    make, step = S.SAMPLERS[sampler]
    x = solve(step, make(steps), randn(1, 4, 20, 30, 30), reversed(range(steps)))
    assert abs(x.std() / STD - 1) < 0.02  # error of the steps and of 72,000 samples


def ode_error(step, schedule, end):
    """Relative error at index `end`, or at x_0 if it is -1, after all steps of a schedule down to
    it. The exact ODE keeps x_t / std_t constant.
    """
    std = (schedule.alpha**2 * STD**2 + schedule.sigma**2).sqrt()
    x = randn(1, 4, 2, 2, 2)
    expected = x / std[-1] * (STD if end < 0 else std[end])
    x = solve(step, schedule, x, range(len(std) - 1, end, -1))
    return ((x - expected).norm() / expected.norm()).item()


def test_ddim_to_x0_is_the_exact_ode_of_a_gaussian():
    errors = [ode_error(S.ddim_step, S.make_schedule(n), -1) for n in (125, 250, 500, 1000)]
    assert errors[-1] < 5e-3, errors  # the first-order error of 1000 steps; it halves with the step
    assert all(1.7 < a / b < 2.3 for a, b in zip(errors, errors[1:])), errors


@pytest.mark.parametrize("end", [199, 399])  # not x_0, where lambda is infinite
def test_dpm_solver_is_of_second_order_and_ddim_of_first(end):
    timesteps = [torch.linspace(end, 999, n + 1, dtype=F64).round() for n in (25, 50, 100, 200)]
    schedules = [S.schedule_from_timesteps(t.long()) for t in timesteps]
    dpm, ddim = ([ode_error(f, s, 0) for s in schedules] for f in (S.dpm_step, S.ddim_step))
    assert all(3.4 < a / b < 4.8 for a, b in zip(dpm, dpm[1:])), dpm
    assert all(1.8 < a / b < 2.2 for a, b in zip(ddim, ddim[1:])), ddim
    assert dpm[-1] < 0.02 * ddim[-1]


@pytest.fixture
def model():
    torch.manual_seed(0)  # of the null caption
    sizes = dict(hidden_size=32, num_heads=4, caption_channels=24, caption_length=6)
    return randomize(STDiT(STDiTConfig(depth=1, **sizes)))


Y, MASK = randn(3, 6, 24).float(), torch.arange(6)[None] < torch.tensor([[6], [2], [4]])
KEYS, SHAPE = [("a", 1), ("b", 2), ("c", 3)], (4, 2, 4, 4)


CASES = [(4.0, False, 0), (4.0, True, 0), (1.0, False, 0), (1.0, True, 0), (4.0, False, 400)]


@pytest.mark.parametrize("guidance, v1, min_t", CASES)
@torch.no_grad()
def test_sampling_equals_two_separate_calls_per_step(model, guidance, v1, min_t):
    """Without guidance, sample_latents() makes one call of batch size B: with guidance 1, and at
    timesteps below guidance_min_t (here 333 and 0 of 999, 666, 333, 0).
    """
    batch_sizes, steps, schedule = [], 4, S.make_schedule(4).to("cpu")
    options = dict(shape=SHAPE, keys=KEYS, steps=steps, guidance=guidance, v1_guidance=v1)
    options |= dict(guidance_min_t=min_t)
    hook = model.register_forward_pre_hook(lambda _, args: batch_sizes.append(len(args[0])))
    found = S.sample_latents(model, Y, MASK, **options)
    hook.remove()
    scales = [guidance, guidance, *2 * [1.0 if min_t else guidance]]  # of the steps in order
    assert batch_sizes == [3 if scale == 1 else 6 for scale in scales]
    generators = [keyed_generator(*key) for key in KEYS]
    draws = [torch.stack([torch.randn(SHAPE, generator=g) for g in generators]) for _ in range(5)]
    x, null = draws.pop(0), model.y_embedder.y_embedding.expand(3, -1, -1)
    for i in reversed(range(steps)):
        t = schedule.timesteps[i].repeat(3)
        eps_cond, v = model(x, t, Y, MASK).chunk(2, dim=1)
        eps_uncond, _ = model(x, t, null, MASK if v1 else None).chunk(2, dim=1)
        eps = eps_uncond + scales.pop(0) * (eps_cond - eps_uncond)
        if v1:  # three guided channels, the fourth conditional
            eps[:, 3] = eps_cond[:, 3]
        x0 = S.predict_x0(schedule, x, i, eps)
        x = S.ddpm_step(schedule, i, x, x0, v, lambda: draws.pop(0))
    scale = x.abs().max()
    assert_close(found / scale, x / scale, 1e-5, "fp32 rounding over 4 steps, relative")


@pytest.mark.parametrize("sampler", list(S.SAMPLERS))
def test_a_video_does_not_depend_on_the_rest_of_its_batch(model, sampler):
    options = dict(shape=SHAPE, steps=8, guidance=3.0, sampler=sampler)
    three = S.sample_latents(model, Y, MASK, keys=KEYS, **options)
    one = S.sample_latents(model, Y[1:2], MASK[1:2], keys=KEYS[1:2], **options)
    scale = three.abs().max()
    assert_close(three[1:2] / scale, one / scale, 1e-5, "fp32 rounding over 8 steps, relative")
    assert (three[0] - three[1]).abs().max() > 0.01
