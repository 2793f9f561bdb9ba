"""Clips: any kind of file is read as a full decode shows it, broken files are named and skipped.
Caches of clips and the tools for them: captions by LLaVA, contact sheets, training of encoders.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest.mock import MagicMock

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_close
from PIL import Image

import data

sys.path.insert(0, str(ROOT / "tools"))
import caption  # noqa: E402
import make_encoders  # noqa: E402
import show  # noqa: E402


def encode(path, frames, codec="libx264", pix_fmt="yuv420p", matrix=None, sound=False, **options):
    """Write uint8 [T, 3, H, W] as a video of any kind, with the title "Caf!"; frames None: sound
    alone. matrix: number of the YUV matrix. pts: times of the frames in units of 1/24 s.
    """
    container, pts = options.pop("container", {}), options.pop("pts", range(9999))
    options = {key: str(value) for key, value in options.items()}
    with av.open(str(path), "w", options=container) as file:
        file.metadata["title"] = "Caf!"
        if frames is not None:
            stream = file.add_stream(codec, rate=24, options=options)
            stream.height, stream.width = frames.shape[-2:]
            stream.pix_fmt, stream.thread_count = pix_fmt, 1
            if matrix is not None:
                stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1
        track = file.add_stream("aac", rate=16000) if sound else None
        for i, image in enumerate([] if frames is None else frames.permute(0, 2, 3, 1)):
            frame = av.VideoFrame.from_ndarray(image.contiguous().numpy(), format="rgb24")
            if matrix is not None:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix)
            frame.pts = pts[i]
            file.mux(stream.encode(frame))
        if frames is not None:
            file.mux(stream.encode())
        if sound:
            wave = np.sin(np.arange(16000, dtype=np.float32) / 10)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 0
            file.mux(track.encode(frame)), file.mux(track.encode())
    return path


def drawing(n=40, H=64, W=96):
    """A video of flat colors with moving parts: uint8 [n, 3, H, W]. The left 8 columns of the upper
    40 rows do not change.
    """
    video = torch.tensor([40, 160, 80], dtype=torch.uint8).view(1, 3, 1, 1).repeat(n, 1, H, W)
    video[:, :, :40, :8] = torch.tensor([220, 60, 40], dtype=torch.uint8).view(3, 1, 1)
    for i in range(n):
        video[i, :, 44:60, 10 : 12 + i * (W - 14) // n] = 6 * i % 256
    return video


def decode_all(path):
    """All frames of a file in the order of PyAV: uint8 [T, 3, H, W]."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------- kinds of files
QUIET = {"x265-params": "log-level=none"}
KINDS = {  # file: (size, options of encode, mean error of the flat parts after compression)
    "h264.mp4": ((64, 96), {"bf": 2}, 3),
    "prores.mov": ((64, 96), {"codec": "prores_ks", "pix_fmt": "yuv422p10le"}, 3),
    "hevc.mp4": ((64, 96), {"codec": "libx265", **QUIET}, 3),
    "ten_bit.mp4": ((64, 96), {"codec": "libx265", "pix_fmt": "yuv420p10le", **QUIET}, 3),
    "av1.mp4": ((64, 96), {"codec": "libsvtav1", "preset": 12}, 6),
    "vp9.webm": ((64, 96), {"codec": "libvpx-vp9", "deadline": "realtime"}, 4),
    "mpeg4.mp4": ((64, 96), {"codec": "mpeg4"}, 8),
    "b_frames.avi": ((64, 96), {"codec": "mpeg4", "bf": 2}, 6),
    "full_range.mp4": ((64, 96), {"pix_fmt": "yuvj420p"}, 3),
    "h264.mkv": ((64, 96), {"bf": 2}, 3),
    "variable.mp4": ((64, 96), {"pts": [3 * i + i % 3 for i in range(40)]}, 3),
    "animated.gif": ((64, 96), {"codec": "gif", "pix_fmt": "rgb8"}, 25),  # 8 bits per pixel
    "bt709.mp4": ((64, 96), {"matrix": 1}, 3),  # HD video; read as BT.601, green would be off by 9
    "sound.mp4": ((64, 96), {"sound": True}, 3),
    "odd.mp4": ((63, 97), {"pix_fmt": "yuv444p"}, 3),
}


@pytest.mark.parametrize("name", KINDS)
def test_frames_of_any_kind_of_file_are_those_of_a_full_decode(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SVT_LOG", "0")
    size, options, bound = KINDS[name]
    video = drawing(40, *size)
    path = encode(tmp_path / name, video, **{"g": 12} | options)
    whole = decode_all(path)
    assert whole.shape == video.shape
    for frames, stride in ((1, 1), (8, 3), (16, 2), (40, 1)):
        for seed in range(4):
            g = torch.Generator().manual_seed(seed)
            found = data.read_frames(path, frames, stride, g)
            g = torch.Generator().manual_seed(seed)
            start = int(torch.randint(40 - (frames - 1) * stride, (1,), generator=g))
            expected = whole[start : start + (frames - 1) * stride + 1 : stride]
            assert torch.equal(found, expected), (frames, stride, start)
    for i, t in enumerate(data.frame_times(path)):  # each alone, from its keyframe
        assert torch.equal(data.decode(path, [t])[0], whole[i]), i
    error = (whole.float() - video.float()).abs()
    assert error[:, :, 4:36, 1:6].mean() < bound and error[:, :, 4:36, 16:].mean() < bound


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_in_the_track_header_is_applied(degrees, tmp_path):
    path = encode(tmp_path / "phone.mp4", drawing(6))
    whole, content = decode_all(path), path.read_bytes()
    i = content.index(b"tkhd") + 4 + 40  # the matrix: nine fixed-point numbers
    turns = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
    a, b, c, d = (v << 16 for v in turns[degrees])
    matrix = b"".join(v.to_bytes(4, signed=True) for v in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    path.write_bytes(content[:i] + matrix + content[i + 36 :])
    assert torch.equal(data.read_frames(path, 6), whole.rot90(-degrees // 90, (2, 3)))  # clockwise


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp"])
def test_an_image_is_a_video_of_one_frame_rotated_by_its_exif_tag(name, tmp_path):
    image, exif = drawing(1)[0], Image.Exif()
    exif[0x112] = 6 if name == "a.jpg" else 1  # orientation 6: rotate by 90 degrees, clockwise
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name, exif=exif)
    found = data.read_frames(tmp_path / name, 1)
    expected = image.rot90(-1, (1, 2)) if name == "a.jpg" else image
    assert found.shape == (1, *expected.shape)
    assert (found[0].float() - expected.float()).abs().mean() < 8  # compression


def test_a_long_clip_is_decoded_from_the_keyframe_before_the_crop(tmp_path, monkeypatch):
    """16 frames at stride 3 from the middle of 3000, with a keyframe every 250: at most 300."""
    video = drawing(60).repeat(50, 1, 1, 1)
    path = encode(tmp_path / "long.mp4", video, g=250, keyint_min=250, sc_threshold=0, bf=0)
    whole, decoded, open_file = decode_all(path), [], av.open

    def open_counted(*args, **options):
        container = open_file(*args, **options)
        counted = MagicMock(wraps=container)
        counted.__enter__.return_value = counted
        counted.decode = lambda stream: (decoded.append(f) or f for f in container.decode(stream))
        return counted

    monkeypatch.setattr(av, "open", open_counted)
    assert torch.equal(data.read_frames(path, 16, 3), whole[1477 : 1477 + 46 : 3])
    assert 46 <= len(decoded) <= 300


def test_a_relative_name_with_a_colon_and_a_title_that_is_not_utf8(tmp_path, monkeypatch):
    content = encode(tmp_path / "title.mkv", drawing(8)).read_bytes()
    assert b"Caf!" in content
    monkeypatch.chdir(tmp_path)
    Path("part: 1.mkv").write_bytes(content.replace(b"Caf!", b"Caf\xe9"))
    Path("clips.csv").write_text("path,text\npart: 1.mkv,a\n")
    found = data.Clips("clips.csv", 8, 1, 64, 96, 0)[0]
    assert torch.equal(found, decode_all("title.mkv"))


# ------------------------------------------------------------------------------------ broken files
@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The content of good files, by extension."""
    folder, image = tmp_path_factory.mktemp("good"), Image.new("RGB", (96, 64), "red")
    codecs = {"avi": {"codec": "mpeg4"}, "gif": {"codec": "gif", "pix_fmt": "rgb8"}}
    for kind in ("mp4", "mkv", "ts", "h264", "avi", "gif"):
        encode(folder / f"good.{kind}", drawing(), **codecs.get(kind, {}))
    for kind in ("png", "jpg"):
        image.save(folder / f"good.{kind}")
    return {path.suffix[1:]: path.read_bytes() for path in folder.iterdir()}


def damage_group(path, group, n=40):
    """An MP4 of n frames in four groups of pictures, one of them overwritten with zeros."""
    options = {"container": {"movflags": "faststart"}, "x264-params": "scenecut=0"}
    encode(path, drawing(n), g=n // 4, bf=0, **options)
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    content = bytearray(path.read_bytes())
    for packet in packets[group * n // 4 : (group + 1) * n // 4]:
        content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(content)


def clip_of(path, frames):
    """Clips[0] of a table with one row."""
    table = path.parent / "table.csv"
    table.write_text(f"path,text\n{path.name},a drawing\n")
    return data.Clips(table, frames, 1, 32, 64, seed=0)[0]


def test_broken_clips_are_skipped_with_the_reason_in_one_line(good, tmp_path, capsys):
    broken = {  # name: (content, frames to read, reason); "": depends on the version of FFmpeg
        "empty.mp4": (b"", 8, "Invalid data"),
        "zeros.mp4": (bytes(5000), 8, "Invalid data"),
        "text.mp4": (b"<html> 403 Forbidden\n" * 99, 8, "Invalid data"),
        "text.jpg": (b"%PDF-1.7 not an image\n" * 99, 1, "Invalid data"),
        "subtitle.mp4": (b"1\n00:00:01,000 --> 00:00:02,000\na\n\n" * 9, 8, "no video stream"),
        "codec.avi": (good["avi"].replace(b"FMP4", b"Q?Z9"), 8, "no video stream"),
        "no_times.h264": (good["h264"], 8, "packets without presentation times"),
        "start.mp4": (good["mp4"][:-1500], 8, ""),
        "end.mp4": (good["mp4"][1000:], 8, "Invalid data"),
        "start.mkv": (good["mkv"][:-900], 40, "frames; 40 at stride 1 need 40"),
        "start.png": (good["png"][:-40], 1, ""),
        "start.jpg": (good["jpg"][:200], 1, "Invalid data"),
        "header.png": (good["png"][:8], 1, ""),
        # 65535 x 65535 pixels: FFmpeg refuses to decode more than 2^28
        "huge.png": (good["png"][:16] + b"\0\0\xff\xff" * 2 + good["png"][24:], 1, "Invalid data"),
        "sound.mp4": (None, 8, "no video stream"),
        "group_0.mp4": (None, 40, "Invalid data"),
        "group_3.mp4": (None, 40, "Invalid data"),
        "folder.mp4": (None, 8, "Is a directory"),
        "link.mp4": (None, 8, "No such file"),
        "missing.mp4": (None, 8, "No such file"),
        "a caption in place of a path " * 10: (None, 8, "File name too long"),
    }
    encode(tmp_path / "sound.mp4", None, sound=True)
    damage_group(tmp_path / "group_0.mp4", 0), damage_group(tmp_path / "group_3.mp4", 3)
    (tmp_path / "folder.mp4").mkdir(), (tmp_path / "link.mp4").symlink_to("nowhere.mp4")
    for name, (content, frames, reason) in broken.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert clip_of(tmp_path / name, frames) is None
        (message,) = capsys.readouterr().err.splitlines()
        assert message.startswith(f"warning: skipped {tmp_path / name}: "), name
        assert reason in message, message
    Image.new("RGB", (1, 1)).save(tmp_path / "pixel.png")
    assert clip_of(tmp_path / "pixel.png", 1).shape[:2] == (1, 3)  # the crop is not empty


def test_random_damage_raises_nothing(good, tmp_path):
    outcomes, kinds = set(), ("mp4", "mkv", "ts", "avi", "gif", "png", "jpg")
    for kind, seed in product(kinds, range(25)):
        rng, content = random.Random(seed), bytearray(good[kind])
        for _ in range(rng.choice([1, 5, 50])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path = tmp_path / f"damaged.{kind}"
        path.write_bytes(content)
        outcomes.add(clip_of(path, 1 if kind in ("png", "jpg") else 8) is None)
    assert outcomes == {True, False}


# --------------------------------------------------------------------------------- folders, caches
def test_a_folder_is_a_data_set(tmp_path, capsys):
    (tmp_path / "more").mkdir(), (tmp_path / ".trash").mkdir()
    for name in ("b.mp4", "more/a.mkv", "silent.mp4", ".hidden.mp4", ".trash/c.mp4"):
        encode(tmp_path / name, drawing(12))
    (tmp_path / "b.txt").write_text("a green   field\n with a wall\n", "utf-8-sig")
    (tmp_path / "more/a.txt").write_text("See https://a.example/x?y=1 A WALL")
    clips = data.Clips(tmp_path, 8, 1, 32, 48, seed=3)
    assert [path.name for path, _ in clips.rows] == ["b.mp4", "a.mkv", "silent.mp4"]
    assert clips.captions == ["a green field with a wall", "see a wall", ""]
    assert clips[2] is None
    assert "silent.mp4: no caption: write one, or run tools/caption.py" in capsys.readouterr().err
    for row in (0, 1):
        crop = data.read_frames(clips.rows[row][0], 8, 1, data.keyed_generator(3, "crop", row))
        assert torch.equal(clips[row], data.resize_and_center_crop(crop, 32, 48))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of ten clips of different lengths, with captions."""
    path = tmp_path_factory.mktemp("folder")
    for i in range(10):
        encode(path / f"{i}.mp4", drawing(12 + i, 48, 80))
        (path / f"{i}.txt").write_text("a red circle " + "moving left " * (i % 6))
    return path


def test_unreadable_clips_are_named_counted_and_left_out(folder, encoders, tmp_path, capsys):
    source = shutil.copytree(folder, tmp_path / "clips")
    damage_group(source / "3.mp4", 2, 16)  # in every crop of 12 of 16 frames
    (source / "5.mp4").write_bytes(b""), (source / "8.txt").unlink()
    clips, rows = data.Clips(source, 12, 1, 32, 48, seed=0), [0, 1, 2, 4, 6, 7, 9]
    cache = data.write_cache(clips, tmp_path / "cache", *encoders)
    printed = capsys.readouterr()
    warnings = sorted(printed.err.splitlines())
    assert printed.out == f"{tmp_path / 'cache'}: 7 of 10 clips\n"
    skipped = [f"warning: skipped {source / name}: " for name in ("3.mp4", "5.mp4", "8.mp4")]
    assert [line[: len(start)] for line, start in zip(warnings, skipped, strict=True)] == skipped
    assert cache.captions == [clips.captions[row] for row in rows]
    for i, row in enumerate(rows):
        x0 = encoders[0].encode(clips[row], data.keyed_generator(0, "posterior", row))
        assert_close(cache[i][0], x0, 4e-3, "fp16 storage of latents up to 8")
    shutil.rmtree(source)
    with pytest.raises(data.UserError, match="no clip is readable, see the warnings"):
        data.write_cache(clips, tmp_path / "none", *encoders)
    assert not (tmp_path / "none/index.json").exists()


def run_python(*arguments, **options):
    """Start Python -> its output."""
    command, environ = [sys.executable, *map(str, arguments)], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


VIEW = ["--frames", 4, "--stride", 1, "--size", 32, "--width", 48]


def test_two_processes_write_the_files_of_one(folder, encoders, tmp_path):
    one, shares, two = (tmp_path / name for name in ("one", "shares", "two"))
    clips, threads = data.Clips(folder, 4, 1, 32, 48, seed=0), torch.get_num_threads()
    torch.set_num_threads(1)  # as under torchrun, for the same bits
    data.write_cache(clips, one, *encoders)
    with pytest.raises(FileNotFoundError):  # rank 1 writes no index
        data.write_cache(clips, shares, *encoders, rank=1, world_size=2)
    names = [f"{row:06d}.safetensors" for row in range(1, 10, 2)]
    assert sorted(contents(shares)) == names
    data.write_cache(clips, shares, *encoders, rank=0, world_size=2)
    torch.set_num_threads(threads)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command = [*torchrun, ROOT / "data.py", folder, *VIEW, "--caption-length", 16, "--out", two]
    assert run_python(*command).count(f"{two}: 10 of 10 clips") == 1
    assert contents(two) == contents(shares) == contents(one)


@pytest.mark.slow
def test_a_cache_killed_five_times_is_the_same_to_the_byte(folder, tmp_path):
    """python -m pytest -m slow -k killed_five. No file is written twice."""
    table, rng, written = tmp_path / "clips.csv", random.Random(0), {}
    rows = [f"{folder / f'{i % 10}.mp4'},a red circle" for i in range(400)]
    table.write_text("\n".join(["path,text", *rows]))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = list(map(str, [ROOT / "data.py", table, *VIEW, "--out"]))
    run_python(*command, whole)
    for _ in range(5):
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, *command, killed], env=environ)
        while process.poll() is None and len(list(killed.glob("0*"))) <= len(written):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = {path: path.stat().st_mtime_ns for path in killed.glob("0*")}
        assert found.items() >= written.items() and not (killed / "index.json").exists()
        written = found
    run_python(*command, killed)
    assert contents(whole) == contents(killed)


# ------------------------------------------------------------------------------------------- tools
QUESTION = "what is seen where how does it move and the camera too in which style of drawing"


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A folder with a tiny LLaVA of random weights, so large that answers depend on the images."""
    import tokenizers as tk
    import transformers as tf

    folder = tmp_path_factory.mktemp("llava")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), "<image>", *QUESTION.split(), *(f"{i}." for i in range(20))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tk.Tokenizer(tk.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
    special["additional_special_tokens"] = ["<image>"]
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    images = tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    template = "<image><image><image> {{ messages[0]['content'][3]['text'] }}"
    options = {"patch_size": 14, "vision_feature_select_strategy": "default"}
    options |= {"num_additional_image_tokens": 1, "chat_template": template}
    tf.LlavaProcessor(images, tokenizer, **options).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision = tf.CLIPVisionConfig(image_size=28, patch_size=14, num_attention_heads=2, **size)
    text = tf.LlamaConfig(vocab_size=len(words), num_attention_heads=2, **size)
    options = {"image_token_id": 3, "vision_feature_layer": -1}
    config = tf.LlavaConfig(vision_config=vision, text_config=text, **options)
    model = tf.LlavaForConditionalGeneration(config)
    torch.manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn_like(p) * (0.5 if p.ndim < 2 else 4 * p[0].numel() ** -0.5)
    model.generation_config.suppress_tokens = [0, 1, 2, 3]  # answer with words alone
    model.save_pretrained(folder)
    return folder


def test_captions_are_those_of_transformers_llava_for_three_frames(llava, tmp_path, capsys):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(llava)
    processor, expected, unfinished = AutoProcessor.from_pretrained(llava), [], 0
    for i in range(3):
        blocks = torch.rand(11, 3, 4, 4, generator=torch.Generator().manual_seed(i)) * 255
        frames = blocks.byte().repeat_interleave(16, 2).repeat_interleave(16, 3)
        images = decode_all(encode(tmp_path / f"{i}.mp4", frames))[[2, 5, 8]]  # 20, 50, 80%
        text = "<image><image><image> " + QUESTION
        inputs = processor(text=text, images=list(images), return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=30)[0]
        text = processor.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        expected.append(text[: text.rindex(".") + 1])  # without an unfinished sentence
        unfinished += expected[i] != text
    assert len(set(expected)) == 3 and unfinished > 0
    table = tmp_path / "clips.csv"
    rows = ["0.mp4,mine,", '1.mp4,"a, b","kept, as it is"', "2.mp4,c,", "gone.mp4,d,"]
    table.write_text("\n".join(["path,license,text", *rows, ""]))
    config = caption.CaptionConfig(str(table), str(llava), QUESTION, max_tokens=30, batch_size=3)
    assert caption.write_captions(config) == 2  # a batch of two
    rows = [f"0.mp4,mine,{expected[0]}", rows[1], f"2.mp4,c,{expected[2]}", rows[3]]
    assert table.read_text() == "\n".join(["path,license,text", *rows, ""])
    assert f"skipped {tmp_path / 'gone.mp4'}: " in capsys.readouterr().err
    config = replace(config, overwrite=True, batch_size=1)
    assert caption.write_captions(config) == 3  # one by one
    assert [text for _, text in data.read_table(table)] == [*map(data.clean_caption, expected), ""]


def test_an_interrupted_run_of_captions_continues(llava, tmp_path, monkeypatch):
    for i in range(3):
        encode(tmp_path / f"{i}.mp4", drawing(6))
    config = caption.CaptionConfig(str(tmp_path), str(llava), batch_size=1)
    describe = MagicMock(side_effect=[["a"], KeyboardInterrupt, ["b"], ["c"]])
    monkeypatch.setattr(caption, "describe", describe)
    with pytest.raises(KeyboardInterrupt):
        caption.write_captions(config)
    assert caption.write_captions(config) == 2
    assert [(tmp_path / f"{i}.txt").read_text() for i in range(3)] == ["a\n", "b\n", "c\n"]
    with pytest.raises(data.UserError, match="nowhere/llava has no LLaVA"):
        caption.write_captions(replace(config, llava="nowhere/llava", overwrite=True))


def test_the_sheet_shows_frames_as_read_and_as_decoded(folder, encoders, tmp_path, monkeypatch):
    """Of clips, frames above and decoded latents below; of their cache, decoded latents."""
    clips = data.Clips(folder, 4, 1, 32, 48, seed=0)
    cache = data.write_cache(clips, tmp_path / "cache", *encoders)
    command = [ROOT / "tools/show.py", folder, *VIEW, "--clips", 2, "--out", "clips"]
    assert "2 clips" in run_python(*command, cwd=tmp_path)
    argv = ["show.py", str(tmp_path / "cache"), "--out", str(tmp_path / "cached"), "--clips", "20"]
    monkeypatch.setattr(sys, "argv", argv)
    show.main()
    decoded = data.to_uint8(encoders[0].decode(cache[0][0]))
    for out, videos, rows in (("clips", [clips[0], decoded], 2), ("cached", [decoded], 10)):
        video = torch.cat(videos, dim=-2)  # [4, 3, 32 or 64, 48]
        H, scale = video.shape[-2], round(128 / video.shape[-2])
        sheet = torch.from_numpy(np.array(Image.open(tmp_path / out / "show.png"))).permute(2, 0, 1)
        assert sheet.shape == (3, rows * (H * scale + 24) + 4, 4 * (48 * scale + 4) + 4)
        for k, frame in enumerate(video):
            shown = sheet[:, 24 : 24 + H * scale : scale, 4 + k * (48 * scale + 4) :: scale]
            assert_close(shown[..., :48].float(), frame.float(), 2, "fp16 storage of latents")
        gif = Image.open(tmp_path / out / "show.gif")
        assert gif.n_frames == 4 and gif.size == (rows * 48 * 256 // H, 256)


def test_encoders_are_trained_and_load(tmp_path, monkeypatch):
    """One step each. The VAE's latents of the toy have zero mean and unit variance."""
    toy_frames = make_encoders.toy_frames
    monkeypatch.setattr(make_encoders, "toy_frames", lambda n, g: toy_frames(min(n, 64), g))
    make_encoders.make_vae(tmp_path / "vae", steps=1, batch=4)
    make_encoders.make_t5(tmp_path / "t5", steps=1, batch=4)
    frames = toy_frames(64, torch.Generator().manual_seed(1))
    latents = data.VAE(tmp_path / "vae").encode(data.to_uint8(frames))  # [4, 64, 8, 8]
    std, mean = torch.std_mean(latents, (1, 2, 3))
    assert_close(torch.cat([mean, std - 1]), torch.zeros(8), 0.1, "another draw of frames")
    captions = [data.caption_of(triple) for triple in data.TRIPLES]
    ids = data.T5(tmp_path / "t5", 16).tokenizer(captions)["input_ids"]
    assert {len(i) for i in ids} == {6} and len(set(map(tuple, ids))) == 48  # a token per word
