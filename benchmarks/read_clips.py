"""Measure reading of clips: crops of 16 frames at stride 3, resized to 256 x 256, in two processes.

    python benchmarks/read_clips.py

The videos are made: 1280 x 720 at 30 frames a second, H.264 with x264's default settings, 10 s
long, and one of 10 minutes. Readers take turns at the same random starts: data.py, a decode from
the first frame with the same conversion, torchcodec (pip install torchcodec), and the data.py of an
earlier commit. All must return the same frames. The rows are milliseconds a crop, the time of
data.py over that of the reader, and both again in time of the CPU, which other work disturbs less.
"""

import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

FRAMES, STRIDE, SIZE = 16, 3, 256
SPAN = (FRAMES - 1) * STRIDE + 1
SECONDS, RATE = 10, 30


@dataclass(frozen=True)
class ReadConfig:
    clips: int = 3  # videos of 10 seconds
    crops: int = 12  # crops of each kind of video per round
    rounds: int = 3  # rounds, in which each reader has a turn
    commit: str = "78903d4"  # commit with an earlier data.py, read by frame_times and decode
    torchcodec: bool = True  # measure torchcodec too


def make_clip(path, seed):
    """A pan over a texture with the spectrum of photographs, moving patches and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.fft.fftfreq(1024), np.fft.rfftfreq(2048), indexing="ij")
    spectrum = 1 / np.maximum(np.hypot(y, x), 1 / 2048) ** 1.2
    phases = np.exp(2j * np.pi * rng.random((3, *spectrum.shape)))
    texture = np.fft.irfft2(spectrum * phases).transpose(1, 2, 0)
    texture = 128 + 50 * texture / texture.std()
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for i in range(SECONDS * RATE):
            top, left = int(100 + 80 * np.sin(i / 40 + seed)), 2 * i % 700
            image = texture[top : top + 720, left : left + 1280].copy()
            for k in range(4):
                a, b = 100 + 140 * k, (150 * k + 5 * i) % 1100
                image[a : a + 120, b : b + 120] = texture[300 * k : 300 * k + 120, :120][:120]
            image += rng.normal(0, 1.5, (720, 1280, 1))
            image = image.clip(0, 255).astype(np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())


def repeat_clip(source, path, times):
    """Write the packets of a clip several times."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [p for p in old.demux(video=0) if p.size]
        length = int(SECONDS / packets[0].time_base)
        for k in range(times):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts = packet.pts + k * length, packet.dts + k * length
                copy.time_base, copy.stream = packet.time_base, stream
                copy.is_keyframe = packet.is_keyframe
                new.mux(copy)


def crop_and_resize(frame):
    return data.center_crop_and_resize(frame, SIZE, SIZE)


def numbers_of(start, count):
    return range(start, start + SPAN, STRIDE)


def read_ours(path, start):
    return data.read_chosen(path, partial(numbers_of, start), crop_and_resize)


def read_plain(path, start):
    found, _ = data.decode(path, numbers_of(start, 0), crop_and_resize)
    return torch.stack(list(found.values()))


def read_torchcodec(path, start):
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1)
    return crop_and_resize(decoder.get_frames_in_range(start, start + SPAN, STRIDE).data)


def read_earlier(path, start):
    spec = importlib.util.spec_from_file_location("earlier", Path(path).parent / "earlier.py")
    if "earlier" not in sys.modules:
        sys.modules["earlier"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["earlier"])
    earlier = sys.modules["earlier"]
    transform = partial(earlier.center_crop_and_resize, height=SIZE, width=SIZE)
    return earlier.decode(path, earlier.frame_times(path)[start : start + SPAN : STRIDE], transform)


def work(reader, path, start):
    """The frames of a crop, the milliseconds it took, and those of the CPU, of all threads."""
    torch.set_num_threads(1)
    cpu, clock = time.process_time(), time.perf_counter()
    frames = reader(path, start)
    return frames, 1000 * (time.perf_counter() - clock), 1000 * (time.process_time() - cpu)


def measure(pool, readers, paths, count, config):
    """Let readers take turns at crops of clips of `count` frames, and print a row for each."""
    rng = random.Random(0)
    starts = [rng.randrange(count - SPAN + 1) for _ in range(config.crops)]
    jobs = [(paths[i % len(paths)], start) for i, start in enumerate(starts)]
    crops, times = {}, {name: [] for name in readers}  # times: [jobs, 2] a round
    for _ in range(config.rounds):
        for name, read in readers.items():
            list(pool.map(work, [read] * 2, paths[:1] * 2, [0, 0]))  # imports
            crops[name], *columns = zip(*pool.map(work, [read] * len(jobs), *zip(*jobs)))
            times[name].append(np.array(columns).T)
    ours = np.mean(times["data.py"], axis=(0, 1))
    for name, rounds in times.items():
        assert all(map(torch.equal, crops[name], crops["data.py"])), name
        (clock, cpu), ratios = np.mean(rounds, axis=(0, 1)), ours / np.mean(rounds, axis=(0, 1))
        print(f"| {name} | {clock:.0f} | {ratios[0]:.2f} | {cpu:.0f} | {ratios[1]:.2f} |")


def main():
    c = tyro.cli(ReadConfig, description=__doc__)
    readers = {"data.py": read_ours, "from the first frame": read_plain}
    if c.torchcodec:
        readers["torchcodec"] = read_torchcodec
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2) as pool:
        if c.commit:
            command = ["git", "-C", str(ROOT), "show", f"{c.commit}:data.py"]
            text = subprocess.run(command, capture_output=True, check=True).stdout
            (Path(folder) / "earlier.py").write_bytes(text)
            readers[f"data.py of {c.commit}"] = read_earlier
        clips, long = [f"{folder}/{i}.mp4" for i in range(c.clips)], f"{folder}/long.mp4"
        list(pool.map(make_clip, clips, range(c.clips)))
        repeat_clip(clips[0], long, 60)
        print(f"10 seconds, {sum(os.path.getsize(path) for path in clips) / 1e6:.1f} MB")
        measure(pool, readers, clips, SECONDS * RATE, c)
        del readers["from the first frame"]  # takes half a minute
        print(f"10 minutes, {os.path.getsize(long) / 1e6:.0f} MB")
        measure(pool, readers, [long], 60 * SECONDS * RATE, c)


if __name__ == "__main__":
    main()
