"""The training loop: the stream, exact resume, one process against two, faults, and the
command lines.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, broken_inside, randomize
from safetensors.torch import load_file

import data
import sample
import stdit
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
    source = {(row, position): {"row": row} for row in range(10) for position in range(40)}
    stream = train.Stream(source, list(range(10)), seed=0)
    epochs = [[stream[e * 10 + i]["row"] for i in range(10)] for e in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("world, micro_batch", [(1, 0), (1, 2), (2, 0), (2, 2), (4, 1), (4, 0)])
def test_processes_and_micro_batches_share_the_positions_of_a_step(world, micro_batch):
    config, taken = TrainConfig(batch_size=8, micro_batch=micro_batch), []
    n, B = train.split(config, world)
    for rank in range(world):
        for k in range(n):
            part = train.positions_of(5, k, config, train.Process(rank, world, "cpu"))
            assert len(part) == B
            taken += part
    assert sorted(taken) == list(range(40, 48))


@pytest.mark.parametrize("n, world", [(6, 1), (6, 2), (5, 3), (2, 4)])
def test_every_process_takes_its_part_of_a_list(n, world):
    items = list(range(n))
    parts = [train.Process(rank, world, "cpu").mine(items) for rank in range(world)]
    assert sum(parts, []) == items and max(map(len, parts)) - min(map(len, parts)) <= 1


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


def launch(config, processes=1, script=ROOT / "train.py", resume=False):
    """Start train.py, or a script in its place, with a configuration; -> the running process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    start = [*torchrun, str(processes)] if processes > 1 else [sys.executable]
    return subprocess.Popen([*start, str(script), *options_of(config), *["--resume"] * resume],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def assert_same_numbers(a, b, bound):
    """Losses, gradient norms and held-out losses of two runs, and their last weights. On other
    processes, sums are taken in another order: fp32 rounding, which a few steps multiply.
    """
    a_lines, b_lines = metrics_of(a), metrics_of(b)
    assert [m["step"] for m in a_lines] == [m["step"] for m in b_lines]
    for x, y in zip(a_lines, b_lines):
        assert x.keys() == y.keys()
        for name in {"loss", "mse", "vlb", "grad_norm"} & x.keys():
            assert abs(x[name] / y[name] - 1) < bound, (x, y)
        for p, q in zip(x.get("held_out", []), y.get("held_out", [])):
            assert abs(p / q - 1) < bound, (x, y)
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys()
    for name in a:  # AdamW divides by the gradient's size, so tiny gradients' rounding counts
        off = (a[name] - b[name]).norm() / a[name].norm().clamp(min=1e-3)
        assert off < 100 * bound, (name, off)


def test_two_processes_with_two_micro_batches_give_the_numbers_of_one(config, tmp_path):
    config = replace(config, steps=12, save_every=4, films=2, film_every=6, film_steps=2)
    two = replace(config, out=config.out + "2", micro_batch=1)
    process = launch(two, 2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    train.train(config)
    assert_same_numbers(config.out, two.out, 1e-5)
    for name in ("films/step_00000006.gif", "films.gif", "films.png"):
        assert (Path(two.out) / name).is_file()
    # from two processes back to one: it ends the same
    for name in ("step_00000008", "step_00000012"):
        shutil.rmtree(Path(two.out) / "checkpoints" / name)
    train.train(two, resume=True)
    assert_same_numbers(config.out, two.out, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes, micro_batch", [(2, 0), (4, 0), (4, 1), (2, 1)])
def test_any_number_of_processes_gives_the_numbers_of_one(config, processes, micro_batch):
    """1 x 8, 2 x 4, 4 x 2, 4 x 1 x 2, 2 x 1 x 4; then from 2 to 4 processes and back to 1."""
    config = replace(config, batch_size=8, steps=12, save_every=4)
    other = replace(config, out=config.out + "2", micro_batch=micro_batch)
    train.train(config)
    process = launch(other, processes)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same_numbers(config.out, other.out, 1e-5)
    for count, last in ((8 // processes, 4), (1, 8)):
        for folder in (Path(other.out) / "checkpoints").glob("step_*"):
            if int(folder.name[5:]) > last:
                shutil.rmtree(folder)
        process = launch(other, count, resume=True)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert_same_numbers(config.out, other.out, 1e-5)


# --- what may be restricted, and what may be recomputed or compiled


@pytest.mark.parametrize("trained, kinds", [
    ("temporal", {True}), ("not-temporal", {False}), ("not-cross", {True, False}),
])  # fmt: skip
def test_what_is_not_trained_stays_without_gradient_and_optimizer_state(
    config, trained, kinds, tmp_path
):
    model = randomize(train.STDiT(train.MODELS["toy"]))  # not zero, so that all could learn
    model.save_pretrained(tmp_path / "init")
    options = dict(trained=trained, image_share=0.0, steps=3, init=str(tmp_path / "init"))
    config = replace(config, **options)
    train.train(config)
    before, after = model.state_dict(), weights_of(config.out)
    learns = {name for name in before if train.TRAINED[trained](name) and "y_embedding" not in name}
    assert {"_temp" in name for name in learns} == kinds
    changed = {n for n in before if not torch.equal(before[n], after[f"model.{n}"])}
    moments = {n.removeprefix("optimizer.").rsplit(".", 1)[0] for n in after if "exp_avg_sq" in n}
    assert changed <= learns == moments and len(changed) > 0.8 * len(learns)
    assert all(torch.equal(before[n], after[f"ema.{n}"]) for n in before.keys() - learns)
    train.train(replace(config, steps=5), resume=True)
    after = weights_of(config.out)
    assert all(torch.equal(before[n], after[f"model.{n}"]) for n in before.keys() - learns)


@pytest.mark.parametrize("options", [
    ["checkpointing"],
    pytest.param(["compile"], marks=pytest.mark.slow),
    pytest.param(["checkpointing", "compile"], marks=pytest.mark.slow),
])  # fmt: skip
def test_recomputed_or_compiled_blocks_give_the_same_losses(config, options):
    if "compile" in options and not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler here")
    from torch._dynamo.utils import counters

    config = replace(config, steps=4, eval_every=4, image_share=0.0, save_every=4)
    values = {option: option == "compile" or "but-products" for option in options}
    if options == ["checkpointing"]:
        values["checkpointing"] = "all"
    other = replace(config, out=config.out + "2", **values)
    torch.compiler.reset(), counters.clear()
    train.train(config), train.train(other)
    assert_same_numbers(config.out, other.out, 1e-4 if "compile" in options else 1e-9)
    assert (counters["stats"]["unique_graphs"] > 0) == ("compile" in options)


def test_checkpointing_keeps_less_and_the_prediction_says_so():
    def kept(config):
        """Bytes that a forward pass keeps for the backward pass."""
        model, held = train.STDiT(train.MODELS["toy"]), {}
        if config.checkpointing != "none":
            train.checkpoint_blocks(model)

        def hold(v):
            held[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
            return v

        x = torch.randn(16, *train.latent_shape(config))
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda v: v):
            out = model(x, torch.zeros(16), torch.randn(16, 16, 64))
        return sum(held.values()) - 4 * sum(p.numel() for p in model.parameters()), out

    process = train.Process(0, 1, "cpu")
    plain, less = TrainConfig(), TrainConfig(checkpointing="all")
    bytes_plain, bytes_less = kept(plain)[0], kept(less)[0]
    assert bytes_less < 0.35 * bytes_plain
    model = train.STDiT(train.MODELS["toy"])
    fixed = 20 * sum(p.numel() for p in model.parameters())
    predicted = 1e9 * train.predicted_memory(plain, model, process) - fixed
    assert 0.8 < predicted / bytes_plain < 1.1  # it leaves out the embedders and the last layer
    predicted_less = 1e9 * train.predicted_memory(less, model, process) - fixed
    assert bytes_less < predicted_less < 0.5 * predicted  # the inside of one block comes on top


# --- presets


def test_a_finished_run_resumes_to_nothing(config):
    train.train(config)
    before = {p: p.read_bytes() for p in Path(config.out).rglob("*") if p.is_file()}
    train.train(config, resume=True)
    assert {p: p.read_bytes() for p in Path(config.out).rglob("*") if p.is_file()} == before


def test_the_stages_are_v1s_and_corresponding_places_agree():
    stages = ["16x256x256", "16x256x256-hq", "16x512x512", "64x512x512"]
    assert [train.PRESETS[s].init for s in stages][1:] == [train.PRESETS[s].out for s in stages][:3]
    assert [train.PRESETS[s].batch_size for s in stages[:3]] == [512, 512, 128]
    for stage in stages:
        config = train.PRESETS[stage]
        train.check(replace(config, data="somewhere"), world=8)
        assert f"{config.frames}x{config.size}" in stage and config.lr == 2e-5
    small, large = (train.model_config(train.PRESETS[s]) for s in (stages[1], stages[2]))
    a = stdit.spatial_embedding(16, 16, 1152, small.space_scale, torch.device("cpu"))
    b = stdit.spatial_embedding(32, 32, 1152, large.space_scale, torch.device("cpu"))
    assert torch.equal(a.view(16, 16, -1), b.view(32, 32, -1)[::2, ::2])
    short, long = (train.PRESETS[s] for s in stages[2:])
    for source_frame in (0, 6, 12, 30):  # the same moment of the source, at stride 3 and at 2
        embeddings = [
            stdit.temporal_embedding(40, 1152, config.time_scale, torch.device("cpu"))[
                source_frame // config.stride
            ]
            for config in (short, long)
        ]
        assert torch.equal(*embeddings)


@pytest.mark.parametrize("name, limit", [
    ("16x256x256", 80), ("16x512x512", 80), ("64x512x512", 80), ("16x256x256-24gb", 24),
])  # fmt: skip
def test_presets_fit_their_gpu_by_prediction(name, limit, monkeypatch):
    """As on CUDA: bf16 autocast. One block stands for all 28. pytest -s shows the figures."""
    monkeypatch.setattr(train, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    config = train.PRESETS[name]
    model = train.STDiT(replace(train.model_config(config), depth=1))
    for weight, p in model.named_parameters():
        p.requires_grad_(train.TRAINED[config.trained](weight))
    block = sum(p.numel() * (4 + 16 * p.requires_grad) for p in model.blocks.parameters())
    model.config = replace(model.config, depth=28)
    predicted = train.predicted_memory(config, model, train.Process(0, 8, "cpu")) + 27 * block / 1e9
    print(f"{name}: {predicted:.0f} GB of {limit} by prediction")
    assert 0.1 * limit < predicted < 0.9 * limit


def test_flops_of_a_token_are_those_of_the_matrices():
    """64x512x512: 1.34 GFLOP forward in matrices, 0.16 in attention; three times for training."""
    cost = train.Cost(train.PRESETS["64x512x512"], train.Process(0, 1, "cpu"))
    assert cost.tokens == 64 * 32 * 32
    assert abs(cost.flops / cost.tokens / (3 * (1.34e9 + 0.16e9)) - 1) < 0.02
    assert cost.of(2.0) == {"tokens_per_second": 2 * 65536}  # on the CPU there is no peak to name


# --- faults


def test_a_gradient_that_is_not_finite_skips_the_step_and_many_end_the_run(config, monkeypatch):
    config, loss = replace(config, image_share=0.0), train.training_loss

    def sometimes(*args):
        step = args[5].start // config.batch_size
        return loss(*args) * (float("nan") if step in bad else 1)

    monkeypatch.setattr(train, "training_loss", sometimes)
    bad = {2, 5}
    train.train(config)
    lines = [m for m in metrics_of(config.out) if "loss" in m]
    assert [m["skipped"] for m in lines] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert all(torch.isfinite(v).all() for v in weights_of(config.out).values())
    bad, other = set(range(4, 99)), replace(config, out=config.out + "2", bad_steps=3)
    with pytest.raises(data.BadInput, match="3 steps in a row .* checkpoint is .*step_00000006"):
        train.train(other)
    assert all(torch.isfinite(v).all() for v in weights_of(other.out).values())


def test_what_one_rank_meets_all_ranks_know(config, tmp_path):
    """One of two processes has a gradient that is not a number, then a sample that can't be read:
    both skip the step, both stop, the first saves, and the message is that of the second.
    """
    script = tmp_path / "broken.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import data, train
loss, read = train.training_loss, train.Stream.__getitem__
def training_loss(*args):
    step = args[5].start // args[0].batch_size
    return loss(*args) * (float("nan") if step == 2 and args[5].start % 4 else 1)
def getitem(self, position):
    if position == 6 * 4 + 3:
        raise data.BadInput("shard_7 is damaged")
    return read(self, position)
train.training_loss, train.Stream.__getitem__ = training_loss, getitem
data.command(train.main)
""")
    process = launch(replace(config, save_every=100, eval_every=100), 2, script)
    output, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and "error [rank 1]: shard_7 is damaged" in errors
    assert "step 3: its gradient is nan; skipped (1 in a row)" in output
    assert "stopped after step 6, saved" in output and "Traceback (most recent" not in output
    assert sample.newest_checkpoint(config.out).name == "step_00000006"
    assert [m["skipped"] for m in metrics_of(config.out) if "loss" in m] == [0, 0, 1, 1, 1, 1]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_rank_that_is_killed_ends_the_other_and_the_run_goes_on(config):
    options = dict(steps=300, save_every=2, eval_every=1000, cosine=False, image_share=0.0)
    config = replace(config, **options)
    process = launch(config, 2)
    while process.poll() is None and not sample.newest_checkpoint(config.out):
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    step = int(sample.newest_checkpoint(config.out).name[5:])
    assert process.returncode != 0 and 0 < step < 290
    alone = replace(config, out=config.out + "2", steps=step + 4)
    train.train(replace(config, steps=step + 4), resume=True)
    train.train(alone)
    assert_same_numbers(config.out, alone.out, 1e-4)  # its metrics have no gap and no double


def test_a_failure_with_data_workers_ends_and_leaves_no_process(config, tmp_path):
    """Workers outlive the signal by which Python would end them; they must not outlive its end."""
    script = tmp_path / "broken.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import data, train
def fails(*args):
    raise RuntimeError("out of memory, say")
train.training_loss = fails
if __name__ == "__main__":
    data.command(train.main)
""")
    process = launch(replace(config, workers=1), 1, script)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "out of memory, say" in errors


def test_a_held_out_clip_that_cannot_be_decoded_is_replaced(config, toy):
    broken_inside(toy / "held_out/broken.mp4", torch.zeros(8, 3, 64, 64, dtype=torch.uint8))
    table = toy / "some_held_out.csv"
    table.write_text("path,text\nheld_out/broken.mp4,a\nheld_out/00002.mp4,b\n")
    train.train(replace(config, held_out=str(table), steps=1))
    assert all(0.5 < b < 2 for m in metrics_of(config.out) for b in m.get("held_out", []))


def test_a_damaged_shard_in_mid_epoch_saves_and_stops(config, toy, tmp_path):
    """... and once the shard is mended, the run ends as if nothing had been."""
    cache = shutil.copytree(toy / "cache_train", tmp_path / "cache")
    config = replace(config, data=str(cache), out=str(tmp_path / "a"))
    (shard,) = cache.glob("shard_*")
    whole = shard.read_bytes()
    train.train(config)
    broken = replace(config, out=str(tmp_path / "b"))
    data.open_shard.cache_clear()
    shard.write_bytes(whole[:-5000] + bytes(5000))  # the last samples
    with pytest.raises(data.BadInput, match="shard_00000.*is damaged"):
        train.train(broken)
    step = int(sample.newest_checkpoint(broken.out).name[5:])
    assert 0 < step < 8 and len([m for m in metrics_of(broken.out) if "loss" in m]) == step
    data.open_shard.cache_clear()
    shard.write_bytes(whole)
    train.train(broken, resume=True)
    assert_same_weights(config.out, broken.out)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on files there")
def test_a_full_disk_leaves_the_checkpoint_before_it_and_says_so(config):
    import resource

    config = replace(config, save_every=3, cosine=False)  # so that 3 of 3 steps are 3 of 8
    config = replace(config, image_share=0.0)
    alone = replace(config, steps=8, out=config.out + "2")
    train.train(alone)
    train.train(replace(config, steps=3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))  # a model has 6 MB
    try:
        with pytest.raises(data.BadInput, match="step_00000006 can't be written.*step_00000003"):
            train.train(replace(config, steps=8), resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = Path(config.out) / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step_00000003"]
    train.train(replace(config, steps=8), resume=True)
    assert_same_weights(config.out, alone.out)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM there")
def test_sigterm_finishes_the_step_saves_and_exits_0(config):
    config = replace(config, steps=400, save_every=1000, eval_every=1000)
    process = launch(config)
    while process.poll() is None and len(train.read_metrics(config.out)) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    step = int(sample.newest_checkpoint(config.out).name[5:])
    assert process.returncode == 0 and 0 < step < 400
    assert f"stopped after step {step}, saved; go on: --resume --out {config.out}" in output
    assert [m["step"] for m in metrics_of(config.out)] == list(range(1, step + 1))


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    ["--signal", "KILL"], ["--signal", "TERM"],
    ["--signal", "KILL", "--processes", "2", "--micro_batch", "1", "--workers", "2"],
    ["--signal", "TERM", "--processes", "2", "--micro_batch", "1", "--workers", "2"],
])  # fmt: skip
def test_five_interruptions_leave_no_trace(options, tmp_path):
    """python -m pytest -m slow -k interruptions; see tests/kill_loop.py, which also does 50."""
    script = Path(__file__).with_name("kill_loop.py")
    done = subprocess.run([sys.executable, script, "--kills", "5", "--out", tmp_path, *options],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_training_from_clips_with_a_data_worker(config, toy, capsys):
    """Encoders in the loop, a clip that can't be decoded, a spawned worker: it goes on."""
    broken_inside(toy / "train/broken.mp4", torch.zeros(8, 3, 64, 64, dtype=torch.uint8))
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
    assert [m["replaced"] for m in metrics_of(config.out) if "loss" in m][-1] > 0


def test_caption_accuracy_counts_what_the_detector_sees(config, encoders, monkeypatch):
    """Films drawn instead of sampled are all right; reversed, all but their direction is."""
    model, (vae, t5) = train.STDiT(train.MODELS["toy"]), encoders

    def drawn(model, vae, y, mask, keys, shape, batch, flip=False):
        clips = [data.draw_clip(words(key[2]), data.keyed_generator(*key)) for key in keys]
        return [clip.flip(0) if flip else clip for clip in clips]

    def words(prompt):
        return tuple(prompt.split()[i] for i in (1, 2, 4))

    monkeypatch.setattr(sample, "film", drawn)
    shape = train.latent_shape(config)
    right = sample.caption_accuracy(model, vae, t5, (1, 2), 0, shape)
    assert right == [42] * 5 + [12] * 5
    parts = [sample.caption_accuracy(model, vae, t5, (1, 2), 0, shape, r, 2) for r in range(2)]
    assert [a + b for a, b in zip(*parts)] == right
    wrong = sample.caption_accuracy(model, vae, t5, (0, 2), 0, shape, flip=True)
    assert wrong == [0] * 5 + [12, 0, 12, 12, 0]
    assert "0.0% of 12 films" in sample.describe(wrong)


# --- the command lines, and what they say to bad input


def parse(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    return train.configuration(*train.parse_command_line())


@pytest.mark.parametrize("options, message", [
    (["--lerning_rate", "1"], "unknown option --lerning_rate"),
    (["--batchsize", "8"], "nearest: --batch_size"),
    (["--preset", "tiy"], "unknown preset 'tiy'; nearest: toy"),
    (["--model", "STDiT-XL"], "nearest: STDiT-XL/2"),
    (["--size", "72"], "size=72 must be a multiple of 16 .* try --size"),
    (["--steps", "0"], "steps=0"),
    (["--film_steps", "1"], "film_steps=1"),
    (["--beta2", "1"], "beta2=1.0: expected 0 to 0.99999"),
    (["--frames", "1"], "the toy is about motion"),
    (["--drop_caption", "1.5"], "drop_caption=1.5"),
    (["--batch_size", "10", "--micro_batch", "4"], "micro_batch 4; try --batch_size 12"),
    (["--init", "nowhere"], "nowhere is not there"),
    (["--trained", "spatial"], "trained='spatial' is unknown"),
    (["--trained", "temporal"], "trained=temporal needs image_share=0"),
    (["--preset", "16x512x512", "--init", ""], "no data: give --data"),
])  # fmt: skip
def test_bad_options_get_one_clear_line(monkeypatch, options, message):
    with pytest.raises((data.BadInput, BadWeights), match=message) as error:
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
    chosen, resume = parse(monkeypatch, "--resume", "--out", config.out + "-new")
    assert not resume and chosen.out == config.out + "-new"  # there is none yet: it begins
    for name, value in (("t_std", 2), ("batch_size", 8), ("seed", 1), ("variant", "full")):
        with pytest.raises(data.BadInput, match=f"{name}=.*; for another, start a new run"):
            parse(monkeypatch, "--resume", "--out", config.out, f"--{name}", value)
    with pytest.raises(data.BadInput, match="has done 8; ask for more"):
        parse(monkeypatch, "--resume", "--out", config.out, "--steps", 7)


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
    low, high = sample.interval(9, 10)
    assert abs(low - 0.5958) < 1e-3 and abs(high - 0.9821) < 1e-3
    assert sample.interval(0, 10)[0] < 1e-9
