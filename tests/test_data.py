"""Crops, captions, tables, the latent cache, the toy and its detector, written media."""

import copy
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_close
from PIL import Image
from safetensors.torch import load_file

import data

LIGHT = torch.tensor([1.0, 0.9] * 4).view(8, 1, 1, 1)  # every other frame is darker


def noise_video(path, n):
    """A video whose n frames all differ, also after compression."""
    blocks = torch.randint(0, 256, (n, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    frames = blocks.repeat_interleave(16, 2).repeat_interleave(16, 3).to(torch.uint8)
    data.write_video(path, frames, 24)
    return frames


# ------------------------------------------------------------------------- crops, captions, tables
def test_temporal_crops_start_anywhere_that_leaves_room(tmp_path):
    path, starts = tmp_path / "a.mp4", set()
    noise_video(path, 12)
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


def test_captions_are_cleaned():
    text = "Sunset &amp; sea,   <b>in 4K</b>\n https://x.example/a.mp4?b=1"
    assert data.clean_caption(text) == "sunset & sea, in 4k"
    assert data.clean_caption("a red circle moving left") == "a red circle moving left"


TABLES = {
    "": "needs the header path,text; it has None",
    "path,caption\na.mp4,b\n": r"header path,text; it has \['path', 'caption'\]",
    "path,text\n": "lists no clips",
    "path,id,text\na.mp4,1,red, blue\n": "line 2: no path, or a text with commas without quotes",
}


@pytest.mark.parametrize("content", TABLES)
def test_bad_tables_get_one_clear_line(tmp_path, content):
    table = tmp_path / "clips.csv"
    table.write_text(content)
    with pytest.raises(data.UserError, match=f"{table}.*{TABLES[content]}$"):
        data.list_clips(table)


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
    kept = {path: path.stat().st_mtime_ns for path in cache.glob("0*")}
    assert len(data.write_cache(data.Toy("train", 24), cache, *encoders)) == 24
    assert len(kept) == 22 and all(path.stat().st_mtime_ns == kept[path] for path in kept)
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


# --------------------------------------------------------------------------------------------- toy
def test_every_pair_of_words_is_seen_although_six_triples_are_not():
    seen = set(data.Toy("train", 2000).triples)
    assert len(data.UNSEEN) == 6 and seen == set(data.TRIPLES) - set(data.UNSEEN)
    assert set(data.Toy("validation", 96).triples) == set(data.TRIPLES) and len(seen) == 42
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(t[i], t[j]) for t in seen} == {(t[i], t[j]) for t in data.TRIPLES}
        assert len({(t[i], t[j]) for t in data.UNSEEN}) == 6  # no two share a pair


def test_shapes_stay_in_view():
    background, toy = torch.tensor(data.BACKGROUND).view(3, 1, 1), data.Toy("validation", 96)
    for clip in toy:
        strength = (clip.float() - background).norm(dim=1).sum((1, 2))  # [T], if no frame cuts it
        assert strength.max() / strength.min() < 1.03  # antialiasing and rounding


def test_the_detector_is_right_after_the_vae_and_at_chance_for_other_captions(toy, encoders):
    """96 cached clips: at least 95 right, with crisp frames, and the VAE reaches 33 dB."""
    cache, clips = data.LatentCache(toy / "validation"), data.Toy("validation", 96)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).tolist()
    right, shuffled, error, crispness = 0, 0, [], []
    for i in range(96):
        video = encoders[0].decode(cache[i][0])  # [T, 3, H, W]
        error.append((video - (clips[i].float() / 127.5 - 1)).square().mean())
        found = data.detect((video + 1) * 127.5)
        right += found is not None and data.caption_of(found) == cache.captions[i]
        shuffled += found is not None and data.caption_of(found) == cache.captions[order[i]]
        crispness.append(data.crispness((video + 1) * 127.5, clips.triples[i]))
    assert right >= 95 and shuffled <= 8  # chance: 2 of 96
    shape, overlap, flicker = torch.tensor(crispness).mean(0)
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


def test_crispness_sees_single_frames():
    triple = ("blue", "square", "up")
    video = data.draw_clip(triple, data.keyed_generator(0)).float()
    circle = data.draw_clip(("blue", "circle", "up"), data.keyed_generator(0)).float()
    mixed = torch.cat([video[:6], circle[6:]])
    assert data.detect(mixed) == triple and data.crispness(mixed, triple)[0] == 0.75
    assert data.crispness(video, triple)[2] < 1 < 5 < data.crispness(video * LIGHT, triple)[2]
    right, overlap, _ = data.crispness(video, ("blue", "circle", "up"))
    assert right == 0 and 0.8 < overlap < 0.95  # a square and a circle of the same area: 0.91


# ----------------------------------------------------------------------------------- written media
def test_gif_and_sheet_show_the_frames(tmp_path):
    frames = noise_video(tmp_path / "a.mp4", 12)
    data.write_gif(tmp_path / "a.gif", frames, 8)
    gif = Image.open(tmp_path / "a.gif")
    assert (gif.n_frames, gif.size) == (12, (256, 256))
    assert gif.info["duration"] == 120 and gif.info["loop"] == 0  # 1/8 s in units of 10 ms; forever
    data.write_sheet(tmp_path / "a.png", [frames, frames.flip(0)], ["a wall", "backwards"])
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "a.png")))
    assert sheet.shape == (2 * (128 + 24) + 4, 8 * (128 + 4) + 4, 3)
    for row, k, i in ((0, 0, 0), (0, 7, 11), (1, 0, 11), (1, 3, 6)):  # 8 of 12 frames
        top, left = 24 + row * 152, 4 + k * 132
        shown = sheet[top : top + 128 : 2, left : left + 128 : 2].permute(2, 0, 1)
        assert torch.equal(shown, frames[i]), (row, k)
