"""The network: shapes, symmetries, and the block against its definition written out."""

from dataclasses import replace

import pytest
import torch
from conftest import assert_close, hand_attention, randomize

import stdit
from stdit import MODELS, VARIANTS, STDiT, STDiTConfig, drop_captions, spatial_pos_embed

TINY = STDiTConfig(depth=2, hidden_size=32, num_heads=4, caption_channels=24, caption_length=10)
FP32 = "fp32 rounding over two blocks"
CPU, F64 = torch.device("cpu"), torch.float64


def inputs(T=3, H=4, W=6, B=2, L=10, seed=1):
    torch.manual_seed(seed)
    mask = torch.arange(L)[None] < torch.tensor([[L - 4], [L - 1]])[:B]
    return torch.randn(B, 4, T, H, W), torch.tensor([17, 801])[:B], torch.randn(B, L, 24), mask


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 1), (2, 2, 2), (1, 4, 1)])
def test_one_model_takes_any_grid_and_returns_twice_the_channels(patch, variant):
    model = randomize(STDiT(replace(TINY, patch_size=patch, variant=variant)))
    for t, h, w in ((1, 1, 1), (3, 2, 3), (2, 5, 1)):  # in patches
        T, H, W = t * patch[0], h * patch[1], w * patch[2]
        assert model(*inputs(T, H, W)).shape == (2, 8, T, H, W)


def test_an_unknown_variant_raises():
    with pytest.raises(ValueError, match="variant='spiral': expected one of full, sequential, "):
        STDiT(replace(TINY, variant="spiral"))


@pytest.mark.parametrize("variant", VARIANTS)
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


@pytest.mark.parametrize("variant", ["sequential", "parallel"])
def test_zero_temporal_projections_make_frames_independent(variant):
    model = randomize(STDiT(replace(TINY, variant=variant)))
    x, t, y, mask = inputs()

    def together_and_alone():
        frames = [model(x[:, :, f : f + 1], t, y, mask) for f in range(3)]
        return model(x, t, y, mask), torch.cat(frames, dim=2)

    together, alone = together_and_alone()
    assert (together - alone).abs().max() > 0.01  # random temporal attention connects frames
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn_temp.proj.weight)
        torch.nn.init.zeros_(block.attn_temp.proj.bias)
    assert_close(*together_and_alone(), 1e-5, FP32)


@pytest.mark.parametrize("axis", ["space", "time"])
def test_permuting_tokens_permutes_the_output_only_without_positions(axis):
    x, t, y, mask = inputs(T=4)

    def permuted(x):
        if axis == "time":
            return x[:, :, [2, 0, 3, 1]]
        order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
        return x.flatten(3)[..., order].view_as(x)

    for scale, equal in ((float("inf"), True), (1.0, False)):  # index / inf: one position for all
        config = replace(TINY, patch_size=(1, 1, 1), **{f"{axis}_scale": scale})
        model = randomize(STDiT(config))
        off = (model(permuted(x), t, y, mask) - permuted(model(x, t, y, mask))).abs().max()
        assert off < 1e-5 if equal else off > 0.01, off  # fp32 rounding, sums in another order


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


def test_all_1000_timesteps_stay_distinct_under_autocast():
    embedder, seen = STDiT(TINY).t_embedder, []
    embedder.mlp[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        embedder(torch.arange(1000))
    assert seen[0].dtype == torch.float32 and len(seen[0].unique(dim=0)) == 1000


def test_position_embeddings_at_hand_computed_positions():
    space = spatial_pos_embed(2, 3, 16, 0.5, CPU)  # row-major in (h, w)
    x, y = 2 / 0.5, 1 / 0.5  # of the patch h=1, w=2
    freq = 10000.0 ** -(torch.arange(4, dtype=F64) / 4)
    expected = [(x * freq).sin(), (x * freq).cos(), (y * freq).sin(), (y * freq).cos()]
    assert_close(space[1 * 3 + 2], torch.cat(expected).float(), 1e-6, "fp32, angles up to 4")
    freq = 10000.0 ** -(torch.arange(8, dtype=F64) / 8)
    expected = torch.cat([(2 / 1.5 * freq).sin(), (2 / 1.5 * freq).cos()]).float()
    assert_close(stdit.temporal_pos_embed(3, 16, 1.5, CPU)[0, 2, 0], expected, 1e-6, "fp32")
    pair = spatial_pos_embed(2, 3, 16, (1.0, 0.5), CPU)  # scales of h and w
    assert torch.equal(pair[:3], space[:3])  # where y = 0
    assert torch.equal(pair[3], spatial_pos_embed(2, 1, 16, 1.0, CPU)[1])  # where x = 0


@pytest.mark.parametrize("first", [True, False])
def test_block_equals_its_definition_written_out(first):
    """Spatial attention with gate; temporal attention without norm, with the same gate;
    cross-attention without gate; MLP with gate.
    """
    block = randomize(STDiT(TINY)).blocks[0].double()
    torch.manual_seed(2)
    x, y = torch.randn(1, 3, 6, 32, dtype=F64), torch.randn(1, 5, 32, dtype=F64)
    modulation = torch.randn(1, 6, 32, dtype=F64)
    pos = torch.randn(1, 3, 1, 32, dtype=F64) if first else 0.0
    m = (block.scale_shift_table + modulation)[0]
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = m

    def norm(z):
        return (z - z.mean(-1, True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def attention(layer, z):  # one sequence [N, D]
        return layer.proj(hand_attention(*layer.qkv(z)[None].chunk(3, dim=-1), 4))[0]

    z = norm(x) * (1 + scale_attn) + shift_attn
    space = torch.stack([attention(block.attn, z[0, f]) for f in range(3)])[None]
    x_space = x + gate_attn * space
    z = x_space + pos
    time = torch.stack([attention(block.attn_temp, z[0, :, s]) for s in range(6)], dim=1)[None]
    x_time = x_space + gate_attn * time
    k, v = block.cross_attn.kv_linear(y).chunk(2, dim=-1)
    q = block.cross_attn.q_linear(x_time.flatten(1, 2))
    x_cross = x_time + block.cross_attn.proj(hand_attention(q, k, v, 4)).view_as(x)
    hidden = block.mlp.fc1(norm(x_cross) * (1 + scale_mlp) + shift_mlp)
    gelu = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    expected = x_cross + gate_mlp * block.mlp.fc2(gelu)
    assert_close(block(x, y, None, modulation, pos), expected, 1e-12, "float64 rounding")


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 4)])
def test_patch_embedder_is_conv3d(patch):
    embedder = randomize(stdit.PatchEmbedder(replace(TINY, patch_size=patch))).double()
    x = torch.randn(2, 4, 4, 6, 8, dtype=F64)
    expected = embedder.proj(x).flatten(3).permute(0, 2, 3, 1)  # [B, T, S, D]
    assert_close(embedder(stdit.patchify(x, patch)), expected, 1e-12, "float64 rounding")


def test_the_output_has_the_channel_last_in_a_patch():
    out = stdit.unpatchify(torch.arange(16.0).view(1, 1, 1, 16), (1, 2, 2), 1, 1)  # [1, 4, 1, 2, 2]
    assert out[0, :, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert out[0, 0, 0].tolist() == [[0, 4], [8, 12]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_of_the_toy_preset_gets_a_gradient(variant):
    model = randomize(STDiT(replace(MODELS["toy"], variant=variant)))
    out = model(torch.randn(1, 4, 8, 8, 8), torch.tensor([3]), torch.randn(1, 16, 64))
    out.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
