"""Real clips: every kind of video reads as what it shows, folders are data sets, broken files are
named once, captions are cleaned and written, caches survive kills and take several processes.
"""

import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_close, broken_inside, encode

import data
import sample
import train

QUIET = {"x265-params": "log-level=none"}
KINDS = {  # file: (how it is encoded, mean error in its flat parts)
    "h264.mp4": (dict(bf=2), 3), "prores.mov": (dict(codec="prores_ks", pix_fmt="yuv422p10le"), 3),
    "hevc.mp4": (dict(codec="libx265", **QUIET), 3),
    "ten_bit.mp4": (dict(codec="libx265", pix_fmt="yuv420p10le", **QUIET), 3),
    "av1.mp4": (dict(codec="libsvtav1", preset=12), 6),
    "vp9.webm": (dict(codec="libvpx-vp9", deadline="realtime"), 4),
    "mpeg4.mp4": (dict(codec="mpeg4"), 8), "b_frames.avi": (dict(codec="mpeg4", bf=2), 6),
    "full_range.mp4": (dict(pix_fmt="yuvj420p"), 3), "h264.mkv": (dict(bf=2), 3),
    "variable.mp4": (dict(times=[40 * i + 11 * (i % 3) for i in range(40)]), 3),
    "animated.gif": (dict(codec="gif", pix_fmt="rgb8"), 25),  # 8 bits a pixel
}  # fmt: skip


def drawing(n=40, H=64, W=96):
    """A film of flat colours with moving parts, uint8 [n, 3, H, W]; its first 40 rows and 8 columns
    stand still.
    """
    film = torch.tensor([40, 160, 80], dtype=torch.uint8).view(1, 3, 1, 1).repeat(n, 1, H, W)
    film[:, :, :40, :8] = torch.tensor([220, 60, 40], dtype=torch.uint8).view(3, 1, 1)
    for i in range(n):
        film[i, :, 44:60, 10 : 12 + i * (W - 14) // n] = 6 * i % 256
    return film


def decode_all(path):
    """All frames of a file, in the order in which PyAV decodes them."""
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", KINDS)
def test_frames_of_any_codec_are_those_of_a_full_decode(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SVT_LOG", "0")
    (options, bound), film = KINDS[name], drawing()
    path = encode(tmp_path / name, film, **{"g": 12} | options)
    whole = decode_all(path)
    assert whole.shape == film.shape
    for frames, stride in ((1, 1), (8, 3), (16, 2), (40, 1)):
        for seed in range(4):
            g = torch.Generator().manual_seed(seed)
            found = data.read_frames(path, frames, stride, g)
            g = torch.Generator().manual_seed(seed)
            start = int(torch.randint(40 - (frames - 1) * stride, (1,), generator=g))
            expected = whole[start : start + (frames - 1) * stride + 1 : stride]
            assert torch.equal(found, expected), (frames, stride, start)
    for i, moment in enumerate(data.frame_times(path)[0]):  # each alone, from wherever it has to be
        assert torch.equal(data.decode(path, [moment])[0], whole[i]), i
    error = (whole.float() - film.float()).abs()
    assert error[:, :, 4:36, 1:6].mean() < bound and error[:, :, 4:36, 16:].mean() < bound


def test_colours_follow_what_the_file_declares(tmp_path):
    """BT.709, as high definition has it, read with its own matrix: with BT.601's, green is off."""
    import av

    film, path = drawing(4), tmp_path / "709.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        for image in film.permute(0, 2, 3, 1).contiguous().numpy():
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            file.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=1)))
        file.mux(stream.encode())
    found = data.read_frames(path, 4)
    assert (found.float() - film.float()).abs()[:, :, 4:36, 16:].mean() < 3


def turned(path, degrees):
    """Write into an MP4's track header that it is shown turned, as phones do."""
    content = path.read_bytes()
    i = content.index(b"tkhd") + 4 + 40  # the matrix: nine fixed-point numbers
    one, matrix = 1 << 16, {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1),
                            270: (0, -1, 1, 0)}[degrees]  # fmt: skip
    a, b, c, d = ((v * one) & 0xFFFFFFFF for v in matrix)
    values = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:i] + b"".join(v.to_bytes(4, "big") for v in values)
                     + content[i + 36 :])  # fmt: skip


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_turned_clips_stand_upright(degrees, tmp_path):
    path = encode(tmp_path / "phone.mp4", drawing(6))
    whole = decode_all(path)
    turned(path, degrees)
    expected = torch.from_numpy(np.rot90(whole.numpy(), -degrees // 90, axes=(2, 3)).copy())
    assert torch.equal(data.read_frames(path, 6), expected)  # clockwise by what the matrix says


@pytest.mark.parametrize("H, W, pix_fmt", [(63, 97, "yuv444p"), (66, 98, "yuv420p")])
def test_odd_sizes(H, W, pix_fmt, tmp_path):
    path = encode(tmp_path / "odd.mp4", drawing(6, H, W), pix_fmt=pix_fmt)
    assert torch.equal(data.read_frames(path, 6), decode_all(path))
    clips = tmp_path / "clips.csv"
    clips.write_text("path,text\nodd.mp4,a\n")
    frames = data.Clips(clips, 4, 1, 32, 0, width=48)[0, 0]["frames"]
    assert frames.shape == (4, 3, 32, 48)


def test_a_clip_with_sound(tmp_path):
    import av

    path, film = tmp_path / "sound.mp4", drawing(24)
    with av.open(str(path), "w") as file:
        video, sound = file.add_stream("libx264", rate=24), file.add_stream("aac", rate=16000)
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        for image in film.permute(0, 2, 3, 1).contiguous().numpy():
            file.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        wave = np.sin(np.arange(16000) / 10).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        for part in (video.encode(), sound.encode(frame), sound.encode()):
            file.mux(part)
    assert torch.equal(data.read_frames(path, 24), decode_all(path))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp"])
def test_images_are_films_of_one_frame_and_stand_upright(name, tmp_path, monkeypatch):
    from PIL import Image

    picture = drawing(1)[0]
    image, tags = Image.fromarray(picture.permute(1, 2, 0).numpy()), Image.Exif()
    tags[0x112] = 6 if name == "a.jpg" else 1  # how a camera says that it was held upright
    image.save(tmp_path / name, exif=tags)
    found = data.read_frames(tmp_path / name, 1)
    expected = picture.rot90(-1, (1, 2)) if name == "a.jpg" else picture
    assert found.shape == (1, *expected.shape)
    assert (found[0].float() - expected.float()).abs().mean() < 8
    with pytest.raises(data.BadClip, match="has 1 frames; 8 frames at stride 1 need 8"):
        data.read_frames(tmp_path / name, 8)
    monkeypatch.setattr(data, "LARGEST", 6000)
    with pytest.raises(data.BadClip, match="declares a picture of 96 x 64 pixels"):
        data.read_frames(tmp_path / name, 1)


def test_images_train_and_are_sampled(encoders, tmp_path, monkeypatch):
    """T = 1 from files to files: pictures, and a film among them, in one CSV; their cache; training
    on either; a PNG for each prompt.
    """
    from PIL import Image

    for i in range(5):
        data.write_png(tmp_path / f"{i}.png", drawing(1, 72, 96)[0])
    encode(tmp_path / "film.mp4", drawing(4, 72, 96))
    files = [f"{i}.png" for i in range(5)] + ["film.mp4"]
    table = tmp_path / "all.csv"
    table.write_text("path,text\n" + "".join(f"{name},a drawing\n" for name in files))
    data.write_cache(table, tmp_path / "cache", *encoders, 1, 1, 64)
    options = dict(frames=1, steps=3, image_share=0.0, batch_size=2, films=1, film_steps=2,
                   eval_every=3, warmup=1, save_every=3)  # fmt: skip
    for source in (table, tmp_path / "cache"):
        config = train.TrainConfig(data=str(source), out=str(tmp_path / f"of_{source.stem}"),
                                   **options)  # fmt: skip
        train.train(config)
    lines = [train.read_metrics(tmp_path / f"of_{name}") for name in ("all", "cache")]
    losses = [[m["mse"] for m in part if "mse" in m] for part in lines]
    assert all(map(math.isfinite, sum(losses, [])))
    monkeypatch.setattr(sys, "argv", [
        "sample.py", "--run", str(tmp_path / "of_cache"), "--prompt", "a drawing", "--prompt", "b",
        "--steps", "2", "--out", str(tmp_path / "out"),
    ])  # fmt: skip
    sample.main()
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["00_a-drawing.png", "01_b.png", "sheet.png"]
    picture = Image.open(tmp_path / "out/00_a-drawing.png")
    assert picture.size == (64, 64) and picture.mode == "RGB"


def test_fps_takes_the_frame_that_is_shown_at_each_moment(tmp_path):
    """Of a clip with frames at 0, 50, 60, 70, 200, 250 ... ms, at 10 a second."""
    times = [0, 50, 60, 70, 200, 250, 300, 310, 390, 500, 600, 640]
    path = encode(tmp_path / "variable.mp4", drawing(12), times=times)
    whole = decode_all(path)
    found = data.read_frames(path, 7, fps=10)  # the last frame begins at 640: one start, 0
    shown = [max(i for i, t in enumerate(times) if t <= moment) for moment in range(0, 601, 100)]
    assert shown == [0, 3, 4, 6, 8, 9, 10] and torch.equal(found, whole[shown])
    with pytest.raises(data.BadClip, match="12 frames in 0.64 s; 9 frames, 10 a second, need 0.80"):
        data.read_frames(path, 9, fps=10)
    assert len(data.read_frames(path, 12, fps=60)) == 12  # more than it has: frames are repeated


def test_long_clips_are_decoded_from_the_keyframe_before(tmp_path, monkeypatch):
    """Of 3000 frames with a keyframe every 250, 16 at stride 3 from the middle: at most 250 + 46
    are decoded, one tenth. With pytest -s, the ratio of the times.
    """
    import av

    film = drawing(60).repeat(50, 1, 1, 1)
    path = encode(tmp_path / "long.mp4", film, g=250, keyint_min=250, sc_threshold=0, bf=0)
    decoded = Counter()

    class Counted:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.container.close()

        def decode(self, stream):
            for frame in self.container.decode(stream):
                decoded["frames"] += 1
                yield frame

    start = time.time()
    whole = decode_all(path)
    all_of_it = time.time() - start
    start = time.time()
    found = data.read_frames(path, 16, 3)
    print(f"\n16 of 3000 frames: {all_of_it / (time.time() - start):.0f} times faster than all")
    assert torch.equal(found, whole[1477 : 1477 + 46 : 3])
    open_file = av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: Counted(open_file(*a, **k)))
    data.read_frames(path, 16, 3)
    assert decoded["frames"] <= 300


# --- folders, and what is wrong with files


def test_hostile_files_are_refused_or_read(tmp_path):
    """A title that is no UTF-8, a name with a colon, a code that FFmpeg does not know."""
    latin = encode(tmp_path / "Intro: part.mp4", drawing(6), container={"title": "x"})
    content = encode(tmp_path / "a.avi", drawing(6), codec="mpeg4").read_bytes()
    assert data.read_frames(latin, 6).shape[0] == 6
    (tmp_path / "a.avi").write_bytes(content.replace(b"FMP4", b"Q?Z9"))
    with pytest.raises(data.BadClip):
        data.read_frames(tmp_path / "a.avi", 6)
    import av

    with av.open(str(tmp_path / "title.mkv"), "w") as file:
        file.metadata["title"] = "Caf!"
        stream = file.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for image in drawing(6).permute(0, 2, 3, 1).contiguous().numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
    content = (tmp_path / "title.mkv").read_bytes()
    assert b"Caf!" in content
    (tmp_path / "title.mkv").write_bytes(content.replace(b"Caf!", b"Caf\xe9"))
    assert data.read_frames(tmp_path / "title.mkv", 6).shape[0] == 6
    with pytest.raises(data.BadClip, match="can't be opened: File name too long"):
        data.read_frames(tmp_path / ("a caption in place of a path " * 12), 6)


def test_a_folder_is_a_data_set(tmp_path, capsys):
    (tmp_path / "more").mkdir()
    for name in ("b.mp4", "more/a.mkv", "silent.mp4", ".hidden.mp4"):
        encode(tmp_path / name, drawing(12))
    (tmp_path / "b.txt").write_text("a green   field\n with a wall\n")
    (tmp_path / "more/a.txt").write_text("See https://a.example/x?y=1 A WALL")
    clips = data.Clips(tmp_path, 8, 1, 32, 0, clean=True)
    assert [(path.name, text) for _, path, text in clips.rows] == [
        ("b.mp4", "a green field with a wall"), ("a.mkv", "see a wall")
    ]  # fmt: skip
    assert clips[1, 0]["frames"].shape == (8, 3, 32, 32)
    errors = capsys.readouterr().err
    assert "silent.mp4 has no caption" in errors and "hidden" not in errors


def test_a_first_look_decodes_the_end(tmp_path):
    for group, reason in ((1, None), (3, "can't be decoded: Invalid data found")):
        path = broken_inside(tmp_path / f"{group}.mp4", drawing(12), group)
        found = data.why_unusable((path, "a wall"), 4, 1, 0)
        assert (found is None) == (reason is None) and (found or "").startswith(reason or "")


def make_broken(folder, kind, name, whole):
    """Write folder/name, broken in one of ten ways; `whole`: bytes of a good MP4 -> its path."""
    path, half = folder / f"{name}.mp4", len(whole) // 2
    if kind == "zero frames":
        import av

        with av.open(str(path), "w") as file:  # sound alone has packets; of video there is none
            stream = file.add_stream("libx264", rate=24)
            stream.height = stream.width = 64
            stream.pix_fmt = "yuv420p"
            file.start_encoding()
    elif kind == "no video stream":
        import av

        with av.open(str(path), "w") as file:
            stream = file.add_stream("aac", rate=16000)
            wave = np.zeros((1, 4000), np.float32)
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate = 16000
            file.mux(stream.encode(frame)), file.mux(stream.encode())
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a dangling link":
        path.symlink_to(folder / "nowhere.mp4")
    elif kind == "a huge declared size":
        content = (folder / "picture.png.is").read_bytes()
        path = folder / f"{name}.png"
        path.write_bytes(content[:16] + (50000).to_bytes(4, "big") * 2 + content[24:])
    elif kind == "wrong extension":
        path = folder / f"{name}.jpeg"
        path.write_bytes(b"%PDF-1.7 not a picture " * 40)
    else:
        path.write_bytes({
            "empty": b"", "not a video": b"a text that is no video\n" * 100,
            "truncated head": whole[half:], "truncated tail": whole[: -len(whole) // 4],
            "truncated middle": whole[: half - 300] + whole[half + 300 :],
        }[kind])  # fmt: skip
    path.with_suffix(".txt").write_text("broken")
    return path


BROKEN = {
    "empty": "is empty", "truncated head": "can't be opened", "truncated tail": "was cut off",
    "not a video": "can't be opened", "no video stream": "has no video stream",
    "zero frames": "", "wrong extension": "holds no picture", "a directory": "is a directory",
    "a dangling link": "is not there", "truncated middle": "was cut off",
    "a huge declared size": "holds no picture",
}  # fmt: skip


def broken_folder(folder, good, each):
    """A folder of whole clips, and `each` clips broken in every way -> paths of the latter."""
    from PIL import Image

    folder.mkdir()
    options = dict(bf=0, container={"movflags": "faststart"})
    sources = [encode(folder / f"good{i}.mp4", drawing(10 + i), **options) for i in range(8)]
    for i in range(good):
        path = folder / f"good{i}.mp4"
        if i >= len(sources):
            os.link(sources[i % len(sources)], path)
        path.with_suffix(".txt").write_text(f"clip {i}")
    Image.fromarray(drawing(1)[0].permute(1, 2, 0).numpy()).save(folder / "picture.png")
    (folder / "picture.png").rename(folder / "picture.png.is")
    bad = [make_broken(folder, kind, f"bad{k}_{i}", sources[0].read_bytes())
           for k, kind in enumerate(BROKEN) for i in range(each)]  # fmt: skip
    (folder / "picture.png.is").unlink()
    return bad


def test_files_broken_in_eleven_ways_are_named_once_with_their_reason(tmp_path, encoders, capsys):
    bad = broken_folder(tmp_path / "clips", 20, 1)
    cache = data.write_cache(tmp_path / "clips", tmp_path / "cache", *encoders, 8, 1, 32)
    errors = capsys.readouterr().err
    reasons = {s["path"]: s["reason"] for s in cache.skipped}
    for path, (kind, reason) in zip(bad, BROKEN.items()):
        assert reason in reasons[path.name], kind
        assert errors.count(f"{path} ") == 1, kind
    assert len(reasons) == len(cache.skipped) == len(bad) and len(cache) == 20
    assert sorted(cache.text(i) for i in range(20)) == sorted(f"clip {i}" for i in range(20))


@pytest.mark.slow
def test_a_thousand_clips_fifty_of_them_broken(tmp_path, encoders):
    """python -m pytest -m slow -k thousand. Looked through by several processes; cached; trained on
    from the files and from the cache, every good one exactly once an epoch.
    """
    bad = broken_folder(tmp_path / "clips", 945, 5)
    command = [sys.executable, ROOT / "data.py", "cache", tmp_path / "clips", "--size", "32",
               "--frames", "4", "--out", tmp_path / "cache"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for path in bad:
        assert done.stderr.count(f"{path} ") == 1, path
    cache, out = data.LatentCache(tmp_path / "cache"), tmp_path / "run"
    assert len(cache) == 945 and len(cache.skipped) == 55
    options = dict(frames=4, size=32, steps=3, films=0, batch_size=8, eval_every=99, log_every=1)
    for source in ("clips", "cache"):
        config = train.TrainConfig(data=str(tmp_path / source), out=f"{out}-{source}", **options)
        train.train(config)
        lines = [m for m in train.read_metrics(config.out) if "loss" in m]
        assert len(lines) == 3 and lines[-1]["replaced"] == 0
    stream, _, _ = train.open_data(config, train.Process(0, 1, "cpu"))
    for epoch in (0, 1):
        n = len(stream.rows)
        texts = Counter()
        for i in range(n):
            order = train.permutation(config.seed, n, epoch)
            texts[cache.text(stream.rows[order[i]])] += 1
        assert len(texts) == n and set(texts.values()) == {1}


# --- captions


@pytest.mark.parametrize("text, cleaned", [
    ("A red circle, moving LEFT!", "a red circle, moving left!"),
    ("Sunset &amp; sea <b>in 4K</b> https://x.example/a.mp4?b=1", "sunset & sea in 4k"),
    ("clip_000123.mp4 – A man’s “dog” #12345678", 'a man\'s "dog'),
    ("stock footage: waves 1920x1080 @someone", "waves"),
    ("wow!!! so   nice ,,, yes", "wow! so nice, yes"), ("...", ""),
])  # fmt: skip
def test_captions_are_cleaned(text, cleaned):
    assert data.clean_caption(text) == cleaned
    assert data.clean_caption(cleaned) == cleaned


def test_the_toys_captions_need_no_cleaning():
    assert all(data.clean_caption(t) == t for t in map(data.caption_of, data.TRIPLES))


def read_lines(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_llava_describes_what_has_no_caption(llava, tmp_path, capsys):
    for i in range(3):
        encode(tmp_path / f"{i}.mp4", drawing(6 + i))
    table = tmp_path / "clips.csv"
    table.write_text('path,licence,text\n0.mp4,mine,\n1.mp4,"a, b","kept, as it is"\n2.mp4,c,\n'
                     "gone.mp4,d,\n")  # fmt: skip
    assert data.write_captions(table, llava, "cpu", batch_size=1) == 2
    lines = read_lines(table)
    assert [line["licence"] for line in lines] == ["mine", "a, b", "c", "d"]
    assert lines[1]["text"] == "kept, as it is" and lines[3]["text"] == ""
    assert len(lines[0]["text"]) > 3 and len(lines[2]["text"]) > 3
    assert "gone.mp4 is not there; it gets no caption" in capsys.readouterr().err
    before = table.read_bytes()
    assert data.write_captions(table, llava, "cpu") == 0 and table.read_bytes() == before
    assert data.write_captions(table, llava, "cpu", overwrite=True) == 3
    assert read_lines(table)[1]["text"] != "kept, as it is"
    # a batch of several gives what each gives alone
    again = read_lines(table)
    assert [again[i]["text"] for i in (0, 2)] == [lines[i]["text"] for i in (0, 2)]


def test_captions_go_beside_the_clips_of_a_folder_and_an_interrupted_run_goes_on(
    llava, tmp_path, monkeypatch
):
    for i in range(3):
        encode(tmp_path / f"{i}.mp4", drawing(6))
    save, calls = data.save_captions, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(data, "save_captions", dies)
    with pytest.raises(KeyboardInterrupt):
        data.write_captions(tmp_path, llava, "cpu", batch_size=1)
    monkeypatch.setattr(data, "save_captions", save)
    assert [p.name for p in tmp_path.glob("*.txt")] == ["0.txt"]
    assert data.write_captions(tmp_path, llava, "cpu", batch_size=1) == 2
    assert len(list(tmp_path.glob("*.txt"))) == 3
    older = shutil.copytree(llava, tmp_path / "older")
    (older / "chat_template.jinja").unlink()  # these bring none
    assert data.write_captions(tmp_path, older, "cpu", overwrite=True) == 3
    with pytest.raises(data.BadInput, match="nowhere/llava"):
        data.write_captions(tmp_path, "nowhere/llava", "cpu", overwrite=True)


# --- the cache of real clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of ten clips of different length, with captions."""
    path = tmp_path_factory.mktemp("folder")
    for i in range(10):
        encode(path / f"{i}.mp4", drawing(12 + i, 48, 80))
        (path / f"{i}.txt").write_text("a red circle " + "moving left " * (i % 6))
    return path


def test_spans_flips_widths_rates_and_types(folder, encoders, tmp_path, monkeypatch):
    make = lambda name, **more: data.write_cache(  # noqa: E731
        folder, tmp_path / name, *encoders, 4, 1, 32, width=48, **more
    )
    one, three = make("one"), make("three", spans=3, dtype=torch.bfloat16)
    assert len(one) == 10 and len(three) == 30
    assert one[0, 0]["latents"].shape == (4, 4, 4, 6)
    assert one.text(5) == three.text(15) == three.text(17)
    assert_close(three[15, 0]["latents"], one[5, 0]["latents"], 0.04, "bf16, of values up to 5")
    assert (three[15, 0]["latents"] - three[16, 0]["latents"]).abs().max() > 0.1
    many = data.write_cache(folder, tmp_path / "many", *encoders, 4, 1, 32, spans=2)
    config = train.TrainConfig(data=str(many.folder), frames=4, size=32, out=str(tmp_path / "run"))
    monkeypatch.setattr(train, "permutation", lambda *_: list(range(10)))
    monkeypatch.setattr(train, "min", lambda *_: 2, raising=False)
    stream, held, _ = train.open_data(config, train.Process(0, 1, "cpu"))
    numbers = [{many.numbers[row] for row in part.rows} for part in (stream, held)]
    assert numbers == [set(range(2, 10)), {0, 1}]  # whole clips are held out, not samples of them
    flipped = make("flipped", flip=True)
    clips = data.Clips(folder, 4, 1, 32, 0, width=48, flip=True)
    plain = data.Clips(folder, 4, 1, 32, 0, width=48)
    pairs = [(clips[i, i]["frames"], plain[i, i]["frames"]) for i in range(10)]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in pairs]
    same = [torch.equal(a, b) for a, b in pairs]
    assert [a != b for a, b in zip(mirrored, same)] == [True] * 10 and 2 <= sum(mirrored) <= 8
    for i in range(10):
        changed = (flipped[i, 0]["latents"] - one[i, 0]["latents"]).abs().max() > 0.1
        assert changed == mirrored[i]
    slow = make("slow", fps=6)  # 4 frames, 6 a second, of clips of 24 a second: every fourth
    frames = data.Clips(folder, 4, 4, 32, 0, width=48)
    number = frames.rows[0][0]  # 1: the first clip is too short
    x0 = encoders[0].encode(frames[0, number]["frames"].transpose(0, 1)[None],
                            [data.keyed_generator(0, "posterior", number)])  # fmt: skip
    assert_close(slow[0, 0]["latents"], x0[0], 1e-2, "fp16 storage of latents up to 8")
    with pytest.raises(data.BadInput, match="width=48 there, 32 asked for"):
        data.write_cache(folder, tmp_path / "one", *encoders, 4, 1, 32)


def test_training_and_sampling_at_a_size_that_is_no_square(folder, encoders, tmp_path, monkeypatch):
    cache = data.write_cache(folder, tmp_path / "cache", *encoders, 4, 1, 32, width=48, clean=True)
    options = dict(frames=4, size=32, width=48, steps=2, films=1, film_steps=2, batch_size=2)
    config = train.TrainConfig(data=str(cache.folder), out=str(tmp_path / "run"), **options)
    train.train(config)
    argv = ["sample.py", "--run", config.out, "--prompt", "A WALL!!", "--steps", "2", "--out"]
    monkeypatch.setattr(sys, "argv", [*argv, str(tmp_path / "films")])
    asked = []
    encode_text = data.T5.encode
    monkeypatch.setattr(data.T5, "encode", lambda t5, t: asked.append(t) or encode_text(t5, t))
    sample.main()
    assert asked == [["a wall!"]]  # as the captions were cleaned, so is the prompt
    (film,) = (tmp_path / "films").glob("*.mp4")
    assert decode_all(film).shape == (4, 3, 32, 48)
    with pytest.raises(data.BadInput, match="width: 48 there, 32 here"):
        train.train(replace(config, width=0, out=config.out + "2"))


def test_a_cache_checks_itself(folder, encoders, tmp_path, monkeypatch, capsys):
    cache = data.write_cache(folder, tmp_path / "cache", *encoders, 4, 1, 32)
    argv = ["data.py", "cache", str(folder), "--check", "--out", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", argv)
    data.main()
    assert "10 samples in 1 shards, all as written" in capsys.readouterr().out
    (shard,) = cache.folder.glob("shard_*")
    content = shard.read_bytes()
    shard.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
    with pytest.raises(data.BadInput, match="1 of 1 shards are damaged: .*shard_00000"):
        data.main()


SMALL = """
import sys
sys.path.insert(0, {root!r})
import data
data.SHARD, write = 3, data.write_shard
data.write_shard = lambda path, *more: print("makes", path.name) or write(path, *more)
if __name__ == "__main__":
    data.command(data.main)
"""


def test_two_processes_make_the_cache_of_one(folder, encoders, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 3)
    data.write_cache(folder, tmp_path / "one", *encoders, 4, 1, 32, spans=2, clean=True)
    script = tmp_path / "small_shards.py"
    script.write_text(SMALL.format(root=str(ROOT)))
    arguments = ["cache", folder, "--frames", "4", "--size", "32", "--spans", "2", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*torchrun, "2", script, *arguments, tmp_path / "two"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("20 samples of") == 1
    assert done.stdout.count("makes shard_") == 7  # each by one of the two
    one, two = (data.LatentCache(tmp_path / out) for out in ("one", "two"))
    assert [shard[:2] for shard in one.shards] != [] and one.settings == two.settings
    assert [n for _, n, _ in one.shards] == [n for _, n, _ in two.shards] == [3] * 6 + [2]
    for i in range(20):
        assert one.text(i) == two.text(i)
        for name in ("latents", "y"):
            assert_close(two[i, 0][name], one[i, 0][name], 1e-2, "fp16 of values up to 8")


@pytest.mark.slow
def test_a_cache_that_is_killed_twenty_times_is_the_same_to_the_byte(folder, tmp_path):
    """python -m pytest -m slow -k killed_twenty. What a shard holds is not encoded again."""
    script = tmp_path / "small_shards.py"
    script.write_text(SMALL.format(root=str(ROOT)))
    arguments = [sys.executable, script, "cache", folder, "--frames", "8", "--spans", "40", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.time()
    subprocess.run([*arguments, whole], check=True, capture_output=True)
    duration, kills, rng = time.time() - start, 0, random.Random(0)
    kept = {}
    while kills < 20 and not (killed / "index.json").exists():
        process = subprocess.Popen([*arguments, killed], stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        time.sleep(rng.uniform(0.2, 0.6) * duration)
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            break
        process.wait()
        kills += 1
        found = {p: p.stat().st_mtime_ns for p in killed.glob("shard_*")}
        assert all(found[p] == kept[p] for p in kept)  # nothing is made twice
        if kills < 20 and len(found) > 3:  # so that there is work for all twenty
            for path in sorted(found)[2:]:
                path.unlink()
        kept = {p: p.stat().st_mtime_ns for p in killed.glob("shard_*")}
    subprocess.run([*arguments, killed], check=True, capture_output=True)
    print(f"{kills} kills; a whole run takes {duration:.0f} s")
    assert kills == 20
    files = sorted(p.name for p in whole.iterdir())
    assert files == sorted(p.name for p in killed.iterdir() if not p.name.startswith("."))
    for name in files:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux counts this so")
def test_memory_does_not_grow_with_the_length_of_a_clip(tmp_path):
    """python -m pytest -m slow -s -k memory_does_not. 1080p, 20 s and 80 s."""
    peaks = {}
    still = drawing(1, 1080, 1920)
    for seconds in (20, 80):
        folder = tmp_path / str(seconds)
        folder.mkdir()
        film = still.expand(24 * seconds, -1, -1, -1)
        encode(folder / "clip.mp4", film, g=48, preset="ultrafast")
        (folder / "clip.txt").write_text("a wall")
        code = ("import sys; sys.argv = sys.argv[1:]; import data; data.main(); print([line for "
                "line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])")
        command = [sys.executable, "-c", code, "data.py", "cache", folder, "--frames", "16",
                   "--stride", "3", "--spans", "8", "--out",
                   tmp_path / f"cache{seconds}"]  # fmt: skip
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks[seconds] = int(done.stdout.splitlines()[-1])
    print(f"\npeak memory in kB by seconds of 1080p: {peaks}")
    assert peaks[80] < 1.1 * peaks[20]


def test_show_draws_what_training_sees_and_what_is_kept(folder, encoders, tmp_path, monkeypatch):
    from PIL import Image

    argv = ["data.py", "show", str(folder), "--frames", "4", "--size", "32", "--width", "48"]
    argv += ["--out", str(tmp_path / "clips"), "--count", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    data.main()
    sheet = Image.open(tmp_path / "clips/show.png")
    gif = Image.open(tmp_path / "clips/show.gif")
    assert gif.n_frames == 4 and gif.size == (2 * 48 * 4, 64 * 4)  # two clips; frames over VAE
    assert sheet.size[1] > 2 * 64
    cache = data.write_cache(folder, tmp_path / "cache", *encoders, 4, 1, 32, width=48)
    monkeypatch.setattr(sys, "argv", ["data.py", "show", str(cache.folder), "--out",
                                      str(tmp_path / "cached"), "--count", "2"])  # fmt: skip
    data.main()
    gif = Image.open(tmp_path / "cached/show.gif")
    assert gif.n_frames == 4 and gif.size == (2 * 48 * 8, 32 * 8)


def test_a_sample_takes_the_room_that_is_stated(folder, encoders, tmp_path):
    """2 bytes a number: 4 T h w of the latents, E a token of the caption, and little else."""
    cache = data.write_cache(folder, tmp_path / "cache", *encoders, 8, 1, 32)
    tokens = sum(int(cache[i, 0]["mask"].sum()) for i in range(10))
    numbers = 10 * 4 * 8 * 4 * 4 + 64 * tokens
    (path, _, _), = cache.shards  # fmt: skip
    header = int.from_bytes(Path(path).read_bytes()[:8], "little") + 8
    assert Path(path).stat().st_size == 2 * numbers + header
    assert json.loads((cache.folder / "index.json").read_text())["shards"][0]["samples"] == 10
    shutil.rmtree(cache.folder)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the disk's cache can't be emptied")
def test_reading_rates(toy, tmp_path, capsys):
    """python -m pytest -m slow -s -k rates: clips through one worker, as in training; samples of a
    cache of 64 x 512 x 512, in random order, beside the bare reading of its files. No rate is
    asserted.
    """
    from safetensors.torch import save_file
    from torch.utils.data import DataLoader

    clips = data.Clips(toy / "train.csv", 8, 1, 64, 0)
    stream = train.Stream(clips, range(len(clips)), 0)
    batches = [range(i, i + 16) for i in range(0, 1600, 16)]
    loader = iter(DataLoader(stream, batch_sampler=batches, num_workers=1,
                             multiprocessing_context="spawn"))  # fmt: skip
    for _ in range(20):
        next(loader)  # the worker has started, and what it has read ahead is used up
    start = time.time()
    read = sum(len(batch["text"]) for batch in loader)
    lines = [f"clips of 8 x 64 x 64, one worker: {read / (time.time() - start):.0f} a second"]
    cache = tmp_path / "cache"
    cache.mkdir()
    shards = []
    for number in range(6):
        tensors, made = {}, []
        for i in range(64):
            sample = {"latents": torch.randn(4, 64, 64, 64), "y": torch.randn(120, 4096)}
            sample = {name: value.half() for name, value in sample.items()}
            made.append({"row": i, "text": "", "crc": data.checksum(sample)})
            tensors |= {f"{i}.{name}": value for name, value in sample.items()}
        path = cache / f"shard_{number:05d}.safetensors"
        save_file(tensors, path, {"index": json.dumps({"samples": made, "skipped": []})})
        shards.append({"file": path.name, "samples": 64, "sha256": data.sha256_of(path)})
    data.write_json(cache / "index.json", {
        "settings": {"caption_length": 120}, "shards": shards, "skipped": [], "latent_channels": 4,
        "caption_channels": 4096, "vae": "", "t5": "",
    })  # fmt: skip
    cache = data.LatentCache(cache)

    def forget():  # so that the disk is read, not its cache
        for path, _, _ in cache.shards:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    size = sum(Path(path).stat().st_size for path, _, _ in cache.shards) / 1e6
    rates = {}
    for kind in ("files", "samples", "files", "samples"):
        data.open_shard.cache_clear()
        forget()
        start = time.time()
        if kind == "files":
            for path, _, _ in cache.shards:
                Path(path).read_bytes()
        else:
            for i in train.permutation(0, len(cache), 0):
                assert cache[i, 0]["latents"].shape == (4, 64, 64, 64)
        rates[kind] = time.time() - start
    of_samples, of_files = (size / rates[kind] for kind in ("samples", "files"))
    lines.append(f"samples of 64 x 512 x 512: {len(cache) / rates['samples']:.0f} a second, "
                 f"{of_samples:.0f} MB/s; their files: {of_files:.0f} MB/s")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
