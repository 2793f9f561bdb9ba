"""From video files to tensors: clips, captions, frozen encoders, latent cache, and the toy data.

    python data.py SOURCE --out DIR --vae VAE --t5 T5       encode all clips once, into a cache

A SOURCE is a folder of videos (with --frames 1 also images), each with its caption in a .txt of
the same name, or a CSV with the header "path,text" (paths relative to its folder). The frozen VAE
turns frames into latents, and the frozen T5 turns captions into embeddings.

Clips and Toy are data sets; another one needs the same interface:
    len(data_set)         number of clips
    data_set[row]         the frames of a clip, uint8 [T, 3, H, W], or None if it is unreadable
    data_set.captions     list of the captions
    data_set.files        list of the clips' paths, None for a clip without a file
    data_set.settings     dict: clips (a hash of their list), frames, stride, size, width, seed

Shapes in this file:
    B batch    T frames    C latent channels (4)    L caption tokens    E caption channels
    H, W height and width in pixels; in stdit.py those of latents, an eighth of them
"""

import csv
import hashlib
import html
import io
import json
import math
import os
import re
import struct
import sys
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate, pad
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------
# Clips and captions

NOT_CLIPS = {".txt", ".csv", ".json", ".md", ".srt", ".vtt", ".safetensors"}


def list_clips(source):
    """The list of (path, caption) of a folder or a CSV. A caption may be empty."""
    source = Path(source)
    require(source.exists(), f"{source} not found; give a folder of clips, or a CSV: path,text")
    if source.is_dir():
        texts = {path: path.with_suffix(".txt") for path in list_files(source)}
        rows = [(path, read_text(t) if t.is_file() else "") for path, t in texts.items()]
    else:
        require(source.suffix == ".csv", f"{source} is not a CSV; give a folder of clips, or a CSV")
        rows = [(source.parent / row["path"], row["text"]) for row in read_table(source)]
    require(rows, f"{source} lists no clips")
    return [(path, clean_caption(text)) for path, text in rows]


def list_files(folder):
    """The files of clips below a folder, following symbolic links, without hidden ones."""
    files, entered = [], set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(parent) in entered:  # a loop of links, or visited before
            folders.clear()
            continue
        entered.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(p for p in files if p.suffix.lower() not in NOT_CLIPS)


def refuse(error):
    raise UserError(f"{error.filename} cannot be listed: {error.strerror}")


def read_text(path):
    """The text of a UTF-8 file, with or without a byte order mark."""
    content = path.read_bytes().replace(b"\0", b"\xff")  # NULs, as in UTF-16, fail below
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8; convert it, e.g. by iconv") from None


def read_table(path):
    """The rows of a CSV with the columns path and text, as dicts."""
    csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    rows = []
    problem = "no path, a missing column, or a text with commas without quotes"
    try:
        reader.fieldnames = header = [name.strip() for name in reader.fieldnames or ()]
        require({"path", "text"} <= {*header}, f"{path}, line 1: needs path,text; it has {header}")
        for row in reader:  # surplus fields have the key None, missing ones the value None
            complete = row["path"] and None not in row and None not in row.values()
            require(complete, f"{path}, line {reader.line_num}: {problem}")
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}, the row at line {reader.line_num + 1}: {error}") from None
    return rows


def clean_caption(text):
    """One line in lower case, without web addresses, HTML tags and entities."""
    attribute = r"""\s+[\w:-]+\s*=\s*("[^"]*"|'[^']*'|[^\s<>]+)"""  # such as class="a"
    tag = rf"</?[a-z]\w*({attribute})*\s*/?>"  # <p>, but not "I <3 my dog who runs -> jumps"
    address = r"(https?://|\bwww\.)(\S*[^\s.,;:!?)\]}\"'<>])?"  # without punctuation after it
    text = re.sub(f"{tag}|{address}", " ", html.unescape(text).lower())
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------
# Reading clips
#
# A training sample is a temporal crop: T frames of a clip, `stride` source frames apart, from a
# random start. An image is a video of one frame.
#
# Frames are what the decoder gives, in its order, and their number is known only when it ends: a
# packet of a file can hold half a frame, a hidden one, or one that cannot be decoded after a cut.
# 1. The start is drawn over the number of packets.
# 2. Where files store presentation times (MP4, Matroska), decoding begins at the keyframe before
#    it. If frames then come at other times than packets, or are damaged, go to 3.
# 3. Otherwise all is decoded from the first packet and counted. If the clip ends early, the start
#    is drawn again, over the number of frames.

TIMED = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}  # containers that store presentation times
ONE_FRAME_PER_PACKET = {"h264", "hevc", "vp9"}  # codecs, unless interlaced (decoded_frames)
ANIMATED = ("PNG", "WEBP", "AVIF", "GIF")  # FFmpeg reads those with several frames, else Pillow
IMAGES = (*ANIMATED, "JPEG", "BMP", "TIFF")
HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics
TO_SDR = "ffmpeg -i IN -vf zscale=t=linear:npl=100,tonemap=hable,zscale=t=709:p=709:m=709 OUT"
# What PyAV and Pillow raise for damaged files
DAMAGE = (av.FFmpegError, OSError, ValueError, SyntaxError, IndexError, EOFError, struct.error)
DAMAGE += (Image.DecompressionBombError,)
frame_rates = []  # of the videos that this process has read


class UnreadableClip(Exception):
    """A clip that cannot be used, and why. It is reported and skipped."""


def read_frames(path, frames, stride=1, generator=None, transform=lambda frame: frame):
    """Read a temporal crop of a clip: uint8 [T, 3, H, W], T = `frames` frames, `stride` source
    frames apart. The generator draws the first one; without it, the crop is in the middle. A frame
    [3, H, W] is transformed as it is decoded. UnreadableClip if a clip is too short or damaged.
    """

    def crop(count):
        span = (frames - 1) * stride + 1
        starts = count - span + 1
        if starts < 1:
            raise UnreadableClip(f"{count} frames; {frames} at stride {stride} need {span}")
        start = int(torch.randint(starts, (1,), generator=generator)) if generator else starts // 2
        return range(start, start + span, stride)

    return read_chosen(path, crop, transform)


def read_chosen(path, choose, transform=lambda frame: frame):
    """Read the frames of a clip with the numbers choose(number of frames): uint8 [T, 3, H, W]."""
    if not os.path.isfile(path):
        raise UnreadableClip("no such file")
    try:
        image = read_image(path)
        if image is not None:
            return torch.stack([transform(image) for _ in choose(1)])  # raises for more than 1
        count, times = list_packets(path)
        numbers = choose(count)
        found, count = decode(path, numbers, transform, times)
        if not found.keys() >= {*numbers}:  # the clip ended early: draw again over its frames
            numbers = choose(count)
            found, _ = decode(path, numbers, transform)
        return torch.stack([found[number] for number in numbers])
    except DAMAGE as error:
        if isinstance(error, (OSError, MemoryError)) and error.errno:
            error.add_note(str(path))
            raise  # of the system (PyAV's have an errno too), such as too many open files
        raise UnreadableClip(f"{type(error).__name__}: {error}") from None


def read_image(path):
    """The pixels of an image, uint8 [3, H, W], or None if the file is not a still image."""
    try:
        with Image.open(path, formats=IMAGES) as image:
            if image.format in ANIMATED and image.is_animated:
                return None
            if image.format == "AVIF":  # Pillow does not tell whether it is HDR
                with av.open(str(path)) as container:
                    refuse_hdr(container.streams.video[0].codec_context)
            return torch.from_numpy(on_white(ImageOps.exif_transpose(image))).permute(2, 0, 1)
    except UnidentifiedImageError:
        return None


def refuse_hdr(tagged):
    """UnreadableClip if a frame or codec context is tagged as HDR, which RGB of 8 bits is not."""
    if tagged.color_trc in HDR:
        raise UnreadableClip(f"HDR ({HDR[tagged.color_trc]}); convert it to SDR: {TO_SDR}")


def on_white(image):
    """The pixels of a PIL image on white, uint8 [H, W, 3]."""
    if image.mode.startswith("I;16"):  # convert() would clip it at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnreadableClip("an image of 32 bits per value; convert it to 8 or 16")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.array(Image.alpha_composite(white, image).convert("RGB"))


@contextmanager
def open_video(path):
    """Open a file with FFmpeg: its container and its video stream."""
    path = Path(path).absolute()  # FFmpeg would parse a relative path with a colon as a URL
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise UnreadableClip("no video stream that FFmpeg can decode")
        if stream.disposition & av.stream.Disposition.dependent:  # HEIC, AVIF
            raise UnreadableClip("an image made of tiles; convert it, e.g. to PNG")
        stream.codec_context.thread_count = 1  # clips are read in parallel instead
        yield container, stream


def list_packets(path):
    """The number of packets, and their sorted times, or [] if packets may not be frames."""
    with open_video(path) as (container, stream):
        packets = container.demux(stream)
        packets = [(p.pts, p.is_keyframe) for p in packets if p.size and not p.is_discard]
        frame_rates.append(round(float(stream.average_rate or 0), 2))
        codec = stream.codec.canonical_name
        known = container.format.name in TIMED and codec in ONE_FRAME_PER_PACKET
    times = sorted({time for time, _ in packets} - {None})
    # Each packet must have its own time, and the first one be a keyframe that is shown first.
    known = known and len(times) == len(packets) > 0 and packets[0] == (times[0], True)
    return len(packets), times if known else []


def decode(path, numbers, transform, times=()):
    """Decode the frames with these numbers. Returns {number: transform(frame)}, without those after
    the end, and the number of frames counted. times: of all frames, or empty if they are not known.
    """
    first, last = min(numbers), max(numbers)
    earlier = {*times[:first]}  # frames between the keyframe and the first one
    found, damaged = {}, False
    with open_video(path) as (container, stream):
        count = 0
        if times:
            count = first
            container.seek(times[first], stream=stream)
        for frame in decoded_frames(container, stream, times[first : last + 1]):
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            if frame.pts in earlier:
                continue
            if times and (damaged or (count <= last and frame.pts != times[count])):
                break  # not as listed: decode from the first packet, below
            if damaged and count >= first:
                raise UnreadableClip(f"frame {count} is damaged, or one before it")
            if count in numbers:
                found[count] = transform(to_rgb(frame, stream))
            count += 1
            # B-frames are decoded after a later frame that they need (shown order B B P, decoded
            # P B B). So go on to the next frame that is not a B-frame, which may be damaged; it is
            # at most 16 frames later.
            b_frame = frame.pict_type == av.video.frame.PictureType.B
            if count > last + 16 or (count > last and not b_frame):
                break
    if times and (damaged or not found.keys() >= {*numbers}):
        return decode(path, numbers, transform)
    if not count:
        raise UnreadableClip("FFmpeg can decode no frame of it")
    return found, count


def decoded_frames(container, stream, times):
    """The frames of a stream, deinterlaced. If times are given, frames at other times may be left
    out, and an interlaced frame is the end, since its filter needs the frame before.
    """
    codec, graph = stream.codec_context, None
    begun = False  # whether a packet was decoded
    packets = (packet for packet in container.demux(stream) if packet.size)
    for packet in chain(packets, [None]):  # None: the frames that the decoder still holds
        needed = not times or packet is None or times[0] <= packet.pts <= times[-1]
        # NONREF leaves out frames to which no other refers.
        codec.skip_frame = "DEFAULT" if needed else "NONREF"
        try:
            frames = codec.decode(packet)
        except av.InvalidDataError:
            if begun or times:
                raise
            continue  # the beginning was cut off
        begun = begun or bool(frames)
        if graph is None and any(frame.interlaced_frame for frame in frames):
            if times:
                return
            graph = av.filter.Graph()
            bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced:threads=1")
            source, sink = graph.add_buffer(template=stream), graph.add("buffersink")
            graph.link_nodes(source, bwdif, sink).configure()
        if graph is None:
            yield from frames
            continue
        for frame in frames if packet else [*frames, None]:  # None flushes the filter
            graph.vpush(frame)
            with suppress(av.BlockingIOError, av.EOFError):  # a frame comes when the next is there
                yield graph.vpull()


def to_rgb(frame, stream):
    """A frame as players show it, uint8 [3, H, W]: with square pixels, upright, on white."""
    refuse_hdr(frame)
    width = round(frame.width * (stream.sample_aspect_ratio or 1))
    alpha = any(component.is_alpha for component in frame.format.components)
    # By default FFmpeg would start a thread per core for every frame.
    image = frame.to_ndarray(width=width, format="rgba" if alpha else "rgb24", threads=1)
    if alpha:
        image = on_white(Image.fromarray(image))
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError as error:  # PyAV's list of kinds is incomplete
        raise UnreadableClip(f"PyAV: side data {error}; convert it, a picture to JPEG") from None
    if matrix is not None:
        a, b, _, c, d = struct.unpack_from("5i", bytes(matrix))  # (x, y) to (ax + cy, bx + dy)
        if abs(b) > abs(a):  # a quarter turn is a transposition; what is left are flips
            image, a, d = image.transpose(1, 0, 2), c, b
        image = np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
    return torch.from_numpy(image).permute(2, 0, 1)


def center_crop_and_resize(frames, height, width):
    """Crop frames, uint8 [..., 3, H, W], to the center and resize them: [..., 3, height, width]."""
    H, W = frames.shape[-2:]
    scale = min(H / height, W / width)  # of the largest rectangle of that aspect ratio
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = round((H - h) / 2), round((W - w) / 2)
    crop = frames[..., top : top + h, left : left + w].reshape(-1, 3, h, w)
    out = interpolate(crop, (height, width), mode="bilinear", antialias=True)
    return out.view(*frames.shape[:-2], height, width)


class Clips:
    """The data set of clips read from files, T = `frames` frames of size x width pixels. The start
    of a crop is random, but keyed on the seed and the row, so it is the same at every reading.
    """

    def __init__(self, source, frames, stride, size, width, seed):
        rows = list_clips(source)
        self.files, self.captions = map(list, zip(*rows))
        listed = [(os.path.relpath(path, source), text) for path, text in rows]
        identity = hashlib.sha256(repr(listed).encode()).hexdigest()[:12]
        self.settings = dict(
            clips=identity, frames=frames, stride=stride, size=size, width=width, seed=seed
        )

    def __len__(self):
        return len(self.files)

    def __getitem__(self, row):
        s = self.settings
        generator = keyed_generator(s["seed"], "crop", row)
        transform = partial(center_crop_and_resize, height=s["size"], width=s["width"])
        try:
            if not self.captions[row]:
                raise UnreadableClip("no caption: write one, or run tools/caption.py")
            return read_frames(self.files[row], s["frames"], s["stride"], generator, transform)
        except UnreadableClip as error:
            print(f"warning: skipped {self.files[row]}: {error}", file=sys.stderr, flush=True)
            return None


# ---------------------------------------------------------------------------------------------
# Frozen encoders
#
# v1 uses an image VAE (Stability's: factor 8, 4 channels), frame by frame, as no good video VAE was
# available, and T5-XXL, with which PixArt-alpha was trained. Both are loaded from a local folder or
# the Hub. One source may hold both: PixArt-alpha's has vae/, text_encoder/ and tokenizer/.


def local_folder(source):
    """The Path of a local folder, also relative to this file; None for a Hub name; or UserError."""
    for path in (Path(source).expanduser(), ROOT / source):
        if path.is_dir():
            return path
    hub_name = r"(?!(out|weights|assets|samples)/)\w[\w.-]*/\w[\w.-]*"  # not of our own folders
    found = re.fullmatch(hub_name, str(source))
    require(found, f"{source} not found; give a local folder, or a name on the Hub, owner/name")
    return None


def load_frozen(load, source, part, **options):
    """Call a library's from_pretrained on a source's subfolder `part`, if any, or on the source."""
    folder, reasons = local_folder(source), []
    # What a repository on the Hub has is found out by trying.
    subfolders = [part, ""] if folder is None else [part if (folder / part).is_dir() else ""]
    for subfolder in subfolders:
        try:
            return load(str(folder or source), subfolder=subfolder, **options)
        except (OSError, ValueError, SafetensorError) as error:
            reasons.append(str(error).strip().split("\n")[0])
    raise UserError(f"{source} has no {part} that can be loaded: {'; '.join(reasons)}")


def default_dtype(device):
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


class VAE:
    """A frozen image VAE applied to videos, `micro_batch` frames at a time."""

    def __init__(self, source, device="cpu", dtype=None, micro_batch=16):
        from diffusers import AutoencoderKL  # here, because the import takes seconds

        self.dtype = dtype or default_dtype(device)
        # low_cpu_mem_usage=True, the default, would need the package accelerate
        options = {"torch_dtype": self.dtype, "low_cpu_mem_usage": False}
        model = load_frozen(AutoencoderKL.from_pretrained, source, "vae", **options)
        model = model.to(device, memory_format=torch.channels_last)  # faster convolutions
        self.model = model.eval().requires_grad_(False)
        self.source, self.device, self.micro_batch = source, device, micro_batch
        self.scaling_factor = model.config.scaling_factor  # to a variance of about 1; 0.18215 in v1
        self.channels = model.config.latent_channels
        # A VAE such as FLUX's also shifts its latents.
        shifted = getattr(model.config, "shift_factor", None)
        require(not shifted, f"{source}: its VAE has shift_factor={shifted}, expected none")
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)  # pixels per latent: 8

    @torch.no_grad()
    def encode(self, video, generator=None):
        """The latents, fp32 [C, T, H/8, W/8], of a video, uint8 [T, 3, H, W]."""
        frames = (video.to(self.device).float() / 127.5 - 1).to(self.dtype)  # [T, 3, H, W]
        parts = [self.model.encode(part).latent_dist for part in frames.split(self.micro_batch)]
        latents = torch.cat([p.mean for p in parts]).float().transpose(0, 1)  # [C, T, H/8, W/8]
        if generator is not None:  # a sample of the posterior, as in v1, in place of its mean
            std = torch.cat([p.std for p in parts]).float().transpose(0, 1)
            latents = latents + std * torch.randn(std.shape, generator=generator).to(std)
        return latents * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents):
        """The video [T, 3, H, W] in [-1, 1], fp32, on the CPU, of latents [C, T, H/8, W/8]."""
        frames = (latents / self.scaling_factor).transpose(0, 1).to(self.device, self.dtype)
        parts = [self.model.decode(part).sample for part in frames.split(self.micro_batch)]
        return torch.cat(parts).float().cpu().clamp(-1, 1)

    def check_size(self, frames, size, width, patch_size=(1, 2, 2)):
        """UserError unless the VAE and the patches divide a video of this size."""
        t, h, w = patch_size[0], patch_size[1] * self.factor, patch_size[2] * self.factor
        fits = frames % t == 0 and size % h == 0 and width % w == 0
        found = f"frames={frames} size={size} width={width}"
        require(fits, f"{found}: expected multiples of {t}, {h}, {w}")


def to_uint8(video):
    """Convert a video in [-1, 1] to uint8."""
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class T5:
    """A frozen T5 encoder with its tokenizer. T5 overflows in fp16, so it is in bf16 or fp32."""

    def __init__(self, source, length=120, device="cpu", dtype=None):
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        dtype = dtype or default_dtype(device)
        self.tokenizer = load_frozen(AutoTokenizer.from_pretrained, source, "tokenizer")
        model = load_frozen(T5EncoderModel.from_pretrained, source, "text_encoder", dtype=dtype)
        self.model = model.to(device).eval().requires_grad_(False)
        self.source, self.device, self.length = source, device, length
        self.channels = model.config.d_model

    @torch.no_grad()
    def encode(self, captions):
        """Embeddings [B, L, E], 0 at padding, and mask [B, L], True at tokens; L is the maximum."""
        options = {"max_length": self.length, "padding": "max_length", "truncation": True}
        uncut = self.tokenizer(list(captions))["input_ids"]
        for caption, ids in zip(captions, uncut):
            if len(ids) > self.length:
                cut = f"cut from {len(ids)} to {self.length} tokens"
                print(f"warning: {cut}: {caption[:60]}...", file=sys.stderr, flush=True)
        batch = self.tokenizer(list(captions), return_tensors="pt", **options).to(self.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]  # [B, L] each
        y = [self.model(*part).last_hidden_state for part in zip(ids.split(32), mask.split(32))]
        return torch.cat(y).float() * mask[..., None], mask.bool()  # [B, L, E], [B, L]


def hash_encoders(vae, t5):
    """12 hex digits from the first value of each weight, the same if it is loaded in bf16."""
    parameters = (*vae.model.parameters(), *t5.model.parameters())
    values = [p.flatten()[0].bfloat16().item() for p in parameters]
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------
# The latent cache
#
# The encoders cost more than a training step of a small model, so they run once and training reads
# their outputs: for each clip one safetensors file with the latents of a temporal crop, sampled
# from the VAE's posterior, and the T5 embeddings without padding, both in fp16. 64x512x512 pixels
# take 2.1 MB, 120 tokens of T5-XXL 0.98 MB. The crop is the same in all epochs, so cut long videos
# into clips first; write captions first, too, since a cache belongs to one list of captions.


def write_cache(clips, out, vae, t5, distributed=None):
    """Encode Clips (or Toy) into the folder `out` and return its LatentCache. Clips that are there
    already are kept, so a call after an interruption continues. UserError if the settings differ.
    """
    out, d = Path(out), distributed or Distributed()
    settings = clips.settings | dict(encoder_hash=hash_encoders(vae, t5), channels=vae.channels)
    settings |= dict(caption_length=t5.length, caption_channels=t5.channels)
    path = out / "settings.json"
    found = json.loads(path.read_text()) if path.exists() else settings
    changed = ", ".join(key for key in settings if found.get(key) != settings[key])
    require(not changed, f"{out} was made with other {changed}: delete it or change --out")
    if d.rank == 0:
        write_json(path, settings)

    files = [out / f"{row:06d}.safetensors" for row in range(len(clips))]
    stamps = [file_stamp(path) for path in clips.files]
    share = range(len(clips))[d.rank :: d.world_size]  # of this process
    rows = [row for row in share if not is_encoded(files[row], stamps[row])]
    with ThreadPoolExecutor() as pool:  # FFmpeg releases the GIL
        reads = (pool.submit(clips.__getitem__, row) for row in rows)  # submitted when asked for
        ahead = deque(islice(reads, 16))  # read while others are encoded, at most 16
        for row in progress(rows, f"encoding {out}"):
            frames = ahead.popleft().result()
            ahead.extend(islice(reads, 1))
            if frames is None:
                files[row].unlink(missing_ok=True)  # it was readable before
                continue
            latents = vae.encode(frames, keyed_generator(settings["seed"], "posterior", row))
            y, mask = t5.encode([clips.captions[row]])  # [1, L, E], [1, L]
            tensors = {"latents": latents, "y": y[0, mask[0]]}  # [C, T, H/8, W/8], [tokens, E]
            tensors = {k: v.half().cpu().contiguous() for k, v in tensors.items()}
            metadata = {"stamp": stamps[row]} if stamps[row] else None
            atomic_write(files[row], partial(save_file, tensors, metadata=metadata))
    barrier()
    if d.rank == 0:  # the index is written last: with it the cache is complete
        made = [row for row, file in enumerate(files) if file.exists()]
        print0(f"{out}: {len(made)} of {len(clips)} clips")
        if not made:
            path.unlink()  # with other settings clips may be readable
        require(made, f"none of {len(clips)} clips is readable, see the warnings")
        encoded = hashlib.sha256(repr(made).encode()).hexdigest()[:12]
        index = {"settings": settings | {"encoded": encoded}, "encoders": [vae.source, t5.source]}
        index["clips"] = [(row, clips.captions[row]) for row in made]
        index["stamps"] = {os.path.abspath(clips.files[r]): stamps[r] for r in made if stamps[r]}
        write_json(out / "index.json", index)
    barrier()
    return LatentCache(out)


def file_stamp(path):
    """Size and time of modification of a clip's file, None if it has none."""
    if path is None or not os.path.isfile(path):
        return None
    status = os.stat(path)
    return f"{status.st_size} bytes, {status.st_mtime_ns} ns"


def is_encoded(file, stamp):
    """Whether a file of a cache was made from a clip's file as it is now."""
    try:
        with safe_open(file, "pt") as tensors:
            # If the clip's file is gone, the cached one is valid.
            return stamp is None or (tensors.metadata() or {}).get("stamp") == stamp
    except (FileNotFoundError, SafetensorError):  # or damaged, as by a full disk
        return False


class LatentCache:
    """The clips of a cache: cache[i] is (latents [C, T, H/8, W/8], y [L, E], mask [L]), in fp32.
    UserError if the file of a clip was replaced after it was encoded, or one of the cache damaged.
    """

    def __init__(self, folder):
        index = json.loads((Path(folder) / "index.json").read_text())
        self.settings, self.encoders = index["settings"], index["encoders"]
        self.files = [Path(folder) / f"{row:06d}.safetensors" for row, _ in index["clips"]]
        self.captions = [caption for _, caption in index["clips"]]
        for path, stamp in index["stamps"].items():
            same = file_stamp(path) in (stamp, None)
            require(same, f"{path} has changed since {folder} was made: run data.py again")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        try:
            tensors = load_file(self.files[i])
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.files[i]} is damaged ({error}): run data.py again") from None
        length = self.settings["caption_length"]
        y = tensors["y"].float()  # [tokens, E]
        mask = torch.arange(length) < len(y)
        return tensors["latents"].float(), pad(y, (0, 0, 0, length - len(y))), mask


# ---------------------------------------------------------------------------------------------
# The toy data: moving shapes with captions, and a detector
#
# One colored shape moves over a plain background. Color, shape and direction are the clip's label
# and three words of its caption. The detector recovers the label from the pixels, so it tells
# whether a generated video matches its caption. Six labels are never in the training set, although
# every pair of their words is: to generate them, a model must have learned the words separately.

COLORS = dict(red=(225, 50, 50), green=(50, 190, 80), blue=(70, 110, 250), yellow=(245, 220, 60))
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y is down
BACKGROUND = (28, 28, 36)
INNER = math.sqrt(math.pi / (3 * math.sqrt(3)))  # inscribed radius of a triangle of area pi
LABELS = [(c, s, d) for c in COLORS for s in SHAPES for d in DIRECTIONS]
# No two share a pair of words, so each pair occurs in training with another third word.
UNSEEN = [("red", "circle", "left"), ("red", "triangle", "up"), ("green", "square", "right")]
UNSEEN += [("blue", "circle", "down"), ("blue", "triangle", "left"), ("yellow", "square", "up")]
SEEN = [label for label in LABELS if label not in UNSEEN]


def caption_of(label):
    """The caption of a label, such as "a red circle moving left"."""
    return "a {} {} moving {}".format(*label)


def coverage(shape, center, radius, size):
    """Fraction of each pixel that a shape covers: float [T, size, size]. center [T, 2] in pixels
    (x, y). Every shape has the area of a circle of this radius, so area does not reveal the shape.
    """
    pixel = torch.arange(size) + 0.5
    x = pixel[None, None, :] - center[:, 0, None, None]  # [T, 1, W]
    y = pixel[None, :, None] - center[:, 1, None, None]  # [T, H, 1]
    if shape == "circle":
        distance = (x**2 + y**2).sqrt() - radius
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - radius * math.sqrt(math.pi) / 2
    else:  # an equilateral triangle, point up; its sides are radius * INNER away from the center
        distance = torch.maximum(y, (math.sqrt(3) * x.abs() - y) / 2) - radius * INNER
    return (0.5 - distance).clamp(0, 1)


def draw_clip(label, generator, frames=8, size=64):
    """Draw a clip of this label, of random size, position and speed: uint8 [T, 3, H, W]. The shape
    moves by 28 to 38% of the frame and ends near the edge it moves to. So the direction word alone
    predicts where it is, and a model learns much faster than with uniform positions.
    """
    color, shape, direction = label
    size_u, speed_u, *start_u = torch.rand(4, generator=generator)
    radius = size * (0.125 + 0.045 * size_u)
    heading = torch.tensor(DIRECTIONS[direction])  # [2]  x, y
    travel = heading * size * (0.28 + 0.10 * speed_u)  # [2]  from the first frame to the last
    reach = 2 * INNER * radius  # no shape extends further from its center
    # [2]  the range of first centers for which the shape never leaves the frame
    low, high = reach - travel.clamp(max=0), size - reach - travel.clamp(min=0)
    # u: uniform across the motion; along it, in the 30% of the range nearest the edge it moves to
    u = torch.stack(start_u)
    u = torch.where(heading == 0, u, torch.where(heading < 0, 0.3 * u, 1 - 0.3 * u))
    center = low + (high - low) * u + travel * torch.linspace(0, 1, frames)[:, None]  # [T, 2]
    covered = coverage(shape, center, radius, size)[:, None]  # [T, 1, H, W]
    background = torch.tensor(BACKGROUND).view(3, 1, 1)
    foreground = torch.tensor(COLORS[color]).view(3, 1, 1)
    return (background + covered * (foreground - background)).round().to(torch.uint8)


def color_coverage(video, color):
    """Fraction of each pixel that a color covers, [T, H, W]. video [T, 3, H, W], 0 to 255."""
    background = torch.tensor(BACKGROUND).view(3, 1, 1)
    value = torch.tensor(COLORS[color]).view(3, 1, 1) - background
    covered = ((video.float() - background) * value).sum(1) / value.square().sum()
    return torch.where(covered > 0.15, covered.clamp(max=1), 0)


def fit_shapes(covered):
    """Compare the coverage [T, H, W] of each frame with every shape, drawn at its center of mass
    and with its area. Returns intersection over union [shapes, T], centers [T, 2], areas [T].
    """
    size = covered.shape[-1]
    pixel = torch.arange(size) + 0.5
    area = covered.sum((1, 2)).clamp(min=1e-6)  # [T]
    center = torch.stack([(covered.sum(1) * pixel).sum(1), (covered.sum(2) * pixel).sum(1)], 1)
    center = center / area[:, None]  # [T, 2]
    radius = (area / math.pi).sqrt()[:, None, None]
    ideals = torch.stack([coverage(shape, center, radius, size) for shape in SHAPES])
    iou = torch.minimum(ideals, covered).sum((2, 3)) / torch.maximum(ideals, covered).sum((2, 3))
    return iou, center, area


def detect(video):
    """The label of a toy clip, or None. video [T, 3, H, W], uint8 or float in [0, 255]."""
    # The thresholds were fixed on drawn clips and their reconstructions by the VAE.
    T, _, _, size = video.shape
    offset = video.float() - torch.tensor(BACKGROUND).view(3, 1, 1)  # [T, 3, H, W]
    strength = offset.norm(dim=1)  # [T, H, W]
    # The color is that of the strong pixels: above 60% of the 99th percentile.
    strong = strength > 0.6 * strength.flatten().kthvalue(int(0.99 * strength.numel())).values
    if strength.median() > 40 or not 0.02 < strong.float().mean() < 0.3:
        return None  # no plain background, or nothing of a shape's size
    colors = torch.tensor(list(COLORS.values())) - torch.tensor(BACKGROUND)  # [4, 3]
    distance = (colors - offset.transpose(0, 1)[:, strong].mean(1)).norm(dim=1)  # [4]
    color = list(COLORS)[distance.argmin()]
    iou, center, area = fit_shapes(color_coverage(video, color))
    iou, size_change = iou.mean(1), area / area.median()  # [shapes], [T]
    if distance.min() > 80 or iou.max() < 0.6 or size_change.min() < 0.5 or size_change.max() > 2:
        return None  # another color, another shape, or not of one size

    # The direction is that of a line fitted to the centers by least squares.
    time = torch.linspace(-0.5, 0.5, T)[:, None]
    velocity = (center * time).sum(0) / time.square().sum()  # [2]  pixels per clip
    residual = (center - center.mean(0) - time * velocity).norm(dim=1).mean()
    direction = max(DIRECTIONS, key=lambda d: velocity @ torch.tensor(DIRECTIONS[d]).float())
    across = (velocity * torch.tensor(DIRECTIONS[direction][::-1])).norm()  # [::-1]: the other axis
    speed = velocity.norm()
    if speed < size / 8 or across > 0.4 * speed or residual > size / 16:
        return None  # too slow, or not straight in one of the directions
    return color, SHAPES[iou.argmax()], direction


def shape_quality(video, label):
    """How well single frames show a label: the fraction of frames with its shape, the mean
    intersection over union with it, and the flicker: the standard deviation of the color.
    """
    covered, shape = color_coverage(video, label[0]), SHAPES.index(label[1])
    iou, _, _ = fit_shapes(covered)
    inside = (covered > 0.75)[:, None]  # [T, 1, H, W]
    color = (video * inside).sum((2, 3)) / inside.sum((2, 3))  # [T, 3], NaN without such pixels
    right = (iou.argmax(0) == shape).float().mean()
    return right.item(), iou[shape].mean().item(), color.std(0).mean().item()


class Toy:
    """The data set of toy clips. Split "train" has the 42 seen labels, "validation" all 48."""

    def __init__(self, split, clips, frames=8, size=64):
        self.split, labels = split, SEEN if split == "train" else LABELS
        self.labels = [labels[i % len(labels)] for i in range(clips)]
        self.captions = [caption_of(label) for label in self.labels]
        self.files = [None] * clips
        # The hash does not cover draw_clip: after changing it, delete the toy's caches.
        identity = hashlib.sha256(repr((split, self.captions, COLORS)).encode()).hexdigest()[:12]
        self.settings = dict(clips=identity, frames=frames, stride=1, size=size, width=size, seed=0)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        generator, s = keyed_generator(0, "toy", self.split, row), self.settings
        return draw_clip(self.labels[row], generator, s["frames"], s["size"])


# ---------------------------------------------------------------------------------------------
# The command line


@dataclass(frozen=True)
class CacheConfig:
    source: tyro.conf.Positional[str]  # folder of clips, or CSV with the header path,text
    out: str  # folder to write; after an interruption, run the same command again
    vae: str  # folder or Hub name of the VAE; that of the toy is assets/vae
    t5: str  # folder or Hub name of T5's encoder and tokenizer; those of the toy: assets/t5
    frames: int = 8  # frames of a clip; 1 for images
    stride: int = 1  # source frames per frame; v1: 3, and 2 for 64 frames
    size: int = 64  # height in pixels
    width: int | None = None  # width in pixels; None: the height
    caption_length: int = 16  # maximum number of tokens; 120 for T5-XXL
    seed: int = 0  # random seed of temporal crops and posterior samples
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else MPS, else CPU


def main():
    c = tyro.cli(CacheConfig, description=__doc__.split("\n\nClips and Toy")[0])
    require_range(c, 1, 100_000, "frames", "stride", "size", "width", "caption_length")
    require_folder(c.out)
    d, width = init_distributed(c.device), c.width or c.size
    clips = Clips(c.source, c.frames, c.stride, c.size, width, c.seed)
    vae = VAE(c.vae, d.device)
    vae.check_size(c.frames, c.size, width)
    t5 = T5(c.t5, c.caption_length, d.device)
    write_cache(clips, c.out, vae, t5, d)
    # At one stride, clips of different frame rates move at different speeds.
    counts = Counter(sum(all_gather(frame_rates), []))  # of all processes
    for rate, count in sorted(counts.items()):
        print0(f"{count:6} videos read, of {rate:g} frames a second")


# ---------------------------------------------------------------------------------------------
# Helpers of all scripts: errors, random numbers, files, processes
#
# torchrun starts one process per GPU and tells each its rank. Without torchrun there is no process
# group, and the collectives below do nothing.

RANK = int(os.environ.get("RANK", 0))
# The device of this process, its rank, and the number of processes
Distributed = namedtuple("Distributed", "device rank world_size", defaults=("cpu", 0, 1))
patient_group = None  # of all processes, for waits of hours


class UserError(Exception):
    """An error the user can correct: what was found, what was expected and what to do."""


def require(ok, message):
    if not ok:
        raise UserError(message)


def require_range(config, low, high, *names):
    """UserError unless these options are None or from low to high (a NaN is not)."""
    for name in names:
        value = getattr(config, name)
        require(value is None or low <= value <= high, f"{name}={value}: expected {low} to {high}")


def require_folder(path):
    """UserError if a file is in the place of a folder to write, or of one above it."""
    for p in (Path(path), *Path(path).parents):
        require(not p.is_file(), f"--out {path}: {p} is a file, expected a folder")


def run_command(main):
    """Run a script's main(); a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        rank = os.environ.get("LOCAL_RANK", "0")
        if rank == "0" or dist.is_initialized():  # else all ranks have the same error
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():  # skipped after an error, because it could hang
        dist.destroy_process_group()


def keyed_generator(*key):
    """A torch.Generator seeded by a key: the seed, the purpose of the draw, and what identifies it
    (index of a sample, row of a clip, prompt). So a draw depends neither on the rank nor on the
    place in a batch, and a resumed run repeats it without a stored state.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # below 2^63


def atomic_write(path, write):
    """Call write(temporary path), then rename, so that `path` is never half-written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{RANK}.{os.getpid()}.{path.name}")
    write(tmp)
    os.replace(tmp, path)


def write_json(path, content):
    atomic_write(path, lambda tmp: tmp.write_text(json.dumps(content, indent=1) + "\n"))


def progress(items, label):
    """Iterate with a progress bar on rank 0; without a terminal it moves every 15 seconds."""
    seconds = 0.1 if sys.stderr.isatty() else 15
    return tqdm(items, label, leave=False, delay=seconds, mininterval=seconds, disable=RANK > 0)


def print0(text):
    """Print on rank 0, above a progress bar."""
    # Ctrl-C also ends `tee`, and may interrupt another print; the run must still be saved.
    with suppress(BrokenPipeError, RuntimeError):
        if RANK == 0:
            tqdm.write(text)
            sys.stdout.flush()


def init_distributed(device="auto"):
    """Join the process group of torchrun, if any, and choose the device: CUDA, MPS or CPU."""
    global patient_group
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        mps = torch.backends.mps.is_available() and world_size == 1  # MPS is a single device
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda":
        gpus, needed = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0)) + 1
        require(gpus >= needed, f"--device cuda: found {gpus} GPUs, expected {needed}")
    require(device != "mps" or torch.backends.mps.is_available(), "--device mps: found no such GPU")
    if world_size == 1:
        return Distributed(device)
    backend, device_id = "gloo", None
    if device == "cuda":
        device, backend = f"cuda:{os.environ['LOCAL_RANK']}", "cpu:gloo,cuda:nccl"
        device_id = torch.device(device)
        torch.cuda.set_device(device_id)
    dist.init_process_group(backend, device_id=device_id)
    patient_group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
    return Distributed(device, dist.get_rank(), world_size)


def all_reduce_sum(tensor):
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather(value):
    """The values of all processes in the order of ranks. It waits for hours if one is late."""
    if patient_group is None:
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=patient_group)
    return values


def barrier():
    """Wait until all processes are here."""
    all_gather(None)


if __name__ == "__main__":
    run_command(main)
