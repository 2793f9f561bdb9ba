"""Show what training will see: a contact sheet and a GIF of the first clips of a SOURCE.

    python tools/show.py SOURCE --out DIR

A SOURCE is a folder of clips or a CSV, as for data.py, or a latent cache. Of clips, the frames as
read are above and the same after the VAE below; of a cache, the decoded latents.
"""

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import sample  # noqa: E402


@dataclass(frozen=True)
class ShowConfig:
    source: tyro.conf.Positional[str]  # folder of clips, CSV with the header path,text, or cache
    out: str  # folder to write show.png and show.gif to
    clips: int = 6  # number of clips
    frames: int = 8  # frames of a clip; this and the next four have no effect on a cache
    stride: int = 1  # source frames per frame
    size: int = 64  # height in pixels
    width: int = 0  # width in pixels; 0: the height
    seed: int = 0  # random seed of temporal crops and posterior samples, as in data.py
    vae: str = ""  # folder or Hub name of the VAE; default: that of the cache, or assets/vae
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else MPS, else CPU


def videos_of_cache(cache, vae):
    """Pairs of a decoded video, uint8 [T, 3, H, W], and its caption."""
    for (latents, _, _), caption in zip(cache, cache.captions):
        yield data.to_uint8(vae.decode(latents)), caption


def videos_of_clips(clips, vae):
    """Pairs of a video, uint8 [T, 3, 2H, W], read above decoded, and its caption."""
    for row, caption in enumerate(clips.captions):
        frames = clips[row]  # [T, 3, H, W], or None
        if frames is None:
            continue
        generator = data.keyed_generator(clips.settings["seed"], "posterior", row)
        decoded = data.to_uint8(vae.decode(vae.encode(frames, generator)))  # as in a cache
        yield torch.cat([frames, decoded], dim=-2), caption


def main():
    c = tyro.cli(ShowConfig, description=__doc__)
    device, width = data.init_distributed(c.device).device, c.width or c.size
    if (Path(c.source) / "index.json").is_file():
        cache = data.LatentCache(c.source)
        pairs = videos_of_cache(cache, data.VAE(c.vae or cache.encoders[0], device))
    else:
        clips = data.Clips(c.source, c.frames, c.stride, c.size, width, c.seed)
        vae = data.VAE(c.vae or "assets/vae", device)
        vae.check_size(c.frames, c.size, width)
        pairs = videos_of_clips(clips, vae)
    pairs = list(islice(pairs, c.clips))
    data.require(pairs, f"{c.source}: no clip is readable")
    videos, captions = zip(*pairs)
    sample.write_sheet(Path(c.out) / "show.png", videos, captions)
    sample.write_gif(Path(c.out) / "show.gif", torch.cat(videos, dim=-1), fps=8)
    print(f"{c.out}/show.png and show.gif: {len(videos)} clips")


if __name__ == "__main__":
    data.run_command(main)
