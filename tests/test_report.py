"""The claims of Open-Sora v1's technical report that can be checked without training, a test or two
each.

Trained on the toy by benchmarks/designs.py and ablations.py: A4's ranking, A5, A7, T1. Not checked,
since it would take v1's data: T3's "1e-4 is too large", T4's large batches, D1's "data matters more
than architecture", D2's source of clips. A8's rates are counted in FLOPs.
"""

import json
import sys
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import ROOT, assert_close, randomize
from einops import rearrange

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "tools"))
import ablations
import caption
import designs
from speed import flops_per_clip

import data
import sample
import train
from stdit import BLOCKS, MODELS, STDiT, spatial_pos_embed, temporal_pos_embed
from train import PRESETS

XL, TOY = MODELS["STDiT-XL/2"], MODELS["toy"]
STAGES = [PRESETS[n] for n in ("16x256x256", "16x256x256-hq", "16x512x512", "64x512x512")]


def on_meta(config):
    with torch.device("meta"):
        return STDiT(config)


def flops(config, T, size):
    """FLOPs of a forward pass on one video of T frames."""
    return flops_per_clip(on_meta(config).requires_grad_(False), (4, T, size // 8, size // 8))


def inputs():
    """x, t, y of two small videos, in float64."""
    g, c = torch.Generator().manual_seed(0), MODELS["toy"]
    x = torch.randn(2, 4, 4, 8, 8, generator=g, dtype=torch.float64)
    y = torch.randn(2, c.caption_length, c.caption_channels, generator=g, dtype=torch.float64)
    return x, torch.tensor([10, 700]), y


def test_A1_a_minute_is_1_5_million_tokens_and_full_attention_is_out_of_reach():
    """A minute at 24 fps is 1440 frames of 1024 tokens (512 pixels / VAE 8 / patch 2, squared):
    about 1.5 million. With full attention a training step on it costs 114 times as much as with
    factorized attention: 0.8 EFLOP.
    """
    with torch.device("meta"):
        video = torch.empty(1, 4, 60 * 24, 512 // 8, 512 // 8)
        tokens = STDiT(XL).x_embedder(video)
    assert tokens.shape[1:3] == (1440, 1024) and round(tokens[..., 0].numel() / 1e6, 1) == 1.5
    sequential, full = (flops(replace(XL, variant=v), 1440, 512) for v in ("sequential", "full"))
    assert full / sequential == pytest.approx(114, rel=0.01)  # including the MLPs
    assert 0.8e18 < 3 * full < 0.9e18  # half an hour of an H100, at 40% of its 989 TFLOP/s


def test_A2_the_vae_encodes_each_frame_independently(encoders):
    vae, _ = encoders
    clip = data.draw_clip(("red", "circle", "left"), data.keyed_generator(0, "A2"))
    latents = vae.encode(clip)
    assert latents.shape == (4, 8, 8, 8)
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    assert_close(vae.encode(clip[order]), latents[:, order], 1e-5, "fp32 rounding")


def test_A3_temporal_attention_follows_spatial_attention_in_every_block():
    model, calls = randomize(STDiT(MODELS["toy"])), []
    for i, block in enumerate(model.blocks):
        for name in ("attn", "attn_temp", "cross_attn", "mlp"):
            record = lambda m, x, i=i, name=name: calls.append((i, name, *x[0].shape))  # noqa: E731
            getattr(block, name).register_forward_pre_hook(record)
    model(*(v.float() for v in inputs()))
    B, T, S, D, expected = 2, 4, 16, 128, []
    for i in range(4):
        names = ("attn", "attn_temp", "cross_attn", "mlp")
        expected += [(i, name, B, T, S, D) for name in names]
        assert model.blocks[i].attn.pattern == "(b t) s d"
        assert model.blocks[i].attn_temp.pattern == "(b s) t d"
    assert calls == expected


def test_A4_four_designs_of_different_size():
    """Parameter counts are not equalized. (That all train: test_train.py.)"""
    models = [on_meta(replace(XL, variant=v)) for v in BLOCKS]
    sequential, parallel, full, latte = (sum(p.numel() for p in m.parameters()) for m in models)
    assert full < sequential == parallel < latte


def test_A4_tables_of_designs_and_ablations_show_the_stored_results():
    """The tables of benchmarks/README.md; and the results are of the designs as they are now."""
    folder = ROOT / "benchmarks"
    text = (folder / "README.md").read_text().splitlines()
    stored = json.loads((folder / "designs.json").read_text())
    others = json.loads((folder / "ablations.json").read_text())
    tables = [designs.summary(stored["results"], "sequential")]
    tables += [designs.summary(e["results"], ablations.BASE[name]) for name, e in others.items()]
    assert len(tables) == 4
    assert [line for line in "\n".join(tables).splitlines() if line not in text] == []
    assert stored["setting"] == designs.SETTING and stored["seeds"] == list(designs.SEEDS)
    steps = stored["setting"]["steps"]
    for variant, runs in stored["results"].items():
        assert len(runs) == len(stored["seeds"]) > 1
        parameters = sum(p.numel() for p in on_meta(replace(TOY, variant=variant)).parameters())
        for run in runs:
            assert run["accuracy"][-1]["step"] == run["validation"][-1]["step"] == steps
            assert run["parameters"] == parameters


@pytest.mark.parametrize("variant", ("sequential", "parallel", "latte"))
def test_A5_at_step_0_stdit_is_the_image_model_and_latte_is_not(variant):
    """New temporal projections start at zero. Latte's design cannot keep the images, even with
    temporal blocks that start at zero: its temporal position embedding is added to the tokens.
    """
    image_model = randomize(STDiT(replace(MODELS["toy"], variant="full")))  # T = 1: an image model
    model = STDiT(replace(MODELS["toy"], variant=variant))
    found = model.load_state_dict(image_model.state_dict(), strict=False)
    assert not found.unexpected_keys and all("_temp" in name for name in found.missing_keys)
    if variant == "latte":
        for block in model.blocks:
            for layer in (block.attn_temp.proj, block.mlp_temp.fc2):
                torch.nn.init.zeros_(layer.weight)
    x, t, y = inputs()
    images = [image_model.double()(frame, t, y) for frame in x.split(1, dim=2)]
    images, video = torch.cat(images, dim=2), model.double()(x, t, y)
    if variant == "latte":
        assert (video - images).abs().max() > 0.1
    else:
        assert_close(video, images, 1e-10, "fp64 rounding")


def test_A6_the_inserted_attention_takes_580M_to_724M():
    """In units of 2^20; the report rounds PixArt-alpha's 583M to 580M."""
    sizes = {name: p.numel() for name, p in on_meta(XL).named_parameters()}
    total, inserted = sum(sizes.values()), sum(n for k, n in sizes.items() if "attn_temp" in k)
    assert (total - inserted, total) == (610_856_096, 759_620_768)
    assert (round((total - inserted) / 2**20), round(total / 2**20)) == (583, 724)


def test_A7_patches_of_two_frames_halve_tokens_and_cost():
    """Hardly more than half the FLOPs. What it does to quality: benchmarks/ablations.py."""
    two = replace(XL, patch_size=(2, 2, 2))
    with torch.device("meta"):
        tokens = [STDiT(c).x_embedder(torch.empty(1, 4, 16, 32, 32)) for c in (XL, two)]
    assert [x[..., 0].numel() for x in tokens] == [4096, 2048]
    assert 0.5 < flops(two, 16, 256) / flops(XL, 16, 256) < 0.505


def test_A8_at_64_frames_of_512_full_attention_costs_5_times_as_much():
    """The report: 25k against 5k tokens per second. In FLOPs it is 6.4 times."""
    sequential, full = (flops(replace(XL, variant=v), 64, 512) for v in ("sequential", "full"))
    tokens = 64 * 32 * 32
    assert round(sequential / tokens / 1e9, 2) == 1.49 and round(full / tokens / 1e9, 1) == 9.5
    assert full / sequential == pytest.approx(6.4, abs=0.05)


@pytest.mark.parametrize("variant", BLOCKS)
def test_A8_factorized_attention_grows_linearly_with_the_frames_full_with_their_square(variant):
    """FLOPs are a + b T + c T^2; per layer, c is 4 D S^2 in full attention, 4 D S in the others."""
    config = replace(XL, depth=2, variant=variant)
    one, two, three, four = (flops(config, T, 256) for T in (8, 16, 24, 32))
    assert one - 3 * two + 3 * three - four == 0
    S, D = 256, config.hidden_size
    c = config.depth * 4 * D * (S**2 if variant == "full" else S)
    assert (three - 2 * two + one) / (2 * 8**2) == c


def test_T1_position_embeddings_of_the_stages_agree_at_corresponding_positions():
    """Patches at the same point of 256x256 and 512x512 agree, and frames at the same time."""
    assert [(c.frames, c.size) for c in STAGES] == [(16, 256), (16, 256), (16, 512), (64, 512)]
    inits = ["out/16x256x256", "out/16x256x256-hq", "out/16x512x512"]
    assert [c.init for c in STAGES] == ["weights/PixArt-XL-2-512x512", *inits]
    sizes = [(512, 80_000), (512, 24_000), (128, 20_000), (128, 20_000)]
    assert [(c.batch_size, c.steps) for c in STAGES] == sizes
    configs, grids = [train.model_config(c) for c in STAGES], {}
    for stage, c in zip(STAGES, configs):
        h = stage.size // 16
        grid = spatial_pos_embed(h, h, c.hidden_size, c.space_scale, "cpu")
        grids[stage.size] = rearrange(grid, "(h w) d -> h w d", h=h)
    assert torch.equal(grids[256], grids[512][::2, ::2])
    short, long = (temporal_pos_embed(64, c.hidden_size, c.time_scale, "cpu") for c in configs[2:])
    # source frames 0, 6, 12, ...: every 2nd frame at stride 3, every 3rd at stride 2
    assert_close(long[:, :24:3], short[:, :16:2], 1e-6, "fp32 rounding of 3k / 1.5")
    v1 = temporal_pos_embed(64, XL.hidden_size, 2 / 3, "cpu")  # v1's scale of the last stage
    assert (v1[:, :24:3] - short[:, :16:2]).abs().max() > 1


@pytest.mark.parametrize("stage", STAGES[1:], ids=lambda c: f"{c.frames}x{c.size}")
def test_T2_every_3rd_frame_for_16_frames_every_2nd_for_64(stage, tmp_path):
    """Read from a clip whose frames show their number, in eight black or white bars."""
    bits = (torch.arange(144)[:, None] >> torch.arange(8)) & 1  # [144, 8]
    bars = (255 * bits).to(torch.uint8).repeat_interleave(8, 1)  # [144, 64]
    sample.write_video(tmp_path / "clip.mp4", bars[:, None, None].expand(-1, 3, 64, -1), 24)
    generator = data.keyed_generator(0, "T2")
    clip = data.read_frames(tmp_path / "clip.mp4", stage.frames, stage.stride, generator)
    index = ((clip[:, 0, 32, 4::8] > 128) << torch.arange(8)).sum(1)  # [T]
    assert (index.diff() == (3 if stage.frames == 16 else 2)).all()


def test_T3_the_learning_rate_is_2e_5_from_the_first_step_to_the_last():
    for c in STAGES:
        assert {train.learning_rate(c, step) for step in (0, 1, c.steps - 1)} == {2e-5}


CASES = [(torch.float16, 6e4, True), (torch.float16, 7e4, False), (torch.bfloat16, 1e15, True)]


@pytest.mark.parametrize("dtype, activation, finite", CASES)
def test_T4_fp16_overflows_above_65504_and_bf16_does_not(dtype, activation, finite):
    model = randomize(STDiT(MODELS["toy"]))
    model.blocks[0].mlp.fc1.bias.data[0] = activation
    with torch.autocast("cpu", dtype):
        assert model(*(v.float() for v in inputs())).isfinite().all() == finite


@pytest.mark.parametrize("scale, fp16, bf16", [(1.0, True, True), (1e-9, False, True)])
def test_T4_small_gradients_vanish_in_fp16_and_not_in_bf16(scale, fp16, bf16):
    """The smallest number of fp16 is 6e-8, so training in it needs a loss scaler."""
    for dtype, arrives in ((torch.float16, fp16), (torch.bfloat16, bf16)):
        model = randomize(STDiT(MODELS["toy"]))
        with torch.autocast("cpu", dtype):
            out = model(*(v.float() for v in inputs()))
        (scale * out.float()).mean().backward()
        nonzero = (model.blocks[0].attn.qkv.weight.grad != 0).float().mean()
        assert nonzero > 0.9 if arrives else nonzero == 0


def test_T5_a_run_plots_its_loss(tmp_path, monkeypatch):
    """Training loss, and validation loss in four bins of t, from the numbers in metrics.jsonl."""
    from matplotlib.axes import Axes

    for step in (1, 2):
        validation = [step + b for b in (0.1, 0.2, 0.3, 0.4)]
        train.write_metrics(tmp_path, {"step": step, "loss": 9.0, "mse": step / 2})
        train.write_metrics(tmp_path, {"step": step, "validation": validation})
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *a, **k: drawn.append(a[1:3]) or plot(*a, **k))
    train.plot_losses(tmp_path)
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    bins = ([1.1, 1.2, 1.3, 1.4], [2.1, 2.2, 2.3, 2.4])
    assert drawn == [((1, 2), (0.5, 1.0)), ((1, 2), bins)]


def test_T6_other_settings_follow_pixart_and_dit():
    """IDDPM with learned variance, 10% caption dropout, EMA, AdamW without weight decay."""
    for c in STAGES:
        assert (c.drop_caption, c.ema_decay, c.weight_decay, c.beta2) == (0.1, 0.9999, 0.0, 0.999)
        assert (c.t_std, c.min_snr, c.grad_clip) == (
            None,
            None,
            1.0,
        )  # uniform timesteps, all weights 1
        assert (c.model, c.variant, c.guidance) == ("STDiT-XL/2", "sequential", 7)
    c = STAGES[0]
    u = train.draw(torch.rand, c.seed, "drop", range(4000))
    dropped = (u < c.drop_caption).float().mean()
    assert 0.085 < dropped < 0.115  # three standard deviations of 4000 draws
    t = train.draw_timesteps(c, range(8 * c.batch_size)).float()
    assert abs(t.mean() - 499.5) < 2 and abs(t.std() - 288.7) < 2  # uniform on 0 to 999
    assert STDiT(MODELS["toy"]).final_layer.linear.out_features == 4 * 2 * 4  # patch x (eps, v) x C


def test_D3_captions_come_from_llava_given_three_frames_and_a_prompt(tmp_path, monkeypatch):
    processor = MagicMock()
    processor.batch_decode.return_value = ["A red circle moves left."]
    monkeypatch.setattr(caption, "load_llava", lambda source, device: (MagicMock(), processor))
    frames = data.draw_clip(("red", "circle", "left"), data.keyed_generator(0, "D3"))
    sample.write_video(tmp_path / "clip.mp4", frames, 8)
    assert caption.write_captions(caption.CaptionConfig(str(tmp_path))) == 1
    (message,) = processor.apply_chat_template.call_args.args[0]
    *images, text = message["content"]
    assert images == 3 * [{"type": "image"}] and text["text"] == caption.PROMPT
    (images,) = processor.call_args.kwargs["images"]
    assert len({image.tobytes() for image in images}) == 3
    assert (tmp_path / "clip.txt").read_text() == "A red circle moves left.\n"
