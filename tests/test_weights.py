"""Weights: the released names and shapes, conversion of every known source, and sample.load_model.
Agreement of converted networks with diffusers' is in test_exact.py.
"""

import json
import shutil
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, randomize
from diffusers import LatteTransformer3DModel, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

import data
import sample
import train
from data import UserError
from stdit import BLOCKS, MODELS, STDiT

sys.path.insert(0, str(ROOT / "tools"))
import convert_weights  # noqa: E402
from convert_weights import convert_state_dict  # noqa: E402

TOY, NULL = MODELS["toy"], torch.ones(16, 64)
# The toy's shape in diffusers' terms, for PixArt and for Latte.
SHAPE = dict(num_attention_heads=4, attention_head_dim=32, cross_attention_dim=128, num_layers=4)
SHAPE |= dict(caption_channels=64, sample_size=16, in_channels=4, out_channels=8, patch_size=2)
LATTE = dict(num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_eps=1e-6, video_length=2)
LATTE |= dict(norm_elementwise_affine=False, activation_fn="gelu-approximate", attention_bias=True)

D = 1152
LINEAR = {  # of STDiT-XL/2 in Open-Sora v1's file: weight [out, in], bias [out]
    "t_embedder.mlp.0": (D, 256),
    "t_embedder.mlp.2": (D, D),
    "t_block.1": (6 * D, D),
    "y_embedder.y_proj.fc1": (D, 4096),
    "y_embedder.y_proj.fc2": (D, D),
    "final_layer.linear": (32, D),
    "x_embedder.proj": (D, 4, 1, 2, 2),
}
LINEAR_BLOCK = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D)}
LINEAR_BLOCK |= {"attn_temp.qkv": (3 * D, D), "attn_temp.proj": (D, D), "mlp.fc2": (D, 4 * D)}
LINEAR_BLOCK |= {"cross_attn.q_linear": (D, D), "cross_attn.kv_linear": (2 * D, D)}
LINEAR_BLOCK |= {"cross_attn.proj": (D, D)}


def test_xl_has_the_names_and_shapes_of_the_released_weights():
    with torch.device("meta"):
        model = STDiT(MODELS["STDiT-XL/2"])
    linear, blocks = dict(LINEAR), [f"blocks.{i}." for i in range(28)]
    linear |= {block + name: shape for block in blocks for name, shape in LINEAR_BLOCK.items()}
    expected = {f"{name}.weight": shape for name, shape in linear.items()}
    expected |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    expected |= {f"{block}scale_shift_table": (6, D) for block in blocks}
    expected |= {"final_layer.scale_shift_table": (2, D), "y_embedder.y_embedding": (120, 4096)}
    assert {name: tuple(v.shape) for name, v in model.state_dict().items()} == expected


# --------------------------------------------------------------------------------------- conversion
@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    """A diffusers folder as PixArt-alpha's on the Hub: an image model of the toy's shape in shards
    and the toy's encoders, without a null caption.
    """
    folder = tmp_path_factory.mktemp("diffusers") / "pixart"
    model = randomize(PixArtTransformer2DModel(**SHAPE))
    model.save_pretrained(folder / "transformer", max_shard_size="2MB")
    assert len(list((folder / "transformer").glob("*-0000*"))) > 1
    (folder / "vae").symlink_to(ROOT / "assets/vae")
    for part in ("text_encoder", "tokenizer"):
        (folder / part).symlink_to(ROOT / "assets/t5")
    return folder


@pytest.fixture
def hub(pixart, tmp_path, monkeypatch):
    """The same as acme/pixart in the cache of the Hub; nothing else is there, and no network."""
    repo = tmp_path / "hub/models--acme--pixart"
    snapshot = repo / "snapshots" / ("0" * 40)
    for folder in (repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs/main").write_text("0" * 40)
    for part in pixart.iterdir():
        (snapshot / part.name).symlink_to(part)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def run(monkeypatch, main, *argv):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, argv)])
    main()


def convert(monkeypatch, source, out, *options):
    """The command -> the state dict of the model it wrote."""
    run(monkeypatch, convert_weights.main, source, "--out", out, "--model", "toy", *options)
    return sample.load_model(out).state_dict()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def image_model(weights):
    """As in PixArt-alpha's .pth: no temporal attention, a Conv2d, a position buffer."""
    weights = {name: v for name, v in weights.items() if "_temp" not in name}
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"][:, :, 0]
    return {"state_dict": weights | {"pos_embed": NULL}}


FILES = {
    "Open-Sora v1": lambda w: w | {"pos_embed": NULL, "pos_embed_temporal": NULL},
    "PixArt-alpha": image_model,
    "ema": lambda w: {"ema": w, "model": {}, "step": 3},
}


@pytest.mark.parametrize("kind", [*FILES, "safetensors", "Hub file"])
def test_files_in_our_names(kind, tmp_path, monkeypatch, hub):
    expected, source = randomize(STDiT(TOY)).state_dict(), tmp_path / f"weights.{kind}"
    save = save_file if kind == "safetensors" else torch.save
    save(FILES.get(kind, dict)(expected), source)
    if kind == "Hub file":
        shutil.move(source, hub / "weights.pth")
        source = "acme/pixart/weights.pth"
    found = convert(monkeypatch, source, tmp_path / "out", "--t5", "nowhere")  # T5 is not loaded
    if kind == "PixArt-alpha":
        expected |= {name: v for name, v in found.items() if "_temp" in name}  # tested below
    assert_same(found, expected)


@pytest.mark.parametrize("kind", ["folder", "transformer", "Hub", "Latte", "null caption"])
def test_diffusers_folders(kind, pixart, hub, encoders, tmp_path, monkeypatch):
    (y, mask), t5, variant = encoders[1].encode([""]), "assets/t5", "sequential"
    null = y[0, mask[0]].expand(16, -1)
    sources = {"folder": pixart, "transformer": pixart / "transformer", "Hub": "acme/pixart"}
    source, theirs = sources.get(kind, tmp_path), randomize(PixArtTransformer2DModel(**SHAPE))
    if kind == "Latte":
        theirs, variant = randomize(LatteTransformer3DModel(**SHAPE, **LATTE)), "latte"
    theirs.save_pretrained(tmp_path / "transformer")
    if kind == "null caption":
        file, t5, null = tmp_path / f"transformer/{convert_weights.WEIGHTS}", "nowhere", NULL
        save_file(load_file(file) | {"caption_projection.y_embedding": NULL}, file)
    options = "--t5", t5, "--variant", variant, "--space-scale", 0.125, "--time-scale", 0.25
    found = convert(monkeypatch, source, tmp_path / "out", *options)
    config = replace(TOY, variant=variant)
    assert_same(found, convert_state_dict(theirs.state_dict(), config, null))
    assert sample.load_model(tmp_path / "out").config == config
    vae = str(source) if kind in ("folder", "Hub") else "PixArt-alpha/PixArt-XL-2-512x512"
    assert json.loads((tmp_path / "out/sample.json").read_text())["vae"] == vae
    assert not list(tmp_path.glob(".*"))  # no temporary folder is left


@pytest.mark.parametrize("variant, new", [*zip(BLOCKS, (16, 16, 0, 36))])
def test_new_temporal_weights_are_seeded_and_their_projection_is_zero(variant, new, pixart):
    config, weights = replace(TOY, variant=variant), convert_weights.read_source(pixart)
    before = torch.get_rng_state()
    found = convert_state_dict(weights, config, NULL)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    fresh = STDiT(config).state_dict()
    temporal = [name for name in fresh if "_temp" in name]
    assert len(temporal) == new and all(torch.equal(found[n], fresh[n]) for n in temporal)
    projections = [found[n] for n in temporal if n.endswith("attn_temp.proj.weight")]
    assert all((v == 0).all() == (variant != "latte") for v in projections)
    assert all(not torch.equal(found[n], fresh[n]) for n in fresh if n not in temporal)


class Code:
    """A pickle that would run something when it is read."""

    def __reduce__(self):
        return (Path.touch, (Path("it_ran"),))


def with_tensor(name, value):
    return lambda w: w | {name: value}


REFUSED = {  # change of a state dict, message
    "missing": (lambda w: {n: w[n] for n in w if "0.attn_temp.qkv.b" not in n}, "lacks 1 tensors"),
    "extra": (with_tensor("net.0", NULL), "also has 1 tensors, e.g. net.0"),
    "shape": (with_tensor("y_embedder.y_embedding", NULL[:12]), r"shape \[12, .* need \[16, 64\]"),
    "code": (with_tensor("x", Code()), "a pickle with code: not run"),
}


def assert_refused(use, message):
    with pytest.raises(UserError, match=message) as error:
        use()
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("case", REFUSED)
def test_conversion_refuses_other_weights(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, message = REFUSED[case]
    torch.save(change(STDiT(TOY).state_dict()), "weights.pth")
    options = "--t5", ROOT / "assets/t5"
    assert_refused(lambda: convert(monkeypatch, "weights.pth", "out", *options), message)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pth"]  # no output, and no code ran


@pytest.mark.parametrize("suffix, save", [("pth", torch.save), ("safetensors", save_file)])
def test_conversion_refuses_what_is_damaged_or_nowhere(suffix, save, tmp_path, monkeypatch):
    file = tmp_path / f"weights.{suffix}"
    save(STDiT(TOY).state_dict(), file)
    file.write_bytes(file.read_bytes()[:-1000])
    cases = {file: "cannot be read", tmp_path: "expected transformer/diffusion_p"}
    cases["acme/other"] = "not a local path, and could not be"
    for source, message in cases.items():
        with pytest.raises(UserError, match=f"{source}.*{message}"):
            convert(monkeypatch, source, tmp_path / "out")


# ------------------------------------------------------------------ sample.load_model and sample.py
def test_a_run_a_checkpoint_and_a_hub_name_are_loaded(toy, hub, tmp_path):
    options = {"steps": 2, "save_every": 1, "num_samples": 0, "batch_size": 4, "compile": False}
    train.train(train.replace(train.TOY, data=str(toy / "train"), out=str(tmp_path), **options))
    old, new = (tmp_path / f"checkpoints/step_{step:08d}" for step in (1, 2))
    for file in ("config.json", "model.safetensors"):
        shutil.copy(new / file, hub)
    for source, folder in ((tmp_path, new), (old, old), ("acme/pixart", new)):
        ema = load_file(folder / "model.safetensors")
        assert_same(sample.load_model(source).state_dict(), ema)
    raw = torch.load(new / "training.pt")["model"]
    assert any(not torch.equal(raw[name], ema[name]) for name in ema)


def test_load_model_refuses_other_folders(hub, tmp_path):
    def refused(message, source=tmp_path):
        assert_refused(lambda: sample.load_model(source), message)

    refused("acme/other is not a local folder, and could not be downloaded", "acme/other")
    refused("lacks config.json or model.safetensors; tools/convert_weights.py", "acme/pixart")
    STDiT(TOY).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"net.0": NULL}, file)
    refused('does not fit the network STDiTConfig.*Unexpected key.s. in state_dict: "net.0"')
    file.write_bytes(file.read_bytes()[:1000])
    refused("does not fit the network STDiTConfig.*")
    (tmp_path / "config.json").write_text('{"d_model": 64}')
    refused(r"config.json is not that of an STDiT, it has .'d_model'.")


def test_sampling_from_released_weights(hub, tmp_path, monkeypatch, capsys):
    """As in the README: convert a Hub name, then sample with its encoders; T5 is freed by then."""
    models, generate, out = [], sample.generate, tmp_path / "samples"

    def load_t5(*args, **options):
        t5 = T5(*args, **options)
        models.append(weakref.ref(t5.model))
        return t5

    def generate_without_t5(*args, **options):
        assert models.pop()() is None
        return generate(*args, **options)

    convert(monkeypatch, "acme/pixart", tmp_path / "w", "--size", 64, "--frames", 4)
    T5 = data.T5
    monkeypatch.setattr(data, "T5", load_t5)
    monkeypatch.setattr(sample, "generate", generate_without_t5)
    options = "--prompt", "a", "--steps", 2, "--space-scale", 0.25, "--out", out
    run(monkeypatch, sample.main, "--weights", tmp_path / "w", *options)
    assert data.read_frames(out / "00_a.mp4", 4).shape == (4, 3, 64, 64) and not models
    printed = capsys.readouterr().out
    assert "space_scale=0.25" in printed and "guidance 7\n" in printed
