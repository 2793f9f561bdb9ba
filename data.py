"""From video files to tensors: clips, captions, frozen encoders, latent cache, and the toy data.

    python data.py SOURCE --out DIR       encode all clips and captions once, into a latent cache

A SOURCE is a folder of videos (with --frames 1 also images), each with its caption in a .txt of
the same name, or a CSV with the header "path,text" (paths relative to its folder). The frozen VAE
turns frames into latents and the frozen T5 turns captions into embeddings; neither is trained, so a
cache stores their outputs. diffusers and transformers are imported where they are used, since that
takes seconds. The first two sections are helpers shared by all scripts.

Shapes in this file:
    B batch    T frames    C latent channels (4)    L caption tokens    E caption channels
    H, W height and width in pixels; in the other files those of latents, an eighth of them
"""

import csv
import hashlib
import html
import json
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
import torch
import torch.distributed as dist
import tyro
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2 import functional as tv
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent

# ---------------------------------------------------------------------------------------------
# Errors, random numbers, files, progress


class UserError(Exception):
    """An error the user can correct: what was found, what was expected and what to do."""


def require(ok, message):
    if not ok:
        raise UserError(message)


def run_command(main):
    """Run a script's main(); a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or dist.is_initialized():  # before that all ranks fail alike: one prints
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():  # not after a failure, where it could hang
        dist.destroy_process_group()


def keyed_generator(*key):
    """A torch.Generator seeded by a key: the seed, the purpose of the draw, and what identifies it
    (position in the stream, row of a clip, epoch, prompt).

    So a draw does not depend on the rank or on the place in a batch, a resumed run repeats it, and
    checkpoints need no generator state.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # positive


def atomic_write(path, write):
    """Call write(temporary path), then rename: a file that exists under `path` is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{os.environ.get('RANK', 0)}.{path.name}")
    write(tmp)
    os.replace(tmp, path)


def write_json(path, content):
    atomic_write(path, lambda tmp: tmp.write_text(json.dumps(content, indent=1) + "\n"))


def progress(items, label):
    """Iterate with a progress bar on rank 0; without a terminal, a line every 15 seconds."""
    options = dict(desc=label, leave=False, disable=os.environ.get("RANK", "0") != "0")
    if sys.stderr.isatty():
        return tqdm(items, **options)
    line = "{desc}: {n_fmt} of {total_fmt}, {remaining} left\n"
    return tqdm(items, mininterval=15, delay=15, bar_format=line, **options)


# ---------------------------------------------------------------------------------------------
# Processes
#
# torchrun starts one process per GPU and tells each its rank. Without torchrun there is no process
# group, and the collectives below do nothing.


class Distributed(NamedTuple):
    """Device, ranks and groups of this process. sp consecutive ranks share each video (sequence
    parallelism); the dp_size = world_size / sp groups share the batch (data parallelism).
    """

    device: str
    rank: int = 0
    world_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    sp_group: dist.ProcessGroup | None = None


def init_distributed(device="auto", sp=1):
    """Join the process group of torchrun, if any, and choose the device: CUDA, MPS or CPU."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        mps = torch.backends.mps.is_available() and world_size == 1  # MPS is a single device
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    require(sp >= 1 and world_size % sp == 0, f"sp={sp} must divide the {world_size} process(es)")
    if int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) % sp:
        print0(f"warning: groups of sp={sp} processes span machines, whose links are slow")
    if world_size == 1:
        return Distributed(device)
    kind, backend = device, "gloo"
    if kind == "cuda":
        device, backend = f"cuda:{os.environ['LOCAL_RANK']}", "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    timeout = timedelta(hours=12)  # long, since ranks wait while rank 0 generates samples
    device_id = torch.device(device) if kind == "cuda" else None
    dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    sp_group = dist.new_subgroups(sp, timeout=timeout)[0] if sp > 1 else None
    rank = dist.get_rank()
    return Distributed(device, rank, world_size, rank // sp, world_size // sp, sp_group)


def print0(text):
    """Print on rank 0, above a progress bar."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(text)
        sys.stdout.flush()


def all_reduce_sum(tensor):
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def barrier():
    """Wait for all processes, on the CPU."""
    all_reduce_sum(torch.zeros(1))


# ---------------------------------------------------------------------------------------------
# Reading clips
#
# A training sample is T frames of a clip, `stride` source frames apart, from a random start (a
# temporal crop). Listing the packets of a file gives the presentation times of all frames without
# decoding any; decoding then starts at the keyframe before the first of them and stops at the last.
# v1 decoded the whole video. An image is a video of one frame.

NOT_CLIPS = {".txt", ".csv", ".json", ".md", ".srt", ".vtt", ".safetensors"}


class UnreadableClip(Exception):
    """A clip that cannot be used, and why. It is reported and skipped."""


def list_clips(source):
    """The list of (path, caption) of a folder or a CSV. A caption may be empty."""
    source, rows = Path(source), []
    require(source.exists(), f"{source} not found; give a folder of clips, or a CSV: path,text")
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
            if path.is_file() and path.suffix.lower() not in NOT_CLIPS and not hidden:
                text = path.with_suffix(".txt")
                rows.append((path, text.read_text("utf-8-sig", "replace") if text.exists() else ""))
    else:
        with open(source, newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.DictReader(file)
            if not {"path", "text"} <= set(reader.fieldnames or ()):
                raise UserError(f"{source} needs the header path,text; it has {reader.fieldnames}")
            for row in reader:
                if not row["path"] or None in row:
                    line = f"{source}, line {reader.line_num}"
                    raise UserError(f"{line}: no path, or a text with commas without quotes")
                rows.append((source.parent / row["path"], row["text"] or ""))
    require(rows, f"{source} lists no clips")
    return [(path, clean_caption(text)) for path, text in rows]


def clean_caption(text):
    """Lower case, without web addresses and HTML. v1 cleans its captions and prompts too."""
    text = re.sub(r"https?://\S+|www\.\S+|<[^>]*>", " ", html.unescape(text).lower())
    return " ".join(text.split())


def open_video(path):
    path = Path(path).absolute()  # FFmpeg would parse a relative path with a colon as a URL
    return av.open(str(path), metadata_errors="replace")


def video_stream(container):
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        raise UnreadableClip("no video stream that FFmpeg can decode")
    return stream


def frame_times(path):
    """Presentation times of all frames in order, in the stream's time base; decodes nothing."""
    with open_video(path) as container:
        packets = container.demux(video_stream(container))
        times = {p.pts for p in packets if p.size and not p.is_discard}
    if None in times:
        raise UnreadableClip("packets without presentation times; convert it, e.g. to MP4")
    return sorted(times)


def decode(path, times, transform=lambda frame: frame):
    """The frames at these presentation times: uint8 [T, 3, H, W], RGB, rotated according to the
    metadata. transform is applied to each frame [3, H, W] as soon as it is decoded, so that only
    one is in memory in full size.
    """
    found = {}
    for start in (times[0], None):  # seek; if it overshot (AVI), decode from the beginning
        with open_video(path) as container:
            stream = video_stream(container)
            stream.codec_context.thread_count = 1  # clips are read in parallel instead
            if start is not None:
                container.seek(start, stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts in times:
                    image = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                    found[frame.pts] = transform(torch.from_numpy(image.copy()).permute(2, 0, 1))
                if len(found) == len(times):
                    return torch.stack([found[t] for t in times])
    raise UnreadableClip(f"{len(found)} of {len(times)} frames could be decoded")


def read_frames(path, frames, stride=1, generator=None, transform=lambda frame: frame):
    """Read a temporal crop of a clip: uint8 [T, 3, H, W], T = `frames` frames, `stride` source
    frames apart. The generator draws the first one; without it, the crop is in the middle of the
    clip. UnreadableClip if the clip is too short or cannot be decoded.
    """
    try:
        times = frame_times(path)
        span = (frames - 1) * stride + 1
        starts = len(times) - span + 1
        if starts < 1:
            raise UnreadableClip(f"{len(times)} frames; {frames} at stride {stride} need {span}")
        start = int(torch.randint(starts, (1,), generator=generator)) if generator else starts // 2
        return decode(path, times[start : start + span : stride], transform)
    except (av.FFmpegError, OSError, IndexError) as error:  # IndexError: a damaged .ts in PyAV
        raise UnreadableClip(f"{type(error).__name__}: {error}") from None


def center_crop_and_resize(frames, height, width):
    """Crop the largest height : width rectangle from the center and resize it with antialiasing.
    frames uint8 [..., 3, H, W]; returns [..., 3, height, width].
    """
    H, W = frames.shape[-2:]
    scale = min(H / height, W / width)
    crop = [max(1, round(height * scale)), max(1, round(width * scale))]
    frames = tv.center_crop(frames, crop)
    return tv.resize(frames, [height, width], antialias=True)


class Clips:
    """Clips read from their files. clips[row] is uint8 [T, 3, size, width], or None and a warning
    if the clip is unreadable. The temporal crop is random, but the same at every reading: it is
    keyed on the seed and the row.
    """

    def __init__(self, source, frames, stride, size, width, seed):
        self.rows = list_clips(source)
        self.captions = [text for _, text in self.rows]
        listed = [(os.path.relpath(path, source), text) for path, text in self.rows]
        identity = hashlib.sha256(repr(listed).encode()).hexdigest()[:12]
        self.settings = dict(  # everything that determines the frames
            clips=identity, frames=frames, stride=stride, size=size, width=width, seed=seed
        )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        (path, text), s = self.rows[row], self.settings
        generator = keyed_generator(s["seed"], "crop", row)
        transform = partial(center_crop_and_resize, height=s["size"], width=s["width"])
        try:
            if not text:
                raise UnreadableClip("no caption: write one, or run tools/caption.py")
            return read_frames(path, s["frames"], s["stride"], generator, transform)
        except UnreadableClip as error:
            print(f"warning: skipped {path}: {error}", file=sys.stderr, flush=True)
            return None


# ---------------------------------------------------------------------------------------------
# Writing videos and images


def write_video(path, frames, fps):
    """Write frames, uint8 [T, 3, H, W], as an H.264 MP4."""

    def write(tmp):
        with av.open(str(tmp), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "16"})
            stream.height, stream.width = frames.shape[-2:]
            for image in frames.permute(0, 2, 3, 1).contiguous().numpy():  # [H, W, 3]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())

    atomic_write(path, write)


def to_image(frame, height=0):
    """The PIL image of a frame, uint8 [3, H, W]; a small one is enlarged to about `height`."""
    factor = max(1, round(height / frame.shape[-2]))
    image = Image.fromarray(frame.permute(1, 2, 0).numpy())
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def write_gif(path, video, fps):
    """Write a video, uint8 [T, 3, H, W], as a looping GIF; small ones are enlarged to about 256."""
    first, *rest = [to_image(frame, 256) for frame in video]
    options = {"save_all": True, "append_images": rest, "duration": round(1000 / fps), "loop": 0}
    atomic_write(path, lambda tmp: first.save(tmp, format="GIF", **options))


def write_sheet(path, videos, captions):
    """Write a PNG with a row per video, uint8 [T, 3, H, W]: its caption above up to 8 frames."""
    T = len(videos[0])
    shown = torch.linspace(0, T - 1, min(T, 8)).round().long()
    rows = [[to_image(frame, 128) for frame in video[shown]] for video in videos]
    width, height = rows[0][0].width + 4, rows[0][0].height + 24
    sheet = Image.new("RGB", (len(shown) * width + 4, len(rows) * height + 4), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for r, (images, caption) in enumerate(zip(rows, captions)):
        draw.text((6, r * height + 4), caption, fill="black", font=font)
        for k, image in enumerate(images):
            sheet.paste(image, (4 + k * width, 24 + r * height))
    atomic_write(path, lambda tmp: sheet.save(tmp, format="PNG"))


# ---------------------------------------------------------------------------------------------
# Frozen encoders
#
# v1 uses an image VAE (Stability's: factor 8, 4 channels), frame by frame, as no good video VAE was
# available, and T5-XXL, with which PixArt-alpha was trained. Both are loaded from a local folder or
# the Hub. One source may hold both: PixArt-alpha's has vae/, text_encoder/ and tokenizer/.


def load_frozen(load, source, part, **options):
    """Call load, some from_pretrained, on the subfolder `part` of a source, or on the source
    itself.
    """
    # "assets/vae" works from any folder
    path = next((p for p in (Path(source), ROOT / source) if p.is_dir()), source)
    reasons = []
    for subfolder in (part, ""):
        try:
            return load(str(path), subfolder=subfolder, **options)
        except (OSError, ValueError, SafetensorError) as error:
            reasons.append(str(error).strip().split("\n")[0])
    raise UserError(f"{source} has no {part} that can be loaded: {'; '.join(reasons)}")


def default_dtype(device):
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


class VAE:
    """A frozen image VAE applied to videos, micro_batch frames at a time; bf16 on CUDA by default,
    else fp32.
    """

    def __init__(self, source, device="cpu", dtype=None, micro_batch=16):
        from diffusers import AutoencoderKL

        self.dtype = dtype or default_dtype(device)
        # low_cpu_mem_usage=True, the default, would need the package accelerate
        options = {"torch_dtype": self.dtype, "low_cpu_mem_usage": False}
        model = load_frozen(AutoencoderKL.from_pretrained, source, "vae", **options)
        model = model.to(device, memory_format=torch.channels_last)  # faster convolutions
        self.model = model.eval().requires_grad_(False)
        self.source, self.device, self.micro_batch = source, device, micro_batch
        self.scaling_factor = model.config.scaling_factor  # to a variance of about 1; 0.18215 in v1
        self.channels = model.config.latent_channels
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)  # pixels per latent: 8

    @torch.no_grad()
    def encode(self, video, generator=None):
        """Latents [C, T, H/8, W/8], fp32, of a video, uint8 [T, 3, H, W]: with a generator a sample
        of the VAE's posterior, as in v1; without, its mean.
        """
        means, stds = [], []
        for frames in video.split(self.micro_batch):
            frames = (frames.to(self.device).float() / 127.5 - 1).to(self.dtype)
            posterior = self.model.encode(frames).latent_dist
            means.append(posterior.mean.float())
            stds.append(posterior.std.float())
        latents = torch.cat(means).transpose(0, 1)  # [C, T, H/8, W/8]
        if generator is not None:
            std = torch.cat(stds).transpose(0, 1)
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
        pt, ph, pw = patch_size
        h, w = ph * self.factor, pw * self.factor
        if frames % pt or size % h or width % w:
            found = f"frames={frames} size={size} width={width}"
            raise UserError(f"{found}: expected multiples of {pt}, {h}, {w}")


def to_uint8(video):
    """Convert a video in [-1, 1] to uint8."""
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class T5:
    """A frozen T5 encoder with tokenizer; bf16 on CUDA, else fp32 (T5 overflows in fp16)."""

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
        """Embeddings [B, L, E] of B captions, fp32, 0 at padding, and mask [B, L], True at real
        tokens. L is self.length; longer captions are truncated.
        """
        options = {"max_length": self.length, "padding": "max_length", "truncation": True}
        batch = self.tokenizer(list(captions), return_tensors="pt", **options).to(self.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]  # [B, L] each
        y = [self.model(*part).last_hidden_state for part in zip(ids.split(32), mask.split(32))]
        return torch.cat(y).float() * mask[..., None], mask.bool()  # [B, L, E], [B, L]


def fingerprint(vae, t5):
    """12 hex digits that identify the encoders' weights: a hash of the first value of each tensor,
    in bf16, so that it is the same for weights loaded in fp32 and in bf16.
    """
    parameters = (*vae.model.parameters(), *t5.model.parameters())
    values = [p.flatten()[0].bfloat16().item() for p in parameters]
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------
# The latent cache
#
# The encoders cost more than a training step of a small model. So they run once, and training
# reads their outputs in every epoch: for each clip one safetensors file with the latents of one
# temporal crop, sampled from the VAE's posterior, and the T5 embeddings without padding, in fp16,
# which is enough for outputs (only activations inside T5 overflow). 64x512x512 pixels take 2.1 MB,
# 120 tokens of T5-XXL 0.98 MB. index.json is written last: a cache that has it is complete. The
# crop is the same in all epochs, so cut long videos into clips first; and write captions first,
# since a cache belongs to one list of clips and captions.


def write_cache(clips, out, vae, t5, distributed=Distributed("cpu")):
    """Encode Clips (or Toy) into the folder `out` and return its LatentCache. Existing files are
    kept, so a call after an interruption continues; each process encodes every world_size-th clip.
    """
    out, rank, world_size = Path(out), distributed.rank, distributed.world_size
    files = [out / f"{row:06d}.safetensors" for row in range(len(clips))]
    settings = clips.settings | dict(
        encoder_hash=fingerprint(vae, t5), caption_length=t5.length, caption_channels=t5.channels
    )
    if (out / "settings.json").exists():
        found = json.loads((out / "settings.json").read_text())
        if found != settings:
            changed = ", ".join(k for k in settings if found.get(k) != settings[k])
            raise UserError(f"{out} was made with other {changed}: delete it or change --out")
    elif rank == 0:
        write_json(out / "settings.json", settings)

    rows = [row for row in range(len(clips))[rank::world_size] if not files[row].exists()]
    with ThreadPoolExecutor() as pool:  # FFmpeg releases the GIL
        for i in progress(range(0, len(rows), 16), f"encoding {out}, 16 clips at a time"):
            part = rows[i : i + 16]
            for row, frames in zip(part, pool.map(clips.__getitem__, part)):
                if frames is None:
                    continue
                generator = keyed_generator(settings["seed"], "posterior", row)
                latents = vae.encode(frames, generator)  # [C, T, H/8, W/8]
                y, mask = t5.encode([clips.captions[row]])  # [1, L, E], [1, L]
                tensors = {"latents": latents, "y": y[0, mask[0]]}  # y [tokens, E]
                tensors = {k: v.half().cpu().contiguous() for k, v in tensors.items()}
                atomic_write(files[row], partial(save_file, tensors))
    barrier()
    if rank == 0:
        made = [(row, clips.captions[row]) for row, file in enumerate(files) if file.exists()]
        print0(f"{out}: {len(made)} of {len(clips)} clips")
        require(made, "no clip is readable, see the warnings")
        index = {"settings": settings, "encoders": [vae.source, t5.source], "clips": made}
        write_json(out / "index.json", index)
    barrier()
    return LatentCache(out)


class LatentCache:
    """The clips of a cache, a map-style data set. cache[i] is (latents [C, T, H/8, W/8], y [L, E],
    mask [L]).
    """

    def __init__(self, folder):
        index = json.loads((Path(folder) / "index.json").read_text())
        self.settings, self.encoders = index["settings"], index["encoders"]
        self.files = [Path(folder) / f"{row:06d}.safetensors" for row, _ in index["clips"]]
        self.captions = [caption for _, caption in index["clips"]]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        tensors, length = load_file(self.files[i]), self.settings["caption_length"]
        y = tensors["y"].float()  # [tokens, E]
        mask = torch.arange(length) < len(y)
        y = torch.nn.functional.pad(y, (0, 0, 0, length - len(y)))  # [L, E]
        return tensors["latents"].float(), y, mask


# ---------------------------------------------------------------------------------------------
# The toy data: moving shapes with captions, and a detector
#
# One colored shape moves over a plain background; three words of the caption name color, shape and
# direction. The detector recovers these words from the pixels; it measures whether a generated
# video matches its caption. Six triples of words are never in the training set, although every pair
# of words is: to generate them, a model must have learned the words separately.

COLORS = {
    "red": (225, 50, 50),
    "green": (50, 190, 80),
    "blue": (70, 110, 250),
    "yellow": (245, 220, 60),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y is down
BACKGROUND = (28, 28, 36)
INNER = math.sqrt(math.pi / (3 * math.sqrt(3)))  # inscribed radius of a triangle of area pi
TRIPLES = [(c, s, d) for c in COLORS for s in SHAPES for d in DIRECTIONS]
# No two share a pair of words, so each pair occurs in training with another third word.
UNSEEN = [
    ("red", "circle", "left"),
    ("red", "triangle", "up"),
    ("green", "square", "right"),
    ("blue", "circle", "down"),
    ("blue", "triangle", "left"),
    ("yellow", "square", "up"),
]
SEEN = [triple for triple in TRIPLES if triple not in UNSEEN]


def caption_of(triple):
    """The caption of a triple of words, such as "a red circle moving left"."""
    return "a {} {} moving {}".format(*triple)


def coverage(shape, center, radius, size):
    """Fraction of each pixel that a shape covers: float [T, size, size], antialiased.

    center [T, 2] in pixels (x, y). All shapes of one radius have the area of a circle of that
    radius, so area does not reveal the shape.
    """
    pixel = torch.arange(size) + 0.5
    x = pixel[None, None, :] - center[:, 0, None, None]  # [T, 1, W]
    y = pixel[None, :, None] - center[:, 1, None, None]  # [T, H, 1]
    if shape == "circle":
        distance = (x**2 + y**2).sqrt() - radius
    elif shape == "square":
        distance = torch.maximum(x.abs(), y.abs()) - radius * math.sqrt(math.pi) / 2
    else:  # an equilateral triangle, point up, whose inscribed circle has this radius:
        inner = radius * INNER
        distance = torch.maximum(y, (math.sqrt(3) * x.abs() - y) / 2) - inner
    return (0.5 - distance).clamp(0, 1)


def draw_clip(triple, generator, frames=8, size=64):
    """Draw a (color, shape, direction) of random size, position and speed: uint8 [T, 3, H, W].

    The shape moves by 28 to 38% of the frame and ends near the edge it moves to, so the direction
    word alone already predicts where it is. With uniform positions a model would need direction and
    frame number together, and learn much more slowly.
    """
    color, shape, direction = triple
    size_u, speed_u, *start_u = torch.rand(4, generator=generator)
    radius = size * (0.125 + 0.045 * size_u)
    heading = torch.tensor(DIRECTIONS[direction])  # [2]  x, y
    travel = heading * size * (0.28 + 0.10 * speed_u)  # [2]  from the first frame to the last
    reach = 2 * INNER * radius  # no shape extends further from its center
    # [2]  the range of first centers for which the shape never leaves the frame
    low, high = reach - travel.clamp(max=0), size - reach - travel.clamp(min=0)
    # u: uniform in the coordinate across the motion; along it, in the 30% of the range at the end
    u = torch.stack(start_u)
    u = torch.where(heading == 0, u, torch.where(heading < 0, 0.3 * u, 1 - 0.3 * u))
    center = low + (high - low) * u + travel * torch.linspace(0, 1, frames)[:, None]  # [T, 2]
    cover = coverage(shape, center, radius, size)[:, None]  # [T, 1, H, W]
    background = torch.tensor(BACKGROUND).view(3, 1, 1)
    foreground = torch.tensor(COLORS[color]).view(3, 1, 1)
    return (background + cover * (foreground - background)).round().to(torch.uint8)


def cover_of(video, color):
    """How much of each pixel a color covers, [T, H, W] in [0, 1]. video [T, 3, H, W], 0 to 255."""
    background = torch.tensor(BACKGROUND).view(3, 1, 1)
    value = torch.tensor(COLORS[color]).view(3, 1, 1) - background
    cover = ((video.float() - background) * value).sum(1) / value.square().sum()
    return torch.where(cover > 0.15, cover.clamp(max=1), 0)


def fit_shapes(cover):
    """Compare the cover [T, H, W] of each frame with every shape, drawn at its center of mass and
    with its area. Returns intersection over union [shapes, T], centers [T, 2], areas [T].
    """
    size = cover.shape[-1]
    pixel, area = torch.arange(size) + 0.5, cover.sum((1, 2)).clamp(min=1e-6)
    center = torch.stack([(cover.sum(1) * pixel).sum(1), (cover.sum(2) * pixel).sum(1)], 1)
    center, radius = center / area[:, None], (area / math.pi).sqrt()[:, None, None]
    ideals = torch.stack([coverage(shape, center, radius, size) for shape in SHAPES])
    iou = torch.minimum(ideals, cover).sum((2, 3)) / torch.maximum(ideals, cover).sum((2, 3))
    return iou, center, area


def detect(video):
    """The triple that a toy clip shows, or None. video [T, 3, H, W], uint8 or float in [0, 255].

    The color is that of the pixels farthest from the background color, the shape the one with the
    highest overlap, averaged over frames; the direction comes from a line fitted to the centers.
    The thresholds were fixed on drawn clips and their VAE reconstructions.
    """
    T, _, _, size = video.shape
    offset = video.float() - torch.tensor(BACKGROUND).view(3, 1, 1)  # [T, 3, H, W]
    strength = offset.norm(dim=1)  # [T, H, W]
    strong = strength > 0.6 * strength.flatten().kthvalue(int(0.99 * strength.numel())).values
    if strength.median() > 40 or not 0.02 < strong.float().mean() < 0.3:
        return None  # no plain background, or nothing of a shape's size
    colors = torch.tensor(list(COLORS.values())) - torch.tensor(BACKGROUND)  # [4, 3]
    distance = (colors - offset.transpose(0, 1)[:, strong].mean(1)).norm(dim=1)  # [4]
    color = list(COLORS)[distance.argmin()]
    iou, center, area = fit_shapes(cover_of(video, color))
    iou, size_change = iou.mean(1), area / area.median()  # [shapes], [T]
    if distance.min() > 80 or iou.max() < 0.6 or size_change.min() < 0.5 or size_change.max() > 2:
        return None  # another color or shape, or one that does not keep its size

    time = torch.linspace(-0.5, 0.5, T)[:, None]
    velocity = (center * time).sum(0) / time.square().sum()  # [2]  least squares, pixels per clip
    residual = (center - center.mean(0) - time * velocity).norm(dim=1).mean()
    direction = max(DIRECTIONS, key=lambda d: velocity @ torch.tensor(DIRECTIONS[d]).float())
    across = (velocity * torch.tensor(DIRECTIONS[direction][::-1])).norm()  # the other coordinate
    if velocity.norm() < size / 8 or across > 0.4 * velocity.norm() or residual > size / 16:
        return None  # too slow, or not straight
    return color, SHAPES[iou.argmax()], direction


def crispness(video, triple):
    """How well single frames show a triple. Returns the fraction of frames with its shape, the mean
    intersection over union with it, and the flicker: the standard deviation of the color over
    frames, on a scale of 255.
    """
    cover, shape = cover_of(video, triple[0]), SHAPES.index(triple[1])
    iou, _, _ = fit_shapes(cover)
    inside = (cover > 0.75)[:, None]  # [T, 1, H, W]
    color = (video * inside).sum((2, 3)) / inside.sum((2, 3))  # [T, 3], NaN without such pixels
    right = (iou.argmax(0) == shape).float().mean()
    return right.item(), iou[shape].mean().item(), color.std(0).mean().item()


class Toy:
    """Toy clips with the interface of Clips. Split "train" has the 42 seen triples, split
    "validation" all 48.
    """

    def __init__(self, split, clips, frames=8, size=64):
        self.split, triples = split, SEEN if split == "train" else TRIPLES
        self.triples = [triples[i % len(triples)] for i in range(clips)]
        self.captions = [caption_of(triple) for triple in self.triples]
        # The same settings as those of Clips. After a change of draw_clip delete the toy's caches.
        identity = hashlib.sha256(repr((split, self.captions, COLORS)).encode()).hexdigest()[:12]
        self.settings = dict(clips=identity, frames=frames, stride=1, size=size, width=size, seed=0)

    def __len__(self):
        return len(self.triples)

    def __getitem__(self, row):
        generator, s = keyed_generator(0, "toy", self.split, row), self.settings
        return draw_clip(self.triples[row], generator, s["frames"], s["size"])


# ---------------------------------------------------------------------------------------------
# The command line


@dataclass(frozen=True)
class CacheConfig:
    source: tyro.conf.Positional[str]  # folder of clips, or CSV with the header path,text
    out: str  # folder to write; after an interruption, run the same command again
    frames: int = 8  # frames of a clip; 1 for images
    stride: int = 1  # source frames per frame; v1: 3, and 2 for 64 frames
    size: int = 64  # height in pixels
    width: int = 0  # width in pixels; 0: the height
    caption_length: int = 16  # maximum number of tokens; 120 for T5-XXL
    vae: str = "assets/vae"  # folder or Hub name of the VAE; default: the toy's
    t5: str = "assets/t5"  # folder or Hub name of T5 encoder and tokenizer; default: the toy's
    seed: int = 0  # random seed of temporal crops and posterior samples
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else MPS, else CPU


def main():
    start = time.time()
    c = tyro.cli(CacheConfig, description=__doc__.split("\n\nShapes")[0])
    d, width = init_distributed(c.device), c.width or c.size
    clips = Clips(c.source, c.frames, c.stride, c.size, width, c.seed)
    vae = VAE(c.vae, d.device)
    vae.check_size(c.frames, c.size, width)
    t5 = T5(c.t5, c.caption_length, d.device)
    write_cache(clips, c.out, vae, t5, d)
    print0(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    run_command(main)
