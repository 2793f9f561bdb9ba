"""Clips, encoders, cache, toy: what is read is what is there, and what is damaged is named."""

import shutil

import pytest
import torch
from conftest import assert_close, broken_inside
from safetensors.torch import load_file

import data


def write_table(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "clips.csv").write_text("\n".join(["path,text", *rows, ""]))
    return folder / "clips.csv"


def long_clip(path, n=40, size=64):
    """A film of n frames of noise that is constant over blocks, so that frames differ and survive
    compression.
    """
    blocks = torch.randint(
        0, 256, (n, 3, size // 16, size // 16), generator=torch.Generator().manual_seed(0)
    )
    frames = blocks.repeat_interleave(16, 2).repeat_interleave(16, 3).to(torch.uint8)
    data.write_video(path, frames, 24)
    return path


def decode_all(path):
    import av

    with av.open(str(path)) as container:
        return torch.stack(
            [torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
        ).permute(0, 3, 1, 2)


@pytest.mark.parametrize("frames, stride", [(1, 1), (8, 1), (8, 3), (16, 2), (40, 1)])
def test_read_frames_are_those_of_a_full_decode(tmp_path, frames, stride):
    path = long_clip(tmp_path / "long.mp4")
    whole = decode_all(path)
    for seed in range(3):
        found = data.read_frames(path, frames, stride, torch.Generator().manual_seed(seed))
        starts = [
            s
            for s in range(40 - (frames - 1) * stride)
            if torch.equal(found, whole[s : s + (frames - 1) * stride + 1 : stride])
        ]
        assert len(starts) == 1, starts


def test_spans_start_anywhere_that_leaves_room(tmp_path):
    path = long_clip(tmp_path / "long.mp4", n=12)
    whole = decode_all(path)
    starts = set()
    for seed in range(60):
        first = data.read_frames(path, 4, 3, torch.Generator().manual_seed(seed))[0]
        starts |= {i for i, frame in enumerate(whole) if torch.equal(first, frame)}
    assert starts == {0, 1, 2}  # 12 frames, a span of 10


@pytest.mark.parametrize("H, W", [(64, 64), (90, 160), (160, 90), (50, 200)])
def test_fit_covers_and_cuts_the_centre(H, W):
    frames = torch.zeros(2, 3, H, W, dtype=torch.uint8)
    frames[..., H // 2 - H // 8 : H // 2 + H // 8, W // 2 - H // 8 : W // 2 + H // 8] = (
        255  # a square in the middle
    )
    out = data.fit(frames, 64, 64)
    assert out.shape == (2, 3, 64, 64) and out.dtype == torch.uint8
    assert out[..., 31:33, 31:33].min() > 250  # and it is in the middle still
    for axis in (-1, -2):
        assert_close(out.float(), out.flip(axis).float(), 40, "half a pixel of resampling")


def test_short_missing_and_broken_clips_are_named_and_left_out(tmp_path, capsys):
    for name, n in (("good", 20), ("good2", 20), ("short", 5)):
        long_clip(tmp_path / f"{name}.mp4", n)
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:500])
    table = write_table(
        tmp_path, "good.mp4,a", "short.mp4,b", "missing.mp4,c", "broken.mp4,d", "good2.mp4,e"
    )
    clips = data.Clips(table, 8, 2, 32, seed=0, max_bad=0.6)
    assert [row[0] for row in clips.rows] == [0, 4] and clips[1, 7]["text"] == "e"
    errors = capsys.readouterr().err
    assert (
        "short.mp4 has 5 frames; 8 frames at stride 2 need 15" in errors
        and "missing.mp4 is not there" in errors
    )
    assert "broken.mp4 can't be" in errors and "3 of 5 clips" in errors
    with pytest.raises(data.BadInput, match="3 of 5 clips can't be used"):
        data.Clips(table, 8, 2, 32, seed=0, max_bad=0.5)


@pytest.mark.parametrize("content, message", [
    (None, "is not there"), ("", "no column path and no column text"),
    ("path,caption\na.mp4,b\n", "no column text"),
    ("path,text\n", "lists no clip"),
    ("path,text\na.mp4,red, blue\n", "line 2: found .* put a text with commas into quotes"),
    ("text,path\na\n", "line 2: found"),
])  # fmt: skip
def test_bad_tables_get_one_clear_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "clips.csv").write_text(content)
    with pytest.raises(data.BadInput, match=message) as error:
        data.read_table(tmp_path / "clips.csv")
    assert "clips.csv" in str(error.value) and "\n" not in str(error.value)


# --- encoders


def test_vae_wrapper_is_the_vae_frame_by_frame(encoders):
    vae = encoders[0]
    video = torch.rand(2, 3, 3, 32, 48) * 2 - 1
    z = vae.encode(video)
    assert z.shape == (2, 4, 3, 4, 6)
    direct = (
        vae.model.encode(video[1, :, 2][None]).latent_dist.mean * vae.model.config.scaling_factor
    )
    assert_close(z[1, :, 2], direct[0], 1e-5, "fp32, another batch size")
    back = vae.decode(z)
    direct = (
        vae.model.decode(z[1, :, 2][None] / vae.model.config.scaling_factor).sample[0].clamp(-1, 1)
    )
    assert back.shape == video.shape
    assert_close(back[1, :, 2], direct, 1e-4, "fp32, another batch size")


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_give_the_same_latents_and_noise(encoders, micro_batch):
    video = torch.rand(2, 3, 4, 32, 32) * 2 - 1
    keyed = lambda: [data.keyed_generator("test", i) for i in range(2)]  # noqa: E731
    expected = encoders[0].encode(video, keyed())
    found = data.VAE("assets/vae", micro_batch=micro_batch).encode(video, keyed())
    assert_close(found, expected, 1e-4, "fp32, other batch sizes, latents of a few units")
    assert (found - encoders[0].encode(video)).abs().max() > 0.01  # the noise is there


def test_t5_wrapper_is_t5_and_padding_takes_no_part(encoders, capsys):
    t5 = encoders[1]
    y, mask = t5.encode(["a red circle moving left", ""])
    assert y.shape == (2, 16, 64) and mask.sum(1).tolist() == [6, 1]  # words and the end token
    ids = t5.tokenizer("a red circle moving left", return_tensors="pt")["input_ids"]
    assert_close(
        y[0, :6], t5.model(ids).last_hidden_state[0], 1e-5, "fp32, with padding and without"
    )
    assert t5.tokenizer.convert_tokens_to_ids("</s>") == ids[0, -1] and y[1, 1:].abs().max() == 0
    t5.encode(["a red circle moving left " * 5])
    assert "cut to 16" in capsys.readouterr().err


@pytest.mark.parametrize("source, message", [
    ("no/such/folder", "is not there"), ("nobody/nothing", "nobody/nothing"),
    ("tests", "holds no vae"),
])  # fmt: skip
def test_an_encoder_that_is_not_there_gets_one_clear_line(source, message):
    with pytest.raises(data.BadInput, match=message) as error:
        data.VAE(source)
    assert "\n" not in str(error.value)


# --- cache


def test_cache_equals_encoding_on_the_fly(toy, encoders):
    cache, clips = (
        data.LatentCache(toy / "cache_train"),
        data.Clips(toy / "train.csv", 8, 1, 64, seed=0),
    )
    assert len(cache) == len(clips) == 24
    batch = torch.utils.data.default_collate([clips[i, i] for i in range(5)])
    x0, y, mask = data.encode_batch(
        batch, *encoders, [data.keyed_generator(0, "posterior", i) for i in range(5)]
    )
    for i in range(5):
        sample = cache[i, 0]
        assert_close(
            sample["latents"], x0[i], 1e-2, "fp16 storage of latents up to 8, and fp32 batches"
        )
        assert_close(sample["y"], y[i], 4e-3, "fp16 storage of values up to 4")
        assert torch.equal(sample["mask"], mask[i]) and cache.text(i) == batch["text"][i]


def test_interrupted_cache_goes_on_where_it_stopped(toy, encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 10)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    make = lambda out: data.write_cache(toy / "train.csv", out, *encoders, 8, 1, 64)  # noqa: E731
    make(whole)
    shutil.copytree(whole, broken)
    (broken / "index.json").unlink(), (broken / "shard_00001.safetensors").unlink()
    kept = (broken / "shard_00000.safetensors").stat().st_mtime_ns
    assert len(make(broken)) == 24
    assert (broken / "shard_00000.safetensors").stat().st_mtime_ns == kept
    for file in whole.iterdir():
        assert file.read_bytes() == (broken / file.name).read_bytes(), file.name


def test_a_clip_that_can_not_be_decoded_after_all_is_left_out(toy, encoders, tmp_path, capsys):
    broken_inside(tmp_path / "broken.mp4", torch.zeros(8, 3, 64, 64, dtype=torch.uint8))
    table = write_table(tmp_path, "broken.mp4,a", f"{toy / 'train/00001.mp4'},b")
    cache = data.write_cache(table, tmp_path / "cache", *encoders, 8, 1, 64)
    assert len(cache) == 1 and cache.text(0) == "b" and cache.skipped[0]["path"] == "broken.mp4"
    assert "broken.mp4" in capsys.readouterr().err


def test_the_commands_make_a_toy_and_its_cache(tmp_path, monkeypatch, capsys):
    import sys

    for argv in (
        ["toy", "--clips", "2", "--out", str(tmp_path)],
        ["cache", str(tmp_path / "train.csv"), "--out", str(tmp_path / "cache")],
    ):
        monkeypatch.setattr(sys, "argv", ["data.py", *argv])
        data.main()
    assert len(data.LatentCache(tmp_path / "cache")) == 2
    assert "2 samples of 0.005 MB, 0 clips skipped" in capsys.readouterr().out


def test_other_settings_are_refused_with_the_difference_named(toy, encoders):
    with pytest.raises(data.BadInput, match="size=64 there, 32 asked for"):
        data.write_cache(toy / "train.csv", toy / "cache_train", *encoders, 8, 1, 32)


def damaged(toy, tmp_path, damage):
    folder = tmp_path / "cache"
    shutil.copytree(toy / "cache_train", folder)
    shard = folder / "shard_00000.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    return folder


def test_a_truncated_shard_is_named_before_training(toy, tmp_path):
    with pytest.raises(data.BadInput, match="shard_00000.safetensors is damaged"):
        data.LatentCache(damaged(toy, tmp_path, lambda b: b[:-100]))


def test_a_changed_byte_in_a_shard_is_noticed_when_it_is_read(toy, tmp_path):
    cache = data.LatentCache(
        damaged(toy, tmp_path, lambda b: b[:-3000] + bytes([b[-3000] ^ 1]) + b[-2999:])
    )
    with pytest.raises(data.BadInput, match="shard_00000.safetensors: sample .* is damaged"):
        [cache[i, 0] for i in range(len(cache))]


def test_a_shard_holds_what_its_names_say(toy):
    tensors = load_file(toy / "cache_train" / "shard_00000.safetensors")
    assert (
        tensors["3.latents"].shape == (4, 8, 8, 8) and tensors["3.latents"].dtype == torch.float16
    )
    assert tensors["3.y"].shape == (6, 64)  # without its padding


# --- toy


def test_every_pair_of_words_is_seen_though_six_triples_are_not():
    seen = set(data.TRIPLES) - set(data.HELD_OUT)
    assert len(data.HELD_OUT) >= 6 and len(seen) + len(data.HELD_OUT) == len(data.TRIPLES) == 48
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(t[i], t[j]) for t in seen} == {(t[i], t[j]) for t in data.TRIPLES}


def test_toy_is_deterministic_in_its_seed_and_avoids_held_out_triples(toy, tmp_path):
    data.make_toy(tmp_path, clips=24)
    data.make_toy(tmp_path / "other", clips=2, seed=1)
    for i in (0, 23):
        assert (tmp_path / f"train/{i:05d}.mp4").read_bytes() == (
            toy / f"train/{i:05d}.mp4"
        ).read_bytes()
    assert (tmp_path / "other/train/00000.mp4").read_bytes() != (
        toy / "train/00000.mp4"
    ).read_bytes()
    captions = {text for _, text in data.read_table(toy / "train.csv")}
    assert not captions & {data.caption_of(t) for t in data.HELD_OUT}


def test_shapes_of_one_size_have_one_area_and_stay_in_view():
    centre = torch.tensor([[32.0, 32.0]])
    areas = [data.coverage(shape, centre, 10.0, 64).sum().item() for shape in data.SHAPES]
    assert max(areas) / min(areas) < 1.02  # anti-aliasing of the corners
    for i, triple in enumerate(data.TRIPLES):
        video = data.draw_clip(triple, data.keyed_generator("view", i))
        # [T]
        strength = (video.float() - torch.tensor(data.GROUND).view(3, 1, 1)).norm(dim=1).sum((1, 2))
        # nothing is cut off in any frame; anti-aliasing and rounding
        assert strength.max() / strength.min() < 1.03


def test_detector_and_vae_on_fresh_films_after_mp4(toy, encoders):
    """96 held-out films, through H.264, the reader and the VAE: >= 99% right, at chance for
    shuffled captions, >= 33 dB.
    """
    clips, right, shuffled, error = data.Clips(toy / "held_out.csv", 8, 1, 64, 0), 0, 0, []
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0)).tolist()
    for i in range(96):
        video = clips[i, i]["frames"].transpose(0, 1)[None].float() / 127.5 - 1
        back = encoders[0].decode(encoders[0].encode(video))
        error.append((back - video).square().mean())
        found = data.detect((back[0].transpose(0, 1) + 1) * 127.5)
        right += found is not None and data.caption_of(found) == clips[i, i]["text"]
        shuffled += found is not None and data.caption_of(found) == clips[order[i], 0]["text"]
    assert right >= 95 and shuffled <= 8  # 99%; chance is 2 of 96
    assert 10 * torch.log10(4 / torch.stack(error).mean()) >= 33  # peak to peak is 2


def test_detector_says_none_to_noise_and_blobs():
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    for i in range(60):
        assert data.detect(torch.randint(0, 256, (8, 3, 64, 64), generator=g)) is None
        smooth = torch.nn.functional.interpolate(
            torch.rand(8, 3, 5, 5, generator=g) * 255, size=64, mode="bicubic"
        )
        assert data.detect(smooth) is None
        colour, shape, direction = data.TRIPLES[
            i % 48
        ]  # a soft blob in a toy colour, moving as a toy shape would
        centre = 32 + (torch.arange(8)[:, None] - 3.5) * 3.5 * torch.tensor(
            data.DIRECTIONS[direction]
        )
        blob = torch.exp(
            -((x - centre[:, 0, None, None]) ** 2 + (y - centre[:, 1, None, None]) ** 2)
            / 2
            / (5 + i % 6) ** 2
        )
        ground, paint = (torch.tensor(c).view(3, 1, 1) for c in (data.GROUND, data.COLOURS[colour]))
        assert data.detect(ground + blob[:, None] * (paint - ground)) is None


def test_detector_wants_the_motion_too():
    video = data.draw_clip(("red", "circle", "left"), data.keyed_generator(0))
    assert data.detect(video) == ("red", "circle", "left") and data.detect(video.flip(0)) == (
        "red",
        "circle",
        "right",
    )
    assert data.detect(video[:1].expand(8, -1, -1, -1)) is None  # stands still
    assert data.detect(video[[0, 5, 2, 7, 1, 6, 3, 4]]) is None  # jumps about
