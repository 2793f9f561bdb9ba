"""The network: shapes, symmetries, and the block against its own definition written out by hand."""

from dataclasses import replace

import pytest
import torch
from conftest import assert_close, hand_attention, randomize

from stdit import MODELS, STDiT, STDiTConfig, drop_captions, spatial_embedding, temporal_embedding

TINY = STDiTConfig(depth=2, hidden_size=32, num_heads=4, caption_channels=24, caption_length=10)
FP32 = "fp32 rounding over two blocks"


def inputs(T=3, H=4, W=6, B=2, L=10, seed=1):
    torch.manual_seed(seed)
    mask = torch.arange(L)[None] < torch.tensor([[L - 4], [L - 1]])[:B]
    return torch.randn(B, 4, T, H, W), torch.tensor([17, 801])[:B], torch.randn(B, L, 24), mask


@pytest.mark.parametrize("T, H, W, patch", [
    (1, 4, 4, (1, 2, 2)), (3, 4, 6, (1, 2, 2)), (5, 3, 7, (1, 1, 1)),
    (4, 8, 2, (2, 2, 2)), (2, 4, 4, (1, 4, 1)),
])  # fmt: skip
def test_output_has_the_shape_of_the_input_and_twice_its_channels(T, H, W, patch):
    model = randomize(STDiT(replace(TINY, patch_size=patch)))
    assert model(*inputs(T, H, W)).shape == (2, 8, T, H, W)


def test_one_model_takes_any_grid():
    model = randomize(STDiT(TINY))
    for T, H, W in ((1, 2, 2), (2, 6, 4), (7, 2, 8)):
        assert model(*inputs(T, H, W)).shape == (2, 8, T, H, W)


def test_a_size_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="3x5x4 do not divide into patches of 1x2x2"):
        STDiT(TINY)(*inputs(3, 5, 4))


def test_a_new_model_predicts_zero():
    torch.manual_seed(0)
    assert STDiT(TINY)(*inputs()).abs().max() == 0  # the final layer starts at zero


def test_temporal_zero_init_makes_frames_independent():
    model = randomize(STDiT(TINY))
    x, t, y, mask = inputs()
    together = model(x, t, y, mask)
    alone = torch.cat([model(x[:, :, i : i + 1], t, y, mask) for i in range(3)], dim=2)
    assert (together - alone).abs().max() > 0.01  # a trained temporal attention does connect them
    for block in model.blocks:
        (
            torch.nn.init.zeros_(block.attn_temp.proj.weight),
            torch.nn.init.zeros_(block.attn_temp.proj.bias),
        )
    together = model(x, t, y, mask)
    alone = torch.cat([model(x[:, :, i : i + 1], t, y, mask) for i in range(3)], dim=2)
    assert_close(together, alone, 1e-5, FP32)


def test_new_blocks_start_with_zero_temporal_and_cross_attention():
    for block in STDiT(TINY).blocks:
        assert (
            block.attn_temp.proj.weight.abs().max() == block.cross_attn.proj.weight.abs().max() == 0
        )
        assert block.attn_temp.proj.bias.abs().max() == block.cross_attn.proj.bias.abs().max() == 0


@pytest.mark.parametrize("axis", ["space", "time"])
def test_permuting_tokens_permutes_the_output_only_without_positions(axis):
    x, t, y, mask = inputs(T=4)

    def shuffled(x):
        if axis == "time":
            return x[:, :, [2, 0, 3, 1]]
        order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
        return x.flatten(3)[..., order].view_as(x)

    for scale, equal in (
        (float("inf"), True),
        (1.0, False),
    ):  # index / inf: all places are one place
        config = replace(TINY, patch_size=(1, 1, 1), **{f"{axis}_scale": scale})
        model = randomize(STDiT(config))
        off = (model(shuffled(x), t, y, mask) - shuffled(model(x, t, y, mask))).abs().max()
        assert off < 1e-5 if equal else off > 0.01, off  # fp32 rounding, sums in another order


def test_padding_of_the_caption_changes_nothing():
    model = randomize(STDiT(TINY))
    x, t, y, _ = inputs(B=1)
    padded = torch.cat([y[:, :6], torch.full_like(y[:, 6:], 1e3)], dim=1)
    mask = torch.arange(10)[None] < 6
    assert_close(model(x, t, padded, mask), model(x, t, y[:, :6]), 1e-5, FP32)
    assert (model(x, t, padded, mask) - model(x, t, y)).abs().max() > 0.01


def test_null_caption_is_whole_whatever_the_prompt_was():
    null = torch.randn(10, 24)
    for L, n in ((10, 9), (10, 2), (5, 3)):
        y, mask = drop_captions(
            torch.randn(2, L, 24),
            torch.arange(L).expand(2, L) < n,
            torch.tensor([True, False]),
            null,
        )
        assert torch.equal(y[0], null) and mask[0].all()
        assert y.shape == (2, 10, 24) and mask[1].sum() == n


def test_all_1000_timesteps_stay_distinct_also_under_autocast():
    model = STDiT(TINY)
    seen = {}
    model.t_embedder.mlp[0].register_forward_pre_hook(lambda _, args: seen.update(waves=args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        model.t_embedder(torch.arange(1000))
    assert seen["waves"].dtype == torch.float32
    assert len(seen["waves"].unique(dim=0)) == 1000


def test_position_embeddings_at_hand_computed_places():
    space = spatial_embedding(2, 3, 16, 0.5, torch.device("cpu"))  # rows (h, w)
    x, y = 2 / 0.5, 1 / 0.5  # of patch h=1, w=2
    freq = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    expected = torch.cat(
        [(x * freq).sin(), (x * freq).cos(), (y * freq).sin(), (y * freq).cos()]
    ).float()
    assert_close(space[1 * 3 + 2], expected, 1e-6, "fp32 sinusoids of angles up to 4")
    time = temporal_embedding(3, 16, 1.5, torch.device("cpu"))
    freq = 10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    assert_close(
        time[2],
        torch.cat([(2 / 1.5 * freq).sin(), (2 / 1.5 * freq).cos()]).float(),
        1e-6,
        "fp32 sinusoids",
    )
    pair = spatial_embedding(2, 3, 16, (1.0, 0.5), torch.device("cpu"))
    assert torch.equal(pair[2], spatial_embedding(1, 3, 16, 0.5, torch.device("cpu"))[2])


@pytest.mark.parametrize("first", [True, False])
def test_block_equals_its_definition_written_out(first):
    """facts: space with gate; time without norm but with the same gate; caption without gate; MLP
    with gate.
    """
    block = randomize(STDiT(TINY)).blocks[0].double()
    torch.manual_seed(2)
    x, y, rows = (
        torch.randn(s, dtype=torch.float64) for s in ((1, 3, 6, 32), (1, 5, 32), (1, 6, 32))
    )
    time = torch.randn(3, 1, 32, dtype=torch.float64) if first else None
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (block.scale_shift_table + rows)[0]
    norm = lambda z: (
        (z - z.mean(-1, True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    )  # noqa: E731

    z = x.clone()
    for f in range(3):
        q, k, v = block.attn.qkv(norm(x[0, f]) * (1 + scale_a) + shift_a).chunk(3, dim=-1)
        z[0, f] += gate_a * block.attn.proj(hand_attention(q[None], k[None], v[None], 4))[0]
    z2 = z.clone()
    for s in range(6):
        a = z[0, :, s] + (time[:, 0] if first else 0)
        q, k, v = block.attn_temp.qkv(a).chunk(3, dim=-1)
        z2[0, :, s] += (
            gate_a * block.attn_temp.proj(hand_attention(q[None], k[None], v[None], 4))[0]
        )
    k, v = block.cross_attn.kv_linear(y).chunk(2, dim=-1)
    z3 = z2 + block.cross_attn.proj(
        hand_attention(block.cross_attn.q_linear(z2.flatten(1, 2)), k, v, 4)
    ).view_as(z2)  # fmt: skip
    hidden = block.mlp.fc1(norm(z3) * (1 + scale_m) + shift_m)
    gelu = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    assert_close(
        block(x, y, None, rows, time), z3 + gate_m * block.mlp.fc2(gelu), 1e-12, "float64 rounding"
    )


def test_patches_are_laid_out_with_the_channel_last():
    """A final layer that outputs its own index tells where unpatchify puts each number."""
    from stdit import unpatchify

    x = torch.arange(16.0).view(1, 1, 1, 16)  # one patch of 1x2x2 with 4 channels
    out = unpatchify(x, (1, 2, 2), 1, 1)  # [1, 4, 1, 2, 2]
    assert out[0, :, 0, 0, 0].tolist() == [0, 1, 2, 3] and out[0, 0, 0].tolist() == [
        [0, 4],
        [8, 12],
    ]


def test_every_weight_of_the_toy_preset_gets_a_gradient():
    model = randomize(STDiT(MODELS["toy"]))
    out = model(torch.randn(1, 4, 8, 8, 8), torch.tensor([3]), torch.randn(1, 16, 64))
    out.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
