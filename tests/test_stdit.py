"""The network: shapes, masks and positions. Agreement with diffusers is in test_exact.py."""

from dataclasses import replace

import pytest
import torch
from conftest import assert_close, randomize

import stdit
from stdit import BLOCKS, STDiT, STDiTConfig, spatial_pos_embed
from train import drop_captions

pytestmark = pytest.mark.quick
TINY = STDiTConfig(depth=2, hidden_size=32, num_heads=4, caption_channels=24, caption_length=10)
FP32 = "fp32 rounding over two blocks"
CPU, F64 = torch.device("cpu"), torch.float64


def inputs(T=3, H=4, W=6, B=2, L=10, seed=1):
    torch.manual_seed(seed)
    mask = torch.arange(L)[None] < torch.tensor([[L - 4], [L - 1]])[:B]
    return torch.randn(B, 4, T, H, W), torch.tensor([17, 801])[:B], torch.randn(B, L, 24), mask


@pytest.mark.parametrize("variant", BLOCKS)
@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 1), (2, 2, 2), (1, 4, 1)])
def test_one_model_takes_any_grid_and_returns_twice_the_channels(patch, variant):
    model = randomize(STDiT(replace(TINY, patch_size=patch, variant=variant)))
    for t, h, w in ((1, 1, 1), (3, 2, 3), (2, 5, 1)):  # in patches
        T, H, W = t * patch[0], h * patch[1], w * patch[2]
        assert model(*inputs(T, H, W)).shape == (2, 8, T, H, W)


@pytest.mark.parametrize("variant", BLOCKS)
def test_a_new_model_predicts_zero_and_starts_as_an_image_model(variant):
    torch.manual_seed(0)
    model = STDiT(replace(TINY, variant=variant))
    assert model(*inputs()).abs().max() == 0  # the final layer starts at zero
    for block in model.blocks:
        assert not block.cross_attn.proj.weight.any() and not block.cross_attn.proj.bias.any()
        if variant in ("sequential", "parallel"):
            assert not block.attn_temp.proj.weight.any() and not block.attn_temp.proj.bias.any()
        if variant == "latte":  # its second half is a whole block, with its own MLP
            assert block.attn_temp.proj.weight.any()


def test_caption_padding_changes_nothing():
    model = randomize(STDiT(TINY))
    x, t, y, _ = inputs(B=1)
    padded = torch.cat([y[:, :6], torch.full_like(y[:, 6:], 1e3)], dim=1)
    mask = torch.arange(10)[None] < 6
    assert_close(model(x, t, padded, mask), model(x, t, y[:, :6]), 1e-5, FP32)
    assert (model(x, t, padded, mask) - model(x, t, y)).abs().max() > 0.01


@pytest.mark.parametrize("n", [9, 2])
def test_the_null_caption_has_all_its_tokens_whatever_the_length_of_the_prompt(n):
    null, y = torch.randn(10, 24), torch.randn(2, 10, 24)
    prompt_mask = (torch.arange(10) < n).expand(2, 10)
    found, mask = drop_captions(y, prompt_mask, torch.tensor([True, False]), null)
    assert torch.equal(found, torch.stack([null, y[1]]))
    assert mask[0].all() and torch.equal(mask[1], prompt_mask[1])


def test_position_embeddings_at_hand_computed_positions():
    space = spatial_pos_embed(2, 3, 16, 0.5, CPU)  # row-major in (h, w)
    x, y = 2 / 0.5, 1 / 0.5  # of the patch h=1, w=2
    freq = 10000.0 ** -(torch.arange(4, dtype=F64) / 4)
    expected = [(x * freq).sin(), (x * freq).cos(), (y * freq).sin(), (y * freq).cos()]
    assert_close(space[1 * 3 + 2], torch.cat(expected).float(), 1e-6, "fp32, angles up to 4")
    freq = 10000.0 ** -(torch.arange(8, dtype=F64) / 8)
    expected = torch.cat([(2 / 1.5 * freq).sin(), (2 / 1.5 * freq).cos()]).float()
    assert_close(stdit.temporal_pos_embed(3, 16, 1.5, CPU)[0, 2, 0], expected, 1e-6, "fp32")


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 4)])
def test_patch_embedder_is_conv3d(patch):
    embedder = randomize(stdit.PatchEmbedder(replace(TINY, patch_size=patch))).double()
    x = torch.randn(2, 4, 4, 6, 8, dtype=F64)
    expected = embedder.proj(x).flatten(3).permute(0, 2, 3, 1)  # [B, T, S, D]
    assert_close(embedder(x), expected, 1e-12, "float64 rounding")
