"""From video files to what the network sees: clips, captions, frozen encoders, cache, and the toy.

    python data.py toy --out DIR                draw captioned films of moving shapes
    python data.py caption SOURCE               describe clips that have no caption, with LLaVA
    python data.py show SOURCE --out DIR        look at what training will see
    python data.py cache SOURCE --out DIR       encode every clip and caption once

A SOURCE is a folder of videos and images, each with its caption in a .txt beside it, or a CSV with
the header "path,text" (paths relative to it). A clip that is read is uint8 frames; the frozen VAE
makes latents of them, the frozen T5 makes tokens of the caption, and a cache keeps both, since
neither changes in training. av, torchvision, diffusers and transformers are imported where they are
used: training from a cache needs none of them.

Shapes, in this file:
    B batch    T frames    H, W height and width in pixels    C latent channels (4)
    h, w latent height and width (H / 8, W / 8)    L caption tokens    E caption channels
"""

import argparse
import csv
import glob
import hashlib
import html
import json
import math
import mimetypes
import multiprocessing
import os
import re
import sys
import time
import zlib
from bisect import bisect_right
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

ASSETS = Path(__file__).resolve().parent / "assets"

# ---------------------------------------------------------------------------------------------
# Small things that every script here needs: errors, random draws, whole files, progress


class BadInput(Exception):
    """Something the user can mend. Says what was found where, what was expected, and what to do."""


def command(main, *more):
    """Run a script's main(): BadInput, and more exceptions that are given, end in one line on
    stderr and exit code 2, without a traceback.
    """
    try:
        main()
    except (BadInput, *more) as error:
        rank = f" [rank {os.environ['RANK']}]" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        # from a data worker it comes with a traceback
        message = (str(error) or type(error).__name__).splitlines()[-1]
        message = message.removeprefix("data.BadInput: ")
        print(f"error{rank}: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


def require(ok, message):
    if not ok:
        raise BadInput(message)


def warn(message):
    """A line on stderr; the work goes on."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def keyed_generator(*key):
    """A torch.Generator for one draw, seeded by what the draw is for: (seed, purpose, global
    position).

    So a draw depends on neither rank nor worker nor place in the batch, a resumed run repeats it,
    and no generator's state has to be saved.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def write_whole(path, write):
    """Call write(temporary path), then rename: whoever finds `path` finds a whole file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())  # on the disk before it gets its name
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path, content):
    write_whole(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))


def read_json(path, what):
    """The content of a JSON file of ours, or BadInput that names the file."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise BadInput(f"{path} is not there: {what}") from None
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error}): {what}") from None


def pick_device(name):
    """auto: CUDA, else MPS, else CPU; anything else as it is, or BadInput if it is not there."""
    have = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    have.append("cpu")
    require(name in ("auto", *have), f"device={name} is not on this machine; have {have}")
    return have[0] if name == "auto" else name


def progress(items, label, total=None):
    """Iterate over items: a tqdm bar on a terminal, else a plain line every 15 seconds."""
    total = len(items) if total is None else total
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, leave=False, total=total)
        return
    start = last = time.time()
    for done, item in enumerate(items):
        if time.time() - last > 15:
            last = time.time()
            left = f"{(last - start) / done * (total - done):.0f} s left" if done else "just begun"
            print(f"{label}: {done} of {total}, {left}", file=sys.stderr, flush=True)
        yield item


# ---------------------------------------------------------------------------------------------
# Processes
#
# torchrun starts a process per GPU, on one machine or many, and tells each its rank. Every process
# takes its part of the work. What they have to tell each other, but for gradients, goes through the
# CPU (gloo), so that it never waits for a GPU.


class Process(NamedTuple):
    """Which of the processes this one is, how many there are, its device, and their gloo group. sp
    processes share each film, in the group `sequence`: a replica, whose members do the same work.
    """

    rank: int
    world: int
    device: str
    group: object = None
    sp: int = 1
    sequence: object = None

    @property
    def replica(self):
        return self.rank // self.sp

    @property
    def replicas(self):
        return self.world // self.sp

    def sum(self, values):
        """Sum a list of numbers over all processes; those that share films count as one."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total, group=self.group)
        return (total / self.sp).tolist()

    def share(self, work):
        """What work() gives on the first process, for all, for files may lie on its machine alone.
        If it fails, all end, and the first says why.
        """
        answer = failure = None
        if self.rank == 0:
            try:
                answer = work()
            except Exception as error:
                failure = error
        if self.world > 1:
            box = [answer, failure is not None]
            dist.broadcast_object_list(box, 0, group=self.group)
            answer, failed = box
            if failed and self.rank:
                raise SystemExit(2)
        if failure:
            raise failure
        return answer

    def gather(self, items):
        """The lists of all replicas one after the other, on the first process."""
        lists = [items] * self.world
        if self.world > 1:
            dist.gather_object(items, lists if self.rank == 0 else None, group=self.group)
        return sum(lists[:: self.sp], [])

    def mine(self, items):
        """The part of a list that this replica takes."""
        n = len(items)
        return items[self.replica * n // self.replicas : (self.replica + 1) * n // self.replicas]

    def say(self, text):
        """Print, on the first process alone, without cutting through the progress bar."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()


def set_up_process(device, sp=1):
    """Read torchrun's variables; without torchrun, one process. sp: how many share a film."""
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)
    rank, world, local = (int(os.environ.get(name, default)) for name, default in names)
    device = pick_device(device)
    require(device != "mps" or world == 1,
            "MPS is one device: start one process, or give --device cpu")  # fmt: skip
    if device == "cuda":
        gpus = torch.cuda.device_count()
        require(local < gpus, f"process {local} of this machine has no GPU, for there are {gpus}; "
                              "start fewer processes")  # fmt: skip
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    require(sp > 0 and world % sp == 0, f"sp={sp}: expected a number that divides the {world} "
                                        "process(es) that torchrun starts")  # fmt: skip
    if world == 1:
        return Process(rank, world, device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    # Patient: the others wait here while the first makes the toy, or reads or writes large weights.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=2))
    if sp == 1:
        return Process(rank, world, device, group)
    shape, names = (world // sp, sp), ("data", "sequence")
    mesh = init_device_mesh(device.split(":")[0], shape, mesh_dim_names=names)
    return Process(rank, world, device, group, sp, mesh["sequence"].get_group())


# ---------------------------------------------------------------------------------------------
# Clips
#
# Training wants T frames, `stride` source frames apart, from anywhere in a clip. Decoding a video
# from its beginning to get 16 frames of it is where v1 spent most of its loading time. Here the
# packets are listed first, which decodes nothing: a frame's index is the rank of its presentation
# time among them. Then the decoder starts at the last keyframe before the first frame that is
# wanted and stops at the last. An image is a video of one frame.

LARGEST = 8192 * 8192  # pixels; a file that declares more is damaged, or would fill the memory
NOT_CLIPS = {".txt", ".csv", ".json", ".jsonl", ".parquet", ".md", ".srt", ".vtt"}  # beside them


class BadClip(Exception):
    """Why a clip can't be used. The caller names it, counts it, and goes on with the others."""


def read_table(source, columns=("path", "text")):
    """A folder or a CSV -> list of (path, caption), "" where there is no caption; or BadInput."""
    source = Path(source)
    try:
        rows = read_folder(source) if source.is_dir() else read_csv(source, columns)
    except FileNotFoundError:
        raise BadInput(f"{source} is not there; give a folder of clips, or a CSV with the header "
                       "path,text") from None  # fmt: skip
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{source} is no CSV ({error}); give one with the header path,text, or a "
                       "folder of clips") from None  # fmt: skip
    require(rows, f"{source} lists no clip; expected videos or images, or lines path,text")
    return rows


def read_folder(folder):
    """Everything in a folder, and in those inside it, that may be a clip; captions lie beside."""
    rows = []
    for name in sorted(glob.glob("**", root_dir=folder, recursive=True)):  # but what is hidden
        path = folder / name
        inner = path.is_dir() and not str(mimetypes.guess_type(path)[0]).startswith("video/")
        if not inner and path.suffix.lower() not in NOT_CLIPS:
            beside = path.with_suffix(".txt")
            text = beside.read_text("utf-8", "replace") if beside.is_file() else ""
            rows.append((path, " ".join(text.split())))
    return rows


def read_csv(path, columns):
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a mark
        reader, rows = csv.DictReader(file), []
        missing = sorted(set(columns) - set(reader.fieldnames or ()))
        require(not missing, f"{path}: no column {' and no column '.join(missing)}; found "
                f"{reader.fieldnames or 'nothing'}, expected a header line path,text")  # fmt: skip
        for row in reader:
            require(row["path"] and None not in row,
                    f"{path}, line {reader.line_num}: found {list(row.values())}, expected "
                    f"{','.join(reader.fieldnames)}; put a text with commas into quotes")
            rows.append((path.parent / row["path"], " ".join((row.get("text") or "").split())))
        return rows


def open_video(path):
    """Open a video or image -> (container, its video stream), or BadClip."""
    import av

    path = Path(path).absolute()  # else a colon in its name would be taken for a protocol
    try:
        if path.is_dir() or path.stat().st_size == 0:
            raise BadClip("is a directory" if path.is_dir() else "is empty")
        container = av.open(str(path), metadata_errors="replace")
    except FileNotFoundError:
        raise BadClip("is not there") from None
    except (av.FFmpegError, OSError) as error:
        raise BadClip(f"can't be opened: {error.strerror}") from None
    stream = container.streams.best("video")
    coder = stream and stream.codec_context
    width, height = (coder.width, coder.height) if coder else (1, 1)
    if not coder or not 0 < width * height <= LARGEST:
        container.close()
        raise BadClip("has no video stream" if not stream else
                      "is in a code that FFmpeg does not know" if not coder else
                      f"declares a picture of {width} x {height} pixels"
                      if width * height else "holds no picture")  # fmt: skip
    coder.thread_count = 1  # several clips are read at once
    return container, stream


def frame_times(path):
    """Presentation times of all frames, in order, and their unit in seconds; decodes nothing."""
    import av

    container, stream = open_video(path)
    with container:
        try:
            packets = [(p.pts, p.duration or 0, p.is_discard)  # and not p, which holds the data
                       for p in container.demux(stream) if p.size]  # fmt: skip
        except av.FFmpegError as error:
            raise BadClip(f"can't be read: {error.strerror}") from None
        if any(pts is None for pts, _, _ in packets):
            raise BadClip("does not say when its frames are shown; put it into another container: "
                          "ffmpeg -i FILE -c copy FILE.mp4")  # fmt: skip
        end = max((pts + duration for pts, duration, _ in packets), default=0)
        whole = (stream.start_time or 0) + (stream.duration or 0)
        if stream.frames > len(packets) and end < 0.98 * whole:
            raise BadClip(f"was cut off: {len(packets)} of its {stream.frames} frames are there")
        times = sorted({pts for pts, _, discard in packets if not discard})
        return times, float(stream.time_base)


def first_frames(times, unit, frames, stride, fps):
    """How many frames of a clip leave room for a span that begins there; BadClip if none does."""
    if fps:
        need = f"{frames} frames, {fps:g} a second, need {(frames - 1) / fps:.2f} s"
        room = bisect_right(times, times[-1] - (frames - 1) / fps / unit + 0.5) if times else 0
    else:
        need = f"{frames} frames at stride {stride} need {(frames - 1) * stride + 1}"
        room = len(times) - (frames - 1) * stride
    if room < 1:
        length = f" in {(times[-1] - times[0]) * unit:.2f} s" if fps and times else ""
        raise BadClip(f"has {len(times)} frames{length}; {need}")
    return room


def decode(path, wanted, change=lambda frame: frame):
    """The frames at these presentation times -> uint8 [T, 3, H, W] in RGB, turned as the file says.
    `change` is applied to each frame [3, H, W], so that no more than one is held in full size.
    Colours are FFmpeg's: those that the file declares, BT.601 where it declares none.
    """
    import av
    import numpy as np

    found, missing = {}, set(wanted)
    for start in (wanted[0], None):  # some containers (AVI) seek too far: then from the beginning
        container, stream = open_video(path)
        with container:
            try:
                if start is not None:
                    container.seek(start, stream=stream, backward=True)
                for frame in container.decode(stream):
                    if frame.pts in missing:
                        image = frame.to_ndarray(format="rgb24")  # [H, W, 3]
                        image = np.rot90(image, round(frame.rotation / 90))  # phones lie on a side
                        image = torch.from_numpy(image.copy()).permute(2, 0, 1)  # [3, H, W]
                        found[frame.pts] = change(image)
                        missing.remove(frame.pts)
                        if not missing:
                            return torch.stack([found[t] for t in wanted])
                    elif frame.pts is not None and frame.pts > wanted[-1 if found else 0]:
                        break
            except av.FFmpegError as error:
                raise BadClip(f"can't be decoded: {error.strerror}") from None
    raise BadClip(f"can't be decoded: {len(missing)} of {len(wanted)} frames are not in it")


def read_frames(path, frames, stride=1, generator=None, fps=0, change=lambda frame: frame):
    """T = `frames` frames of a clip -> uint8 [T, 3, H, W]. They are `stride` source frames apart;
    or, with fps, frame k is the one that is shown k / fps seconds after the first, whatever the
    clip's own rate. The first is drawn by the generator among all that leave room for the rest;
    without one it is the middle one of them. BadClip if there is no room, or it can't be decoded.
    """
    times, unit = frame_times(path)
    room = first_frames(times, unit, frames, stride, fps)
    start = room // 2 if generator is None else int(torch.randint(room, (1,), generator=generator))
    if fps:
        moments = [times[start] + k / fps / unit + 0.5 for k in range(frames)]
        wanted = [times[bisect_right(times, moment) - 1] for moment in moments]
    else:
        wanted = times[start : start + (frames - 1) * stride + 1 : stride]
    return decode(path, wanted, change)


def fit(frames, height, width):
    """Cut out the largest part of height : width from the centre, and resize it, antialiased.
    uint8 [..., 3, H, W] -> [..., 3, height, width].
    """
    from torchvision.transforms.v2 import functional as tv

    H, W = frames.shape[-2:]
    scale = min(H / height, W / width)
    frames = tv.center_crop(frames, [round(height * scale), round(width * scale)])
    return tv.resize(frames, [height, width], antialias=True)


def why_unusable(row, frames, stride, fps):
    """Why the clip of a row (path, caption) can't be used, or None. Lists its packets and decodes
    from the last keyframe to the end: a file that lost a part is found now, one that is damaged
    here and there when it is read.
    """
    path, text = row
    try:
        if not text:
            raise BadClip("has no caption: write one, or run data.py caption")
        times, unit = frame_times(path)
        first_frames(times, unit, frames, stride, fps)
        decode(path, times[-1:])
    except BadClip as error:
        return str(error)


class Clips:
    """Clips read from their files. clips[row, position] -> {"frames": uint8 [T, 3, height, width],
    "text": str}, or BadClip if it turns out now that the file can't be decoded. `position` keys the
    draw of the span and, if flip, of left and right.

    Rows that can't be used are found now (or are `known` from an earlier look), named and left out;
    if they are more than the share `max_bad`, that is no accident and the run ends.
    """

    def __init__(self, source, frames, stride, size, seed, max_bad=0.5, *, width=0, fps=0,
                 flip=False, clean=False, known=None, limit=None):  # fmt: skip
        rows = read_table(source)[:limit]
        if clean:
            rows = [(path, clean_caption(text)) for path, text in rows]
        self.frames, self.stride, self.fps, self.flip = frames, stride, fps, flip
        self.height, self.width, self.seed, self.listed = size, width or size, seed, len(rows)
        self.identity = identity(source, rows)
        reasons = known or look_through(rows, frames, stride, fps)
        self.rows = [(n, *rows[n]) for n, reason in enumerate(reasons) if not reason]
        self.numbers = [n for n, _, _ in self.rows]
        self.skipped = [{"row": n, "path": rows[n][0].name, "reason": reason}
                        for n, reason in enumerate(reasons) if reason]  # fmt: skip
        bad = f"{source}: {len(self.skipped)} of {len(rows)} clips can't be used"
        require(self.rows and len(self.skipped) <= max_bad * len(rows),
                f"{bad}, more than the share max_bad={max_bad}; mend the list, or ask for fewer "
                "frames or a smaller stride")  # fmt: skip
        if self.skipped:
            warn(f"{bad} and are left out")

    def __len__(self):
        return len(self.rows)

    def text(self, row):
        return self.rows[row][2]

    def __getitem__(self, key):
        row, position = key
        _, path, text = self.rows[row]
        generator = keyed_generator(self.seed, "span", position)
        change = partial(fit, height=self.height, width=self.width)
        frames = read_frames(path, self.frames, self.stride, generator, self.fps, change)
        coin = torch.rand(1, generator=keyed_generator(self.seed, "flip", position))
        if self.flip and coin < 0.5:
            frames = frames.flip(-1)
        return {"frames": frames, "text": text}


def identity(source, rows):
    """12 hex digits that tell one list of clips and captions from another, wherever it lies."""
    listed = [(os.path.relpath(path, source), text) for path, text in rows]
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:12]


def look_through(rows, frames, stride, fps, process=Process(0, 1, "cpu")):
    """why_unusable of all rows, on each process; each takes its part, and many rows in as many
    processes of its own as it has CPUs. Names what can't be used.
    """
    mine, found = process.mine(rows), []
    check = partial(why_unusable, frames=frames, stride=stride, fps=fps)
    if len(mine) < 512:
        found = [check(row) for row in progress(mine, "looking through clips")]
    else:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        spawn = multiprocessing.get_context("spawn")
        try:
            with ProcessPoolExecutor(cpus, spawn) as pool:
                checked = pool.map(check, mine, chunksize=16)
                for reason in progress(checked, "looking through clips", len(mine)):
                    found.append(reason)
        except BrokenProcessPool:
            path = mine[len(found)][0]
            raise BadInput(f"a process that looked through {path}, or one of the next {16 * cpus} "
                           "clips, was killed: too little memory, or a file that breaks FFmpeg; "
                           "take it out of the list") from None  # fmt: skip
    for (path, _), reason in zip(mine, found):
        if reason:
            warn(f"{path} {reason}; skipped")
    everything = process.gather(found)
    return process.share(lambda: everything)


# ---------------------------------------------------------------------------------------------
# Pictures: films for any player, and what people look at


def write_video(path, frames, fps):
    """uint8 [T, 3, H, W] -> an H.264 MP4 for any player; the same bytes every time, which x264
    with several threads, or looking ahead at all, does not promise.
    """
    import av

    exact = "threads=1:lookahead-threads=1:sync-lookahead=0:rc-lookahead=0:mbtree=0"
    options = {"crf": "16", "preset": "fast", "x264-params": exact}

    def write(beside):
        with av.open(str(beside), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps, options=options)
            stream.height, stream.width = frames.shape[-2:]
            stream.pix_fmt, stream.thread_count = "yuv420p", 1
            for image in frames.permute(0, 2, 3, 1).contiguous().numpy():  # [H, W, 3]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())

    write_whole(path, write)


def enlarge(video):
    """Repeat the pixels of a small film, uint8 [T, 3, H, W], until it is about 256 high."""
    k = max(1, round(256 / video.shape[-2]))
    return video.repeat_interleave(k, -1).repeat_interleave(k, -2)


def write_gif(path, video, fps):
    """uint8 [T, 3, H, W] -> an endless GIF."""
    from PIL import Image

    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in enlarge(video)]
    duration = round(1000 / fps)  # ms per frame
    write_whole(path, lambda p: images[0].save(
        p, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0,
    ))  # fmt: skip


def write_png(path, picture):
    """uint8 [3, H, W] -> a PNG, pixel for pixel."""
    from PIL import Image

    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    write_whole(path, lambda p: image.save(p, format="PNG"))


def write_sheet(path, videos, captions):
    """A PNG with a row per film, uint8 [T, 3, H, W]: its caption, and below it at most 8 frames."""
    from PIL import Image, ImageDraw, ImageFont

    T = videos[0].shape[0]
    rows = [enlarge(v[torch.linspace(0, T - 1, min(T, 8)).round().long()])[..., ::2, ::2]
            for v in videos]  # fmt: skip
    h, w = rows[0].shape[-2:]
    sheet = Image.new("RGB", (len(rows[0]) * (w + 4) + 4, len(rows) * (h + 24) + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (frames, caption) in enumerate(zip(rows, captions)):
        draw.text((6, r * (h + 24) + 4), caption, fill="black", font=ImageFont.load_default(14))
        for k, frame in enumerate(frames):
            place = 4 + k * (w + 4), r * (h + 24) + 24
            sheet.paste(Image.fromarray(frame.permute(1, 2, 0).numpy()), place)
    write_whole(path, lambda p: sheet.save(p, format="PNG"))


# ---------------------------------------------------------------------------------------------
# Captions
#
# Captions from the web are full of what no film shows: addresses, file names, catalogue numbers.
# v1 cleans them, and the prompts that it is given, and so does whatever is trained on clips from
# outside. Where there is no caption at all, LLaVA writes one from three frames (report, D3).

CLEANING = (  # in this order: (pattern, what takes its place), in lower case
    (r"https?://\S+|www\.\S+", " "),  # addresses
    (r"<[^>]*>", " "),  # tags
    (r"\S+@\S+|@[\w.]+", " "),  # mail addresses, nicknames
    (r"\S+\.(jpe?g|png|gif|webp|mp4|mov|avi|webm|mkv)\b", " "),  # file names
    (r"#?\b\d{6,}\b|#\d+\b|\b\d{3,4}\s*[x×]\s*\d{3,4}\b", " "),  # catalogue numbers, sizes
    (r"\b(royalty[- ]free|free download|stock (video|footage|photo|image)s?)\b", " "),
    (r"[“”„«»″]", '"'), (r"[‘’‚`´′]", "'"),  # one kind of quotes,
    (r"[‐‑‒–—―−]", "-"),  # and of dashes
    (r"[#_|\\/*^~=+<>\[\]{}]+", " "),  # signs of layout
    (r"([.,!?;:'\"-])\1+", r"\1"),  # repeated signs
    (r"\s+([.,!?;:])", r"\1"), (r"\s+", " "), (r"^[\s.,;:'\"-]+|[\s,;:'\"-]+$", ""),
)  # fmt: skip
QUESTION = (
    "These three pictures are from one video, in their order. Describe the video in two to four "
    "sentences: who or what is to be seen and where, what moves and how, how the camera moves, and "
    "the style, such as drawing, film or aerial view. Write only what can be seen. Do not mention "
    "pictures or frames."
)  # what LLaVA is asked


def clean_caption(text):
    """A caption without what says nothing about the film; lower case, as v1 has it."""
    text = html.unescape(html.unescape(text[:2000])).lower()  # no caption is longer
    for pattern, instead in CLEANING:
        text = re.sub(pattern, instead, text)
    return text


def write_captions(source, llava, device, overwrite=False, batch_size=8, question=QUESTION):
    """Ask LLaVA (a folder or Hub name) about every clip of a folder or CSV that has no caption, or
    about all -> how many were described. They are written into the .txt beside the clip after every
    batch, or into the CSV's column text once a minute; run again, without overwrite, it goes on.
    """
    require(int(os.environ.get("WORLD_SIZE", 1)) == 1,
            "captions are made by one process: start one, or one for each part of the list")
    rows = read_table(source, columns=("path",))
    todo = [i for i, (_, text) in enumerate(rows) if overwrite or not text]
    if not todo:
        return 0
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype = usual_dtype(device)
    processor = load_frozen(AutoProcessor.from_pretrained, llava, "")
    model = load_frozen(AutoModelForImageTextToText.from_pretrained, llava, "", dtype=dtype)
    model, processor.tokenizer.padding_side = model.to(device), "left"  # answers begin together
    prompt = f"USER: {'<image>' * 3}\n{question} ASSISTANT:"
    if processor.chat_template:
        content = [{"type": "image"}] * 3 + [{"type": "text", "text": question}]
        talk = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    described, new, saved = 0, {}, time.time()
    parts = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
    for part in progress(parts, f"describing {source}, batches of {batch_size}"):
        pictures = {}
        for i in part:
            try:
                times, _ = frame_times(rows[i][0])
                moments = [times[int(share * (len(times) - 1))] for share in (0.2, 0.5, 0.8)]
                pictures[i] = [decode(rows[i][0], [t])[0] for t in moments]  # 3 of [3, H, W]
            except BadClip as error:
                warn(f"{rows[i][0]} {error}; it gets no caption")
        if not pictures:
            continue
        inputs = processor(text=[prompt] * len(pictures), images=list(pictures.values()),
                           padding=True, return_tensors="pt").to(device, dtype)  # fmt: skip
        with torch.no_grad():
            answers = model.generate(**inputs, do_sample=False, max_new_tokens=200)
        answers = processor.batch_decode(answers[:, inputs["input_ids"].shape[1] :],
                                         skip_special_tokens=True)  # fmt: skip
        for i, answer in zip(pictures, answers):  # without the sentence that was cut off
            new[i] = " ".join(re.sub(r"([.!?])[^.!?]*$", r"\1", answer).split())
        described += len(pictures)
        if Path(source).is_dir() or time.time() > saved + 60:
            save_captions(source, rows, new)
            saved = time.time()
    save_captions(source, rows, new)
    return described


def save_captions(source, rows, new):
    """Write {row: caption} beside the clips of a folder, or into the CSV; its columns stay."""
    if Path(source).is_dir():
        for i, text in new.items():
            beside = rows[i][0].with_suffix(".txt")
            write_whole(beside, lambda p, text=text: p.write_text(text + "\n", "utf-8"))
        new.clear()
        return
    with open(source, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        names, lines = list(dict.fromkeys([*reader.fieldnames, "text"])), list(reader)
    for i, text in new.items():
        lines[i]["text"] = text

    def write(beside):
        with open(beside, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader(), writer.writerows(lines)

    write_whole(source, write)


# ---------------------------------------------------------------------------------------------
# Frozen encoders
#
# v1 trains neither: an image VAE (Stability's, factor 8, 4 channels), applied frame by frame,
# because no good video VAE was open; and T5-XXL, which PixArt-alpha was trained with. Both wrappers
# take what from_pretrained takes: a local folder or a name on the Hub. A folder that holds several
# models (the Hub's PixArt-alpha has vae/, text_encoder/ and tokenizer/) serves for both.


def locate(source, part):
    """(folder or Hub name, subfolder) where from_pretrained finds `part`, or all that there is."""
    for folder in (Path(source), ASSETS.parent / source):  # "assets/vae" works from anywhere
        if folder.is_dir():
            sub = part if (folder / part).is_dir() else ""
            files = [folder / sub / name for name in ("config.json", "spiece.model",
                                                      "tokenizer.json")]  # fmt: skip
            require(any(file.is_file() for file in files),
                    f"{folder} holds no {part}: expected config.json and weights, or a subfolder "
                    f"{part}/")  # fmt: skip
            return str(folder), sub
    require(str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")),
            f"{source} is not there; expected a folder with a {part}, or a Hub name like "
            "owner/model")  # fmt: skip
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    file = "spiece.model" if part == "tokenizer" else "config.json"
    try:
        hf_hub_download(source, f"{part}/{file}" if part else file)
        return source, part
    except EntryNotFoundError:  # also when there is no network: then from_pretrained says so
        return source, ""
    except Exception as error:  # the Hub's own errors are of a dozen classes
        raise BadInput(f"{source} is no folder here and can't be had from the Hub: "
                       f"{type(error).__name__}") from None  # fmt: skip


def load_frozen(load, source, part, **options):
    """from_pretrained, frozen, or BadInput in one line."""
    name, subfolder = locate(source, part)
    try:
        loaded = load(name, subfolder=subfolder, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"the {part or 'model'} of {source} can't be loaded: {reason}") from None
    return loaded.eval().requires_grad_(False) if isinstance(loaded, torch.nn.Module) else loaded


def fingerprint(tensors, *more):
    """12 hex digits that tell one set of weights from another, from the first values of each tensor
    in bf16: so the same for weights that were loaded as fp32 and as bf16.
    """
    digest = hashlib.sha256(repr(more).encode())
    for name, tensor in sorted(tensors.items()):
        first = tensor.flatten()[:16].bfloat16().tolist()
        digest.update(f"{name}{tuple(tensor.shape)}{first}".encode())
    return digest.hexdigest()[:12]


def portable(source):
    """A folder outside this project by its whole path, to be found from anywhere; else as it is."""
    outside = Path(source).is_dir() and not (ASSETS.parent / source).is_dir()
    return str(Path(source).resolve() if outside else source)


def usual_dtype(device):
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


class VAE:
    """A frozen image VAE for films. dtype defaults to bf16 on CUDA, else fp32."""

    def __init__(self, source, device="cpu", dtype=None, micro_batch=16):
        from diffusers import AutoencoderKL

        self.dtype = dtype or usual_dtype(device)
        # low_cpu_mem_usage=True, the default, would want a further package
        options = {"torch_dtype": self.dtype, "low_cpu_mem_usage": False}
        self.model = load_frozen(AutoencoderKL.from_pretrained, source, "vae", **options).to(device)
        self.source, self.device, self.micro_batch = portable(source), device, micro_batch
        # brings latents to unit variance: 0.18215 for Stability's
        self.scale = self.model.config.scaling_factor
        self.channels = self.model.config.latent_channels
        self.factor = 2 ** (len(self.model.config.block_out_channels) - 1)  # 8
        # Of what makes the latents: decoders may differ, as ft-mse's and ft-ema's do.
        parts = "encoder.", "quant_conv."
        weights = {k: v for k, v in self.model.state_dict().items() if k.startswith(parts)}
        self.fingerprint = fingerprint(weights, self.scale)

    @torch.no_grad()
    def encode(self, video, generators=None):
        """[B, 3, T, H, W], uint8 or in [-1, 1] -> latents [B, C, T, h, w], fp32, about unit
        variance.

        generators: one per film; then a latent is drawn from the VAE's posterior, as v1 does.
        Without, its mean. Frames go through in micro-batches, each film's noise is drawn whole, so
        the size of one changes nothing.
        """
        B, _, T = video.shape[:3]
        frames = video.transpose(1, 2).flatten(0, 1)  # [B*T, 3, H, W]  a stack of pictures
        means, stds = [], []
        for part in frames.split(self.micro_batch):
            part = part.to(self.device)
            if part.dtype == torch.uint8:  # up to here a quarter of the bytes
                part = part.float() / 127.5 - 1
            posterior = self.model.encode(part.to(self.dtype)).latent_dist
            means.append(posterior.mean), stds.append(posterior.std)
        z, std = (torch.cat(parts).float().unflatten(0, (B, T)).transpose(1, 2)
                  for parts in (means, stds))  # fmt: skip
        # [B, C, T, h, w] each
        if generators is not None:
            noise = [torch.randn(z.shape[1:], generator=g) for g in generators]
            z = z + std * torch.stack(noise).to(z)
        return z * self.scale

    @torch.no_grad()
    def decode(self, latents):
        """[B, C, T, h, w] -> [B, 3, T, H, W] in [-1, 1], fp32, on the CPU."""
        B = latents.shape[0]
        latents = (latents / self.scale).transpose(1, 2).flatten(0, 1)  # [B*T, C, h, w]
        frames = [self.model.decode(part.to(self.device, self.dtype)).sample.float().cpu()
                  for part in latents.split(self.micro_batch)]  # fmt: skip
        return torch.cat(frames).clamp(-1, 1).unflatten(0, (B, -1)).transpose(1, 2)


def to_uint8(video):
    """[..., 3, H, W] in [-1, 1] -> uint8."""
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class T5:
    """A frozen T5 encoder with its tokenizer; bf16 on CUDA, else fp32 (fp16 overflows in T5)."""

    def __init__(self, source, length=120, device="cpu", dtype=None):
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.tokenizer = load_frozen(AutoTokenizer.from_pretrained, source, "tokenizer")
        load, dtype = T5EncoderModel.from_pretrained, dtype or usual_dtype(device)
        self.model = load_frozen(load, source, "text_encoder", dtype=dtype).to(device)
        self.source, self.device, self.length = portable(source), device, length
        self.channels = self.model.config.d_model
        self.fingerprint = fingerprint(self.model.state_dict())

    @torch.no_grad()
    def encode(self, captions):
        """B strings -> y [B, length, E] fp32, zero where there is no token, and mask [B, length],
        true where there is one. A caption of more than `length` tokens is cut, with a warning.
        """
        for caption, ids in zip(captions, self.tokenizer(captions)["input_ids"]):
            if len(ids) > self.length:
                warn(f"caption of {len(ids)} tokens is cut to {self.length}: {caption[:60]!r}...")
        batch = self.tokenizer(captions, max_length=self.length, padding="max_length",
                               truncation=True, return_tensors="pt").to(self.device)  # fmt: skip
        ids, mask = batch["input_ids"], batch["attention_mask"]  # [B, L] each
        y = [self.model(*part).last_hidden_state for part in zip(ids.split(32), mask.split(32))]
        return torch.cat(y).float() * mask[..., None], mask.bool()  # [B, L, E], [B, L]

    def null_caption(self):
        """[length, E], what stands for "no caption" with weights that bring none: T5 of the empty
        string. That is one token, its end; it is repeated, for attention to equal keys is attention
        to one, so that the null caption can always be used whole.
        """
        y, mask = self.encode([""])
        return y[0, mask[0]].repeat(self.length, 1)[: self.length]


def encode_batch(batch, vae, t5, generators):
    """A collated batch of Clips, {"frames": uint8 [B, T, 3, H, W], "text": B strings}, with a
    generator for each latent -> (x0 [B, C, T, h, w], y [B, L, E], mask [B, L]).
    """
    video = batch["frames"].transpose(1, 2)  # [B, 3, T, H, W]
    return vae.encode(video, generators), *t5.encode(batch["text"])


# ---------------------------------------------------------------------------------------------
# The cache
#
# Encoders cost more than a small model's training step and give the same answer every epoch. So
# they run once, and training reads latents. A cache is a folder of safetensors shards; an index,
# written last, says with which settings they were made. Shards are written beside and renamed, each
# sample carries a checksum: what is there is whole, and what is damaged later is noticed when it is
# read.
#
# A sample is one span of a clip, one draw from the VAE's posterior on it, and T5's tokens without
# their padding, in 16 bits. Mean and variance of the posterior would take twice the room, for
# another draw every epoch; other spans of the clip (--spans) vary it far more for the same room.
# 64 x 512 x 512 pixels are 4 x 64 x 64 x 64 numbers, 2.1 MB, and 120 tokens of T5-XXL 0.98 MB: v1
# put its own at 4 MB and 1 MB.

SHARD = 64  # samples in a shard: 190 MB at 64 frames of 512x512 and the longest captions


def write_cache(source, out, vae, t5, frames, stride, size, seed=0, max_bad=0.5, *, spans=1,
                dtype=torch.float16, process=Process(0, 1, "cpu"), **options):  # fmt: skip
    """Encode `spans` random spans of every usable clip, and the captions, into the folder `out`
    -> LatentCache. Interrupted, it goes on. Of several processes, each makes its share of the
    shards. options: of Clips (width, fps, flip, clean).
    """
    out, width = Path(out), options.get("width") or size
    check_view(frames, stride, size, width, vae.factor)
    require(spans > 0, f"spans={spans}: expected 1 or more")

    def begin():  # what a first look found is kept, for files may come and go
        settings, looked = {
            "clips and captions": identity(source, read_table(source)), "frames": frames,
            "stride": stride, "size": size, "fps": 0, "flip": False, "clean": False, "spans": spans,
            "dtype": str(dtype), "seed": seed, "vae": vae.fingerprint, "t5": t5.fingerprint,
            "caption_length": t5.length,
        } | options | {"width": width}, out / "looked_through.json"  # fmt: skip
        check_settings(out, settings)
        write_json(out / "settings.json", settings)
        known = read_json(looked, f"delete {out} and make it again") if looked.exists() else None
        return settings, known, (out / "index.json").exists()

    settings, known, done = process.share(begin)
    if done:
        return LatentCache(out)
    if not known:
        rows = process.share(lambda: read_table(source))
        if settings["clean"]:
            rows = [(path, clean_caption(text)) for path, text in rows]
        known = look_through(rows, frames, stride, settings["fps"], process)
        process.share(lambda: write_json(out / "looked_through.json", known))
    clips = process.share(lambda: Clips(source, frames, stride, size, seed, max_bad, known=known,
                                        **options))  # fmt: skip
    samples = [(row, span) for row in range(len(clips)) for span in range(spans)]
    shards = [(out / f"shard_{i // SHARD:05d}.safetensors", samples[i : i + SHARD])
              for i in range(0, len(samples), SHARD)]  # fmt: skip
    mine = shards[process.rank :: process.world]
    todo = [shard for shard in mine if not shard[0].exists()]
    for path, part in progress(todo, f"encoding {source}, shards of {SHARD}"):
        write_shard(path, clips, part, vae, t5, dtype)
    # the first process knows them all when all have made theirs
    hashes = dict(process.gather([(path, sha256_of(path)) for path, _ in mine]))

    def index():
        read = [(path, *open_shard(str(path))[1:]) for path, _ in shards]
        late = {bad["row"]: bad for _, _, skipped in read for bad in skipped}  # once, of all spans
        skipped = clips.skipped + list(late.values())
        require(len(skipped) <= max_bad * clips.listed,
                f"{source}: {len(skipped)} of {clips.listed} clips can't be used, more than the "
                f"share max_bad={max_bad}; mend the list")  # fmt: skip
        write_json(out / "index.json", {
            "settings": settings, "skipped": skipped, "latent_channels": vae.channels,
            "caption_channels": t5.channels, "vae": vae.source, "t5": t5.source,
            "shards": [{"file": path.name, "samples": len(made), "sha256": hashes[path]}
                       for path, made, _ in read],
        })  # fmt: skip

    process.share(index)
    return LatentCache(out)


def check_view(frames, stride, size, width, unit):
    """BadInput where films of this shape can't be; unit: the VAE's factor."""
    require(frames > 0 and stride > 0, f"frames={frames}, stride={stride}: expected 1 or more")
    require(min(size, width) > 0 and size % unit == width % unit == 0,
            f"size={size}, width={width}: expected multiples of the VAE's factor {unit}")


def check_settings(out, settings):
    """BadInput if what stands in the folder `out` was made with other settings; names them."""
    if not (out / "settings.json").exists():
        return
    found = read_json(out / "settings.json", f"delete {out} and make it again")
    different = [f"{k}={found.get(k)!r} there, {v!r} asked for" for k, v in settings.items()
                 if found.get(k) != v]  # fmt: skip
    require(not different, f"{out} was made with other settings ({'; '.join(different)}); give "
                           "another --out, or delete it")  # fmt: skip


def write_shard(path, clips, samples, vae, t5, dtype=torch.float16, batch_size=8):
    """Encode some samples (row, span) of clips into one file: tensors "i.latents" [C, T, h, w] and
    "i.y" [tokens, E] for each sample i. Clips that can't be decoded after all are named and left
    out.
    """
    tensors, made, skipped = {}, [], {}

    def read(sample):
        row, span = sample
        number, file, _ = clips.rows[row]  # the clip's place in the list keys its draws
        try:
            key = number + span * clips.listed
            return clips[row, key], key, number
        except BadClip as error:
            if number not in skipped:
                warn(f"{file} {error}; skipped")
            skipped[number] = {"row": number, "path": file.name, "reason": str(error)}

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # FFmpeg needs no lock of Python's
        found = list(pool.map(read, samples))  # as uint8: 50 MB for 64 frames of 512x512
    found = [one for one in found if one and one[2] not in skipped]
    for part in (found[i : i + batch_size] for i in range(0, len(found), batch_size)):
        batch, keys = [sample for sample, _, _ in part], [one[1:] for one in part]
        generators = [keyed_generator(clips.seed, "posterior", key) for key, _ in keys]
        batch = torch.utils.data.default_collate(batch)
        latents, y, mask = encode_batch(batch, vae, t5, generators)
        for j, (_, number) in enumerate(keys):
            sample = {"latents": latents[j].to("cpu", dtype).contiguous(),
                      "y": y[j, mask[j]].to("cpu", dtype)}  # fmt: skip
            tensors |= {f"{len(made)}.{name}": value for name, value in sample.items()}
            made.append({"row": number, "text": batch["text"][j], "crc": checksum(sample)})
    # One entry: safetensors writes several in an order that changes from call to call.
    index = {"samples": made, "skipped": [skipped[number] for number in sorted(skipped)]}
    write_whole(path, lambda p: save_file(tensors, p, {"index": json.dumps(index)}))


def checksum(sample):
    """crc32 of a sample's bytes, as stored."""
    latents, y = (sample[name].view(torch.int16).numpy() for name in ("latents", "y"))
    return zlib.crc32(y, zlib.crc32(latents))


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1024)  # one memory map per shard and process
def open_shard(path):
    """(the mapped file, its list of samples, its list of clips left out)."""
    try:
        file = safe_open(path, framework="pt")
        index = json.loads(file.metadata()["index"])
        return file, index["samples"], index["skipped"]
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise BadInput(f"{path} is damaged or not there ({error}); {AGAIN}") from None


AGAIN = "delete the file and index.json, and run the cache command again"


class LatentCache:
    """Samples of a cache, read one by one from memory-mapped files. cache[row, position] ->
    {"latents" fp32 [C, T, h, w], "y" fp32 [L, E], "mask" [L]}.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        index = read_json(self.folder / "index.json", f"no cache, or a damaged one: {AGAIN}")
        try:
            self.settings, self.skipped = index["settings"], index["skipped"]
            self.channels = index["latent_channels"]
            self.caption_channels = index["caption_channels"]
            self.vae, self.t5 = index["vae"], index["t5"]
            self.identity = hashlib.sha256(repr(self.settings).encode()).hexdigest()[:12]
            self.shards = [(str(self.folder / s["file"]), s["samples"], s["sha256"])
                           for s in index["shards"]]  # fmt: skip
        except (KeyError, TypeError) as error:
            raise BadInput(f"{self.folder}/index.json lacks {error}: {AGAIN}") from None
        self.places = [(path, i) for path, n, _ in self.shards for i in range(n)]
        self.numbers = []  # of each sample's clip in the list that the cache was made from
        for path, n, _ in self.shards:  # headers alone: what was cut off is found before training
            samples = open_shard(path)[1]
            require(len(samples) == n,
                    f"{path} does not hold the {n} samples that the index says: {AGAIN}")
            self.numbers += [sample["row"] for sample in samples]

    def __len__(self):
        return len(self.places)

    def text(self, row):
        path, i = self.places[row]
        return open_shard(path)[1][i]["text"]

    def __getitem__(self, key):
        row, _ = key
        path, i = self.places[row]
        file, samples, _ = open_shard(path)
        sample = {name: file.get_tensor(f"{i}.{name}") for name in ("latents", "y")}
        require(checksum(sample) == samples[i]["crc"],
                f"{path}: sample {i} is damaged (its checksum differs); {AGAIN}")
        n, length = len(sample["y"]), self.settings["caption_length"]
        y = torch.nn.functional.pad(sample["y"].float(), (0, 0, 0, length - n))  # [L, E]
        return {"latents": sample["latents"].float(), "y": y, "mask": torch.arange(length) < n}

    def verify(self):
        """Compare every shard with its hash; BadInput that names all that differ."""
        bad = [path for path, _, sha256 in progress(self.shards, "checking shards")
               if sha256_of(path) != sha256]  # fmt: skip
        require(not bad, f"{len(bad)} of {len(self.shards)} shards are damaged: {', '.join(bad)}; "
                         "delete them and index.json, and run the cache command again")  # fmt: skip


def is_cache(path):
    """Whether a folder is, or was to become, a cache; else it is a folder of clips."""
    return any((Path(path) / name).exists() for name in ("index.json", "looked_through.json"))


def show(source, out, vae, count, frames, stride, size, seed, **options):
    """Write out/show.png and show.gif: what training sees of the first `count` clips, above, and
    what is left of it after the VAE, below; of a cache, which has no frames any more, the latter
    alone -> captions.
    """
    require(count > 0, f"count={count}: expected 1 or more")
    if is_cache(source):
        cache = LatentCache(source)
        rows = range(min(count, len(cache)))
        texts = [cache.text(row) for row in rows]
        seen = [to_uint8(vae.decode(cache[row, 0]["latents"][None])[0].transpose(0, 1))
                for row in rows]  # fmt: skip
    else:
        check_view(frames, stride, size, options.get("width") or size, vae.factor)
        clips = Clips(source, frames, stride, size, seed, 1.0, limit=4 * count, **options)
        seen, texts = [], []
        for row in range(min(count, len(clips))):
            try:
                sample = clips[row, clips.rows[row][0]]
            except BadClip as error:
                warn(f"{clips.rows[row][1]} {error}; skipped")
                continue
            back = vae.decode(vae.encode(sample["frames"].transpose(0, 1)[None]))[0]
            seen.append(torch.cat([sample["frames"], to_uint8(back.transpose(0, 1))], dim=-2))
            texts.append(sample["text"])
        require(seen, f"{source}: none of the first {count} clips can be decoded")
    write_sheet(Path(out) / "show.png", seen, texts)  # each [T, 3, 2H, W], of a cache [T, 3, H, W]
    write_gif(Path(out) / "show.gif", torch.cat(seen, dim=-1), fps=8)
    return texts


# ---------------------------------------------------------------------------------------------
# The toy: moving shapes with captions, and a detector that is its inverse
#
# A model that learns in minutes on a laptop needs a world that small: one coloured shape gliding
# over a plain ground. Three words of the caption name what one sees, so whether a film
# shows what its caption says can be *measured*, by the detector below, instead of guessed. The
# clips are still real H.264 files and go through the same reader and VAE as any other video.
# Six (colour, shape, direction) triples are never in the training set, though every pair of words
# is: only a model that has learned what the single words mean can film them.

COLOURS = {"red": (225, 50, 50), "green": (50, 190, 80), "blue": (70, 110, 250),
           "yellow": (245, 220, 60)}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y is down
GROUND = (28, 28, 36)
HELD_OUT = [
    ("red", "circle", "left"), ("red", "triangle", "up"), ("green", "square", "right"),
    ("blue", "circle", "down"), ("blue", "triangle", "left"), ("yellow", "square", "up"),
]  # fmt: skip
# no two share a pair of words, so each of their pairs is seen with another third word
TRIPLES = [(c, s, d) for c in COLOURS for s in SHAPES for d in DIRECTIONS]


def caption_of(triple):
    """("red", "circle", "left") -> "a red circle moving left"."""
    return "a {} {} moving {}".format(*triple)


def coverage(shape, centre, radius, size):
    """How much of each pixel a shape covers: float [T, size, size] in 0…1, anti-aliased.

    centre [T, 2] in pixels (x, y). Each shape is where its distance function is negative; a shape
    of radius r has the area of a circle of radius r, so area alone does not tell which it is.
    """
    pixel = torch.arange(size) + 0.5
    x = pixel[None, None, :] - centre[:, 0, None, None]  # [T, 1, W]
    y = pixel[None, :, None] - centre[:, 1, None, None]  # [T, H, 1]
    if shape == "circle":
        distance = (x**2 + y**2).sqrt() - radius
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - radius * math.sqrt(math.pi) / 2
    else:  # an equilateral triangle, point up, whose inscribed circle has this radius:
        inner = radius * math.sqrt(math.pi / (3 * math.sqrt(3)))
        distance = torch.maximum(y, (math.sqrt(3) * x.abs() - y) / 2) - inner
    return (0.5 - distance).clamp(0, 1)


def draw_clip(triple, generator, frames=8, size=64):
    """Film one (colour, shape, direction), of random size, place and speed: uint8 [T, 3, H, W].

    Over the clip the shape travels 0.28 to 0.38 of the frame's width (18 to 24 of 64 pixels: two to
    three latent cells), never leaves the frame, and ends near the edge towards which it moves.

    That last point makes the toy learnable in minutes. Were paths spread evenly, neither the
    direction's word nor a frame's number would say anything about where a shape is, only both
    together, and a gradient finds a pair of things that are useless one by one only after long
    wandering.
    """
    colour, shape, direction = triple
    u = torch.rand(4, generator=generator)
    radius = size * (0.125 + 0.045 * u[0])
    heading = torch.tensor(DIRECTIONS[direction])  # [2]  x, y
    step = heading * size * (0.28 + 0.10 * u[1])  # [2]  from the first frame to the last
    inner = radius * math.sqrt(math.pi / (3 * math.sqrt(3)))
    half = {"circle": (radius, radius, radius), "square": (radius * 0.886,) * 3,
            "triangle": (inner * math.sqrt(3), 2 * inner, inner)}[shape]  # fmt: skip
    # half width, above, below
    # [2]  where the first frame's centre may be
    low = torch.tensor([half[0], half[1]]) - step.clamp(max=0)
    high = size - torch.tensor([half[0], half[2]]) - step.clamp(min=0)
    place = torch.where(heading == 0, u[2:], torch.where(heading < 0, 0.3 * u[2:], 1 - 0.3 * u[2:]))
    start = low + (high - low) * place
    centre = start + step * torch.linspace(0, 1, frames)[:, None]  # [T, 2]
    cover = coverage(shape, centre, radius, size)[:, None]  # [T, 1, H, W]
    ground = torch.tensor(GROUND).view(3, 1, 1)
    paint = torch.tensor(COLOURS[colour]).view(3, 1, 1)
    return (ground + cover * (paint - ground)).round().to(torch.uint8)


def detect(video):
    """Name what a toy clip shows: ("red", "circle", "left"), or None if it shows no such thing.

    video: uint8 or float in [0, 255], [T, 3, H, W]. It looks at the pixels alone: colour from the
    strongest pixels, shape by the best overlap with a shape of the same area drawn at the same
    places, direction from a straight line through the centres.
    """
    video = video.float()
    T, _, size, _ = video.shape
    offset = video - torch.tensor(GROUND).view(3, 1, 1)  # [T, 3, H, W]
    strength = offset.norm(dim=1)  # [T, H, W]
    strong = strength > 0.6 * strength.flatten().kthvalue(int(0.99 * strength.numel())).values
    if strength.median() > 40 or not 0.02 < strong.float().mean() < 0.3:
        return None  # the ground is not the ground, or nothing of a shape's size stands out
    mean = offset.permute(0, 2, 3, 1)[strong].mean(0)  # [3]
    paints = torch.tensor(list(COLOURS.values())) - torch.tensor(GROUND)  # [4, 3]
    distance = (paints - mean).norm(dim=1)
    if distance.min() > 80:
        return None
    colour, paint = list(COLOURS)[distance.argmin()], paints[distance.argmin()].float()
    cover = (offset * paint.view(3, 1, 1)).sum(1) / paint.square().sum()  # [T, H, W]
    cover = torch.where(cover > 0.15, cover.clamp(max=1), 0)

    area = cover.sum((1, 2))  # [T]  cover.sum(1) below is [T, W], cover.sum(2) is [T, H]
    if area.min() < 0.5 * area.median() or area.max() > 2 * area.median():
        return None  # a shape does not come and go
    pixel = torch.arange(size) + 0.5
    centre = torch.stack([(cover.sum(1) * pixel).sum(1), (cover.sum(2) * pixel).sum(1)], 1)
    centre = centre / area[:, None]  # [T, 2]  centres of gravity
    radius = (area.median() / math.pi).sqrt()
    overlap = {}
    for shape in SHAPES:
        ideal = coverage(shape, centre, radius, size)  # [T, H, W]
        both, either = torch.minimum(ideal, cover).sum(), torch.maximum(ideal, cover).sum()
        overlap[shape] = (both / either).item()
    shape = max(overlap, key=overlap.get)
    if overlap[shape] < 0.6:
        return None

    time = torch.linspace(-0.5, 0.5, T)[:, None]
    velocity = (centre * time).sum(0) / time.square().sum()  # [2]  least squares, pixels per clip
    residual = centre - centre.mean(0) - time * velocity  # [T, 2]
    along = max(DIRECTIONS, key=lambda d: velocity @ torch.tensor(DIRECTIONS[d], dtype=torch.float))
    across = (velocity * torch.tensor(DIRECTIONS[along][::-1])).norm()
    jumps = residual.norm(dim=1).mean() > size / 16
    if velocity.norm() < size / 8 or across > 0.4 * velocity.norm() or jumps:
        return None  # hardly moves, moves aslant, or jumps about
    return colour, shape, along


def make_toy(out, clips=2048, frames=8, size=64, seed=0, fps=8):
    """Draw the toy: out/train.csv with `clips` films of the 42 seen triples, out/held_out.csv with
    two new films of each of the 48. The CSVs are written last, so where they are, everything is.
    """
    require(clips > 0 and frames > 1 and size >= 32, f"clips={clips}, frames={frames}, size="
            f"{size}: expected 1 or more, 2 or more, 32 or more")  # fmt: skip
    out = Path(out)
    settings = {"clips": clips, "frames": frames, "size": size, "seed": seed, "fps": fps}
    check_settings(out, settings)
    write_json(out / "settings.json", settings)
    seen = [triple for triple in TRIPLES if triple not in HELD_OUT]
    for split, triples, n in (("train", seen, clips), ("held_out", TRIPLES, 2 * len(TRIPLES))):
        if (out / f"{split}.csv").exists():
            continue
        rows = []
        for i in progress(range(n), f"drawing {split}"):
            triple = triples[i % len(triples)]
            film = draw_clip(triple, keyed_generator(seed, "toy", split, i), frames, size)
            write_video(out / split / f"{i:05d}.mp4", film, fps)
            rows.append(f"{split}/{i:05d}.mp4,{caption_of(triple)}")
        text = "\n".join(["path,text", *rows, ""])
        write_whole(out / f"{split}.csv", lambda p: p.write_text(text))


# ---------------------------------------------------------------------------------------------
# The command line


def parse_command_line():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="draw the toy data set")
    caption = commands.add_parser("caption", help="describe clips with LLaVA")
    show = commands.add_parser("show", help="look at what training will see")
    cache = commands.add_parser("cache", help="encode clips and captions once")
    for sub in (caption, show, cache):
        sub.add_argument("source", help="folder of clips, or CSV with header path,text")
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    for sub in (toy, show, cache):
        sub.add_argument("--out", required=True, help="folder to write")
        sub.add_argument("--frames", type=int, default=8, help="frames per clip")
        sub.add_argument("--size", type=int, default=64, help="height in pixels")
        sub.add_argument("--seed", type=int, default=0)
    for sub in (show, cache):
        add = sub.add_argument
        add("--width", type=int, default=0, help="in pixels; default: the height")
        add("--stride", type=int, default=1, help="source frames per kept frame")
        add("--fps", type=float, default=0.0, help="frames per second, in place of the stride")
        add("--flip", action="store_true", help="mirror half of all clips (captions say left)")
        add("--no-clean", action="store_true", help="take captions as they are")
        add("--vae", help="folder or Hub name of an AutoencoderKL; default: the cache's or toy's")
    show.add_argument("--count", type=int, default=6, help="clips to show")
    toy.add_argument("--clips", type=int, default=2048, help="training films")
    add = caption.add_argument
    add("--llava", default="llava-hf/llava-1.5-7b-hf", help="folder or Hub name")
    add("--overwrite", action="store_true", help="also describe clips that have a caption")
    add("--batch", type=int, default=8, help="clips at a time")
    add("--question", default=QUESTION, help="what is asked about three frames of each clip")
    add = cache.add_argument
    add("--t5", default="assets/t5", help="folder or Hub name of a T5 encoder")
    add("--caption-length", type=int, default=16, help="most caption tokens; 120 for T5-XXL")
    add("--spans", type=int, default=1, help="random spans of each clip")
    add("--dtype", choices=["float16", "bfloat16"], default="float16", help="of what is stored")
    add("--max-bad", type=float, default=0.5, help="share of unusable clips at which to give up")
    add("--check", action="store_true", help="compare the finished cache in --out with its hashes")
    return parser.parse_args()


def main():
    args, start = parse_command_line(), time.time()
    if args.command == "toy":
        make_toy(args.out, args.clips, args.frames, args.size, args.seed)
        print(f"{args.out}/train.csv and held_out.csv, {time.time() - start:.0f} s")
        return
    if args.command == "cache" and args.check:
        cache = LatentCache(args.out)
        cache.verify()
        print(f"{args.out}: {len(cache)} samples in {len(cache.shards)} shards, all as written")
        return
    if args.command == "caption":
        made = write_captions(args.source, args.llava, pick_device(args.device), args.overwrite,
                              args.batch, args.question)  # fmt: skip
        print(f"{args.source}: {made} clips described, {time.time() - start:.0f} s")
        return
    require(args.fps >= 0 and not (args.fps and args.stride > 1),
            f"fps={args.fps:g}, stride={args.stride}: give one of the two, more than 0")
    view = args.frames, args.stride, args.size, args.seed
    options = {"width": args.width, "fps": args.fps, "flip": args.flip, "clean": not args.no_clean}
    if args.command == "show":
        own = LatentCache(args.source).vae if is_cache(args.source) else "assets/vae"
        vae = VAE(args.vae or own, pick_device(args.device))
        texts = show(args.source, args.out, vae, args.count, *view, **options)
        print(f"{args.out}/show.png and show.gif: {len(texts)} clips")
        return
    process = set_up_process(args.device)
    process.share(lambda: read_table(args.source))  # complain before loading encoders
    vae = VAE(args.vae or "assets/vae", process.device)
    t5 = T5(args.t5, args.caption_length, process.device)
    options |= {"spans": args.spans, "dtype": getattr(torch, args.dtype), "process": process}
    made = write_cache(args.source, args.out, vae, t5, *view, args.max_bad, **options)
    size = sum(Path(path).stat().st_size for path, _, _ in made.shards)
    process.say(f"{args.out}: {len(made)} samples of {size / len(made) / 1e6:.3f} MB, "
                f"{len(made.skipped)} clips skipped, {time.time() - start:.0f} s")  # fmt: skip
    if process.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    command(main)
