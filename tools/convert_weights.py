"""Convert released weights to the folder that sample.py --weights and train.py --init read.

    python tools/convert_weights.py SOURCE --out weights/NAME

A SOURCE is one of these (the null caption of diffusers' folders is T5 of the empty string):

    PixArt-alpha/PixArt-XL-2-512x512     PixArt-alpha on the Hub: before the first stage of training
    PixArt-alpha/PixArt-alpha/PixArt-XL-2-512x512.pth          a file on the Hub; the same weights
    hpcai-tech/Open-Sora/OpenSora-v1-HQ-16x256x256.pth         with --size 256 --space-scale 0.5
    maxin-cn/Latte-1                                           with --variant latte
    FOLDER                    a diffusers folder with transformer/, in one file or in shards
    FILE.pth, FILE.safetensors                                 in any of these namings

Conversion is strict: every tensor is used and none is missing. PixArt-alpha is an image model; its
new temporal weights are random, with an output projection of zero except in the variant latte.
"""

import json
import os
import pickle
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from data import UserError, require  # noqa: E402
from stdit import BLOCKS, MODELS, STDiT  # noqa: E402

# Our names are those of Open-Sora v1 and of PixArt-alpha's .pth. Below, ours -> the tensors of
# diffusers' PixArtTransformer2DModel or LatteTransformer3DModel whose rows make it; N is the block.
DIFFUSERS = {
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": ["adaln_single.emb.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["adaln_single.emb.timestep_embedder.linear_2"],
    "t_block.1": ["adaln_single.linear"],
    "y_embedder.y_proj.fc1": ["caption_projection.linear_1"],
    "y_embedder.y_proj.fc2": ["caption_projection.linear_2"],
    "y_embedder.y_embedding": ["caption_projection.y_embedding"],  # in early versions only
    "blocks.N.scale_shift_table": ["transformer_blocks.N.scale_shift_table"],
    "blocks.N.attn.qkv": [f"transformer_blocks.N.attn1.to_{part}" for part in "qkv"],
    "blocks.N.attn.proj": ["transformer_blocks.N.attn1.to_out.0"],
    "blocks.N.cross_attn.q_linear": ["transformer_blocks.N.attn2.to_q"],
    "blocks.N.cross_attn.kv_linear": [f"transformer_blocks.N.attn2.to_{part}" for part in "kv"],
    "blocks.N.cross_attn.proj": ["transformer_blocks.N.attn2.to_out.0"],
    "blocks.N.mlp.fc1": ["transformer_blocks.N.ff.net.0.proj"],
    "blocks.N.mlp.fc2": ["transformer_blocks.N.ff.net.2"],
    "blocks.N.scale_shift_table_temp": ["temporal_transformer_blocks.N.scale_shift_table"],
    "blocks.N.attn_temp.qkv": [f"temporal_transformer_blocks.N.attn1.to_{part}" for part in "qkv"],
    "blocks.N.attn_temp.proj": ["temporal_transformer_blocks.N.attn1.to_out.0"],
    "blocks.N.mlp_temp.fc1": ["temporal_transformer_blocks.N.ff.net.0.proj"],
    "blocks.N.mlp_temp.fc2": ["temporal_transformer_blocks.N.ff.net.2"],
    "final_layer.linear": ["proj_out"],
    "final_layer.scale_shift_table": ["scale_shift_table"],
}
RECOMPUTED = {"pos_embed", "pos_embed_temporal", "pos_embed.pos_embed", "temp_pos_embed"}


def diffusers_names(name):
    """For example "blocks.3.attn.proj.bias" -> ["transformer_blocks.3.attn1.to_out.0.bias"]."""
    stem, kind = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name).groups(default="")
    block = "".join(re.findall(r"^blocks\.(\d+)\.", stem))
    theirs = DIFFUSERS[re.sub(r"^blocks\.\d+\.", "blocks.N.", stem)]
    return [their.replace(".N.", f".{block}.") + kind for their in theirs]


def convert_state_dict(theirs, config, null_caption=None):
    """Tensors in any known naming -> the state dict of STDiT(config), in fp32.

    null_caption [L, E]: used if the source has none.
    """
    theirs = {name: tensor for name, tensor in theirs.items() if name not in RECOMPUTED}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = STDiT(config).state_dict()
    from_diffusers = any(name.startswith("adaln_single.") for name in theirs)
    sources = {name: diffusers_names(name) if from_diffusers else [name] for name in ours}
    if not any("temp" in name for name in theirs):  # an image model: temporal weights are new
        sources = {name: parts for name, parts in sources.items() if "_temp" not in name}
    if null_caption is not None:
        theirs = {sources["y_embedder.y_embedding"][0]: null_caption} | theirs

    expected = {part for parts in sources.values() for part in parts}
    missing, extra = expected - theirs.keys(), theirs.keys() - expected
    wanted = f"the weights of {config.variant} with {config.depth} blocks"
    found = ("lacks", missing), ("also has", extra)
    found = [f"{verb} {len(names)} tensors, e.g. {min(names)}" for verb, names in found if names]
    require(not found, f"expected {wanted}; the source {' and '.join(found)}")
    for name, parts in sources.items():
        tensors, (rows, *rest) = [theirs[part] for part in parts], ours[name].shape
        if name == "x_embedder.proj.weight" and tensors[0].ndim == 4:  # Conv2d of an image model
            tensors[0] = tensors[0].unsqueeze(2)
        for part, tensor in zip(parts, tensors):
            shape, needed = list(tensor.shape), [rows // len(parts), *rest]
            require(shape == needed, f"{part} has shape {shape}, {wanted} need {needed}")
        ours[name] = torch.cat(tensors).float()
    return ours


# ---------------------------------------------------------------------------------------------
# Reading the source

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = [
    "diffusion_pytorch_model-0*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
]
ENCODERS = ["vae/config.json", "text_encoder/config.json"]


def locate(source):
    """A path or Hub name -> local file or folder. Of a Hub repository only the transformer's
    weights are downloaded, and configs that show whether it also has the encoders.
    """
    if Path(source).exists():
        return Path(source)
    owner, name, file = (source.split("/", 2) + ["", ""])[:3]
    patterns = [f"transformer/{file}" for file in (WEIGHTS, *SHARDS)] + ENCODERS
    try:
        if file:
            return Path(hf_hub_download(f"{owner}/{name}", file))
        return Path(snapshot_download(f"{owner}/{name}", allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = f"could not be downloaded from the Hub ({type(error).__name__})"
        raise UserError(f"{source} is not a local path, and {reason}") from None


def read_source(path):
    """All tensors of a file or a diffusers folder, by name."""
    if path.is_file():
        return read_tensors(path)
    for folder in (path / "transformer", path):
        index, files = folder / SHARDS[1], {folder / WEIGHTS}
        if index.is_file():
            files = set(json.loads(index.read_text())["weight_map"].values())
            files = {folder / file for file in files}
        if all(file.is_file() for file in files):
            return {name: v for file in sorted(files) for name, v in read_tensors(file).items()}
    raise UserError(f"{path}: expected transformer/{WEIGHTS}, or all shards of its index.json")


def read_tensors(path):
    """The tensors of a .safetensors or .pth file. Code in a pickle is not run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for key in ("ema", "state_dict_ema", "state_dict", "model"):  # as training scripts nest
            content = content[key] if isinstance(content.get(key), dict) else content
        return {name: value for name, value in content.items() if torch.is_tensor(value)}
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not a state dict, or a pickle with code: not run") from None
    except (OSError, EOFError, RuntimeError, AttributeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path} cannot be read as weights: {reason}") from None


# ---------------------------------------------------------------------------------------------
# The command line


@dataclass(frozen=True)
class ConvertConfig:
    source: tyro.conf.Positional[str]  # file, folder, Hub name, or file on the Hub; see above
    out: str  # folder to write
    model: Literal[tuple(MODELS)] = "STDiT-XL/2"  # a name in stdit.MODELS
    variant: Literal[tuple(BLOCKS)] = "sequential"  # design of the block
    space_scale: float = 1.0  # position = index / scale; 0.5 at 256x256, 1 at 512x512 pixels
    time_scale: float = 1.0  # position = index / scale; 1 at frame stride 3, 1.5 at stride 2
    frames: int = 16  # frames of a video, here and below for sample.py
    size: int = 512  # height and width in pixels
    vae: str | None = None  # folder or Hub name of the VAE; None: the source, if it has one
    t5: str | None = None  # folder or Hub name of T5 encoder and tokenizer; None: likewise


def main():
    c = tyro.cli(ConvertConfig, description=__doc__)
    out, config = Path(c.out), MODELS[c.model]
    require(not out.exists(), f"{out} exists: delete it, or give another --out")
    path = locate(c.source)
    config = replace(config, variant=c.variant, space_scale=c.space_scale, time_scale=c.time_scale)
    has_encoders = all((path / file).is_file() for file in ENCODERS)
    encoders = c.source if has_encoders else "PixArt-alpha/PixArt-XL-2-512x512"
    sample = {"vae": c.vae or encoders, "t5": c.t5 or encoders, "frames": c.frames}
    sample |= {"size": c.size, "width": c.size, "output_fps": 8}
    sample |= {"guidance": 7.0, "guidance_min_t": 0}

    theirs, null_caption = read_source(path), None
    if not any(name.endswith(".y_embedding") for name in theirs):
        t5 = data.T5(sample["t5"], config.caption_length, data.init_distributed().device)
        y, mask = t5.encode([""])  # T5 of the empty string, one token, is repeated: attention to
        null_caption = y[0, mask[0]].expand(t5.length, -1).cpu()  # equal keys is attention to one
        print(f"null caption: {sample['t5']} of the empty string")
    with torch.device("meta"):
        model = STDiT(config)
    model.load_state_dict(convert_state_dict(theirs, config, null_caption), assign=True)

    tmp = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)  # left by an interrupted call
    model.save_pretrained(tmp)
    data.write_json(tmp / "sample.json", sample)
    os.replace(tmp, out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {config}")


if __name__ == "__main__":
    data.run_command(main)
