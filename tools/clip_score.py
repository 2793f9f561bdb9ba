"""How well videos match their captions, by CLIP: for real clips, which data.detect cannot judge.

    python tools/clip_score.py SOURCE

A SOURCE is a folder of clips with captions or a CSV with the header "path,text", as for data.py.
The score of a clip is 100 times the cosine of the embeddings of a frame and the caption, averaged
over 8 frames (CLIPSIM, arXiv 2104.14806); that of real clips is what generated ones can reach.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402


@dataclass(frozen=True)
class ClipScoreConfig:
    source: tyro.conf.Positional[str]  # folder of clips, or CSV with the header path,text
    clip: str = "openai/clip-vit-base-patch32"  # folder or Hub name of the CLIP model
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else MPS, else CPU


@torch.no_grad()
def clip_score(model, processor, path, caption):
    """The mean score of 8 evenly spaced frames of a clip."""
    frames = data.read_chosen(path, lambda n: [i * (n - 1) // 7 for i in range(8)])
    options = dict(return_tensors="pt", padding=True, truncation=True)
    inputs = processor(text=[caption], images=list(frames), **options).to(model.device)
    out = model(**inputs)  # embeddings: image [8, D] and text [1, D]
    return 100 * torch.cosine_similarity(out.image_embeds, out.text_embeds).mean().item()


def main():
    c = tyro.cli(ClipScoreConfig, description=__doc__)
    from transformers import CLIPModel, CLIPProcessor

    device = data.init_distributed(c.device).device
    model = data.load_frozen(CLIPModel.from_pretrained, c.clip, "CLIP").to(device).eval()
    processor = data.load_frozen(CLIPProcessor.from_pretrained, c.clip, "CLIP")
    scores = []
    for path, caption in data.list_clips(c.source):
        data.require(caption, f"{path} has no caption: write one, or run tools/caption.py")
        try:
            scores.append(clip_score(model, processor, path, caption))
        except data.UnreadableClip as error:
            print(f"warning: skipped {path}: {error}", file=sys.stderr, flush=True)
            continue
        print(f"{scores[-1]:.2f}  {path}", flush=True)
    data.require(scores, "no clip is readable, see the warnings")
    print(f"{sum(scores) / len(scores):.2f}  mean of {len(scores)} clips")


if __name__ == "__main__":
    data.run_command(main)
