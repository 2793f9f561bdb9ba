"""Files of clips against a full decode, broken ones, their caches, their captions by LLaVA."""

import shutil
import subprocess
import sys
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_close
from PIL import Image

import data

sys.path.insert(0, str(ROOT / "tools"))
import caption  # noqa: E402


def encode(path, frames, codec="libx264", pix_fmt="yuv420p", sound=False, pts=None, **options):
    """Write uint8 [T, 3, H, W] as a video of any kind. pts: times of frames, in units of 1/24 s."""
    with av.open(str(path), "w") as file:
        options = {key: str(value) for key, value in options.items()}
        stream = file.add_stream(codec, rate=24, options=options)
        stream.height, stream.width = frames.shape[-2:]
        stream.pix_fmt, stream.thread_count = pix_fmt, 1
        track = file.add_stream("aac", rate=16000) if sound else None
        for i, image in enumerate(frames.permute(0, 2, 3, 1)):
            frame = av.VideoFrame.from_ndarray(image.contiguous().numpy(), format="rgb24")
            frame.pts = pts[i] if pts else i
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if sound:
            silence = np.zeros((1, 16000), dtype=np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
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
KINDS = {  # file: (options of encode, mean error of the flat parts after compression)
    "h264.mp4": ({"bf": 2}, 3),
    "prores.mov": ({"codec": "prores_ks", "pix_fmt": "yuv422p10le"}, 3),
    "ten_bit.mp4": ({"codec": "libx265", "pix_fmt": "yuv420p10le", **QUIET}, 3),
    "av1.mp4": ({"codec": "libsvtav1", "preset": 12}, 6),
    "vp9.webm": ({"codec": "libvpx-vp9", "deadline": "realtime"}, 4),
    "b_frames.avi": ({"codec": "mpeg4", "bf": 2}, 6),
    "variable.mp4": ({"pts": [3 * i + i % 3 for i in range(40)]}, 3),
    "animated.gif": ({"codec": "gif", "pix_fmt": "rgb8"}, 25),  # 8 bits per pixel
    "sound.mp4": ({"sound": True}, 3),
    "odd.mp4": ({"pix_fmt": "yuv444p"}, 3),  # 63 x 97 pixels
}


@pytest.mark.parametrize("name", KINDS)
def test_frames_of_any_kind_of_file_are_those_of_a_full_decode(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SVT_LOG", "0")
    options, bound = KINDS[name]
    video = drawing(40, 63, 97) if name == "odd.mp4" else drawing()
    path = encode(tmp_path / name, video, **{"g": 12} | options)
    whole = decode_all(path)
    assert whole.shape == video.shape
    for frames, stride, start in ((1, 1, 20), (8, 3, 9), (16, 2, 5), (40, 1, 0)):  # in the middle
        expected = whole[start : start + (frames - 1) * stride + 1 : stride]
        assert torch.equal(data.read_frames(path, frames, stride), expected), (frames, stride)
    for i, t in enumerate(data.frame_times(path)):  # each alone, from its keyframe
        assert torch.equal(data.decode(path, [t])[0], whole[i]), i
    error = (whole.float() - video.float()).abs()
    assert error[:, :, 4:36, 1:6].mean() < bound and error[:, :, 4:36, 16:].mean() < bound


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_in_the_track_header_is_applied(degrees, tmp_path):
    path = encode(tmp_path / "phone.mp4", drawing(6))
    whole, content = decode_all(path), path.read_bytes()
    i = content.index(b"tkhd") + 4 + 40  # the matrix: nine fixed-point numbers
    turns = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
    a, b, c, d = (v << 16 for v in turns[degrees])
    matrix = b"".join(v.to_bytes(4, signed=True) for v in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    path.write_bytes(content[:i] + matrix + content[i + 36 :])
    assert torch.equal(data.read_frames(path, 6), whole.rot90(-degrees // 90, (2, 3)))  # clockwise


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_an_image_is_a_video_of_one_frame_rotated_by_its_exif_tag(name, tmp_path):
    image, exif = drawing(1)[0], Image.Exif()
    exif[0x112] = 6 if name == "a.jpg" else 1  # orientation 6: rotate by 90 degrees, clockwise
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name, exif=exif)
    found = data.read_frames(tmp_path / name, 1)
    expected = image.rot90(-1, (1, 2)) if name == "a.jpg" else image
    assert found.shape == (1, *expected.shape)
    assert (found[0].float() - expected.float()).abs().mean() < 8  # compression


def test_a_long_clip_is_decoded_from_the_keyframe_before_the_crop(tmp_path):
    """16 frames at stride 3 of 3000, with a keyframe every 250: at most 300 are decoded."""
    video, decoded = drawing(60).repeat(50, 1, 1, 1), []
    path = encode(tmp_path / "long.mp4", video, g=250, keyint_min=250, sc_threshold=0, bf=0)

    class Times(list):
        def __contains__(self, time):  # asked for every decoded frame
            decoded.append(time)
            return super().__contains__(time)

    times = Times(data.frame_times(path)[1477:1523:3])
    assert torch.equal(data.decode(path, times), decode_all(path)[1477:1523:3])
    assert 46 <= len(decoded) <= 300


# ------------------------------------------------------------------------------------ broken files
@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The content of good files, by extension."""
    folder = tmp_path_factory.mktemp("good")
    for kind in ("mp4", "mkv", "h264", "avi"):
        encode(folder / f"good.{kind}", drawing(), "mpeg4" if kind == "avi" else "libx264")
    Image.new("RGB", (96, 64), "red").save(folder / "good.png")
    return {path.suffix[1:]: path.read_bytes() for path in folder.iterdir()}


def clip_of(path, frames):
    """Clips[0] of a table with one row."""
    table = path.parent / "table.csv"
    table.write_text(f"path,text\n{path.name},a drawing\n")
    return data.Clips(table, frames, 1, 32, 64, seed=0)[0]


def test_broken_clips_are_skipped_with_the_reason_in_one_line(good, tmp_path, capsys):
    mp4, png = good["mp4"], good["png"]
    broken = {  # name: (content, frames to read, reason); "": depends on the version of FFmpeg
        "empty.mp4": (b"", 8, "Invalid data"),
        "text.mp4": (b"<html> 403 Forbidden\n" * 99, 8, "Invalid data"),
        "subtitle.mp4": (b"1\n00:00:01,000 --> 00:00:02,000\na\n\n" * 9, 8, "no video stream"),
        "codec.avi": (good["avi"].replace(b"FMP4", b"Q?Z9"), 8, "no video stream"),
        "no_times.h264": (good["h264"], 8, "packets without presentation times"),
        "start.mp4": (mp4[:-1500], 8, ""),
        "start.mkv": (good["mkv"][:-900], 40, "frames; 40 at stride 1 need 40"),
        "middle.mp4": (mp4[:1000] + bytes(500) + mp4[1500:], 40, "Invalid data"),
        "start.png": (png[:-40], 1, ""),
        # 65535 x 65535 pixels: FFmpeg refuses to decode more than 2^28
        "huge.png": (png[:16] + b"\0\0\xff\xff" * 2 + png[24:], 1, "Invalid data"),
        "missing.mp4": (None, 8, "No such file"),
        "a caption in place of a path " * 10: (None, 8, "File name too long"),
    }
    for name, (content, frames, reason) in broken.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert clip_of(tmp_path / name, frames) is None, name
        (message,) = capsys.readouterr().err.splitlines()
        assert message.startswith(f"warning: skipped {tmp_path / name}: "), name
        assert reason in message, message


# --------------------------------------------------------------------------------- folders, caches
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of ten clips of different lengths, with captions."""
    path = tmp_path_factory.mktemp("folder")
    for i in range(10):
        encode(path / f"{i}.mp4", drawing(12 + i, 48, 80))
        (path / f"{i}.txt").write_text("a red circle " + "moving left " * (i % 6))
    return path


def test_a_folder_is_a_data_set_without_its_unreadable_clips(folder, encoders, tmp_path, capsys):
    source = shutil.copytree(folder, tmp_path / "clips")
    (source / ".trash").mkdir(), (source / "more").mkdir()
    shutil.copy(source / "0.mp4", source / ".trash")
    for file in ("9.mp4", "9.txt"):
        shutil.move(source / file, source / "more")
    (source / "2.txt").write_text("See https://a.example/x?y=1 A\n WALL", "utf-8-sig")
    (source / "3.mp4").write_bytes(b""), (source / "8.txt").unlink()
    clips, rows = data.Clips(source, 12, 1, 32, 48, seed=3), [0, 1, 2, 4, 5, 6, 7, 9]
    names = [*(f"{i}.mp4" for i in range(9)), "more/9.mp4"]
    assert [str(path.relative_to(source)) for path, _ in clips.rows] == names
    assert clips.captions[2] == "see a wall"
    cache = data.write_cache(clips, tmp_path / "cache", *encoders)
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'cache'}: 8 of 10 clips\n"
    skipped = [f"skipped {source / name}" for name in ("3.mp4", "8.mp4")]
    assert sorted(line.split(": ")[1] for line in printed.err.splitlines()) == skipped
    assert "8.mp4: no caption: write one, or run tools/caption.py" in printed.err
    assert cache.captions == [clips.captions[row] for row in rows]
    for i, row in enumerate(rows):
        crop = data.read_frames(clips.rows[row][0], 12, 1, data.keyed_generator(3, "crop", row))
        frames = data.center_crop_and_resize(crop, 32, 48)
        x0 = encoders[0].encode(frames, data.keyed_generator(3, "posterior", row))
        assert_close(cache[i][0], x0, 4e-3, "fp16 storage of latents up to 8")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


VIEW = ["--frames", 4, "--stride", 1, "--size", 32, "--width", 48]


def test_two_processes_write_the_files_of_one(folder, encoders, tmp_path):
    one, shares, two = (tmp_path / name for name in ("one", "shares", "two"))
    clips, threads = data.Clips(folder, 4, 1, 32, 48, seed=0), torch.get_num_threads()
    torch.set_num_threads(1)  # as under torchrun, for the same bits
    data.write_cache(clips, one, *encoders)
    with pytest.raises(FileNotFoundError):  # rank 1 writes no index
        data.write_cache(clips, shares, *encoders, data.Distributed("cpu", rank=1, world_size=2))
    assert contents(shares).keys() == {f"{row:06d}.safetensors" for row in range(1, 10, 2)}
    torch.set_num_threads(threads)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, ROOT / "data.py", folder, *map(str, VIEW), "--out", two]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.count(f"{two}: 10 of 10 clips") == 1, done.stderr[-2000:]
    assert contents(two) == contents(one) == contents(one) | contents(shares)


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
    assert [text for _, text in data.list_clips(table)] == [*map(data.clean_caption, expected), ""]
