"""Weights from elsewhere: names and shapes, every layout that load_weights takes, what it refuses,
and the two commands that use it.
"""

import json
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomize
from diffusers import PixArtTransformer2DModel
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import data
import sample
import train
from stdit import LAYOUTS, MODELS, BadWeights, STDiT, STDiTConfig, load_weights

TINY = STDiTConfig(depth=2, hidden_size=32, num_heads=4, caption_channels=24, caption_length=10)

D = 1152
RELEASED = {  # of STDiT-XL/2: Open-Sora v1's file, without its two position buffers
    "x_embedder.proj.weight": (D, 4, 1, 2, 2), "x_embedder.proj.bias": (D,),
    "t_embedder.mlp.0.weight": (D, 256), "t_embedder.mlp.0.bias": (D,),
    "t_embedder.mlp.2.weight": (D, D), "t_embedder.mlp.2.bias": (D,),
    "t_block.1.weight": (6 * D, D), "t_block.1.bias": (6 * D,),
    "y_embedder.y_embedding": (120, 4096),
    "y_embedder.y_proj.fc1.weight": (D, 4096), "y_embedder.y_proj.fc1.bias": (D,),
    "y_embedder.y_proj.fc2.weight": (D, D), "y_embedder.y_proj.fc2.bias": (D,),
    "final_layer.linear.weight": (32, D), "final_layer.linear.bias": (32,),
    "final_layer.scale_shift_table": (2, D),
}  # fmt: skip
RELEASED_BLOCK = {
    "scale_shift_table": (6, D),
    "attn.qkv.weight": (3 * D, D), "attn.qkv.bias": (3 * D,),
    "attn.proj.weight": (D, D), "attn.proj.bias": (D,),
    "attn_temp.qkv.weight": (3 * D, D), "attn_temp.qkv.bias": (3 * D,),
    "attn_temp.proj.weight": (D, D), "attn_temp.proj.bias": (D,),
    "cross_attn.q_linear.weight": (D, D), "cross_attn.q_linear.bias": (D,),
    "cross_attn.kv_linear.weight": (2 * D, D), "cross_attn.kv_linear.bias": (2 * D,),
    "cross_attn.proj.weight": (D, D), "cross_attn.proj.bias": (D,),
    "mlp.fc1.weight": (4 * D, D), "mlp.fc1.bias": (4 * D,),
    "mlp.fc2.weight": (D, 4 * D), "mlp.fc2.bias": (D,),
}  # fmt: skip


def test_xl_has_the_names_shapes_and_size_of_the_released_weights():
    with torch.device("meta"):
        model = STDiT(MODELS["STDiT-XL/2"])
    expected = dict(RELEASED)
    for i in range(28):
        expected |= {f"blocks.{i}.{name}": shape for name, shape in RELEASED_BLOCK.items()}
    assert {name: tuple(v.shape) for name, v in model.state_dict().items()} == expected
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 759_620_768
    assert sum(n for name, n in sizes.items() if "attn_temp" not in name) == 610_856_096


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """A folder with the layout of the Hub's PixArt-alpha: an image model of the toy's shape in
    shards, and the toy's encoders. No null caption in it.
    """
    folder = tmp_path_factory.mktemp("hub") / "pixart"
    pixart = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, num_layers=4, cross_attention_dim=128,
        caption_channels=64, sample_size=16,
    )  # fmt: skip
    randomize(pixart).save_pretrained(folder / "transformer", max_shard_size="2MB")
    (folder / "vae").symlink_to(data.ASSETS / "vae")
    (folder / "text_encoder").symlink_to(data.ASSETS / "t5")
    (folder / "tokenizer").symlink_to(data.ASSETS / "t5")
    return folder


@pytest.fixture
def hub(hub_folder, tmp_path, monkeypatch):
    """The same as "acme/pixart" of the Hub, fetched before; nothing else is there, and no network.

    -> the folder in which huggingface_hub keeps what it has fetched from there.
    """
    home = tmp_path / "hub"
    repo = home / "models--acme--pixart"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir()
    for part in hub_folder.iterdir():
        (snapshot / part.name).symlink_to(part)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    return snapshot


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------ what is read and written


@pytest.mark.parametrize("variant", ["full", "sequential", "parallel", "latte"])
def test_save_pretrained_and_from_pretrained(variant, tmp_path):
    config = replace(TINY, variant=variant, space_scale=(0.5, 1.0), time_scale=1.5)
    model = randomize(STDiT(config))
    model.save_pretrained(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    again = STDiT.from_pretrained(tmp_path / "model")
    assert again.config == config and same(again, model) and not again.training


def test_names_of_the_hub(hub, hub_folder):
    model, expected = (randomize(STDiT(MODELS["toy"]), seed=1) for _ in range(2))
    null = torch.ones(16, 64)
    load_weights(expected, hub_folder, lambda: null)
    load_weights(model, "acme/pixart", lambda: null)
    assert same(model, expected)
    expected.save_pretrained(hub)
    assert same(STDiT.from_pretrained("acme/pixart"), expected)
    again = randomize(STDiT(MODELS["toy"]))
    load_weights(again, "acme/pixart/model.safetensors")
    assert same(again, expected)


def test_of_a_run_the_average_is_taken_and_of_a_file_what_is_in_it(toy, tmp_path):
    run = train_toy(toy, tmp_path / "run", steps=2)
    folder = run / "checkpoints/step_00000002"
    ema, raw = (load_file(folder / f"{file}.safetensors") for file in ("ema", "model"))
    assert any(not torch.equal(ema[name], raw[name]) for name in ema)
    for source, file in ((run, "ema"), (folder, "ema"), (folder / "model.safetensors", "model")):
        model = randomize(STDiT(MODELS["toy"]))
        assert load_weights(model, source) == []
        expected = load_file(folder / f"{file}.safetensors")
        assert all(torch.equal(v, expected[name]) for name, v in model.state_dict().items())


def test_of_a_hub_repository_only_the_weights_are_fetched():
    """What is asked for, on lists of files like those of the repositories that the README names."""
    of_diffusers = ["model_index.json", "tokenizer/spiece.model", "vae/config.json",
                    "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json",
                    "text_encoder/model-00001-of-00002.safetensors",
                    "text_encoder/model.safetensors.index.json", "transformer/config.json",
                    "transformer/diffusion_pytorch_model.fp16.safetensors"]  # fmt: skip
    weights = [f"transformer/diffusion_pytorch_model{part}.safetensors"
               for part in ("", "-00001-of-00002", "-00002-of-00002")]  # fmt: skip
    weights += ["transformer/diffusion_pytorch_model.safetensors.index.json"]
    fetched = filter_repo_objects(of_diffusers + weights, allow_patterns=LAYOUTS)
    assert sorted(fetched) == sorted(weights)
    ours = ["config.json", "model.safetensors"]
    other = ["README.md", "model.bin", "v1.pth"]
    assert list(filter_repo_objects(ours + other, allow_patterns=LAYOUTS)) == ours


def test_a_null_caption_in_diffusers_format_is_found(hub_folder, tmp_path):
    """Early versions of diffusers stored it with the caption's projection."""
    folder = tmp_path / "transformer"
    shutil.copytree(hub_folder / "transformer", folder)
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    index["weight_map"]["caption_projection.y_embedding"] = "more.safetensors"
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"caption_projection.y_embedding": torch.ones(16, 64)}, folder / "more.safetensors")
    model = randomize(STDiT(MODELS["toy"]))
    load_weights(model, tmp_path)
    assert torch.equal(model.y_embedder.y_embedding, torch.ones(16, 64))


def test_new_temporal_weights_start_with_a_projection_of_zero(hub_folder):
    for variant, new in (("full", 0), ("sequential", 16), ("parallel", 16), ("latte", 36)):
        model = randomize(STDiT(replace(MODELS["toy"], variant=variant)))
        before = {name: v.clone() for name, v in model.state_dict().items()}
        names = load_weights(model, hub_folder, lambda: torch.ones(16, 64))
        assert len(names) == new and all("_temp" in name for name in names)
        for name in names:
            zero = "attn_temp.proj" in name and variant != "latte"
            assert torch.equal(model.state_dict()[name], before[name] * (not zero)), name


def test_the_null_caption_is_the_sources_or_t5_of_nothing(hub_folder, encoders, tmp_path):
    t5 = encoders[1]
    null = t5.null_caption()
    assert null.shape == (16, 64) and torch.equal(null[0], null[15])
    y, mask = t5.encode([""])
    model = randomize(STDiT(MODELS["toy"]))
    x, t = torch.randn(1, 4, 2, 8, 8), torch.tensor([500])
    with torch.no_grad():  # used whole it says the same as the empty string with its mask
        off = (model(x, t, null[None]) - model(x, t, y, mask)).abs().max()
    assert off < 1e-5, off  # fp32
    with pytest.raises(BadWeights, match="no null caption; give one"):
        load_weights(model, hub_folder)
    load_weights(model, hub_folder, t5.null_caption)
    assert torch.equal(model.y_embedder.y_embedding, null)
    model.save_pretrained(tmp_path)
    load_weights(model, tmp_path, lambda: pytest.fail("the source has a null caption"))


# ------------------------------------------------------------------------------ what is refused


class Code:
    """A pickle that would run something when it is read."""

    def __reduce__(self):
        return (Path.touch, (Path("it_ran"),))


def without(name):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors")

    return change


def cut(name):
    def change(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[:-1000])

    return change


def as_pth(content):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(content(weights), folder / "weights.pth")

    return change


def sharded(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"t_block.1.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BAD = {
    "cut short": (cut("model.safetensors"), "model.safetensors can't be read"),
    "a tensor missing": (without("blocks.1.mlp.fc2.bias"),
                         r"lacks 1 tensors \(blocks.1.mlp.fc2.bias\)"),
    "part of the temporal attention missing": (without("blocks.0.attn_temp.qkv.bias"),
                                               r"lacks 1 tensors \(blocks.0.attn_temp.qkv.bias\)"),
    "a pth cut short": (lambda f: (as_pth(dict)(f), cut("weights.pth")(f)), "weights.pth can't be"),
    "a pickle with code": (as_pth(lambda w: w | {"x": Code()}), "code besides, which is not run"),
    "a pickle of something else": (as_pth(lambda w: [1, 2]), "weights.pth can't be read"),
    "no torch file at all": (lambda f: (as_pth(dict)(f), (f / "weights.pth").write_text("hello")),
                             "weights.pth can't be read"),
    "unknown names": (as_pth(lambda w: {f"net.{k}": v for k, v in w.items()}),
                      r"lacks 46 tensors .*and has besides 54 tensors \(net\."),
    "a number for a tensor": (as_pth(lambda w: w | {"t_block.1.bias": torch.tensor(1.0)}),
                              r"t_block.1.bias has shape \[\], expected \[192\]"),
    "nothing nested": (as_pth(lambda w: {"ema": None, "state_dict": 3}), "lacks 46 tensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no files of weights"),
    "a missing shard": (sharded, "model-00001-of-00002.safetensors can't be read"),
    "a broken index": (lambda f: (sharded(f), (f / "model.safetensors.index.json").write_text("[")),
                       "index.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_get_one_clear_line_and_change_nothing(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    randomize(STDiT(TINY)).save_pretrained(tmp_path / "source")
    damage, message = BAD[case]
    damage(tmp_path / "source")
    check_refused(tmp_path / "source", message)
    assert not Path("it_ran").exists()


@pytest.mark.parametrize("shapes", [
    {"to_q": (16, 32), "to_k": (48, 32)}, {"to_k": (32, 16)}, {"to_v": ()},
])  # fmt: skip
def test_parts_that_only_add_up_to_the_right_shape_are_refused(shapes, tmp_path):
    theirs = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=2, cross_attention_dim=32,
        caption_channels=24, sample_size=16,
    ).state_dict()  # fmt: skip
    for part, shape in shapes.items():
        theirs[f"transformer_blocks.1.attn1.{part}.weight"] = torch.zeros(shape)
    save_file(theirs, tmp_path / "model.safetensors")
    model = randomize(STDiT(TINY), seed=3)
    before = {name: v.clone() for name, v in model.state_dict().items()}
    with pytest.raises(BadWeights, match=r"blocks.1.attn1.to_. has shape|to_..weight has shape"):
        load_weights(model, tmp_path, lambda: torch.zeros(10, 24))
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


@pytest.mark.parametrize("change, message", [
    (dict(depth=3), "has besides 19 tensors .*expected a sequential model, depth 2"),
    (dict(hidden_size=64), r"has shape \[.*\], expected \["),
    (dict(caption_length=12), r"y_embedder.y_embedding has shape \[12, 24\], expected \[10, 24\]"),
    (dict(variant="latte"), "has besides 10 tensors .*mlp_temp"),
    (dict(patch_size=(2, 2, 2)), r"x_embedder.proj.weight has shape \[32, 4, 2, 2, 2\]"),
])  # fmt: skip
def test_weights_of_another_model_are_refused(change, message, tmp_path):
    randomize(STDiT(replace(TINY, **change))).save_pretrained(tmp_path)
    check_refused(tmp_path, message)


@pytest.mark.parametrize("source", ["nowhere.pth", "no/such/folder", "/no/such/file", "acme/other"])
def test_a_source_that_is_not_there_gets_one_clear_line(source, hub):
    check_refused(source, "is not there; expected|neither a path here nor to be had from the Hub")


def check_refused(source, message):
    model = randomize(STDiT(TINY), seed=3)
    before = {name: v.clone() for name, v in model.state_dict().items()}
    with pytest.raises(BadWeights, match=message) as error:
        load_weights(model, source)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


# --------------------------------------------------------------------------------- the commands


def train_toy(toy, out, **options):
    short = dict(steps=1, batch_size=4, eval_every=9, films=0, image_share=0.0, workers=0)
    config = train.TrainConfig(
        data=str(toy / "cache_train"), out=str(out), **short | options
    )
    train.train(config)
    return out


def test_training_begins_with_weights_and_its_own_scales(toy, hub_folder, tmp_path, capsys):
    # with a learning rate of 0 a run has at its end what it began with
    options = dict(init=str(hub_folder), t5=str(hub_folder), lr=0.0)
    first = train_toy(toy, tmp_path / "first", **options)
    assert "16 tensors are new" in capsys.readouterr().out
    torch.manual_seed(0)  # as the run seeds it, so its new temporal weights are the same
    expected = STDiT(MODELS["toy"])
    load_weights(expected, hub_folder, data.T5("assets/t5", 16).null_caption)
    assert same(sample.load_run(first)[0], expected)
    options = dict(init=str(first), lr=0.0, space_scale=0.25, time_scale=1.5)
    second = train_toy(toy, tmp_path / "second", **options)
    assert "space_scale=0.25, time_scale=1.5 (stored: 0.125, 0.25)" in (
        capsys.readouterr().out)  # fmt: skip
    a, b = (sample.load_run(run)[0] for run in (first, second))
    assert same(a, b) and b.config == replace(MODELS["toy"], space_scale=0.25, time_scale=1.5)
    null = data.T5("assets/t5", 16).null_caption()
    assert torch.equal(b.y_embedder.y_embedding, null)  # stored with the run


@pytest.mark.parametrize("variant", ["full", "parallel", "latte"])
def test_every_variant_trains_and_films(variant, toy, tmp_path, monkeypatch):
    run = train_toy(
        toy, tmp_path / "run", variant=variant, checkpointing="all", steps=2, image_share=0.5
    )
    films = film(monkeypatch, tmp_path, "--run", run)
    assert films == ["00_a.gif", "00_a.mp4", "sheet.png"]


def film(monkeypatch, tmp_path, *options, out="films"):
    argv = ["sample.py", "--prompt", "a", "--steps", "2", "--out", tmp_path / out, *options]
    monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
    sample.main()
    return sorted(p.name for p in (tmp_path / out).iterdir())


@pytest.mark.parametrize("name", ["folder", "Hub"])
def test_films_from_released_weights(name, hub, hub_folder, tmp_path, monkeypatch, capsys):
    """As the README's line does it: weights from one place, all encoders from a folder like
    PixArt-alpha's. T5 is gone before the first step.
    """
    alive = []

    class Watched(data.T5):
        def __init__(self, *args):
            super().__init__(*args)
            alive.append(weakref.ref(self.model))

    def watched(*args, **options):
        assert alive.pop()() is None
        return sampled(*args, **options)

    sampled = sample.sample
    monkeypatch.setattr(sample, "T5", Watched)
    monkeypatch.setattr(sample, "sample", watched)
    source = hub_folder if name == "folder" else "acme/pixart"
    options = "--model", "toy", "--vae", source, "--t5", source, "--frames", 4, "--size", 64
    names = ["00_a.gif", "00_a.mp4", "sheet.png"]
    assert film(monkeypatch, tmp_path, "--weights", source, *options) == names
    assert "space_scale=0.125, time_scale=0.25 (none are stored)" in capsys.readouterr().out
    # Open-Sora's way: one .pth, under ema
    model = randomize(STDiT(MODELS["toy"]))
    torch.save({"ema": model.state_dict()}, tmp_path / "v1.pth")
    file = tmp_path / "v1.pth"
    assert film(monkeypatch, tmp_path, "--weights", file, *options, out="v1") == names
    assert not alive


@pytest.mark.parametrize("options, message", [
    (["--weights", "nowhere.pth"], "nowhere.pth is not there"),
    (["--weights", "PIXART"], "the model takes captions of 4096 channels"),
    (["--weights", "PIXART", "--model", "toys"], "model='toys' is unknown"),
    (["--weights", "PIXART", "--space-scale", "0"], "space_scale=0.0: expected more than 0"),
    (["--weights", "PIXART", "--model", "toy", "--size", "72"], "size=72 and width=72 by 16"),
])  # fmt: skip
def test_bad_weights_end_the_command_with_one_line(
    options, message, hub_folder, tmp_path, monkeypatch, capsys
):
    options = [hub_folder if o == "PIXART" else o for o in options]
    with pytest.raises(SystemExit) as stop:
        data.command(
            lambda: film(monkeypatch, tmp_path, *options, "--vae", hub_folder, "--t5", hub_folder),
            BadWeights,
        )
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in error[-1] and error[-1].startswith("error: ")
    assert not (tmp_path / "films").exists()


def test_saved_models_and_runs_keep_their_own_variant_and_scales(
    toy, tmp_path, monkeypatch, capsys
):
    encoders = "--vae", "assets/vae", "--t5", "assets/t5", "--frames", 2, "--size", 64
    config = replace(MODELS["toy"], variant="parallel", space_scale=0.3, time_scale=0.7)
    randomize(STDiT(config)).save_pretrained(tmp_path / "saved")
    film(monkeypatch, tmp_path, "--weights", tmp_path / "saved", *encoders)
    assert "parallel, space_scale=0.3, time_scale=0.7 (stored: 0.3, 0.7)" in capsys.readouterr().out
    run = train_toy(toy, tmp_path / "run")
    assert same(STDiT.from_pretrained(run), sample.load_run(run)[0])
    raw = run / "checkpoints/step_00000001/model.safetensors"
    film(monkeypatch, tmp_path, "--weights", run, out="a")  # knows everything
    film(monkeypatch, tmp_path, "--weights", raw.parent, out="b")
    film(monkeypatch, tmp_path, "--run", run, "--weights", raw, "--space-scale", 0.25, out="c")
    assert "space_scale=0.25, time_scale=0.25 (stored: 0.125, 0.25)" in capsys.readouterr().out
    files = [(tmp_path / out / "00_a.mp4").read_bytes() for out in "abc"]
    assert files[0] == files[1] != files[2]
    saved = "--weights", tmp_path / "saved", *encoders
    for source in (("--run", run), ("--weights", run), saved):
        with pytest.raises(data.BadInput, match="variant=latte: .* knows its own; omit it"):
            film(monkeypatch, tmp_path, *source, "--variant", "latte")


@pytest.mark.parametrize("content", ["[1]", "{", '{"caption_length": 3, "net": 1}', "{}"])
def test_from_pretrained_names_what_is_no_config(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadWeights, match=r"config.json") as error:
        STDiT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_alone_need_encoders(hub_folder, tmp_path, monkeypatch):
    with pytest.raises(data.BadInput, match="weights alone bring no vae: give --vae"):
        film(monkeypatch, tmp_path, "--weights", hub_folder)
