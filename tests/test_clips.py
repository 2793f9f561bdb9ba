"""Files of clips against a plain decode, broken ones, their caches, their captions by LLaVA."""

import os
import shutil
import sys
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_close
from PIL import Image, ImageOps

import data

sys.path.insert(0, str(ROOT / "tools"))
import caption  # noqa: E402
import clip_score  # noqa: E402


def encode(path, frames, codec="libx264", pix_fmt="yuv420p", pts=None, color=(), **options):
    """Write uint8 [T, 3 or 4, H, W] as a video of any kind. pts: times of frames, in 1/24 s. color:
    numbers of matrix and transfer. sar: ratio of a pixel's width to its height.
    """
    with av.open(str(path), "w") as file:
        sar = options.pop("sar", 1)
        options = {key: str(value) for key, value in options.items()}
        stream = file.add_stream(codec, rate=24, options=options)
        stream.height, stream.width = frames.shape[-2:]
        stream.pix_fmt, stream.thread_count = pix_fmt, 1
        context = stream.codec_context
        context.sample_aspect_ratio = Fraction(sar)
        if color:
            context.colorspace, context.color_trc = color
        for i, image in enumerate(frames.permute(0, 2, 3, 1).contiguous().numpy()):
            kind = "rgba" if image.shape[-1] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(image, format=kind)
            frame = frame.reformat(format=pix_fmt, dst_colorspace=1 if color else None)
            frame.pts = pts[i] if pts else i
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def copy_packets(source, target, first=0, shift=0, change=lambda packets: packets):
    """Write the packets of a video into another file: from `first` on, `shift` frames earlier."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [p for p in old.demux(video=0) if p.size][first:]
        for packet, content in zip(packets, change([bytes(p) for p in packets])):
            copy = av.Packet(content)
            copy.stream, copy.time_base = stream, packet.time_base
            copy.is_keyframe = packet.is_keyframe
            copy.dts = packet.dts - int(shift / 24 / packet.time_base)
            copy.pts = None if packet.pts is None else packet.pts - packet.dts + copy.dts
            new.mux(copy)
    return target


def drawing(n=40, H=64, W=96):
    """A video of flat colors: uint8 [n, 3, H, W]. The width of a bright bar tells the number of the
    frame; the left 8 columns of the upper 40 rows do not change.
    """
    video = torch.tensor([40, 160, 80], dtype=torch.uint8).view(1, 3, 1, 1).repeat(n, 1, H, W)
    video[:, :, :40, :8] = torch.tensor([220, 60, 40], dtype=torch.uint8).view(3, 1, 1)
    for i in range(n):
        video[i, :, 44:60, 2 : 8 + i * (W - 14) // n] = 255
    return video


def bars(video):
    """Widths of the bars in a drawing, in pixels."""
    return (video[:, 2, 52] > 170).sum(1).tolist()  # blue


def decode_all(path):
    """All frames of a file in the order of PyAV: uint8 [T, 3, H, W]."""
    frames = []
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.best("video")):
            try:
                frames += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
            except av.InvalidDataError:  # VP9, after a cut
                assert not frames
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------- kinds of files
QUIET = {"x265-params": "log-level=none"}
KINDS = {  # file: (options of encode, mean error of the flat parts after compression)
    "h264.mp4": ({"bf": 2}, 3),
    "open.mkv": ({"x264-params": "open-gop=1:bframes=3:keyint=12"}, 3),
    "refresh.mp4": ({"x264-params": "intra-refresh=1:keyint=12:bframes=0"}, 3),
    "h264.avi": ({"bf": 3}, 3),  # AVI has no presentation times
    "h264.ts": ({"bf": 3}, 3),
    "raw.h264": ({"bf": 3}, 3),  # no times at all
    "prores.mov": ({"codec": "prores_ks", "pix_fmt": "yuv422p10le"}, 3),
    "ten_bit.mp4": ({"codec": "libx265", "pix_fmt": "yuv420p10le", **QUIET}, 3),
    "av1.mp4": ({"codec": "libsvtav1", "preset": 12}, 6),
    "vp9.webm": ({"codec": "libvpx-vp9", "deadline": "realtime"}, 4),
    "b_frames.avi": ({"codec": "mpeg4", "bf": 2}, 6),
    "variable.mp4": ({"pts": [3 * i + i % 3 for i in range(40)]}, 3),
    "animated.gif": ({"codec": "gif", "pix_fmt": "rgb8"}, 25),  # 8 bits per pixel
    "odd.mp4": ({"pix_fmt": "yuv444p"}, 3),  # 63 x 97 pixels
}


def pack(packets):
    """Packed B-frames, as XviD writes them to AVI: each follows another frame in one packet, and a
    packet that shows nothing stands in its place.
    """
    kinds = [p[p.index(b"\0\0\1\xb6") + 4] >> 6 for p in packets] + [0]  # 0: I, 1: P, 2: B
    packed = [b"\0\0\1\xb2DivX503b1393p" + packets[0]]  # the mark by which decoders know it
    for i in range(1, len(packets)):
        both = packets[i] + packets[i + 1] if kinds[i + 1] == 2 else packets[i]
        packed.append(b"\0\0\1\xb6\x50\x4f" if kinds[i] == 2 else both)
    return packed


def hide(packets):
    """Give frame 3 VP8's flag of a frame that is never shown, only referred to."""
    return [*packets[:3], bytes([packets[3][0] & 0xEF]) + packets[3][1:], *packets[4:]]


def check_crops(path):
    """Every crop is one of a plain decode, wherever decoding begins. Returns all frames."""
    whole = decode_all(path)
    count, times = data.list_packets(path)
    assert torch.equal(data.read_frames(path, len(whole)), whole)
    for start in range(len(whole) - 9):
        numbers = range(start, start + 10, 3)
        found, _ = data.decode(path, numbers, lambda frame: frame, times)
        assert torch.equal(torch.stack([found[i] for i in numbers]), whole[numbers]), start
    for seed in range(8):
        crop = data.read_frames(path, 4, 3, torch.Generator().manual_seed(seed))
        assert any(torch.equal(crop, whole[i : i + 10 : 3]) for i in range(len(whole) - 9)), seed
    return whole


@pytest.mark.parametrize("name", KINDS)
def test_crops_of_any_kind_of_file_are_those_of_a_plain_decode(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SVT_LOG", "0")
    options, bound = KINDS[name]
    video = drawing(40, 63, 97) if name == "odd.mp4" else drawing()
    path = encode(tmp_path / name, video, **{"g": 12} | options)
    whole = check_crops(path)
    assert whole.shape == video.shape and bars(whole) == sorted(bars(whole))
    for frames, stride, start in ((1, 1, 20), (8, 3, 9), (16, 2, 5)):  # in the middle
        expected = whole[start : start + (frames - 1) * stride + 1 : stride]
        assert torch.equal(data.read_frames(path, frames, stride), expected), (frames, stride)
    error = (whole.float() - video.float()).abs()
    assert error[:, :, 4:36, 1:6].mean() < bound and error[:, :, 4:36, 16:].mean() < bound


EDITED = {  # file: (options of encode, options of copy_packets, numbers of the frames shown)
    "cut.mkv": ({}, {"first": 5}, range(12, 40)),
    "cut.webm": ({"codec": "libvpx-vp9", "deadline": "realtime"}, {"first": 5}, range(12, 40)),
    "edit.mp4": ({"bf": 2}, {"shift": 7}, range(7, 40)),  # an edit list hides what is before 0
    "hidden.webm": ({"codec": "libvpx"}, {"change": hide}, [*range(3), *range(4, 40)]),
    "packed.avi": ({"codec": "mpeg4", "bf": 1}, {"change": pack}, range(40)),
}


@pytest.mark.parametrize("name", EDITED)
def test_packets_that_are_not_frames_do_not_change_the_order_of_frames(name, tmp_path):
    options, edit, shown = EDITED[name]
    encoded = encode(tmp_path / f"0{name}", drawing(), **{"g": 12, "sc_threshold": 0} | options)
    path = copy_packets(encoded, tmp_path / name, **edit)
    found, expected = bars(check_crops(path)), bars(drawing()[list(shown)])
    assert len(shown) - (name == "edit.mp4") <= len(found) <= len(shown)  # PyAV 17 hides the last
    assert max(abs(a - b) for a, b in zip(found, expected)) <= 1  # less than one frame


def test_a_long_clip_is_decoded_from_the_keyframe_before_the_crop(tmp_path, monkeypatch):
    """16 frames at stride 3 of 600, with a keyframe every 100: at most 150 are decoded."""
    path, decoded = tmp_path / "long.mp4", []
    encode(path, drawing().repeat(15, 1, 1, 1), g=100, keyint_min=100, sc_threshold=0, bf=0)

    def counted(*args, frames_of=data.decoded_frames):
        for frame in frames_of(*args):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(data, "decoded_frames", counted)
    assert torch.equal(data.read_frames(path, 16, 3), decode_all(path)[277:323:3])
    assert 46 <= len(decoded) <= 150


# ----------------------------------------------------------------------------- what a player shows
TURNS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]  # clockwise: a, b, c, d


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_the_matrix_in_the_track_header_is_applied(turns, mirrored, tmp_path):
    path = encode(tmp_path / "phone.mp4", drawing(4))
    whole, content = decode_all(path), path.read_bytes()
    i = content.index(b"tkhd") + 4 + 40  # the matrix: nine fixed-point numbers
    a, b, c, d = (v << 16 for v in TURNS[turns])
    if mirrored:  # before it is rotated
        whole, a, b = whole.flip(-1), -a, -b
    matrix = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    content = content[:i] + b"".join(v.to_bytes(4, signed=True) for v in matrix) + content[i + 36 :]
    path.write_bytes(content)
    assert torch.equal(data.read_frames(path, 4), whole.rot90(-turns, (2, 3)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_a_video_of_one_frame_in_the_orientation_of_its_exif_tag(orientation, tmp_path):
    image, exif = Image.fromarray(drawing(1)[0].permute(1, 2, 0).numpy()), Image.Exif()
    exif[0x112] = orientation
    for name in ("a.png", "a.jpg", "a.webp", "a.avif"):
        image.save(tmp_path / name, exif=exif)
        expected = np.array(ImageOps.exif_transpose(Image.open(tmp_path / name)).convert("RGB"))
        found = data.read_frames(tmp_path / name, 1)[0]
        assert torch.equal(found, torch.from_numpy(expected).permute(2, 0, 1)), name
        assert found.shape == ((3, 64, 96) if orientation < 5 else (3, 96, 64))


@pytest.mark.parametrize("name, sar", [("a.mp4", "64/45"), ("a.ts", "16/15"), ("a.avi", "4/3")])
def test_circles_are_round_where_pixels_are_not_square(name, sar, tmp_path):
    y, x = torch.meshgrid(torch.arange(256) - 127.5, torch.arange(320) - 159.5, indexing="ij")
    circle = ((y / 100) ** 2 + (x / 100 * float(Fraction(sar))) ** 2 < 1).to(torch.uint8) * 255
    video = circle.expand(2, 3, -1, -1)
    path = encode(tmp_path / name, video, "mpeg4" if name == "a.avi" else "libx264", sar=sar)
    shape = data.read_frames(path, 1, transform=lambda f: data.center_crop_and_resize(f, 128, 128))
    bright = shape[0, 1] > 127
    assert bright.any(0).sum() / bright.any(1).sum() == pytest.approx(1, abs=0.02)


def test_transparent_pixels_are_white_and_16_bits_become_8(tmp_path):
    pixels = np.zeros((64, 96, 4), np.uint8)
    pixels[...], pixels[16:48, 16:48] = (255, 0, 255, 0), (200, 40, 40, 255)
    image, path = Image.fromarray(pixels), tmp_path / "a.png"
    image.save(path), image.quantize(8).save(tmp_path / "b.png")
    encode(tmp_path / "c.mov", torch.from_numpy(pixels).permute(2, 0, 1)[None], "qtrle", "argb")
    for name in ("a.png", "b.png", "c.mov"):  # true color, palette, video
        found = data.read_frames(tmp_path / name, 1)[0]
        assert found[:, 0, 0].tolist() == [255] * 3 and found[:, 32, 32].tolist() == [200, 40, 40]
    Image.fromarray(np.arange(0, 60000, 1000, dtype=np.uint16).reshape(6, 10)).save(path)
    assert data.read_frames(path, 1)[0, 1].flatten().tolist() == [i * 1000 >> 8 for i in range(60)]
    image.convert("RGB").convert("CMYK").save(tmp_path / "d.jpg", quality=95)
    assert data.read_frames(tmp_path / "d.jpg", 1)[0, :, 32, 32].tolist() == [200, 40, 40]


def test_colors_are_those_of_the_tagged_matrix(tmp_path):
    green = torch.tensor([30, 200, 30], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 64, 96)
    for name, color in (("709.mp4", (1, 1)), ("untagged.mp4", ())):
        found = data.read_frames(encode(tmp_path / name, green, color=color), 1)[0, :, 32, 48]
        assert (
            found.int() - green[0, :, 0, 0]
        ).abs().max() <= 3  # 8 bits of YUV; untagged is BT.601


def test_interlaced_frames_are_deinterlaced(tmp_path):
    """A bar that moves by 2 pixels a frame, its lines recorded in turns, half a frame apart."""
    fields = torch.full((40, 3, 64, 96), 40, dtype=torch.uint8)
    for i in range(40):
        fields[i, :, :, 4 + i : 24 + i] = 200
    frames = fields[::2].clone()
    frames[:, :, 1::2] = fields[1::2, :, 1::2]
    path = encode(tmp_path / "a.ts", frames, **{"x264-params": "tff=1:keyint=8"})
    assert not torch.equal(decode_all(path)[:, :, ::2], decode_all(path)[:, :, 1::2])
    whole = data.read_frames(path, 20)
    between = (whole[:, :, 1:-1].float() - (whole[:, :, :-2].float() + whole[:, :, 2:]) / 2).abs()
    assert between.mean() < 0.5  # no comb; 3.5 in the frames as coded
    assert torch.equal(data.read_frames(path, 4, 3), whole[5:15:3])


def test_reading_starts_no_threads_and_a_lack_of_them_is_not_damage(tmp_path, monkeypatch):
    path, tasks = encode(tmp_path / "a.mp4", drawing()), "/proc/self/task"
    if os.path.isdir(tasks):
        data.read_frames(path, 1)
        before, during = len(os.listdir(tasks)), []
        count = lambda frame: during.append(len(os.listdir(tasks))) or frame  # noqa: E731
        data.read_frames(path, 4, 3, transform=count)
        assert during == [before] * 4
    error = av.error.BlockingIOError(11, "Resource temporarily unavailable")
    monkeypatch.setattr(data, "open_video", lambda path: (_ for _ in ()).throw(error))
    with pytest.raises(BlockingIOError):
        data.read_frames(path, 4)


# ------------------------------------------------------------------------------------ broken files
def clip_of(path, frames):
    """Clips[0] of a table with one row."""
    table = path.parent / "table.csv"
    table.write_text(f"path,text\n{path.name},a drawing\n")
    return data.Clips(table, frames, 1, 32, 64, seed=0)[0]


def test_broken_clips_are_skipped_with_the_reason_in_one_line(tmp_path, capsys):
    good = {kind: encode(tmp_path / f"good.{kind}", drawing()) for kind in ("mp4", "mkv")}
    good["avi"] = encode(tmp_path / "good.avi", drawing(), "mpeg4")
    for kind, trc in (("pq", 16), ("hlg", 18)):
        good[kind] = tmp_path / f"{kind}.mp4"
        encode(good[kind], drawing(8), "libx265", "yuv420p10le", color=(9, trc), **QUIET)
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in drawing(8)]
    good |= {kind: tmp_path / f"good.{kind}" for kind in ("webp", "png")}
    images[0].save(good["webp"], save_all=True, append_images=images[1:])
    images[0].save(good["png"])
    good = {kind: path.read_bytes() for kind, path in good.items()}
    mp4, png = good["mp4"], good["png"]
    broken = {  # name: (content, frames to read, reason); "": depends on the version of FFmpeg
        "empty.mp4": (b"", 8, "Invalid data"),
        "text.mp4": (b"<html> 403 Forbidden\n" * 99, 8, "Invalid data"),
        "subtitle.mp4": (b"1\n00:00:01,000 --> 00:00:02,000\na\n\n" * 9, 8, "no video stream"),
        "codec.avi": (good["avi"].replace(b"FMP4", b"Q?Z9"), 8, "no video stream"),
        "start.mp4": (mp4[:-1500], 8, ""),
        "start.mkv": (good["mkv"][:-900], 40, "frames; 40 at stride 1 need 40"),
        "middle.mp4": (mp4[:1000] + bytes(500) + mp4[1500:], 40, "Invalid data"),
        "pq.mp4": (good["pq"], 8, "HDR (PQ); convert it to SDR: ffmpeg -i IN -vf zscale="),
        "hlg.mp4": (good["hlg"], 8, "HDR (HLG); convert it to SDR: ffmpeg -i IN -vf zscale="),
        "start.png": (png[:-40], 1, ""),
        "animated.webp": (good["webp"], 1, "FFmpeg can decode no frame"),
        # 65535 x 65535 pixels: FFmpeg refuses to decode more than 2^28
        "huge.png": (png[:16] + b"\0\0\xff\xff" * 2 + png[24:], 1, ""),
        "missing.mp4": (None, 8, "no such file"),
        "a caption in place of a path " * 10: (None, 8, "no such file"),
    }
    for name, (content, frames, reason) in broken.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert clip_of(tmp_path / name, frames) is None, name
        (message,) = capsys.readouterr().err.splitlines()
        assert message.startswith(f"warning: skipped {tmp_path / name}: "), name
        assert reason in message, message


@pytest.mark.parametrize("bframes, last_readable", [(0, 9), (2, 7)])
def test_a_crop_needs_undamaged_frames_since_the_keyframe(bframes, last_readable, tmp_path):
    """Bytes of frame 12 are overwritten, in the first of two groups of 24 frames. All later ones of
    the group depend on it, and of B-frames also 10 and 11.
    """
    blocks = torch.randint(0, 256, (3, 8, 12), generator=torch.Generator().manual_seed(0)).byte()
    noise = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    video = torch.stack([noise.roll(2 * i, 2) for i in range(48)])
    x264 = f"keyint=24:min-keyint=24:scenecut=0:b-adapt=0:b-pyramid=none:bframes={bframes}"
    path = encode(tmp_path / "a.mp4", video, **{"x264-params": x264})
    with av.open(str(path)) as file:
        frames = sorted((p.pts, p.pos, p.size) for p in file.demux(video=0) if p.size)
    (_, start, size), content = frames[12], bytearray(path.read_bytes())
    for j in range(start + size // 3, start + size // 3 + min(24, size // 2)):
        content[j] = (content[j] * 7 + 91) % 256
    path.write_bytes(content)
    _, times = data.list_packets(path)
    for reads in (times, []):  # from the keyframe, from the beginning
        readable = []
        for first in range(46):
            try:
                data.decode(path, range(first, first + 3), lambda frame: frame, reads)
                readable.append(first)
            except data.UnreadableClip as error:
                assert "is damaged" in str(error)
        assert readable == [*range(last_readable + 1), *range(24, 46)]


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
    assert [str(path.relative_to(source)) for path in clips.files] == names
    assert clips.captions[2] == "see a wall"
    cache = data.write_cache(clips, tmp_path / "cache", *encoders)
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'cache'}: 8 of 10 clips\n"
    skipped = [f"skipped {source / name}" for name in ("3.mp4", "8.mp4")]
    assert sorted(line.split(": ")[1] for line in printed.err.splitlines()) == skipped
    assert "8.mp4: no caption: write one, or run tools/caption.py" in printed.err
    assert cache.captions == [clips.captions[row] for row in rows]
    for i, row in enumerate(rows):
        crop = data.read_frames(clips.files[row], 12, 1, data.keyed_generator(3, "crop", row))
        frames = data.center_crop_and_resize(crop, 32, 48)
        x0 = encoders[0].encode(frames, data.keyed_generator(3, "posterior", row))
        assert_close(cache[i][0], x0, 4e-3, "fp16 storage of latents up to 8")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


VIEW = ["--frames", 4, "--stride", 1, "--size", 32, "--width", 48]


CODE = """
import data
vae, t5 = data.VAE("assets/vae"), data.T5("assets/t5", 16)
data.write_cache(data.Clips({folder!r}, 4, 1, 32, 48, seed=0), {two!r}, vae, t5, distributed)
"""


def test_two_processes_write_the_files_of_one(
    folder, encoders, tmp_path, processes, monkeypatch, capsys
):
    one, shares, two = (tmp_path / name for name in ("one", "shares", "two"))
    encoder_options = ["--vae=assets/vae", "--t5=assets/t5", f"--out={one}"]
    monkeypatch.setattr(sys, "argv", ["data.py", str(folder), *map(str, VIEW), *encoder_options])
    monkeypatch.setattr(data, "frame_rates", [])
    data.main()
    assert "10 videos read, of 24 frames a second\n" in capsys.readouterr().out
    clips = data.Clips(folder, 4, 1, 32, 48, seed=0)
    with pytest.raises(FileNotFoundError):  # rank 1 writes no index
        data.write_cache(clips, shares, *encoders, data.Distributed("cpu", rank=1, world_size=2))
    assert contents(shares).keys() == {f"{row:06d}.safetensors" for row in range(1, 10, 2)}
    processes(2).run(CODE.format(folder=str(folder), two=str(two)))
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


def test_the_clip_score_is_that_of_transformers_clip(tmp_path, monkeypatch, capsys):
    import tokenizers as tk
    import transformers as tf

    words = ["<end>", "<unk>", "a", "red", "blue", "circle"]
    vocabulary = tk.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    tokenizer = tk.Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
    end = {"special_tokens": [("<end>", 0)]}  # its embedding is that of the caption
    tokenizer.post_processor = tk.processors.TemplateProcessing("$A <end>", **end)
    special = {"pad_token": "<end>", "eos_token": "<end>", "unk_token": "<unk>"}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    images = tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    processor = tf.CLIPProcessor(images, tokenizer)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    size["num_attention_heads"] = 2
    text = {"vocab_size": 6, "eos_token_id": 0, "bos_token_id": 1, "max_position_embeddings": 8}
    vision = {"image_size": 28, "patch_size": 14} | size
    torch.manual_seed(0)
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text | size, vision_config=vision)).eval()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "clip")

    expected, _ = [], (tmp_path / "clips").mkdir()
    for name, words in (("a", "a red circle"), ("b", "a blue circle")):
        blocks = torch.rand(15, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255
        frames = blocks.byte().repeat_interleave(16, 2).repeat_interleave(16, 3)
        frames = decode_all(encode(tmp_path / f"clips/{name}.mp4", frames))[::2]  # 8 of 15
        (tmp_path / f"clips/{name}.txt").write_text(words)
        out = model(**processor(text=words, images=list(frames), return_tensors="pt"))
        expected.append(100 * (out.logits_per_image / model.logit_scale.exp()).mean().item())
    assert abs(expected[0] - expected[1]) > 0.1
    (tmp_path / "clips/c.mp4").touch()
    (tmp_path / "clips/c.txt").write_text("a circle")
    argv = ["clip_score.py", str(tmp_path / "clips"), "--clip", str(tmp_path / "clip")]
    monkeypatch.setattr(sys, "argv", [*argv, "--device", "cpu"])
    clip_score.main()
    printed = capsys.readouterr()
    found = [float(line.split()[0]) for line in printed.out.splitlines()]
    assert found == pytest.approx([*expected, sum(expected) / 2], abs=0.01)  # two decimals
    assert f"skipped {tmp_path / 'clips/c.mp4'}" in printed.err
