"""The training loop: the stream, exact resume, one process against two, faults, and the
command lines.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import data
import sample
import train
from stdit import BadWeights
from train import TrainConfig

SHORT = dict(
    steps=8,
    image_share=0.25,
    batch_size=4,
    warmup=2,
    log_every=1,
    eval_every=4,
    save_every=3,
    films=0,
    keep=9,
)


@pytest.fixture
def config(toy, tmp_path):
    return TrainConfig(
        data=str(toy / "cache_train"),
        held_out=str(toy / "cache_held_out"),
        out=str(tmp_path / "run"),
        **SHORT,
    )


def weights_of(out):
    """All tensors of a run's newest checkpoint, with the name of their file."""
    folder = sample.newest_checkpoint(out)
    files = {
        name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema", "optimizer")
    }
    return {
        f"{file}.{name}": tensor
        for file, tensors in files.items()
        for name, tensor in tensors.items()
    }


def assert_same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, among them {different[:3]}"


def metrics_of(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def options_of(config):
    """The command line that gives a configuration."""
    fields = vars(config).items()
    return [f"--{name}={value}" for name, value in fields if value != getattr(TrainConfig(), name)]


# --- the stream


def test_every_clip_comes_once_an_epoch_in_an_order_of_its_own():
    source = {(row, position): row for row in range(10) for position in range(40)}
    stream = train.Stream(source, list(range(10)), seed=0)
    epochs = [[stream[e * 10 + i] for i in range(10)] for e in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_positions_of_a_step(world):
    config = TrainConfig(batch_size=8)
    parts = [
        list(train.positions_of(5, config, train.Process(rank, world, "cpu")))
        for rank in range(world)
    ]
    assert sum(parts, []) == list(range(40, 48)) and len({len(p) for p in parts}) == 1


def test_draws_hang_on_the_position_alone():
    config = TrainConfig(t_std=0.8)
    for draw in (
        train.draw_timesteps,
        lambda c, p: train.draw_noise(c, p, (2, 3)),
        lambda c, p: train.draw_choice(c, "drop", p),
    ):
        whole = draw(config, range(16))
        assert torch.equal(
            torch.cat([draw(config, range(0, 5)), draw(config, range(5, 16))]), whole
        )
        assert not torch.equal(draw(replace(config, seed=1), range(16)), whole)
        assert len(whole.unique(dim=0)) > 12


def test_timesteps_are_spread_evenly_over_any_batch():
    uniform = TrainConfig(t_std=0.0)
    for start in (0, 777):
        t = train.draw_timesteps(uniform, range(start, start + 32)).sort().values
        # 1000 / 32 = 31 apart on average; independent draws would leave gaps of about 125
        assert t.diff().max() < 90
    t = train.draw_timesteps(uniform, range(5000)).float()
    assert abs(t.mean() - 499.5) < 2 and t.min() == 0 and t.max() == 999
    t = train.draw_timesteps(TrainConfig(t_mean=0.4, t_std=0.8), range(5000)).float() / 1000
    logit = torch.logit(t + 0.0005)
    assert abs(logit.mean() - 0.4) < 0.02 and abs(logit.std() - 0.8) < 0.02


def test_dropped_captions_are_the_share_that_is_asked_for():
    share = (train.draw_choice(TrainConfig(), "drop", range(4000)) < 0.1).float().mean()
    assert abs(share - 0.1) < 0.025  # 5 standard errors


# --- training


def test_a_network_overfits_four_clips(toy, encoders, tmp_path, monkeypatch):
    small = replace(train.MODELS["toy"], depth=2, hidden_size=96)
    monkeypatch.setitem(train.MODELS, "toy", small)
    rows = data.read_table(toy / "train.csv")[:4]
    (tmp_path / "four.csv").write_text(
        "path,text\n" + "".join(f"{path},{text}\n" for path, text in rows)
    )
    cache = tmp_path / "cache"
    data.write_cache(tmp_path / "four.csv", cache, *encoders, 8, 1, 64)
    config = TrainConfig(
        data=str(cache), held_out=str(cache), out=str(tmp_path / "run"), steps=900, image_share=0.0,
        batch_size=4, warmup=20, eval_every=900, save_every=900, lr=3e-3, films=0, t_std=0.01,
        min_snr=0.0, drop_caption=0.0,
    )  # fmt: skip
    train.train(config, resume=False)
    found = [m["mse"] for m in metrics_of(config.out) if "mse" in m][-1]
    # t is 599 here, where predicting the mean of all latents leaves abar = 0.026
    assert found < 0.008, found


@pytest.mark.parametrize("image_share", [0.25, 0.5])  # resumed among films, and among images
def test_resume_is_exact(config, monkeypatch, image_share):
    """A run that dies while it saves its second checkpoint ends, resumed, as if it had not."""
    config = replace(config, image_share=image_share)
    train.train(config, resume=False)
    other = replace(config, out=config.out + "2")
    replace_file = os.replace

    def dies(a, b):
        if str(b).endswith("step_00000006"):
            raise KeyboardInterrupt
        replace_file(a, b)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        train.train(other, resume=False)
    monkeypatch.setattr(os, "replace", replace_file)
    assert sample.newest_checkpoint(other.out).name == "step_00000003"
    train.train(other, resume=True)
    assert_same_weights(config.out, other.out)
    values = [
        [(m["step"], m.get("loss"), m.get("held_out")) for m in metrics_of(c.out)]
        for c in (config, other)
    ]
    assert values[0] == values[1]  # no gap and no double


def test_resume_after_sigkill_is_exact(config):
    config = replace(config, steps=80, save_every=2, eval_every=100)
    killed = replace(config, out=config.out + "-killed")
    options = options_of(killed)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = Path(killed.out) / "checkpoints"
    while process.poll() is None and not len(list(checkpoints.glob("step_*"))) > 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed in the middle"
    train.train(killed, resume=True)
    train.train(config, resume=False)
    assert_same_weights(config.out, killed.out)


def test_two_processes_give_the_losses_of_one(config):
    config = replace(config, steps=20, save_every=20, eval_every=20)
    two = replace(config, out=config.out + "2")
    options = options_of(two)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        ROOT / "train.py",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    train.train(config, resume=False)
    a, b = metrics_of(config.out), metrics_of(two.out)
    assert len(a) == len(b) == 21 and all(x.keys() == y.keys() for x, y in zip(a, b))
    for x, y in zip(a, b):
        for name in {"loss", "mse", "vlb"} & x.keys():
            # fp32: sums in another order, over 20 steps
            assert abs(x[name] / y[name] - 1) < 1e-5, (x, y)
        assert all(
            abs(p / q - 1) < 1e-5 for p, q in zip(x.get("held_out", []), y.get("held_out", []))
        )


def test_training_from_clips_with_a_data_worker(config, toy, capsys):
    """Encoders in the loop, a clip that can't be decoded, a spawned worker: it goes on."""
    broken = bytearray((toy / "train/00001.mp4").read_bytes())
    start = broken.index(b"mdat") + 4
    broken[start : start + 400] = bytes(400)  # the packets are listed as before, but hold nothing
    (toy / "train/broken.mp4").write_bytes(broken)
    table = toy / "some.csv"
    table.write_text(
        "path,text\n" + "".join(f"train/{n}.mp4,a\n" for n in ("00000", "broken", "00002"))
    )
    config = replace(
        config, data=str(table), held_out=str(toy / "cache_held_out"), steps=3, workers=1
    )
    train.train(replace(config, image_share=0.0, save_every=3), resume=False)
    losses = [m["loss"] for m in metrics_of(config.out) if "loss" in m]
    assert len(losses) == 3 and all(0.5 < loss < 5 for loss in losses)


def test_caption_accuracy_counts_what_the_detector_sees(config, encoders, monkeypatch):
    """Films drawn instead of sampled are all right; reversed, all but their direction is."""
    made = train.Encoders({"vae": "assets/vae", "t5": "assets/t5"}, 16, "cpu")
    model = train.STDiT(train.MODELS["toy"])

    def drawn(model, vae, y, mask, keys, shape, batch, flip=False):
        clips = [data.draw_clip(words(key[2]), data.keyed_generator(*key)) for key in keys]
        return [clip.flip(0) if flip else clip for clip in clips]

    def words(prompt):
        return tuple(prompt.split()[i] for i in (1, 2, 4))

    monkeypatch.setattr(train, "film", drawn)
    right = train.caption_accuracy(config, model, made, (1, 2), train.Process(0, 1, "cpu"))
    assert right["seen"] == dict.fromkeys(("films", "right", "colour", "shape", "direction"), 42)
    assert right["held_out"] == dict.fromkeys(
        ("films", "right", "colour", "shape", "direction"), 12
    )
    wrong = train.caption_accuracy(
        config, model, made, (0, 2), train.Process(0, 1, "cpu"), flip=True
    )
    assert wrong["held_out"] == {"films": 12, "right": 0, "colour": 12, "shape": 12, "direction": 0}
    assert "0.0% of 12 films" in train.describe(wrong)


# --- the command lines, and what they say to bad input


def parse(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    return train.parse_command_line()


@pytest.mark.parametrize("options, message", [
    (["--lerning_rate", "1"], "unknown option --lerning_rate"),
    (["--batchsize", "8"], "nearest: --batch_size"),
    (["--preset", "tiy"], "unknown preset 'tiy'; nearest: toy"),
    (["--model", "STDiT-XL"], "nearest: STDiT-XL/2"),
    (["--size", "72"], "size=72 must divide by 16 .* try --size"),
    (["--steps", "0"], "steps=0"),
    (["--film_steps", "1"], "film_steps=1"),
    (["--frames", "1"], "the toy is about motion"),
    (["--drop_caption", "1.5"], "drop_caption=1.5"),
    (["--resume", "--out", "nowhere"], "nowhere holds no run to resume"),
])  # fmt: skip
def test_bad_options_get_one_clear_line(monkeypatch, options, message):
    with pytest.raises(data.BadInput, match=message) as error:
        parse(monkeypatch, *options)
    assert "\n" not in str(error.value)


def test_options_override_the_preset_and_a_resumed_run_its_own(monkeypatch, config):
    chosen, resume = parse(
        monkeypatch, "--steps", 7, "--batch-size", 6, "--cosine", False, "--out", config.out
    )
    assert (chosen.steps, chosen.batch_size, chosen.cosine, resume) == (7, 6, False, False)
    train.train(config, resume=False)
    with pytest.raises(data.BadInput, match="holds a run already"):
        parse(monkeypatch, "--out", config.out)
    chosen, resume = parse(monkeypatch, "--resume", "--out", config.out, "--steps", 9)
    assert chosen == replace(config, steps=9) and resume


@pytest.mark.parametrize("change, message", [
    (dict(frames=4), "frames: 8 there, 4 here"),
    (dict(model="STDiT-XL/2"), "caption_length: 16 there, 120 here"),
    (dict(data="nowhere"), "nowhere is not there"),
])  # fmt: skip
def test_data_that_does_not_fit_the_run_is_refused(config, change, message):
    with pytest.raises(data.BadInput, match=message):
        train.train(replace(config, **change), resume=False)


@pytest.fixture(scope="session")
def run(toy, tmp_path_factory):
    """A finished run of two steps."""
    out = tmp_path_factory.mktemp("run")
    train.train(
        TrainConfig(
            data=str(toy / "cache_train"), out=str(out), **SHORT | dict(steps=2, image_share=0.0)
        ),
        resume=False,
    )
    return out


def test_sample_writes_films_that_hang_on_seed_and_prompt_alone(run, tmp_path, monkeypatch, capsys):
    def films(out, *options):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "sample.py",
                "--run",
                str(run),
                "--out",
                str(tmp_path / out),
                "--steps",
                "4",
                *options,
            ],
        )
        sample.main()
        return {file.name: file.read_bytes() for file in (tmp_path / out).iterdir()}

    (tmp_path / "prompts.txt").write_text("a blue square moving up\n\na red circle moving left\n")
    one = films("one", "--prompt", "a blue square moving up")
    two = films("two", "--prompts", str(tmp_path / "prompts.txt"), "--sampler", "ddim")
    again = films("again", "--prompt", "a blue square moving up")
    assert set(one) == {
        "00_a-blue-square-moving-up.mp4",
        "00_a-blue-square-moving-up.gif",
        "sheet.png",
    }
    names = "00_a-blue-square-moving-up", "01_a-red-circle-moving-left"
    assert set(two) == {"sheet.png"} | {f"{n}.{e}" for n in names for e in ("mp4", "gif")}
    assert (
        one == again and films("seed", "--prompt", "a blue square moving up", "--seed", "1") != one
    )
    assert data.read_frames(tmp_path / "one/00_a-blue-square-moving-up.mp4", 8, 1).shape == (
        8,
        3,
        64,
        64,
    )
    assert "4 steps of ddpm" in capsys.readouterr().out


@pytest.mark.parametrize("options, message", [
    (["--run", "nowhere", "--prompt", "a"], "nowhere holds no run"), ([], "nothing to film"),
    (["--prompts", "nowhere.txt"], "nowhere.txt is not there"),
    (["--prompt", "a", "--size", "40"], "size=40"),
    (["--prompt", "a", "--steps", "1"], "steps=1"),
    (["--prompt", "a", "--vae", "assets/t5"], "the vae of assets/t5"),
])  # fmt: skip
def test_bad_input_to_sample_gets_one_clear_line(run, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(
        sys, "argv", ["sample.py", "--run", str(run), "--out", str(tmp_path), *options]
    )
    with pytest.raises(data.BadInput, match=message) as error:
        sample.main()
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-50], lambda b: b[:-50] + b"x" + b[-49:], lambda b: b""]
)
def test_a_damaged_checkpoint_is_named_and_not_loaded(config, damage):
    train.train(replace(config, steps=3), resume=False)
    file = sample.newest_checkpoint(config.out) / "ema.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    for use in (lambda: sample.load_run(config.out), lambda: train.train(config, resume=True)):
        with pytest.raises((data.BadInput, BadWeights), match="step_00000003/ema.safetensors"):
            use()


def test_an_encoder_that_does_not_fit_the_run_is_refused(run, encoders):
    names = {"vae": "some/vae", "vae_fingerprint": "0123456789ab"}
    with pytest.raises(data.BadInput, match="does not fit the run.*some/vae"):
        sample.check_encoder(encoders[0], names, "vae")
    sample.check_encoder(encoders[0], sample.load_run(run)[1]["encoders"], "vae")


def test_bad_input_ends_with_exit_code_2_and_no_traceback():
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--data", "nowhere.csv", "--out", "nowhere"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "error: nowhere.csv is not there"
    )
    assert "Traceback" not in done.stderr and not Path("nowhere").exists()


def test_interval_is_wilsons():
    low, high = train.interval(9, 10)
    assert abs(low - 0.5958) < 1e-3 and abs(high - 0.9821) < 1e-3
    assert train.interval(0, 10)[0] < 1e-9
