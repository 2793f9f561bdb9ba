"""From video files to what the network sees: clips, frozen encoders, cache, and the toy.

    python data.py toy --out DIR                draw captioned films of moving shapes
    python data.py cache clips.csv --out DIR    encode every clip and caption once

A data set is a CSV with the header "path,text"; paths are relative to it. A clip read from it is
uint8 frames; the frozen VAE makes latents of them, the frozen T5 makes tokens of the caption, and a
cache keeps both, since neither changes in training. torchvision, diffusers, transformers and av are
imported where they are used: training from a cache needs none of them.

Shapes, in this file:
    B batch    T frames    H, W height and width in pixels    C latent channels (4)
    h, w latent height and width (H / 8, W / 8)    L caption tokens    E caption channels
"""

import argparse
import csv
import hashlib
import json
import math
import os
import sys
import time
import zlib
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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
        message = str(error).splitlines()[-1].removeprefix("data.BadInput: ")
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
    """Call write(temporary path), then rename: whoever finds `path` finds a whole file, at any
    moment.
    """
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
    """auto: CUDA, else MPS, else CPU; anything else as it is, or BadInput if the machine
    lacks it.
    """
    have = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    name = next(d for d in have if have[d]) if name == "auto" else name
    if not have.get(name):
        raise BadInput(
            f"device={name} is not on this machine; have {', '.join(d for d in have if have[d])}"
        )
    return name


def progress(items, label):
    """Iterate over items: a tqdm bar on a terminal, else a plain line every 15 seconds."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, leave=False)
        return
    start = last = time.time()
    for done, item in enumerate(items):
        if time.time() - last > 15:
            last = time.time()
            left = (last - start) / done * (len(items) - done)
            print(
                f"{label}: {done} of {len(items)}, {left:.0f} s left", file=sys.stderr, flush=True
            )
        yield item


# ---------------------------------------------------------------------------------------------
# Processes
#
# torchrun starts a process per GPU, on one machine or many, and tells each its rank. Every process
# takes its part of the work. What they have to tell each other, but for gradients, goes through the
# CPU (gloo), so that it never waits for a GPU.


class Process(NamedTuple):
    """Which of the processes this one is, how many there are, its device, and their gloo group."""

    rank: int
    world: int
    device: str
    group: object = None

    def sum(self, values):
        """Sum a list of numbers over all processes."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total, group=self.group)
        return total.tolist()

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
        """The lists of all processes one after the other, on the first process."""
        lists = [items] * self.world
        if self.world > 1:
            dist.gather_object(items, lists if self.rank == 0 else None, group=self.group)
        return sum(lists, [])

    def mine(self, items):
        """The part of a list that this process takes."""
        n = len(items)
        return items[self.rank * n // self.world : (self.rank + 1) * n // self.world]

    def say(self, text):
        """Print, on the first process alone, without cutting through the progress bar."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()


def set_up_process(device):
    """Read torchrun's variables; without torchrun, one process."""
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
    if world == 1:
        return Process(rank, world, device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    # Patient: the others wait here while the first makes the toy, or reads or writes large weights.
    return Process(rank, world, device, dist.new_group(backend="gloo", timeout=timedelta(hours=2)))


# ---------------------------------------------------------------------------------------------
# Clips
#
# Training wants T frames, `stride` source frames apart, from anywhere in a clip. Decoding a video
# from its beginning to get 16 frames of it is where v1 spent most of its loading time. Here the
# packets are listed first, which decodes nothing: a frame's index is the rank of its presentation
# time among them. Then the decoder starts at the last keyframe before the first frame that is
# wanted and stops at the last.


class BadClip(Exception):
    """This clip can't be used, and why. The caller names it, counts it, and goes on with the
    others.
    """


def read_table(path):
    """The rows of a CSV with header path,text -> list of (path, caption)."""
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a mark
            reader = csv.DictReader(file)
            missing = {"path", "text"} - set(reader.fieldnames or ())
            if missing:
                raise BadInput(
                    f"{path}: no column {' and no column '.join(sorted(missing))}; found "
                    f"{reader.fieldnames or 'nothing'}, expected a header line path,text"
                )
            rows = [(path.parent / row["path"], (row["text"] or "").strip()) for row in reader]
    except FileNotFoundError:
        raise BadInput(f"{path} is not there; give a CSV with the header path,text") from None
    except (UnicodeDecodeError, csv.Error, IsADirectoryError) as error:
        raise BadInput(
            f"{path} is not a CSV file ({error}); give one with the header path,text"
        ) from None
    if not rows:
        raise BadInput(f"{path} lists no clip; add a line path,text for each")
    return rows


def open_video(path):
    """Open a video file -> (container, its first video stream), or BadClip."""
    import av

    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise BadClip(
            "is not there" if not Path(path).exists() else f"can't be opened: {error}"
        ) from None
    if not container.streams.video:
        container.close()
        raise BadClip("has no video stream")
    return container, container.streams.video[0]


def frame_times(path):
    """Presentation times of all frames, in order, in units of the stream's time base. Decodes
    nothing.
    """
    import av

    container, stream = open_video(path)
    with container:
        try:
            times = [
                p.pts for p in container.demux(stream) if p.pts is not None and not p.is_discard
            ]
        except av.FFmpegError as error:
            raise BadClip(f"can't be read: {error}") from None
    return sorted(times)


def span_length(frames, stride):
    """Source frames from the first to the last that is kept, both included."""
    return (frames - 1) * stride + 1


def checked_times(path, frames, stride):
    """frame_times of a clip that is long enough, or BadClip."""
    times = frame_times(path)
    if len(times) < span_length(frames, stride):
        raise BadClip(
            f"has {len(times)} frames; {frames} frames at stride {stride} need "
            f"{span_length(frames, stride)}"
        )
    return times


def read_frames(path, frames, stride, generator=None):
    """Decode T = `frames` frames, `stride` source frames apart -> uint8 [T, 3, H, W] in RGB.

    The first is drawn by the generator among all that leave room for the rest; without one it is
    the middle one of them. BadClip if the file is too short or can't be decoded.
    """
    import av
    import numpy as np

    times = checked_times(path, frames, stride)
    room = len(times) - span_length(frames, stride) + 1
    start = room // 2 if generator is None else int(torch.randint(room, (1,), generator=generator))
    wanted = times[start : start + span_length(frames, stride) : stride]
    container, stream = open_video(path)
    found = {}
    with container:
        try:
            container.seek(wanted[0], stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts in wanted:
                    found[frame.pts] = frame.to_ndarray(format="rgb24")  # [H, W, 3]
                if len(found) == len(wanted):
                    break
        except av.FFmpegError as error:
            raise BadClip(f"can't be decoded: {error}") from None
    if len(found) < len(wanted):
        raise BadClip(f"only {len(found)} of the {len(wanted)} frames wanted could be decoded")
    # [T, 3, H, W]
    return torch.from_numpy(np.stack([found[t] for t in wanted])).permute(0, 3, 1, 2)


def fit(frames, height, width):
    """Resize until height x width is just covered, then cut out the centre. uint8 [T, 3, H, W],
    antialiased.
    """
    from torchvision.transforms.v2 import functional as tv

    H, W = frames.shape[-2:]
    scale = max(height / H, width / W)
    if scale != 1:
        frames = tv.resize(
            frames, [max(height, round(H * scale)), max(width, round(W * scale))], antialias=True
        )
    return tv.center_crop(frames, [height, width])


def write_video(path, frames, fps):
    """uint8 [T, 3, H, W] -> an H.264 MP4 for any player; the same bytes every time, which x264
    with several threads, or looking ahead at all, does not promise.
    """
    import av

    options = {
        "crf": "16",
        "preset": "fast",
        "x264-params": "threads=1:lookahead-threads=1:sync-lookahead=0:rc-lookahead=0:mbtree=0",
    }

    def write(beside):
        with av.open(str(beside), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps, options=options)
            stream.height, stream.width = frames.shape[-2:]
            stream.pix_fmt, stream.thread_count = "yuv420p", 1
            for image in frames.permute(0, 2, 3, 1).contiguous().numpy():  # [H, W, 3]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())

    write_whole(path, write)


class Clips:
    """Clips read from their files. clips[row, position] -> {"frames": uint8 [T, 3, size, size],
    "text": str}, or BadClip if it turns out now that the file can't be decoded.

    Rows that are absent, unreadable or too short are found now, by demuxing, named and left out; if
    they are more than the share `max_bad`, that is no accident and the run ends. `position` keys
    the draw of the span.
    """

    def __init__(self, table, frames, stride, size, seed, max_bad=0.5):
        rows = read_table(table)
        self.frames, self.stride, self.size, self.seed = frames, stride, size, seed
        self.rows, self.skipped = [], []
        for number, (path, text) in enumerate(progress(rows, "checking clips")):
            try:
                checked_times(path, frames, stride)
                self.rows.append((number, path, text))
            except BadClip as error:
                self.skipped.append({"row": number, "path": path.name, "reason": str(error)})
                warn(f"{path} {error}; skipped")
        if self.skipped:
            warn(f"{len(self.skipped)} of {len(rows)} clips of {table} are skipped")
        if len(self.skipped) > max_bad * len(rows) or not self.rows:
            raise BadInput(
                f"{table}: {len(self.skipped)} of {len(rows)} clips can't be used, more than the "
                f"share max_bad={max_bad}; mend the list, or ask for fewer frames or a smaller "
                "stride"
            )

    def __len__(self):
        return len(self.rows)

    def text(self, row):
        return self.rows[row][2]

    def __getitem__(self, key):
        row, position = key
        _, path, text = self.rows[row]
        frames = read_frames(
            path, self.frames, self.stride, keyed_generator(self.seed, "span", position)
        )
        return {"frames": fit(frames, self.size, self.size), "text": text}


# ---------------------------------------------------------------------------------------------
# Frozen encoders
#
# v1 trains neither: an image VAE (Stability's, factor 8, 4 channels), applied frame by frame,
# because no good video VAE was open; and T5-XXL, which PixArt-alpha was trained with. Both wrappers
# take what from_pretrained takes: a local folder or a name on the Hub. A folder that holds several
# models (the Hub's PixArt-alpha has vae/, text_encoder/ and tokenizer/) serves for both.


def locate(source, part):
    """(folder or Hub name, subfolder) at which from_pretrained finds `part`, which may be all there
    is.
    """
    here = [
        p for p in (Path(source), ASSETS.parent / source) if p.is_dir()
    ]  # "assets/vae" works from anywhere
    if here:
        folder = here[0]
        sub = part if (folder / part).is_dir() else ""
        if not any(
            (folder / sub / name).is_file()
            for name in ("config.json", "spiece.model", "tokenizer.json")
        ):
            raise BadInput(
                f"{folder} holds no {part}: expected config.json and weights, or a subfolder "
                f"{part}/"
            )
        return str(folder), sub
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise BadInput(
            f"{source} is not there; expected a folder with a {part}, or a Hub name like "
            "owner/model"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(
            source, f"{part}/config.json" if part != "tokenizer" else f"{part}/spiece.model"
        )
        return source, part
    except EntryNotFoundError:  # also when there is no network: then from_pretrained says so
        return source, ""
    except Exception as error:  # the Hub's own errors are of a dozen classes
        raise BadInput(
            f"{source} is no folder here and can't be had from the Hub: {type(error).__name__}"
        ) from None


def load_frozen(load, source, part, **options):
    """from_pretrained, frozen, or BadInput in one line."""
    name, subfolder = locate(source, part)
    try:
        loaded = load(name, subfolder=subfolder, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"the {part} of {source} can't be loaded: {reason}") from None
    return loaded.eval().requires_grad_(False) if isinstance(loaded, torch.nn.Module) else loaded


def fingerprint(tensors, *more):
    """12 hex digits that tell one set of weights from another, from the first values of each tensor
    in bf16: so the same for weights that were loaded as fp32 and as bf16.
    """
    digest = hashlib.sha256(repr(more).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(
            f"{name}{tuple(tensor.shape)}{tensor.flatten()[:16].bfloat16().tolist()}".encode()
        )
    return digest.hexdigest()[:12]


def portable(source):
    """A folder outside this project by its whole path, so that a run finds it again from anywhere;
    else as it is.
    """
    return (
        str(Path(source).resolve())
        if Path(source).is_dir() and not (ASSETS.parent / source).is_dir()
        else str(source)
    )


class VAE:
    """A frozen image VAE for films. dtype defaults to bf16 on CUDA, else fp32."""

    def __init__(self, source, device="cpu", dtype=None, micro_batch=16):
        from diffusers import AutoencoderKL

        self.dtype = dtype or (
            torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        )
        # low_cpu_mem_usage=True, the default, would want a further package
        options = {"torch_dtype": self.dtype, "low_cpu_mem_usage": False}
        self.model = load_frozen(AutoencoderKL.from_pretrained, source, "vae", **options).to(device)
        self.source, self.device, self.micro_batch = portable(source), device, micro_batch
        # brings latents to unit variance: 0.18215 for Stability's
        self.scale = self.model.config.scaling_factor
        self.channels = self.model.config.latent_channels
        self.factor = 2 ** (len(self.model.config.block_out_channels) - 1)  # 8
        # Of what makes the latents: decoders may differ, as ft-mse's and ft-ema's do.
        weights = {
            k: v
            for k, v in self.model.state_dict().items()
            if k.startswith(("encoder.", "quant_conv."))
        }
        self.fingerprint = fingerprint(weights, self.scale)

    @torch.no_grad()
    def encode(self, video, generators=None):
        """[B, 3, T, H, W] in [-1, 1] -> latents [B, C, T, h, w], fp32, about unit variance.

        generators: one per film; then a latent is drawn from the VAE's posterior, as v1 does.
        Without, its mean. Frames go through in micro-batches, each film's noise is drawn whole, so
        the size of one changes nothing.
        """
        B, _, T = video.shape[:3]
        # [B*T, 3, H, W]  a film is a stack of pictures
        frames = video.transpose(1, 2).flatten(0, 1)
        posteriors = [
            self.model.encode(part.to(self.device, self.dtype)).latent_dist
            for part in frames.split(self.micro_batch)
        ]
        # [B, C, T, h, w]
        z = torch.cat([p.mean for p in posteriors]).float().unflatten(0, (B, T)).transpose(1, 2)
        if generators is not None:
            # [B, C, T, h, w]
            std = (
                torch.cat([p.std for p in posteriors]).float().unflatten(0, (B, T)).transpose(1, 2)
            )
            z = z + std * torch.stack(
                [torch.randn(z.shape[1:], generator=g) for g in generators]
            ).to(z)
        return z * self.scale

    @torch.no_grad()
    def decode(self, latents):
        """[B, C, T, h, w] -> [B, 3, T, H, W] in [-1, 1], fp32, on the CPU."""
        B = latents.shape[0]
        latents = (latents / self.scale).transpose(1, 2).flatten(0, 1)  # [B*T, C, h, w]
        parts = latents.split(self.micro_batch)
        frames = [
            self.model.decode(part.to(self.device, self.dtype)).sample.float().cpu()
            for part in parts
        ]
        return torch.cat(frames).clamp(-1, 1).unflatten(0, (B, -1)).transpose(1, 2)


class T5:
    """A frozen T5 encoder with its tokenizer. dtype defaults to bf16 on CUDA, else fp32 (fp16
    overflows in T5).
    """

    def __init__(self, source, length=120, device="cpu", dtype=None):
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
        self.tokenizer = load_frozen(AutoTokenizer.from_pretrained, source, "tokenizer")
        self.model = load_frozen(
            T5EncoderModel.from_pretrained, source, "text_encoder", dtype=dtype
        ).to(device)
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
    video = batch["frames"].transpose(1, 2).float() / 127.5 - 1  # [B, 3, T, H, W] in [-1, 1]
    return vae.encode(video, generators), *t5.encode(batch["text"])


# ---------------------------------------------------------------------------------------------
# The cache
#
# Encoders cost more than a small model's training step and give the same answer every epoch. So
# they run once, and training reads latents. A cache is a folder of safetensors shards; an index,
# written last, says with which settings they were made. Shards are written beside and renamed, each
# sample carries a checksum: what is there is whole, and what is damaged later is noticed when it is
# read.

SHARD = 64  # samples in a shard: 256 MB at 64 frames of 512x512


def write_cache(table, out, vae, t5, frames, stride, size, seed=0, max_bad=0.5):
    """Encode every usable clip of a CSV and its caption into the folder `out` -> LatentCache.
    Interrupted, it goes on.

    A latent is one draw from the VAE's posterior on one random span of the clip, kept in fp16.
    """
    if frames < 1 or stride < 1 or size < vae.factor or size % vae.factor:
        raise BadInput(
            f"frames={frames}, stride={stride}, size={size}: expected 1 or more frames and source "
            f"frames per frame, and a size that divides by the VAE's factor {vae.factor}"
        )
    out, settings = Path(out), {
        "table": hashlib.sha256(Path(table).read_bytes()).hexdigest()[:12],
        "frames": frames, "stride": stride, "size": size, "seed": seed, "vae": vae.fingerprint,
        "t5": t5.fingerprint, "caption_length": t5.length,
    }  # fmt: skip
    check_settings(out, settings)
    if (out / "index.json").exists():
        return LatentCache(out)
    clips = Clips(table, frames, stride, size, seed, max_bad)
    # files may come and go
    settings["clips"] = zlib.crc32(repr([number for number, _, _ in clips.rows]).encode())
    check_settings(out, settings)
    write_json(out / "settings.json", settings)
    shards = [
        (f"shard_{i // SHARD:05d}.safetensors", range(i, min(i + SHARD, len(clips))))
        for i in range(0, len(clips), SHARD)
    ]
    for name, rows in progress(
        [shard for shard in shards if not (out / shard[0]).exists()], f"encoding {table}"
    ):
        write_shard(out / name, clips, rows, vae, t5)
    index = [(name, *open_shard(str(out / name))[1:]) for name, _ in shards]
    skipped = clips.skipped + [bad for _, _, skipped in index for bad in skipped]
    if len(skipped) > max_bad * (len(clips) + len(clips.skipped)):
        raise BadInput(
            f"{table}: {len(skipped)} clips can't be used, more than the share max_bad={max_bad}; "
            "mend the list"
        )
    write_json(out / "index.json", {
        "settings": settings,
        "shards": [{"file": name, "samples": len(samples)} for name, samples, _ in index],
        "skipped": skipped, "latent_channels": vae.channels, "caption_channels": t5.channels,
        "vae": vae.source, "t5": t5.source,
    })  # fmt: skip
    return LatentCache(out)


def check_settings(out, settings):
    """BadInput if what stands in the folder `out` was made with other settings; names the
    difference.
    """
    if not (out / "settings.json").exists():
        return
    found = read_json(out / "settings.json", f"delete {out} and make it again")
    different = [
        f"{k}={found.get(k)!r} there, {v!r} asked for"
        for k, v in settings.items()
        if found.get(k) != v
    ]
    if different:
        raise BadInput(
            f"{out} was made with other settings ({'; '.join(different)}); give another --out, or "
            "delete it"
        )


def write_shard(path, clips, rows, vae, t5, batch_size=8):
    """Encode some rows of clips into one file: tensors "i.latents" [C, T, h, w] and "i.y" [tokens,
    E] for each sample i. Clips that can't be decoded after all are named and left out.
    """
    tensors, samples, skipped = {}, [], []
    for i in range(0, len(rows), batch_size):
        batch, numbers = [], []  # the line in the CSV keys a clip's draws
        for row in rows[i : i + batch_size]:
            number, file, _ = clips.rows[row]
            try:
                batch.append(clips[row, number])
                numbers.append(number)
            except BadClip as error:
                skipped.append({"row": number, "path": file.name, "reason": str(error)})
                warn(f"{file} {error}; skipped")
        if not batch:
            continue
        generators = [keyed_generator(clips.seed, "posterior", number) for number in numbers]
        batch = torch.utils.data.default_collate(batch)
        latents, y, mask = encode_batch(batch, vae, t5, generators)
        for j, number in enumerate(numbers):
            sample = {
                "latents": latents[j].half().cpu().contiguous(),
                "y": y[j, mask[j]].half().cpu(),
            }
            tensors |= {f"{len(samples)}.{key}": value for key, value in sample.items()}
            samples.append({"row": number, "text": batch["text"][j], "crc": checksum(sample)})
    # One entry: safetensors writes several in an order that changes from call to call.
    metadata = {"index": json.dumps({"samples": samples, "skipped": skipped})}
    write_whole(path, lambda p: save_file(tensors, p, metadata))


def checksum(sample):
    """crc32 of a sample's bytes, as stored."""
    return zlib.crc32(
        sample["y"].numpy().tobytes(), zlib.crc32(sample["latents"].numpy().tobytes())
    )


@lru_cache(maxsize=1024)  # one memory map per shard and process
def open_shard(path):
    """(the mapped file, its list of samples, its list of clips left out)."""
    try:
        file = safe_open(path, framework="pt")
        index = json.loads(file.metadata()["index"])
        return file, index["samples"], index["skipped"]
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise BadInput(
            f"{path} is damaged or not there ({error}); delete it and index.json, and run the cache"
            " command again"
        ) from None


class LatentCache:
    """Samples of a cache. cache[row, position] -> {"latents" fp32 [C, T, h, w], "y" fp32 [L, E],
    "mask" [L]}.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        again = "delete the file and index.json, and run the cache command again"
        index = read_json(self.folder / "index.json", f"no cache, or a damaged one: {again}")
        try:
            self.settings, self.skipped = index["settings"], index["skipped"]
            self.channels = index["latent_channels"]
            self.caption_channels = index["caption_channels"]
            self.vae, self.t5 = index["vae"], index["t5"]
            shards = [(str(self.folder / s["file"]), s["samples"]) for s in index["shards"]]
        except (KeyError, TypeError) as error:
            raise BadInput(f"{self.folder}/index.json lacks {error}: {again}") from None
        self.places = [(path, i) for path, n in shards for i in range(n)]
        for path, n in shards:  # headers alone: a truncated file is found now, not while training
            if len(open_shard(path)[1]) != n:
                raise BadInput(f"{path} does not hold the {n} samples that the index says: {again}")

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
        if checksum(sample) != samples[i]["crc"]:
            raise BadInput(f"{path}: sample {i} is damaged (its checksum differs); delete the file "
                           "and index.json, and run the cache command again")  # fmt: skip
        n, length = len(sample["y"]), self.settings["caption_length"]
        y = torch.nn.functional.pad(sample["y"].float(), (0, 0, 0, length - n))  # [L, E]
        return {"latents": sample["latents"].float(), "y": y, "mask": torch.arange(length) < n}


# ---------------------------------------------------------------------------------------------
# The toy: moving shapes with captions, and a detector that is its inverse
#
# A model that learns in minutes on a laptop needs a world that small: one coloured shape gliding
# over a plain ground. Three words of the caption name what one sees, so whether a film
# shows what its caption says can be *measured*, by the detector below, instead of guessed. The
# clips are still real H.264 files and go through the same reader and VAE as any other video.
# Six (colour, shape, direction) triples are never in the training set, though every pair of words
# is: only a model that has learned what the single words mean can film them.

COLOURS = {
    "red": (225, 50, 50),
    "green": (50, 190, 80),
    "blue": (70, 110, 250),
    "yellow": (245, 220, 60),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y is down
GROUND = (28, 28, 36)
HELD_OUT = [
    ("red", "circle", "left"),
    ("red", "triangle", "up"),
    ("green", "square", "right"),
    ("blue", "circle", "down"),
    ("blue", "triangle", "left"),
    ("yellow", "square", "up"),
]  # no two share a pair of words, so each of their pairs is seen with another third word
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
    """Film one (colour, shape, direction): uint8 [T, 3, size, size]. Size, place and speed are
    random.

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
    half = {
        "circle": (radius, radius, radius),
        "square": (radius * 0.886,) * 3,
        "triangle": (inner * math.sqrt(3), 2 * inner, inner),
    }[shape]  # half width, above, below
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
        ideal = coverage(shape, centre, radius, size)
        overlap[shape] = (
            torch.minimum(ideal, cover).sum() / torch.maximum(ideal, cover).sum()
        ).item()
    shape = max(overlap, key=overlap.get)
    if overlap[shape] < 0.6:
        return None

    time = torch.linspace(-0.5, 0.5, T)
    velocity = (centre * time[:, None]).sum(
        0
    ) / time.square().sum()  # least squares, pixels per clip
    residual = centre - centre.mean(0) - time[:, None] * velocity
    along = max(DIRECTIONS, key=lambda d: velocity @ torch.tensor(DIRECTIONS[d], dtype=torch.float))
    across = (velocity * torch.tensor(DIRECTIONS[along][::-1])).norm()
    if (
        velocity.norm() < size / 8
        or across > 0.4 * velocity.norm()
        or residual.norm(dim=1).mean() > size / 16
    ):
        return None  # hardly moves, moves aslant, or jumps about
    return colour, shape, along


def make_toy(out, clips=2048, frames=8, size=64, seed=0, fps=8):
    """Draw the toy: out/train.csv with `clips` films of the 42 seen triples, out/held_out.csv with
    two new films of each of the 48. The CSVs are written last, so where they are, everything is.
    """
    if clips < 1 or frames < 2 or size < 32:
        raise BadInput(
            f"clips={clips}, frames={frames}, size={size}: expected 1 or more, 2 or more, 32 or "
            "more"
        )
    out, settings = (
        Path(out),
        {"clips": clips, "frames": frames, "size": size, "seed": seed, "fps": fps},
    )
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser("toy", help="draw the toy data set")
    toy.add_argument("--out", required=True, help="folder to write")
    toy.add_argument("--clips", type=int, default=2048, help="training films")
    cache = commands.add_parser("cache", help="encode clips and captions once")
    cache.add_argument("table", help="CSV with header path,text")
    cache.add_argument("--out", required=True, help="folder to write")
    cache.add_argument("--stride", type=int, default=1, help="source frames per kept frame")
    cache.add_argument("--vae", default="assets/vae", help="folder or Hub name of an AutoencoderKL")
    cache.add_argument("--t5", default="assets/t5", help="folder or Hub name of a T5 encoder")
    cache.add_argument(
        "--caption-length", type=int, default=16, help="most caption tokens; 120 for T5-XXL"
    )
    cache.add_argument(
        "--max-bad", type=float, default=0.5, help="share of unusable clips at which to give up"
    )
    cache.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    for sub in (toy, cache):
        sub.add_argument("--frames", type=int, default=8, help="frames per clip")
        sub.add_argument("--size", type=int, default=64, help="height and width in pixels")
        sub.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.time()
    if args.command == "toy":
        make_toy(args.out, args.clips, args.frames, args.size, args.seed)
        print(f"{args.out}/train.csv and held_out.csv, {time.time() - start:.0f} s")
        return
    read_table(args.table)  # complain about the list before loading encoders
    device = pick_device(args.device)
    vae, t5 = VAE(args.vae, device), T5(args.t5, args.caption_length, device)
    made = write_cache(
        args.table, args.out, vae, t5, args.frames, args.stride, args.size, args.seed, args.max_bad
    )
    print(
        f"{args.out}: {len(made)} clips, {len(made.skipped)} skipped, {time.time() - start:.0f} s"
    )


if __name__ == "__main__":
    command(main)
