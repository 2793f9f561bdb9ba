"""Training: the stream of samples, exact resume, one process against several, faults, and the
command lines of train.py and sample.py.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import ROOT, randomize
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import data
import sample
import stdit
import train
from data import UserError
from stdit import STDiT
from train import TrainConfig

TOY = train.PRESETS["toy"]

SHORT = {"steps": 8, "batch_size": 4, "warmup": 2, "log_every": 1}
SHORT |= {"eval_every": 4, "save_every": 3, "num_samples": 0, "keep_checkpoints": 9}
SHORT |= {"device": "cpu"}  # for the same numbers on every machine


@pytest.fixture
def config(toy, tmp_path):
    return train.derive(replace(TOY, data=str(toy / "train"), out=str(tmp_path / "run"), **SHORT))


def checkpoint_of(config):
    """All tensors of a run's newest checkpoint: averages, weights, optimizer."""
    folder = sample.newest_checkpoint(config.out)
    training = torch.load(folder / "training.pt", weights_only=True)
    tensors = {f"ema.{name}": v for name, v in load_file(folder / "model.safetensors").items()}
    tensors |= {f"model.{name}": v for name, v in training["model"].items()}
    for i, state in training["optimizer"]["state"].items():
        tensors |= {f"optimizer.{i}.{name}": v for name, v in state.items()}
    return tensors


def assert_same_checkpoints(a, b):
    a, b = checkpoint_of(a), checkpoint_of(b)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert a.keys() == b.keys() and not different, f"{len(different)} differ: {different[:3]}"


def losses_of(config):
    """The set of lines with losses; a resumed run may repeat some."""
    lines = train.read_metrics(config.out)
    return {str((m["step"], m.get("loss"), m.get("validation"))) for m in lines}


def options_of(config):
    """The command line that gives a configuration."""
    for name, value in vars(config).items():
        if value is None:
            continue
        boolean = f"--{'' if value else 'no-'}{name}"
        yield boolean if isinstance(value, bool) else f"--{name}={value}"


def launch(config, processes=1):
    """Starts train.py and returns the running process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *torchrun * (processes > 1), ROOT / "train.py", *options_of(config)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes)


def run(config, pool):
    """train.train(config) in the processes of a pool."""
    code = f"import data, torch, train\nfrom train import TrainConfig\nconfig = {config!r}\n"
    pool.run(code + "train.train(config, distributed)")


def assert_same_numbers(a, b, bound):
    """Losses, gradient norms, validation losses and last weights of two runs. The processes' sums
    have another order: fp32 rounding, which AdamW multiplies where gradients are tiny.
    """
    lines = [{(m["step"], *m): m for m in train.read_metrics(c.out)} for c in (a, b)]
    assert lines[0].keys() == lines[1].keys()
    for x, y in ((lines[0][key], lines[1][key]) for key in lines[0]):
        for name in {"loss", "mse", "vlb", "grad_norm"} & x.keys():
            assert abs(x[name] / y[name] - 1) < bound, (x, y)
        for p, q in zip(x.get("validation", []), y.get("validation", [])):
            assert abs(p / q - 1) < bound, (x, y)
    a, b = checkpoint_of(a), checkpoint_of(b)
    assert a.keys() == b.keys()
    for name in a:
        difference = (a[name] - b[name]).norm() / a[name].norm().clamp(min=1e-3)
        assert difference < 100 * bound, (name, difference)


# ------------------------------------------------------------------------- the stream and its draws
def test_every_clip_comes_once_an_epoch_in_a_new_order():
    rows = [2, 3, 5, 7, 11]
    cache = {row: [torch.tensor(row)] * 3 for row in rows}
    x0, _, _ = train.Stream(cache, rows, seed=0).batch(range(40))
    epochs = [tuple(epoch) for epoch in x0.view(8, 5).tolist()]
    assert all(sorted(epoch) == rows for epoch in epochs) and len(set(epochs)) > 6


@pytest.mark.parametrize("dp_size, B", [(1, 2), (2, 4), (2, 2)])
def test_processes_and_micro_batches_share_the_indices_of_a_step(dp_size, B):
    streams = [train.indices_from(5, 8, B, rank, dp_size) for rank in range(dp_size)]
    n = 8 // dp_size // B  # micro-batches of a step
    shares = [list(islice(stream, n)) for stream in streams]
    assert [next(stream)[0] // 8 for stream in streams] == dp_size * [6]  # the next step
    assert [p for parts in zip(*shares) for part in parts for p in part] == list(range(40, 48))
    assert {len(part) for parts in shares for part in parts} == {B}


def test_draws_depend_on_seed_and_index_alone():
    config = TOY
    noise = lambda c, i: train.draw(torch.randn, c.seed, "noise", i, 2, 3)  # noqa: E731
    uniform = lambda c, i: train.draw(torch.rand, c.seed, "drop", i)  # noqa: E731
    for draw in (train.draw_timesteps, noise, uniform):
        whole = draw(config, range(16))
        parts = [draw(config, range(0, 5)), draw(config, range(5, 16))]
        assert torch.equal(torch.cat(parts), whole) and len(whole.unique(dim=0)) > 12
        assert not torch.equal(draw(replace(config, seed=1), range(16)), whole)


def test_timesteps_of_a_step_are_spread_evenly():
    uniform = TrainConfig(batch_size=32)
    for step in (0, 24):
        t = train.draw_timesteps(uniform, range(32 * step, 32 * step + 32))
        assert (
            t * 32 // 1000 - torch.arange(32)
        ).abs().max() <= 1  # one in each part, rounded down
    t = train.draw_timesteps(uniform, range(6400)).float()
    assert abs(t.mean() - 499.5) < 2 and t.min() < 3 and t.max() > 996
    t = train.draw_timesteps(replace(uniform, t_mean=0.4, t_std=0.8), range(6400)).float()
    logit = torch.logit((t + 0.5) / 1000)
    assert abs(logit.mean() - 0.4) < 0.01 and abs(logit.std() - 0.8) < 0.01


def test_the_next_batch_is_read_while_this_one_is_used():
    read = []
    batches = train.prefetch(lambda key: read.append(key) or key, iter(range(4)))
    assert next(batches) == 0
    deadline = time.time() + 60
    while read != [0, 1] and time.time() < deadline:  # in a thread
        time.sleep(0.001)
    assert read == [0, 1] and next(batches) == 1

    def fail(key):
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        next(train.prefetch(fail, iter(range(4))))


# ----------------------------------------------------------------------------------------- training
def test_learning_rate_loss_weights_and_ema_follow_their_formulas():
    config = replace(TOY, lr=1.0, warmup=10, steps=100, ema_decay=0.9)
    rates = [train.learning_rate(config, step) for step in (0, 4, 50, 75)]
    assert rates == pytest.approx([0.1, 0.5 * 0.96, 0.5, 0.25])
    assert train.learning_rate(replace(config, decay=False), 99) == 1
    t, schedule = torch.arange(1000), sample.TRAIN_SCHEDULE
    snr = (schedule.alpha / schedule.sigma).square()
    weights = train.loss_weights(config, schedule, t)
    assert torch.equal(weights, (0.05 / snr).clamp(max=1)) and (weights == 1).sum() > 100
    assert (train.loss_weights(TrainConfig(), schedule, t) == 1).all()
    model = nn.Linear(3, 3)
    for step, decay in ((0, 2 / 11), (7, 0.5), (1000, 0.9)):
        ema = randomize(deepcopy(model), seed=step)
        expected = decay * ema.weight + (1 - decay) * model.weight
        train.update_ema(config, step, ema, model)
        assert torch.allclose(ema.weight, expected, atol=1e-6)


def test_a_network_overfits_four_clips(encoders, tmp_path, monkeypatch):
    small = replace(train.MODELS["toy"], depth=2, hidden_size=96)
    monkeypatch.setitem(train.MODELS, "toy", small)
    data.write_cache(data.Toy("train", 4), tmp_path / "cache", *encoders)
    options = SHORT | {"steps": 500, "warmup": 20, "lr": 5e-3, "t_std": 0.01}
    options |= {"eval_every": 500, "save_every": 500, "log_every": 500}
    options |= {"min_snr": None, "drop_caption": 0.0}
    config = replace(TOY, data=str(tmp_path / "cache"), out=str(tmp_path / "run"), **options)
    train.train(config)
    (found,) = [m["mse"] for m in train.read_metrics(config.out) if "mse" in m]
    # t is 599 here, where predicting the mean of all latents leaves alphas_cumprod = 0.026
    assert found < 0.008, found


def test_resume_is_exact(config, monkeypatch):
    """A run dies while it saves its second checkpoint, and resumes from the first."""
    config = replace(config, keep_checkpoints=2)
    other, os_replace = replace(config, out=config.out + "2"), os.replace

    def die(source, target):
        if str(target).endswith("step_00000006"):
            raise KeyboardInterrupt
        os_replace(source, target)

    train.train(config)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        train.train(other)
    assert sample.newest_checkpoint(other.out).name == "step_00000003"
    train.train(other)
    assert_same_checkpoints(config, other)
    assert losses_of(config) == losses_of(other)
    kept = sorted(p.name for p in Path(other.out, "checkpoints").iterdir())
    assert kept == ["step_00000006", "step_00000008"]
    files = {p: p.read_bytes() for p in Path(config.out, "checkpoints").rglob("*.*")}
    train.train(config)  # a finished run resumes to nothing new
    assert {p: p.read_bytes() for p in Path(config.out, "checkpoints").rglob("*.*")} == files
    one, two = ({(m["step"], *m) for m in train.read_metrics(c.out)} for c in (config, other))
    assert one == two, "a resumed run lacks lines or has others"


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_exits_with_0(config, processes):
    config = replace(config, steps=400, save_every=1000, eval_every=1000, micro_batch=1)
    process = launch(config, processes)
    metrics = Path(config.out, "metrics.jsonl")
    while process.poll() is None and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.01)
    pid = process.pid
    if processes > 1:  # one worker of torchrun; the other learns of it
        workers = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
        pid = int(workers.stdout.split()[-1])
    os.kill(pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    step = int(sample.newest_checkpoint(config.out).name[5:])
    assert process.returncode == 0 and 0 < step < 400, errors
    assert f"stopped after step {step}; continue with --resume --out {config.out}" in output
    assert [m["step"] for m in train.read_metrics(config.out)] == list(range(1, step + 1))


def test_ctrl_c_while_the_toy_is_encoded_stops_at_once(tmp_path):
    config = train.derive(replace(TOY, out=str(tmp_path / "run")))
    process, cache = launch(config), tmp_path / "toy-train-2048x8x64"
    while process.poll() is None and not list(cache.glob("*.safetensors")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    assert 0 < len(list(cache.glob("*.safetensors"))) < 2048


SLOW = pytest.mark.slow
OTHER = [(2, {}), (4, {}), (4, {"micro_batch": 1}), (4, {"sp": 2, "micro_batch": 2})]
OTHER += [(4, {"sp": 4, "micro_batch": 2})]
CASES = [(2, {"micro_batch": 1}), (2, {"sp": 2, "micro_batch": 1})]
CASES += [pytest.param(*case, marks=SLOW) for case in OTHER]


@pytest.mark.parametrize("n, options", CASES)
def test_any_number_of_processes_gives_the_numbers_of_one(config, toy, n, options, processes):
    """... also resumed in another number, and with sp: losses, validation, sample videos."""
    samples = {"data": str(toy / "validation"), "num_samples": 2, "sample_steps": 2}
    every = {"save_every": 4, "eval_every": 12, "sample_every": 12}
    config = replace(config, steps=12, batch_size=8, **every, **samples)
    other = replace(config, out=config.out + "2", **options)
    bound = 1e-4 if other.sp > 1 else 1e-5  # attention over frames in another order: fp32 rounding
    train.train(config)
    run(other, processes(n))
    assert_same_numbers(config, other, bound)
    sheets = (Path(c.out, "samples/step_00000012.png") for c in (config, other))
    one, many = (np.asarray(Image.open(sheet).convert("RGB"), float) for sheet in sheets)
    assert one.shape == many.shape and np.abs(one - many).mean() < 0.5  # of 255
    for count, last in ((2, 4), (1, 8)) if n > 2 else ((1, 8),):
        for folder in Path(other.out, "checkpoints").glob("step_*"):
            if int(folder.name[5:]) > last:
                shutil.rmtree(folder)
        other = replace(other, resume=True, sp=1)
        run(other, processes(count)) if count > 1 else train.train(other)
        assert_same_numbers(config, other, bound)


COMPILED = """
import torch, train
from dataclasses import replace
from train import TrainConfig
from torch import nn
backend, config = {backend!r}, {config!r}
compile, toy = nn.Module.compile, train.MODELS["toy"]
nn.Module.compile = lambda self, **options: compile(self, backend=backend, **options)
train.MODELS["toy"] = replace(toy, depth=2)
torch._dynamo.reset()
torch._dynamo.utils.counters.clear()
try:
    train.train(config, distributed)
finally:
    nn.Module.compile, train.MODELS["toy"] = compile, toy
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
"""
EAGER, RANKS = "aot_eager", [(1, 1), (2, 1), (2, 2)]  # processes, of which sp share a clip
ALL = product([EAGER, "inductor"], ["none", "selective", "full"], RANKS)
QUICK = [(EAGER, "none", (1, 1)), (EAGER, "full", (2, 1)), (EAGER, "selective", (2, 2))]
COMPILERS = [*QUICK, *(pytest.param(*case, marks=SLOW) for case in ALL if case not in QUICK)]


@pytest.mark.parametrize("backend, mode, ranks", COMPILERS)
def test_compiled_blocks_give_the_same_numbers(
    config, backend, mode, ranks, processes, monkeypatch
):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("no C++ compiler")
    monkeypatch.setitem(train.MODELS, "toy", replace(train.MODELS["toy"], depth=2))
    config = replace(config, steps=4, save_every=4)
    train.train(config)
    options = {"compile": True, "sp": ranks[1], "activation_checkpointing": mode}
    other = replace(config, out=config.out + "2", **options)
    monkeypatch.undo()  # the code sets the depth itself
    code = COMPILED.format(backend=backend, config=other)
    if ranks[0] > 1:
        processes(ranks[0]).run(code)
    else:
        exec(code, {"distributed": data.Distributed()})
    # fp32; inductor also fuses and reorders sums
    assert_same_numbers(config, other, 1e-4 if backend == "inductor" else 1e-5)


def test_activation_checkpointing_changes_no_bit(config, monkeypatch):
    train.train(config)
    checkpoint = MagicMock(wraps=torch.utils.checkpoint.checkpoint)
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", checkpoint)
    other = replace(config, out=config.out + "2", activation_checkpointing="selective")
    train.train(other)
    assert_same_checkpoints(config, other)
    assert ["context_fn" in call.kwargs for call in checkpoint.call_args_list] == [True] * 32


def test_temporal_training_changes_temporal_attention_alone(config, tmp_path):
    model = randomize(train.STDiT(train.MODELS["toy"]))  # not zero, so that all could learn
    model.save_pretrained(tmp_path / "init")
    options = {"trainable": "temporal", "init": str(tmp_path / "init")}
    before, trained = model.state_dict(), {n for n in model.state_dict() if "attn_temp" in n}
    for steps in (3, 5):  # the second resumes
        train.train(replace(config, steps=steps, decay=False, **options))
        after = checkpoint_of(config)
        for kind in ("model", "ema"):
            same = {n for n in before if torch.equal(before[n], after[f"{kind}.{n}"])}
            assert before.keys() - same == trained
    assert sum("exp_avg_sq" in n for n in after) == len(trained)


@pytest.mark.parametrize("variant", stdit.BLOCKS)
def test_every_variant_begins_with_given_weights_and_its_own_scales(config, variant, tmp_path):
    model = randomize(train.STDiT(replace(train.MODELS["toy"], variant=variant)))
    model.save_pretrained(tmp_path / "init")
    options = {"variant": variant, "init": str(tmp_path / "init"), "steps": 2, "lr": 0.0}
    train.train(replace(config, space_scale=0.25, time_scale=1.5, **options))
    found = sample.load_model(config.out)
    assert found.config == replace(model.config, space_scale=0.25, time_scale=1.5)
    assert all(torch.equal(v, found.state_dict()[n]) for n, v in model.state_dict().items())
    other = replace(config, variant="full" if variant != "full" else "latte", out=config.out + "2")
    with pytest.raises(UserError, match="init does not fit the network STDiTConfig.*blocks.0"):
        train.train(replace(other, init=str(tmp_path / "init")))


def test_nonfinite_gradients_skip_the_step(config, monkeypatch, capsys):
    loss, bad = train.training_loss, {2, 5}

    def sometimes(run, *batch):
        return loss(run, *batch) * (float("nan") if run.step in bad else 1)

    monkeypatch.setattr(train, "training_loss", sometimes)
    train.train(config)
    lines = [m for m in train.read_metrics(config.out) if "loss" in m]
    assert [m["step"] - 1 for m in lines if math.isnan(m["loss"] + m["grad_norm"])] == [2, 5]
    assert "step 3: skipped, its gradient norm is nan" in capsys.readouterr().out
    assert all(v.isfinite().all() for v in checkpoint_of(config).values())


# ------------------------------------------------------------------------------------------ samples
def drawn(model, vae, y, mask, keys, shape, batch_size=8, **options):
    """In place of sample.generate: draws what the caption in each key says."""
    labels = {data.caption_of(label): label for label in data.LABELS}
    return [data.draw_clip(labels[key[2]], data.keyed_generator(*key)) for key in keys]


def test_a_toy_run_makes_its_caches_and_counts_matching_videos(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "generate", drawn)
    options = SHORT | {"steps": 2, "sample_every": 1, "num_samples": 6}
    train.train(replace(TOY, toy_clips=8, out=str(tmp_path / "run"), **options))
    names = {"run", "toy-train-8x8x64", "toy-validation-96x8x64"}
    assert {p.name for p in tmp_path.iterdir()} == names
    found = [m["accuracy"] for m in train.read_metrics(tmp_path / "run") if "accuracy" in m]
    assert found == [{"seen": [n, n], "unseen": [m, m]} for n, m in ((42, 6), (84, 48))]
    assert "48 of 48 videos match unseen captions" in capsys.readouterr().out
    assert (tmp_path / "run/loss.png").is_file()


def test_reversed_videos_match_no_caption():
    rows = train.sample_rows(TOY, None, last=True)
    captions = [data.caption_of(data.LABELS[row]) for row in rows]
    videos = drawn(None, None, None, None, sample.video_keys(0, captions), None)
    right = train.evaluate_toy(captions, videos)
    assert right["accuracy"] == {"seen": [84, 84], "unseen": [48, 48]}
    shape, overlap, flicker = right["quality"]
    assert shape == 1 and overlap > 0.99 and flicker < 0.5  # antialiasing and rounding
    wrong = {"accuracy": {"seen": [0, 84], "unseen": [0, 48]}, "quality": None}
    assert train.evaluate_toy(captions, [video.flip(0) for video in videos]) == wrong


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """A finished run of two steps."""
    out, options = str(tmp_path_factory.mktemp("run")), SHORT | {"steps": 2}
    train.train(replace(TOY, data=str(toy / "train"), out=out, **options))
    return out


def test_sample_files_depend_on_seed_and_prompt_alone(finished, tmp_path, monkeypatch, capsys):
    def files(out, *options):
        argv = ["sample.py", "--weights", finished, "--steps", "4", "--out", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", [*argv, "--prompt", "A blue square", *options])
        sample.main()
        return {file.name: file.read_bytes() for file in (tmp_path / out).iterdir()}

    one, again, other = files("a"), files("b"), files("c", "--seed", "1")
    assert set(one) == {"00_a-blue-square.mp4", "00_a-blue-square.gif", "sheet.png"}
    for file in set(one) - {"00_a-blue-square.mp4"}:
        assert one[file] == again[file] != other[file], file
    a, b, c = (data.read_frames(tmp_path / f"{k}/00_a-blue-square.mp4", 8).float() for k in "abc")
    # The sheet shows that the pixels are the same. From the same pixels x264 with AVX-512 has made
    # videos that differ by 1.4 of 255 on average, the first time after other work.
    assert (a - b).abs().mean() < 5 < (a - c).abs().mean()
    two = files("d", "--prompt", "a red circle", "--sampler", "ddim", "--guidance", "1")
    assert set(two) == set(one) | {"01_a-red-circle.mp4", "01_a-red-circle.gif"}
    image = files("e", "--frames", "1", "--width", "128")
    assert set(image) == {"00_a-blue-square.png", "sheet.png"}
    assert data.read_frames(tmp_path / "e/00_a-blue-square.png", 1).shape == (1, 3, 64, 128)
    printed = capsys.readouterr().out
    assert "8 frames of 64x64, guidance 1\n" in printed and "4 steps of ddim on " in printed


# ------------------------------------------------------------------------------------ command lines
def test_bad_input_to_sample_gets_one_clear_line(finished, tmp_path, monkeypatch):
    bad = {
        "": "nothing to generate: give --prompt",
        "--weights nowhere --prompt a": "nowhere not found; give a local folder, or a name",
        "--prompt a --steps 1": "steps=1: expected 2 to 1000",
        "--prompt a --size 40": "frames=8 size=40 width=40: expected multiples of 1, 16, 16",
        "--prompt a --frames 0": "frames=0: expected 1 to ",
        "--prompt a --output-fps 0": "output_fps=0: expected 1 to ",
        "--prompt a --width -64": "width=-64: expected 1 to ",
        "--prompt a --space-scale 0": "space_scale=0.0: expected 1e-06 to ",
        "--prompt a --guidance nan": "guidance=nan: expected ",
        "--prompt a --vae assets/t5": "assets/t5 has no vae that can be loaded",
    }
    command = ["sample.py", "--weights", finished, "--out", str(tmp_path / "out")]
    for options, message in bad.items():
        monkeypatch.setattr(sys, "argv", [*command, *options.split()])
        with pytest.raises(UserError, match=f"^{message}.*$"):
            sample.main()
    assert not list(tmp_path.iterdir())


def test_data_that_does_not_fit_the_run_is_refused(config, monkeypatch):
    monkeypatch.setitem(train.MODELS, "16", replace(train.MODELS["toy"], in_channels=16))
    for change, message in (
        ({"frames": 4}, "has .*'frames': 8, .* the run needs .*'frames': 4"),
        ({"stride": 2}, "has .*'stride': 1, .* the run needs .*'stride': 2"),
        ({"model": "16"}, "has .*'channels': 4}, the run needs .*'channels': 16"),
        ({"model": "STDiT-XL/2"}, "has .*'caption_length': 16, .* needs .*'caption_length': 120"),
        ({"data": "nowhere"}, "--data: expected a latent cache, made with data.py; found nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            train.train(replace(config, **change))


def test_options_override_the_preset_and_a_resumed_run_keeps_its_own(config, toy):
    argv = ["--steps", "7", "--batch_size", "6", "--no-decay", "--preset", "16x256x256-24gb"]
    changes = {"steps": 7, "batch_size": 6, "decay": False, "out": "out/16x256x256-24gb"}
    expected = replace(train.PRESETS["16x256x256-24gb"], **changes)
    assert train.parse_command_line(argv) == replace(expected, preset="16x256x256-24gb")
    config = replace(config, steps=2)
    train.train(config)
    with pytest.raises(UserError, match="run holds a run: continue it with --resume, or give"):
        train.parse_command_line(["--out", config.out])
    resumed = train.parse_command_line(["--resume", "--out", config.out, "--steps", "9"])
    assert resumed == replace(config, steps=9, resume=True)
    settings = data.LatentCache(config.data).settings
    _, _, optimizer, _ = train.create_model(replace(resumed, beta2=0.5), "cpu", settings)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.5)
    with pytest.raises(UserError, match=r"with other options \(trainable all\): resume with"):
        train.create_model(replace(resumed, trainable="temporal"), "cpu", settings)
    new = train.parse_command_line(["--resume", "--out", config.out + "2"])
    assert new == replace(
        TOY, preset="toy", resume=True, out=config.out + "2"
    )  # there is none: it begins
    for change, message in (
        (
            {"data": str(toy / "validation")},
            r"with other options \(clips [0-9a-f]+, encoded [0-9a-f]+\): resume",
        ),
        ({"variant": "parallel"}, r"with other options \(variant sequential\)"),
        ({"space_scale": 0.5}, r"options \(space_scale 0.125\): resume with the same"),
    ):
        with pytest.raises(UserError, match=message):
            train.train(replace(resumed, **change))


def test_a_copied_checkpoint_is_neither_resumed_nor_deleted(config):
    config = replace(config, steps=2, save_every=1, keep_checkpoints=1)
    train.train(config)
    folder = Path(config.out, "checkpoints")
    shutil.copytree(folder / "step_00000002", folder / "step_best")
    train.train(replace(config, steps=4))
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000004", "step_best"]
    assert sample.newest_checkpoint(config.out).name == "step_00000004"


def test_a_folder_that_cannot_be_made_is_refused_at_once(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out .*/file/run: .*/file is a file, expected a folder"):
        train.train(replace(config, out=str(tmp_path / "file/run")))


def test_a_resumed_run_refuses_a_cache_that_has_gained_a_clip(config, encoders, tmp_path):
    class Damaged(data.Toy):
        def __getitem__(self, row):
            return None if row == 3 else super().__getitem__(row)

    path = tmp_path / "cache"
    assert len(data.write_cache(Damaged("train", 24), path, *encoders)) == 23
    config = replace(config, data=str(path), steps=2)
    train.train(config)
    assert len(data.write_cache(data.Toy("train", 24), path, *encoders)) == 24  # repaired
    with pytest.raises(UserError, match=r"with other options \(encoded [0-9a-f]+\): resume"):
        train.train(replace(config, steps=3))


BAD = {  # options that do not fit each other
    "--variant full has no temporal weights": {"variant": "full", "trainable": "temporal"},
    "sp=3 must divide the 1 process": {"sp": 3},
    "--compile needs .*no-such-compiler.*--no-compile": {"compile": True},
    "the toy has --stride 1": {"data": "toy", "stride": 2},
    "batch_size=0: expected 1 to ": {"batch_size": 0},
    "keep_checkpoints=-1: expected 0 to ": {"keep_checkpoints": -1},
    "micro_batch=-4: expected 1 to ": {"micro_batch": -4},
    "grad_clip=0: expected 1e-06 to ": {"grad_clip": 0},
    "lr=nan: expected 0 to ": {"lr": math.nan},
    "drop_caption=5: expected 0 to 1": {"drop_caption": 5},
    "width=0: expected 1 to ": {"width": 0},
    "sample_steps=1: expected 2 to 1000": {"sample_steps": 1},
    "--trainable temporal needs --init": {"trainable": "temporal"},
}


@pytest.mark.parametrize("message", BAD)
def test_options_that_do_not_fit_are_refused(message, config, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=message):
        train.train(replace(config, **BAD[message]))
    assert not Path(config.out).exists()


def test_sequence_parallelism_needs_frames_and_patches_that_divide(config):
    two = data.Distributed("cpu", 0, 2)
    train.check_options(replace(config, sp=2), two)
    for change, message in (
        ({"frames": 7}, "sp=2 with 7 frames and 16 patches a frame: sp must divide both"),
        ({"size": 48, "width": 48}, "8 frames and 9 patches"),
        ({"variant": "latte"}, "--sp 2 needs --variant sequential or parallel"),
    ):
        with pytest.raises(UserError, match=message):
            train.check_options(replace(config, sp=2, **change), two)


def test_ranks_that_would_start_at_different_steps_stop(config, monkeypatch):
    monkeypatch.setattr(data, "all_gather", lambda value: [value, 4])  # another folder there
    with pytest.raises(
        UserError, match=r"ranks would start at steps \[0, 4\]: --out must be shared"
    ):
        train.train(config)


def test_a_half_written_line_of_metrics_is_dropped_and_the_last_evaluation_kept(config):
    train.train(replace(config, steps=3))
    metrics = Path(config.out, "metrics.jsonl")
    before = train.read_metrics(config.out)
    validated = [m for m in before if "validation" in m]  # the last one at the end, step 3
    with open(metrics, "a") as file:
        file.write('{"step": 4, "lo')  # the process was killed here
    assert train.read_metrics(config.out) == before
    train.train(config)
    lines = list(map(json.loads, metrics.read_text().splitlines()))
    assert [m["step"] for m in lines if "loss" in m] == list(range(1, 9))
    assert [m for m in lines if "validation" in m][: len(validated)] == validated


def test_samples_above_128_pixels_are_an_mp4(config, toy, monkeypatch):
    config, video = (
        replace(config, data=str(toy / "validation")),
        torch.zeros(8, 3, 144, 160).byte(),
    )
    monkeypatch.setattr(sample, "generate", lambda *a, **k: [video, video])
    run = MagicMock(step=8, validation=train.open_data(config, data.Distributed())[1])
    run.config, run.distributed = replace(config, size=144, num_samples=2), data.Distributed()
    train.write_samples(run)
    names = {path.name for path in Path(config.out, "samples").iterdir()}
    assert names == {"step_00000008.mp4", "step_00000008.png"}
    mp4 = data.read_frames(Path(config.out, "samples/step_00000008.mp4"), 8)
    assert mp4.shape == (8, 3, 144, 320)  # next to each other


def test_a_video_of_another_size_spans_the_same_positions(tmp_path):
    """The rule of train.py: the scale is proportional to the size."""
    config = replace(train.MODELS["toy"], space_scale=0.125, time_scale=0.5)
    STDiT(config).save_pretrained(tmp_path)
    settings = dict(vae="a", t5="b", frames=8, size=64, width=64, output_fps=8)
    data.write_json(tmp_path / "sample.json", settings | dict(guidance=3, guidance_min_t=600))
    for options, scale in (
        ({}, 0.125),
        ({"size": 96}, 0.1875),
        ({"size": 64, "width": 256}, 0.25),
        ({"size": 96, "space_scale": 0.3}, 0.3),
    ):
        found = sample.resolve(sample.SampleConfig(weights=str(tmp_path), **options))
        assert found.space_scale == pytest.approx(scale) and found.time_scale == 0.5, options


ERRORS = {
    "--batchsize 8": "--batch-size",
    "--preset tiy": "invalid choice: 'tiy'",
    "--batch-size 10 --micro-batch 4": "error: batch_size=10: expected a multiple of 4 "
    "(processes / sp x micro_batch)\n",
}


@pytest.mark.parametrize("options", ERRORS)
def test_wrong_options_exit_with_2_and_say_what_is_right(options, tmp_path):
    command = [sys.executable, ROOT / "train.py", "--out", tmp_path / "run", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and ERRORS[options] in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@SLOW
@pytest.mark.parametrize("options", ["", "--processes 2 -- --micro-batch=1"])
@pytest.mark.parametrize("number", ["KILL", "TERM"])
def test_five_interruptions_leave_no_trace(number, options, tmp_path):
    command = [sys.executable, "tests/kill_loop.py", "--kills=5", f"--out={tmp_path}"]
    command += [f"--signal={number}", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
