"""The diffusion process against closed forms: Gaussians, for which every step is known exactly."""

import math

import pytest
import torch
from conftest import assert_close, randomize
from torch.distributions import Normal, kl_divergence

import data
import sample as S
from stdit import STDiT, STDiTConfig

F64 = torch.float64


def film(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_schedule_is_ddpms():
    beta = torch.linspace(1e-4, 2e-2, 1000, dtype=F64)
    assert_close(S.TRAINING.beta, beta, 1e-12, "float64: 1 - abar / abar_prev")
    assert_close(S.TRAINING.abar, torch.cumprod(1 - beta, 0), 1e-15, "float64")


@pytest.mark.parametrize("steps", [2, 10, 100, 1000])
def test_respaced_schedule_goes_through_the_same_abar(steps):
    short = S.make_schedule(steps)
    assert short.timesteps.tolist() == [round(i * 999 / (steps - 1)) for i in range(steps)]
    assert_close(short.abar, S.TRAINING.abar[short.timesteps], 0, "the same numbers")
    assert_close(torch.cumprod(1 - short.beta, 0), short.abar, 1e-12, "float64")


@pytest.mark.parametrize("t", [0, 300, 999])
def test_q_sample_moments(t):
    x0, noise = torch.full((1, 4, 50, 50, 50), 2.0, dtype=F64), film(1, 4, 50, 50, 50)
    x_t = S.q_sample(S.TRAINING, x0, torch.tensor([t]), noise)
    abar = S.TRAINING.abar[t].item()
    se = math.sqrt((1 - abar) / noise.numel())
    assert abs(x_t.mean() - 2 * abar**0.5) < 5 * se  # 5 standard errors
    assert abs(x_t.var() / (1 - abar) - 1) < 5 * math.sqrt(2 / noise.numel())
    assert_close(
        S.predict_x0(S.TRAINING, x_t, torch.tensor([t]), noise),
        x0,
        1e-9,
        "float64, divided by sqrt(abar) = 0.006",
    )


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_learned_variance_loss_matches_closed_form_kl(t):
    x0, noise, eps, v = (
        film(2, 4, 2, 3, 3),
        film(2, 4, 2, 3, 3, seed=1),
        film(2, 4, 2, 3, 3, seed=2),
        film(2, 4, 2, 3, 3, seed=3),
    )
    ts = torch.tensor([t, t])
    x_t = S.q_sample(S.TRAINING, x0, ts, noise)
    loss = S.diffusion_loss(S.TRAINING, torch.cat([eps, v], 1), x0, x_t, ts, noise)
    beta, abar, before = S.TRAINING.beta[t], S.TRAINING.abar[t], S.TRAINING.abar[t - 1]
    tilde = beta * (1 - before) / (1 - abar)
    mean = lambda x: (
        before.sqrt() * beta / (1 - abar) * x + (1 - beta).sqrt() * (1 - before) / (1 - abar) * x_t
    )  # noqa: E731
    guess = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
    std = ((v + 1) / 2 * beta.log() + (1 - v) / 2 * tilde.log()).mul(0.5).exp()
    kl = kl_divergence(Normal(mean(x0), tilde.sqrt()), Normal(mean(guess), std)).flatten(1).mean(
        1
    ) / math.log(2)
    assert_close(loss["vlb"] / kl, torch.ones(2, dtype=F64), 1e-9, "float64, relative")
    assert_close(loss["mse"], (eps - noise).square().flatten(1).mean(1), 1e-12, "float64")


def test_vlb_at_t_0_is_the_likelihood_of_a_bin():
    x0 = torch.tensor([-1.0, 0.3, 1.0], dtype=F64).view(1, 3, 1, 1, 1)
    mean, log_std = torch.full_like(x0, 0.2), torch.full_like(x0, math.log(0.6))
    normal, w = Normal(torch.tensor(0.2, dtype=F64), torch.tensor(0.6, dtype=F64)), 1 / 255
    edges = torch.tensor([[-9, -1 + w], [0.3 - w, 0.3 + w], [1 - w, 9]], dtype=F64)
    expected = (normal.cdf(edges[:, 1]) - normal.cdf(edges[:, 0])).clamp(min=1e-12).log()
    assert_close(
        S.discretized_log_likelihood(x0, mean, log_std).flatten(), expected, 1e-9, "float64"
    )


def test_vlb_trains_the_variance_channels_only():
    x0, noise = film(2, 4, 1, 2, 2), film(2, 4, 1, 2, 2, seed=1)
    out = film(2, 8, 1, 2, 2, seed=2).requires_grad_()
    t = torch.tensor([0, 400])
    loss = S.diffusion_loss(S.TRAINING, out, x0, S.q_sample(S.TRAINING, x0, t, noise), t, noise)
    (grad,) = torch.autograd.grad(loss["vlb"].sum(), out, retain_graph=True)
    assert grad[:, :4].abs().max() == 0 and grad[:, 4:].abs().min() > 0
    (grad,) = torch.autograd.grad(loss["mse"].sum(), out)
    assert grad[:, 4:].abs().max() == 0 and grad[:, :4].abs().min() > 0


SPREAD = 0.5  # of the Gaussian data below: x_0 ~ N(0, SPREAD^2)


def exact_eps(schedule, x, i):
    """E[noise | x_t] for Gaussian data."""
    abar = schedule.abar[i]
    return (1 - abar).sqrt() / (abar * SPREAD**2 + 1 - abar) * x


@pytest.mark.parametrize("t", [5, 200, 700])
def test_loss_of_the_best_predictor_of_gaussian_data(t):
    x0, noise = SPREAD * film(1, 4, 40, 40, 40), film(1, 4, 40, 40, 40, seed=1)
    x_t = S.q_sample(S.TRAINING, x0, torch.tensor([t]), noise)
    out = torch.cat([exact_eps(S.TRAINING, x_t, t), torch.zeros_like(x_t)], 1)
    abar = S.TRAINING.abar[t].item()
    signal = abar * SPREAD**2
    expected = signal / (signal + 1 - abar)  # the variance of the noise that x_t leaves open
    mse = S.diffusion_loss(S.TRAINING, out, x0, x_t, torch.tensor([t]), noise)["mse"].item()
    assert abs(mse / expected - 1) < 5 * math.sqrt(2 / x0.numel())  # 5 standard errors


def ddim_error(steps):
    """Distance of DDIM's end from the exact solution x_0 = x_T * std_0 / std_T of the ODE."""
    schedule = S.make_schedule(steps)
    x = start = film(1, 4, 2, 2, 2)
    for i in reversed(range(steps)):
        x = S.ddim_step(schedule, x, i, exact_eps(schedule, x, i), None, torch.zeros_like(x))
    std_T = (schedule.abar[-1] * SPREAD**2 + 1 - schedule.abar[-1]).sqrt()
    return ((x - start * SPREAD / std_T).norm() / x.norm()).item()


def test_ddim_without_noise_follows_the_exact_ode_of_a_gaussian():
    errors = [ddim_error(n) for n in (125, 250, 500, 1000)]
    assert errors[-1] < 5e-3, errors  # what is left is the first-order error of 1000 steps
    # and it halves with the step
    assert all(1.7 < a / b < 2.3 for a, b in zip(errors, errors[1:])), errors


@pytest.mark.parametrize("sampler, steps", [("ddpm", 250), ("ddim", 250), ("dpm", 50)])
def test_sampling_gaussian_data_gives_its_spread(sampler, steps):
    make, step = S.SAMPLERS[sampler]
    schedule, generator = make(steps), torch.Generator().manual_seed(0)
    x, before = film(1, 4, 20, 30, 30), None
    for i in reversed(range(steps)):
        noise = torch.randn(x.shape, dtype=F64, generator=generator)
        eps = exact_eps(schedule, x, i)
        x0 = S.predict_x0(schedule, x, torch.tensor([i]), eps)
        x, before = step(schedule, x, i, eps, torch.ones_like(x), noise, before), x0
    assert abs(x.std() / SPREAD - 1) < 0.02  # error of the steps and of 72,000 samples


def ode_error(step, steps, end):
    """Distance from the exact solution of the ODE after `steps` steps from t = 999 to t = end."""
    timesteps = torch.linspace(end, 999, steps + 1, dtype=F64).round().long()
    schedule = S.respaced(timesteps)
    x, before = film(1, 4, 2, 2, 2), None
    std = (schedule.abar * SPREAD**2 + 1 - schedule.abar).sqrt()
    expected = x * std[0] / std[-1]
    for i in range(steps, 0, -1):  # not the step at index 0, which leads to x_0
        eps = exact_eps(schedule, x, i)
        x0 = S.predict_x0(schedule, x, torch.tensor([i]), eps)
        x, before = step(schedule, x, i, eps, None, torch.zeros_like(x), before), x0
    return ((x - expected).norm() / expected.norm()).item()


def test_dpm_solver_is_of_second_order_and_ddim_of_first():
    """Twice the steps: a quarter of the error, or half of it. End times above 0, for at x_0 its
    clock, log(alpha / sigma), is infinite.
    """
    for end in (199, 399):
        dpm = [ode_error(S.dpm_step, steps, end) for steps in (25, 50, 100, 200)]
        ddim = [ode_error(S.ddim_step, steps, end) for steps in (25, 50, 100, 200)]
        assert all(3.4 < a / b < 4.8 for a, b in zip(dpm, dpm[1:])), dpm
        assert all(1.8 < a / b < 2.2 for a, b in zip(ddim, ddim[1:])), ddim
        assert dpm[-1] < 0.02 * ddim[-1]


@pytest.mark.parametrize("steps", [1, 1000])
def test_dpm_solver_refuses_steps_that_it_has_no_timesteps_for(steps):
    with pytest.raises(data.BadInput, match="expected 2 to"):
        S.dpm_schedule(steps)


def test_ddim_with_eta_1_is_ddpm_with_the_lower_variance():
    schedule, x, eps, noise = (
        S.make_schedule(50),
        film(1, 4, 2, 2, 2),
        film(1, 4, 2, 2, 2, seed=1),
        film(1, 4, 2, 2, 2, seed=2),
    )
    for i in (1, 20, 49):
        a = S.ddim_step(schedule, x, i, eps, None, noise, eta=1.0)
        b = S.ddpm_step(schedule, x, i, eps, -torch.ones_like(x), noise)
        assert_close(a, b, 1e-9, "float64")


def stand_in(x, t, y, mask):
    """A network whose answer is known: the mean of the caption's tokens that take part, in every
    channel.
    """
    mean = (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # [B, E]
    return torch.cat([x, x], 1) * 0 + mean.mean(1).view(-1, 1, 1, 1, 1) * torch.arange(1, 9).view(
        1, 8, 1, 1, 1
    )


def test_guidance_moves_all_four_channels_and_takes_the_captioned_variance():
    x = film(2, 4, 1, 2, 2)
    y = torch.cat([torch.full((2, 3, 5), 2.0), torch.full((2, 3, 5), 0.5)])  # captions, then nulls
    eps, v = S.guided(stand_in, x, torch.tensor(7), y, torch.ones(4, 3, dtype=torch.bool), 4.0)
    for c in range(4):
        assert_close(eps[:, c], torch.full_like(eps[:, c], (0.5 + 4 * 1.5) * (c + 1)), 1e-6, "fp32")
        assert_close(v[:, c], torch.full_like(v[:, c], 2.0 * (c + 5)), 1e-6, "fp32")


def test_v1s_guidance_of_three_channels_is_one_constant_away(monkeypatch):
    monkeypatch.setattr(S, "GUIDED", slice(3))
    y = torch.cat([torch.full((2, 3, 5), 2.0), torch.full((2, 3, 5), 0.5)])  # captions, then nulls
    options = torch.tensor(7), y, torch.ones(4, 3, dtype=torch.bool), 4.0
    eps, _ = S.guided(stand_in, film(2, 4, 1, 2, 2), *options)
    for c, expected in enumerate([6.5, 13.0, 19.5, 2.0 * 4]):  # the fourth: the caption's alone
        assert_close(eps[:, c], torch.full_like(eps[:, c], expected), 1e-6, "fp32")


@pytest.mark.parametrize("sampler", list(S.SAMPLERS))
def test_a_film_does_not_depend_on_the_rest_of_the_batch(sampler):
    config = STDiTConfig(
        depth=1, hidden_size=32, num_heads=4, caption_channels=24, caption_length=6
    )
    model = randomize(STDiT(config))
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    y, mask = film(3, 6, 24).float(), torch.arange(6)[None] < torch.tensor([[6], [2], [4]])
    keys = [("a", 1), ("b", 2), ("c", 3)]
    options = dict(shape=(4, 2, 4, 4), steps=8, guidance=3.0, sampler=sampler)
    three = S.sample(model, y, mask, keys=keys, **options)
    one = S.sample(model, y[1:2], mask[1:2], keys=keys[1:2], **options)
    scale = three.abs().max().item()
    assert_close(three[1:2] / scale, one / scale, 1e-5, "fp32 rounding over 8 steps, relative")
    assert (three[0] - three[1]).abs().max() > 0.01
