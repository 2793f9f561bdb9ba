"""Shared by all tests: the path to the scripts, a tiny data set, comparisons."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded

import data  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; run them with: python -m pytest -m slow")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def assert_close(found, expected, atol, cause):
    """Equal up to atol, which has this cause; a failure prints the largest difference."""
    worst = (found - expected).abs().max().item()
    assert found.shape == expected.shape and worst <= atol, (
        f"differs by up to {worst:.3g}, allowed {atol:g} ({cause})"
    )


def randomize(model, seed=0):
    """Give every weight a random value, also those that start at zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.3 if p.ndim < 2 else p[0].numel() ** -0.5
            p.copy_(torch.randn_like(p) * scale)
    return model.eval()


def hand_attention(q, k, v, heads, mask=None):
    """softmax(q k^T / sqrt(d)) v, head by head, without the keys where mask [B, M] is False.
    q [B, N, D], k and v [B, M, D] -> [B, N, D].
    """
    out = []
    for q, k, v in zip(*(z.chunk(heads, dim=-1) for z in (q, k, v))):
        scores = q @ k.mT / q.shape[-1] ** 0.5  # [B, N, M]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        out.append(scores.softmax(-1) @ v)
    return torch.cat(out, dim=-1)


@pytest.fixture(scope="session")
def encoders():
    """The toy's frozen VAE and T5, as shipped."""
    return data.VAE("assets/vae"), data.T5("assets/t5", 16)


@pytest.fixture(scope="session")
def toy(tmp_path_factory, encoders):
    """A folder with caches of the toy, "train" of 24 clips and "validation" of 96."""
    folder = tmp_path_factory.mktemp("toy")
    for split, clips in (("train", 24), ("validation", 96)):
        data.write_cache(data.Toy(split, clips), folder / split, *encoders)
    return folder
