"""The claims of Open-Sora v1's technical report, a test or two each, as far as they can be checked.

A4's ranking and three experiments that the report only mentions (A5, A7, T1) are trained on the toy
by benchmarks/designs.py and ablations.py; here stands what needs no training. Not checked, for it
would take v1's data: T3's "1e-4 is too large", T4's large batches, D1's "data matters more than
architecture"; and D2, where clips come from. A8's rates are counted in FLOPs.
"""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, assert_close, encode, randomize
from einops import rearrange
from torch.utils.flop_counter import FlopCounterMode

import data
import train
from stdit import MODELS, STDiT, load_weights, spatial_embedding, temporal_embedding
from train import PRESETS

XL, FP64 = MODELS["STDiT-XL/2"], "fp64 rounding, other orders of summation"
STAGES = [PRESETS[n] for n in ("16x256x256", "16x256x256-hq", "16x512x512", "64x512x512")]


def flops(config, T, size):
    """FLOPs of a forward pass on one film of T frames, counted by torch without content."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        y = torch.empty(1, config.caption_length, config.caption_channels)
        STDiT(config)(torch.empty(1, 4, T, size // 8, size // 8), torch.zeros(1), y)
    return counter.get_total_flops()


def inputs(T=4, seed=0):
    """x, t, y of two small films, in float64."""
    g, c = torch.Generator().manual_seed(seed), MODELS["toy"]
    x = torch.randn(2, 4, T, 8, 8, generator=g, dtype=torch.float64)
    y = torch.randn(2, c.caption_length, c.caption_channels, generator=g, dtype=torch.float64)
    return x, torch.tensor([10, 700]), y


def frame_by_frame(model, x, t, y):
    return torch.cat([model(x[:, :, i : i + 1], t, y) for i in range(x.shape[2])], dim=2)


# ---------------------------------------------------------------------------------------------
# Architecture


def test_A1_a_minute_is_1_5_million_tokens_and_full_attention_is_out_of_reach():
    """A minute at 24 fps is 1440 frames of 1024 tokens (512 pixels / VAE 8 / patch 2, squared):
    about 1.5 million. A token of full attention looks at 600 times as many others, and one training
    step on that minute costs 114 times as much as with factorized attention: 0.8 EFLOP.
    """
    frames = 60 * 24
    with torch.device("meta"):
        film = torch.empty(1, 4, frames, 512 // 8, 512 // 8)
        tokens = STDiT(replace(XL, depth=1)).x_embedder(film)
    assert tokens.shape[1:3] == (1440, 1024) and round(tokens[0, :, :, 0].numel() / 1e6, 1) == 1.5
    sequential, full = (flops(replace(XL, variant=v), frames, 512) for v in ("sequential", "full"))
    assert full / sequential == pytest.approx(114, rel=0.01)  # with the MLPs and all
    assert 0.8e18 < 3 * full < 0.9e18  # half an hour of an H100, at 40% of its 989 TFLOP/s


def test_A2_the_vae_sees_each_frame_alone(encoders):
    """The VAE is one of images, applied frame by frame: nothing is compressed or mixed in time."""
    vae, _ = encoders
    film = data.draw_clip(("red", "circle", "left"), data.keyed_generator(0, "A2"))
    video = film.transpose(0, 1)[None].float() / 127.5 - 1  # [1, 3, T, H, W]
    latents = vae.encode(video)
    assert latents.shape == (1, 4, 8, 8, 8)
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    assert_close(vae.encode(video[:, :, order]), latents[:, :, order], 1e-5, "fp32 rounding")


def test_A3_the_temporal_attention_follows_the_spatial_one_in_every_block():
    """STDiT: a temporal self-attention right after each spatial self-attention."""
    model, calls = randomize(STDiT(MODELS["toy"])), []
    for i, block in enumerate(model.blocks):
        for name in ("attn", "attn_temp", "cross_attn", "mlp"):
            record = lambda m, x, i=i, name=name: calls.append((i, name, *x[0].shape))  # noqa: E731
            getattr(block, name).register_forward_pre_hook(record)
    x, t, y = (v.float() for v in inputs())
    model(x, t, y)
    B, T, S, D = 2, 4, 16, 128
    assert calls == [
        call for i in range(4) for call in (
            (i, "attn", B * T, S, D),  # every frame is a sequence of its patches
            (i, "attn_temp", B * S, T, D),  # every patch is a sequence of its frames
            (i, "cross_attn", B, T * S, D), (i, "mlp", B, T, S, D))
    ]  # fmt: skip


def test_A4_four_designs_of_different_size():
    """Full, sequential, parallel and Latte are compared with parameter counts as they come. (That
    all four train is tested in test_train.py and test_weights.py.)
    """
    count = {}
    for variant in ("full", "sequential", "parallel", "latte"):
        with torch.device("meta"):
            model = STDiT(replace(XL, variant=variant))
        count[variant] = sum(p.numel() for p in model.parameters())
    assert count["full"] < count["sequential"] == count["parallel"] < count["latte"]
    x, t, y = inputs()
    sequential = randomize(STDiT(MODELS["toy"])).double()
    parallel = STDiT(replace(MODELS["toy"], variant="parallel")).double()
    parallel.load_state_dict(sequential.state_dict())  # the same weights, another function
    assert (sequential(x, t, y) - parallel(x, t, y)).abs().max() > 0.01


def test_A4_and_the_ablations_tables_are_those_of_the_stored_results(monkeypatch):
    """What benchmarks/README.md says of them; and they are of the designs as they are now."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import ablations
    import designs

    text = (ROOT / "benchmarks/README.md").read_text()
    stored = json.loads((ROOT / "benchmarks/designs.json").read_text())
    tables = [designs.summary(stored["results"], "sequential")]
    for name, experiment in json.loads((ROOT / "benchmarks/ablations.json").read_text()).items():
        tables.append(designs.summary(experiment["results"], ablations.BASE[name]))
    assert len(tables) == 4
    for line in "\n".join(tables).splitlines():
        assert line in text
    for variant, runs in stored["results"].items():
        assert len(runs) == len(stored["seeds"]) == 3
        config = replace(PRESETS["toy"], variant=variant, **stored["setting"])
        steps = stored["setting"]["steps"]
        for run in runs:
            assert run["films"][-1]["step"] == run["held_out"][-1]["step"] == steps
            assert run["films"][-1]["tflop"] == pytest.approx(designs.tflop_until(config, steps))


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    "designs.py", "ablations.py zero", "ablations.py patches", "ablations.py progressive", "cost.py"
])  # fmt: skip
def test_the_benchmarks_run(command, tmp_path):
    """As far as it can be seen in a minute or two each:

    python -m pytest -m slow tests/test_report.py
    """
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    script, *words = command.split()
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / script, *words, "--quick"],
                          cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) > 5  # tables


def test_A5_at_step_0_stdit_is_the_image_model_and_latte_is_not(tmp_path):
    """The inserted temporal projections start at zero, so the first film is the image model's
    pictures. Latte's design can't keep that, even if all of its temporal blocks begin with zeros:
    its temporal embedding is added to the tokens.
    """
    pictures = randomize(STDiT(replace(MODELS["toy"], variant="full")))  # at T = 1 an image model
    pictures.save_pretrained(tmp_path)
    x, t, y = inputs()
    expected = frame_by_frame(pictures.double(), x, t, y)
    for variant in ("sequential", "parallel", "latte"):
        model = randomize(STDiT(replace(MODELS["toy"], variant=variant)))
        assert load_weights(model, tmp_path)  # some are new: the temporal ones
        if variant == "latte":
            for block in model.blocks:
                for layer in (block.attn_temp.proj, block.mlp_temp.fc2):
                    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        film = model.double()(x, t, y)
        if variant == "latte":
            assert (film - expected).abs().max() > 0.1
        else:
            assert_close(film, expected, 1e-10, FP64)


def test_A6_the_inserted_attention_takes_580M_to_724M():
    """In units of 2^20: PixArt-alpha's 610,856,096 parameters are 583M, which the report rounds to
    580M; STDiT's are 724M.
    """
    with torch.device("meta"):
        model = STDiT(XL)
    whole = sum(p.numel() for p in model.parameters())
    inserted = sum(p.numel() for name, p in model.named_parameters() if "attn_temp" in name)
    assert (whole - inserted, whole) == (610_856_096, 759_620_768)
    assert (round((whole - inserted) / 2**20), round(whole / 2**20)) == (583, 724)


def test_A7_patches_of_two_frames_halve_tokens_and_cost():
    """A (2, 2, 2) patch: half the tokens, and hardly more than half the FLOPs: keys and values of
    the caption and the timestep's rows stay. (What becomes of films is benchmarks/ablations.py's to
    say.)
    """
    two = replace(XL, patch_size=(2, 2, 2))
    with torch.device("meta"):
        film = torch.empty(1, 4, 16, 32, 32)
        counts = [STDiT(replace(c, depth=1)).x_embedder(film)[..., 0].numel() for c in (XL, two)]
    assert counts == [4096, 2048]
    assert 0.5 < flops(two, 16, 256) / flops(XL, 16, 256) < 0.505


def test_A8_at_64_frames_of_512_full_attention_costs_5_times_as_much():
    """25k against 5k tokens a second at 64x512x512. In FLOPs it is 6.4 times: 9.5 GFLOP a token,
    not 1.49.
    """
    sequential, full = (flops(replace(XL, variant=v), 64, 512) for v in ("sequential", "full"))
    tokens = 64 * 32 * 32
    assert round(sequential / tokens / 1e9, 2) == 1.49 and round(full / tokens / 1e9, 1) == 9.5
    assert full / sequential == pytest.approx(6.4, abs=0.05)


@pytest.mark.parametrize("variant", ("full", "sequential", "parallel", "latte"))
def test_A8_factorized_attention_grows_with_the_frames_full_with_their_square(variant):
    """FLOPs as a function of T are a + b T + c T^2, exactly. c, of a layer: 4 D S^2 for full
    attention, 4 D S for the others (each patch sees T frames): S = 256 times less.
    """
    config = replace(XL, depth=2, variant=variant)
    one, two, three, four = (flops(config, T, 256) for T in (8, 16, 24, 32))
    assert one - 3 * two + 3 * three - four == 0
    c = (three - 2 * two + one) / (2 * 8**2)
    S, D = 256, config.hidden_size
    assert c == config.depth * 4 * D * (S**2 if variant == "full" else S)


# ---------------------------------------------------------------------------------------------
# Training


def test_T1_positions_of_the_stages_agree_at_corresponding_places():
    """Each stage rescales position embeddings: the patch that is at a place in 256x256 has the
    embedding of the patch that is there in 512x512; a frame that of the frame of its moment.
    """
    assert [(c.frames, c.size) for c in STAGES] == [(16, 256), (16, 256), (16, 512), (64, 512)]
    assert [c.init for c in STAGES[1:]] == [c.out for c in STAGES[:-1]]  # each from the one before
    assert [c.batch_size for c in STAGES] == [512, 512, 128, 128]
    assert [c.steps for c in STAGES] == [80_000, 24_000, 20_000, 20_000]
    D = XL.hidden_size
    grids = {}
    for c in STAGES:
        h = c.size // 16
        grid = spatial_embedding(h, h, D, c.space_scale, "cpu")
        grids[c.size] = rearrange(grid, "(h w) d -> h w d", h=h)
    assert torch.equal(grids[256], grids[512][::2, ::2])
    short, long = (temporal_embedding(c.frames, D, c.time_scale, "cpu") for c in STAGES[2:])
    # source frames 0, 6, 12, ...: every 2nd of those at stride 3, every 3rd of those at stride 2
    assert_close(long[: 3 * 8 : 3], short[::2], 1e-6, "fp32 rounding of 3k / 1.5")
    v1 = temporal_embedding(64, D, 2 / 3, "cpu")  # as v1 has it
    assert (v1[: 3 * 8 : 3] - short[::2]).abs().max() > 1


@pytest.mark.parametrize("stage", STAGES, ids=lambda c: f"{c.frames}x{c.size}")
def test_T2_every_3rd_frame_for_16_frames_every_2nd_for_64(stage, tmp_path):
    """In a clip whose frames show their number, as eight black or white bars, the numbers that are
    read are that far apart.
    """
    bits = (torch.arange(144)[:, None] >> torch.arange(8)) & 1  # [144, 8]
    bars = (255 * bits).to(torch.uint8).repeat_interleave(8, 1)  # [144, 64]
    film = bars[:, None, None].expand(-1, 3, 64, -1)  # [144, 3, 64, 64]
    path = encode(tmp_path / "clip.mp4", film)
    clip = data.read_frames(path, stage.frames, stage.stride, data.keyed_generator(0, "T2"))
    seen = clip[:, 0, 32, 4::8] > 128  # [T, 8]
    index = (seen << torch.arange(8)).sum(1)  # [T]
    assert (index.diff() == (3 if stage.frames == 16 else 2)).all()


def test_T3_the_learning_rate_is_2e_5_from_the_first_step_to_the_last():
    """1e-4 is too large; 2e-5 is used. (That it is too large would take v1's data to show.)"""
    for c in STAGES:
        rates = {train.learning_rate(c, step) for step in (0, 1, c.steps // 2, c.steps - 1)}
        assert rates == {2e-5}


def overflow(dtype, largest):
    """Whether the toy's output has numbers that are not finite when the largest number inside its
    first MLP is `largest`, with matrix products in a dtype.
    """
    model, seen = randomize(STDiT(MODELS["toy"])), []
    x, t, y = (v.float() for v in inputs())
    hook = model.blocks[0].mlp.fc1.register_forward_hook(lambda m, x, out: seen.append(out))
    model(x, t, y)
    hook.remove()
    with torch.no_grad():
        for p in model.blocks[0].mlp.fc1.parameters():
            p.mul_(largest / seen[0].abs().max())
    with torch.autocast("cpu", dtype):
        return not model(x, t, y).isfinite().all()


def test_T4_fp16_fails_above_65504_and_bf16_does_not():
    """fp16 is less stable than bf16: its largest number is 65,504. An activation of 60,000 passes
    in both; of 70,000 the output is no number in fp16. bf16 has the range of fp32.
    """
    assert not overflow(torch.float16, 60_000) and overflow(torch.float16, 70_000)
    assert not overflow(torch.bfloat16, 70_000) and not overflow(torch.bfloat16, 1e15)


def test_T4_gradients_vanish_in_fp16_and_not_in_bf16():
    """And its smallest is 6e-8: of a loss that is so small that its gradients are below that,
    nothing comes back through matrix products in fp16 (which is why it needs a loss scaler). In
    bf16 it does.
    """
    arrived = {}
    for dtype in (torch.float16, torch.bfloat16):
        for size in (1.0, 1e-9):
            model = randomize(STDiT(MODELS["toy"]))
            x, t, y = (v.float() for v in inputs())
            with torch.autocast("cpu", dtype):
                out = model(x, t, y)
            (size * out.float()).mean().backward()
            gradient = model.blocks[0].attn.qkv.weight.grad
            arrived[dtype, size] = (gradient != 0).float().mean().item()
    assert arrived[torch.float16, 1.0] > 0.5  # a loss of a usual size arrives
    assert arrived[torch.float16, 1e-9] == 0
    assert arrived[torch.bfloat16, 1e-9] > 0.9


def test_T5_loss_curves_go_over_the_stages(tmp_path, monkeypatch):
    """Loss curves are shown of three stages: each run draws those of the stages that it began from
    in front of its own.
    """
    from matplotlib.axes import Axes

    for k in range(3):
        out = tmp_path / f"stage{k}"
        folder = out / "checkpoints/step_00000002"
        folder.mkdir(parents=True)
        init = str(tmp_path / f"stage{k - 1}") if k else ""
        config = replace(PRESETS["toy"], out=str(out), init=init)
        (folder / "state.json").write_text(json.dumps({"config": vars(config)}))
        lines = [{"step": s, "mse": 0.1, "held_out": [0.4, 0.3, 0.2, 0.1]} for s in (1, 2)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    drawn, plot = [], Axes.plot

    def record(self, x, *rest, **more):
        drawn.append(list(x))
        return plot(self, x, *rest, **more)

    monkeypatch.setattr(Axes, "plot", record)
    train.plot_losses(config)  # of the last stage
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    # steps of three stages, one after the other: the training loss as it is and smoothed, and the
    # held-out loss in four bins
    assert drawn.count([1, 2, 3, 4, 5, 6]) == 6


def test_T6_other_settings_follow_pixart_and_dit():
    """IDDPM with learned variance, 10% of captions dropped, EMA, AdamW without weight decay."""
    for c in STAGES:
        assert (c.drop_caption, c.ema, c.weight_decay, c.beta2) == (0.1, 0.9999, 0.0, 0.999)
        assert (c.t_std, c.min_snr, c.clip) == (0, 0, 1.0)  # timesteps uniform, all weights 1
    c = STAGES[0]
    dropped = (train.draw_choice(c, "drop", range(4000)) < c.drop_caption).float().mean()
    assert 0.085 < dropped < 0.115  # three standard deviations of 4000 draws
    t = train.draw_timesteps(c, range(1000))
    assert t.bincount(minlength=1000).max() <= 3 and t.min() < 3 and t.max() > 996
    assert STDiT(MODELS["toy"]).final_layer.linear.out_features == 4 * 2 * 4  # patch x (eps, v) x C


# ---------------------------------------------------------------------------------------------
# Data


def test_D3_captions_come_from_llava_given_three_frames_and_a_prompt(llava, tmp_path, monkeypatch):
    """What LLaVA is given, seen where it goes in: three pictures and the designed question."""
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    given, original = [], LlavaForConditionalGeneration.generate

    def generate(self, **inputs):
        given.append(inputs)
        return original(self, **inputs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", generate)
    film = data.draw_clip(("red", "circle", "left"), data.keyed_generator(0, "D3"))
    encode(tmp_path / "clip.mp4", film)
    assert data.write_captions(tmp_path, llava, "cpu") == 1
    pictures = given[0]["pixel_values"]  # [3, 3, 28, 28]
    assert len(pictures) == 3
    assert not any(torch.equal(pictures[i], pictures[j]) for i, j in ((0, 1), (1, 2), (0, 2)))
    asked = AutoTokenizer.from_pretrained(llava).decode(given[0]["input_ids"][0])
    assert data.QUESTION.split() == [w for w in asked.split() if w in data.QUESTION.split()]
    assert (tmp_path / "clip.txt").read_text().strip()
