"""Crops, lists of clips, captions, the latent cache, the toy and its detector."""

import copy
import errno
import io
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_close
from safetensors.torch import load_file
from test_clips import drawing, encode

import data

LIGHT = torch.tensor([1.0, 0.9] * 4).view(8, 1, 1, 1)  # every other frame is darker


# ---------------------------------------------------------------------------- crops, lists of clips
def test_temporal_crops_start_anywhere_that_leaves_room(tmp_path):
    path, starts = encode(tmp_path / "a.mp4", drawing(12)), set()
    whole = data.read_frames(path, 12)
    for seed in range(60):
        crop = data.read_frames(path, 4, 3, torch.Generator().manual_seed(seed))
        starts |= {i for i in range(12) if torch.equal(crop, whole[i : i + 10 : 3])}
    assert starts == {0, 1, 2}
    assert torch.equal(data.read_frames(path, 4, 3), whole[1:11:3])  # without a generator: middle


@pytest.mark.parametrize("H, W", [(64, 64), (90, 160), (160, 90), (50, 200)])
@pytest.mark.parametrize("height, width", [(64, 64), (32, 48)])
def test_center_crop_and_resize_keeps_the_center_and_the_aspect_ratio(H, W, height, width):
    """A disk in the center stays a disk in the center."""

    def distance(H, W):  # from the center, in pixels: [H, W]
        y, x = torch.arange(H)[:, None] - (H - 1) / 2, torch.arange(W) - (W - 1) / 2
        return (x**2 + y**2).sqrt()

    frames = (distance(H, W) < min(H, W) / 4).to(torch.uint8).mul(255).expand(2, 3, H, W)
    out = data.center_crop_and_resize(frames, height, width)
    assert out.shape == (2, 3, height, width) and out.dtype == torch.uint8
    outside = distance(height, width) - min(H, W) / 4 / min(H / height, W / width)
    assert out[..., outside < -2].min() > 250 and out[..., outside > 2].max() < 5  # else blurred


def test_a_crop_has_at_least_one_pixel():
    line = torch.zeros(3, 1, 1000, dtype=torch.uint8)  # a quarter of a pixel has this aspect ratio
    assert data.center_crop_and_resize(line, 64, 16).shape == (3, 64, 16)


def test_resizing_averages_fine_patterns():
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(3, 96, 48)  # [3, 96, 96]
    gray = data.center_crop_and_resize(stripes, 32, 32)[..., 1:-1].int()
    assert (gray - 127).abs().max() < 20  # weights of 4/9 and 5/9; without antialiasing 0 and 255


CAPTIONS = {
    "Sunset &amp; sea,   <b>in 4K</b>\n https://x.example/a.mp4?b=1": "sunset & sea, in 4k",
    '<p class="a b">a red<br/>ball</p>': "a red ball",
    "a dog (see https://example.org/z), running": "a dog (see ), running",
    "I <3 my dog who runs -> jumps": "i <3 my dog who runs -> jumps",
    "temperature < 0 outside, but > 20 inside": "temperature < 0 outside, but > 20 inside",
    "people <age 5 and over 60>": "people <age 5 and over 60>",
}


@pytest.mark.parametrize("text", CAPTIONS)
def test_captions_lose_tags_and_addresses_alone(text):
    assert data.clean_caption(text) == CAPTIONS[text]
    assert data.clean_caption(CAPTIONS[text]) == CAPTIONS[text]


def test_tables_are_read_with_long_quoted_texts_and_spaces_in_the_header(tmp_path):
    table, text = tmp_path / "clips.csv", "a, b\n" * 50_000
    table.write_text(f'id, text,path \n1,"{text}",a.mp4\n\n2,"a ""b""",c/d.mp4\n', "utf-8-sig")
    paths, captions = zip(*data.list_clips(table))
    assert paths == (tmp_path / "a.mp4", tmp_path / "c/d.mp4")
    assert captions == (" ".join(text.split()), 'a "b"')


BAD_TABLES = {
    b"": r"line 1: needs path,text; it has \[\]",
    b"path,caption\na.mp4,b\n": r"line 1: needs path,text; it has \['path', 'caption'\]",
    b"path,text\n": "lists no clips",
    b"path,id,text\na.mp4,1,red, blue\n": "line 2: no path, .* commas without quotes",
    b"path,text\na.mp4\n": "line 2: .* a missing column, ",
    b'path,text\na.mp4,"a car\nb.mp4,a dog\nc.mp4,a "cat"\n': "the row at line 2: ',' expected",
    b'path,text\na.mp4,b\nb.mp4,"c\n': "the row at line 3: unexpected end of data",
    b"path,text\na.mp4,a\nb.mp4,caf\xe9\n": "line 3: not UTF-8",
}


@pytest.mark.parametrize("content", BAD_TABLES)
def test_bad_tables_get_one_clear_line(tmp_path, content):
    table = tmp_path / "clips.csv"
    table.write_bytes(content)
    with pytest.raises(data.UserError, match=f"{table}.*{BAD_TABLES[content]}"):
        data.list_clips(table)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_captions_must_be_utf8(tmp_path, encoding):
    (tmp_path / "a.mp4").touch(), (tmp_path / "b.mp4").touch()
    (tmp_path / "a.txt").write_text("a caf\u00e9", "utf-8-sig")
    assert data.list_clips(tmp_path)[0][1] == "a caf\u00e9"
    text = "a cat" if encoding == "utf-16-le" else "a caf\u00e9"  # no byte is above 127
    (tmp_path / "b.txt").write_bytes(text.encode(encoding))
    with pytest.raises(data.UserError, match=f"{tmp_path / 'b.txt'}.*not UTF-8"):
        data.list_clips(tmp_path)


def test_folders_behind_links_are_listed_and_loops_are_not(tmp_path):
    clips, store = tmp_path / "clips", tmp_path / "store"
    clips.mkdir(), (store / "deep").mkdir(parents=True)
    for path in (clips / "a.mp4", store / "deep/b.mp4", tmp_path / "c.mp4", store / ".d.mp4"):
        path.touch()
    (clips / "link").symlink_to(store), (clips / "c.mp4").symlink_to(tmp_path / "c.mp4")
    (store / "deep/loop").symlink_to(clips), (clips / "gone.mp4").symlink_to(tmp_path / "none")
    names = [str(path.relative_to(clips)) for path, _ in data.list_clips(clips)]
    assert names == ["a.mp4", "c.mp4", "gone.mp4", "link/deep/b.mp4"]  # gone: reported when read


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    scandir = os.scandir

    def refuse(path):  # as for a user without the right to read it; root may read all
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(data.UserError, match="a/b cannot be listed: Permission denied"):
        data.list_clips(tmp_path)


def test_names_that_can_only_be_local_are_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own/vae").mkdir(parents=True)
    assert data.local_folder("own/vae").samefile(tmp_path / "own/vae")
    assert data.local_folder("assets/vae") == ROOT / "assets/vae"
    assert data.local_folder("PixArt-alpha/PixArt-XL-2-512x512") is None
    for source in ("/a/b", "./a", "../a/b", "~/a", "a", "a/b/c", "out/a", "weights/b", "samples/c"):
        with pytest.raises(data.UserError, match=f"^{source} not found"):
            data.local_folder(source)


def test_the_import_is_light():
    heavy = "{'torchvision', 'diffusers', 'transformers', 'matplotlib', 'torch._dynamo'}"
    code = f"import sys, data; assert not {heavy} & {{*sys.modules}}, {heavy} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_print0_survives_the_end_of_a_pipe(monkeypatch):
    class Gone(io.StringIO):  # standard output of `train.py | tee log` after Ctrl-C
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    data.print0("stopping after the current step")


# ------------------------------------------------------------------------------------------- cache
def test_the_cache_equals_encoding_on_the_fly(toy, encoders):
    cache, clips = data.LatentCache(toy / "train"), data.Toy("train", 24)
    assert len(cache) == len(clips) == 24 and cache.captions == clips.captions
    assert cache.encoders == ["assets/vae", "assets/t5"]
    rows = [0, 5, 23]
    generators = [data.keyed_generator(0, "posterior", row) for row in rows]
    x0 = [encoders[0].encode(clips[row], g) for row, g in zip(rows, generators)]
    y, mask = encoders[1].encode([clips.captions[row] for row in rows])
    for i, row in enumerate(rows):
        latents, embeddings, real = cache[row]
        assert_close(latents, x0[i], 4e-3, "fp16 storage of latents up to 8, and batch sizes")
        assert_close(embeddings, y[i], 4e-3, "fp16 storage of values up to 4")
        assert torch.equal(real, mask[i])
    stored = load_file(cache.files[5])
    assert stored["latents"].shape == (4, 8, 8, 8) and stored["y"].shape == (6, 64)  # no padding
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def test_an_interrupted_cache_continues_and_equals_an_uninterrupted_one(toy, encoders, tmp_path):
    cache = shutil.copytree(toy / "train", tmp_path / "cache")
    for name in ("index.json", "000003.safetensors", "000017.safetensors"):
        (cache / name).unlink()
    (cache / ".0.000003.safetensors").write_bytes(b"half")  # of a process that was killed
    os.truncate(cache / "000005.safetensors", 100)  # by a full disk
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("0*") if path.name[5] != "5"}
    assert len(data.write_cache(data.Toy("train", 24), cache, *encoders)) == 24
    assert len(kept) == 20 and all(path.stat().st_mtime_ns == kept[path] for path in kept)
    for path in (toy / "train").iterdir():
        assert path.read_bytes() == (cache / path.name).read_bytes(), path.name


@pytest.mark.parametrize("change", ["frames", "clips", "caption_length", "encoder_hash"])
def test_a_cache_of_other_settings_is_refused(change, toy, encoders):
    vae, t5 = encoders
    if change == "caption_length":
        t5 = data.T5("assets/t5", 20)
    if change == "encoder_hash":  # the VAE of another training run
        vae = copy.deepcopy(vae)
        vae.model.decoder.conv_out.bias += 0.1
    clips = data.Toy("train", 48 if change == "clips" else 24, 4 if change == "frames" else 8)
    with pytest.raises(data.UserError, match=f"train was made with other {change}: .* --out"):
        data.write_cache(clips, toy / "train", vae, t5)


def test_a_damaged_cache_is_refused_and_one_without_clips_leaves_no_settings(
    toy, encoders, tmp_path
):
    cache = data.LatentCache(shutil.copytree(toy / "train", tmp_path / "cache"))
    os.truncate(cache.files[5], 100)
    with pytest.raises(data.UserError, match="000005.* is damaged .*: run data.py again"):
        cache[5]

    class Unreadable(data.Toy):
        def __getitem__(self, row):
            return None

    with pytest.raises(data.UserError, match="none of 2 clips is readable"):
        data.write_cache(Unreadable("train", 2), tmp_path / "none", *encoders)
    assert len(data.write_cache(data.Toy("train", 3, 1), tmp_path / "none", *encoders)) == 3


def test_a_vae_that_shifts_its_latents_is_refused(tmp_path):
    folder = shutil.copytree(ROOT / "assets/vae", tmp_path / "vae")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"shift_factor": null', '"shift_factor": 0.1'))
    with pytest.raises(data.UserError, match="vae: its VAE has shift_factor=0.1, expected none"):
        data.VAE(folder)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_gpu_that_is_not_there_is_refused(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(data.UserError, match=f"--device {device}: found"):
        data.init_distributed(device)


def test_a_video_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(data.UserError, match="a.mp4 is not a CSV; give a folder"):
        data.list_clips(tmp_path / "a.mp4")


def test_a_caption_that_is_cut_is_reported(encoders, capsys):
    encoders[1].encode(["a red circle", "a blue square " * 9])
    warning = "warning: cut from 28 to 16 tokens: a blue square a blue"
    assert capsys.readouterr().err.startswith(warning)


def test_clips_are_read_while_others_are_encoded(encoders, tmp_path, monkeypatch):
    vae, read = encoders[0], threading.Event()

    class Watched(data.Toy):
        def __getitem__(self, row):
            if row == 16:
                read.set()
            return super().__getitem__(row)

    def encode(frames, generator, now=vae.encode):
        assert read.wait(10)  # also during the first clip
        return now(frames, generator)

    monkeypatch.setattr(vae, "encode", encode)
    assert len(data.write_cache(Watched("train", 17, 1), tmp_path, *encoders)) == 17


def test_only_a_replaced_clip_is_encoded_again_and_until_then_the_cache_is_refused(
    encoders, tmp_path
):
    source, out = tmp_path / "clips", tmp_path / "cache"
    source.mkdir()
    for name in "abc":
        encode(source / f"{name}.mp4", drawing(8))
        (source / f"{name}.txt").write_text(name)
    clips = data.Clips(source, 4, 1, 32, 32, seed=0)
    before = [path.stat().st_mtime_ns for path in data.write_cache(clips, out, *encoders).files]
    encode(source / "b.mp4", drawing(8).flip(0))
    with pytest.raises(data.UserError, match="b.mp4 has changed since .*: run data.py again"):
        data.LatentCache(out)
    cache = data.write_cache(clips, out, *encoders)
    after = [path.stat().st_mtime_ns for path in cache.files]
    assert [a == b for a, b in zip(after, before)] == [True, False, True]
    expected = encoders[0].encode(clips[1], data.keyed_generator(0, "posterior", 1))
    assert_close(cache[1][0], expected, 4e-3, "fp16 storage of latents up to 8")
    (source / "a.mp4").unlink()  # a cache can be used without its clips
    os.utime(source / "c.mp4", ns=(0, 0))
    with pytest.raises(data.UserError, match="c.mp4 has changed since"):
        data.LatentCache(out)


# --------------------------------------------------------------------------------------------- toy
def test_every_pair_of_words_is_seen_although_six_labels_are_not():
    seen = set(data.Toy("train", 2000).labels)
    assert len(data.UNSEEN) == 6 and seen == set(data.LABELS) - set(data.UNSEEN)
    assert set(data.Toy("validation", 96).labels) == set(data.LABELS) and len(seen) == 42
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(t[i], t[j]) for t in seen} == {(t[i], t[j]) for t in data.LABELS}
        assert len({(t[i], t[j]) for t in data.UNSEEN}) == 6  # no two share a pair


def test_shapes_stay_in_view():
    background, toy = torch.tensor(data.BACKGROUND).view(3, 1, 1), data.Toy("validation", 96)
    for clip in toy:
        strength = (clip.float() - background).norm(dim=1).sum((1, 2))  # [T], if no frame cuts it
        assert strength.max() / strength.min() < 1.03  # antialiasing and rounding


def test_the_detector_is_right_after_the_vae_and_at_chance_for_other_captions(toy, encoders):
    """96 cached clips: at least 95 right, with clear shapes, and the VAE reaches 33 dB."""
    cache, clips = data.LatentCache(toy / "validation"), data.Toy("validation", 96)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).tolist()
    right, shuffled, error, quality = 0, 0, [], []
    for i in range(96):
        video = encoders[0].decode(cache[i][0])  # [T, 3, H, W]
        error.append((video - (clips[i].float() / 127.5 - 1)).square().mean())
        found = data.detect((video + 1) * 127.5)
        right += found is not None and data.caption_of(found) == cache.captions[i]
        shuffled += found is not None and data.caption_of(found) == cache.captions[order[i]]
        quality.append(data.shape_quality((video + 1) * 127.5, clips.labels[i]))
    assert right >= 95 and shuffled <= 8  # chance: 2 of 96
    shape, overlap, flicker = torch.tensor(quality).mean(0)
    assert shape == 1 and overlap > 0.94 and flicker < 1.2  # the ceiling of generated videos
    assert 10 * torch.log10(4 / torch.stack(error).mean()) >= 33  # the range is 2


def test_the_detector_finds_nothing_in_noise():
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        assert data.detect(torch.randint(0, 256, (8, 3, 64, 64), generator=g)) is None
        smooth = torch.rand(8, 3, 5, 5, generator=g) * 255
        smooth = torch.nn.functional.interpolate(smooth, size=64, mode="bicubic")
        assert data.detect(smooth) is None


def test_the_detector_needs_straight_motion():
    video = data.draw_clip(("red", "circle", "left"), data.keyed_generator(0))
    assert data.detect(video) == ("red", "circle", "left")
    assert data.detect(video.flip(0)) == ("red", "circle", "right")
    assert data.detect(video[:1].expand(8, -1, -1, -1)) is None  # stands still
    assert data.detect(video[[0, 0, 7, 7, 0, 0, 7, 7]]) is None  # jumps


def test_shape_quality_sees_single_frames():
    label = ("blue", "square", "up")
    video = data.draw_clip(label, data.keyed_generator(0)).float()
    circle = data.draw_clip(("blue", "circle", "up"), data.keyed_generator(0)).float()
    mixed = torch.cat([video[:6], circle[6:]])
    assert data.detect(mixed) == label and data.shape_quality(mixed, label)[0] == 0.75
    assert data.shape_quality(video, label)[2] < 1 < 5 < data.shape_quality(video * LIGHT, label)[2]
    right, overlap, _ = data.shape_quality(video, ("blue", "circle", "up"))
    assert right == 0 and 0.8 < overlap < 0.95  # a square and a circle of the same area: 0.91
