"""Shared by all tests: the path to the scripts, a tiny data set, and a comparison that says
how far off it was.
"""

import os
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded, and nothing tries to

import data  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes; run them with: python -m pytest -m slow")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def assert_close(found, expected, atol, cause):
    """Equal up to atol, which has this cause; a failure prints the largest difference."""
    worst = (found - expected).abs().max().item()
    assert found.shape == expected.shape and worst <= atol, (
        f"differs by up to {worst:.3g}, allowed {atol:g} ({cause})"
    )


def randomize(model, seed=0):
    """Give every weight a random value, also those that start at zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter)
                * (0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
            )
    return model.eval()


def hand_attention(q, k, v, heads, mask=None):
    """softmax(q k^T / sqrt(d)) v, head by head; keys where mask [B, M] is false take no part.
    q [B, N, D], k and v [B, M, D] -> [B, N, D].
    """
    out = []
    for q, k, v in zip(*(z.chunk(heads, dim=-1) for z in (q, k, v))):
        scores = q @ k.mT / q.shape[-1] ** 0.5  # [B, N, M]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        out.append(scores.softmax(-1) @ v)
    return torch.cat(out, dim=-1)


def encode(path, frames, codec="libx264", pix_fmt="yuv420p", rate=24, times=None, container=None,
           **options):  # fmt: skip
    """Write uint8 [T, 3, H, W] as a video of any kind. times: of the frames, in milliseconds."""
    import av

    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width = frames.shape[-2:]
        stream.pix_fmt, stream.thread_count = pix_fmt, 1
        if times:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for i, image in enumerate(frames):
            image = image.permute(1, 2, 0).contiguous().numpy()  # [H, W, 3]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def broken_inside(path, frames, group=1):
    """Write a video of which one of four groups of pictures is damaged: a first look, which decodes
    the last, finds nothing if it is another.
    """
    encode(path, frames, g=len(frames) // 4, bf=0, container={"movflags": "faststart"},
           **{"x264-params": "scenecut=0:threads=1"})  # fmt: skip
    import av

    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    content = bytearray(path.read_bytes())
    for packet in packets[group * len(frames) // 4 : (group + 1) * len(frames) // 4]:
        content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(content)
    return path


@pytest.fixture(scope="session")
def encoders():
    """The toy's frozen VAE and T5, as shipped."""
    return data.VAE("assets/vae"), data.T5("assets/t5", 16)


@pytest.fixture(scope="session")
def toy(tmp_path_factory, encoders):
    """A folder with a toy of 24 training clips, and the caches of it."""
    folder = tmp_path_factory.mktemp("toy")
    data.make_toy(folder, clips=24)
    for split in ("train", "held_out"):
        data.write_cache(folder / f"{split}.csv", folder / f"cache_{split}", *encoders, 8, 1, 64)
    return folder


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """A LLaVA of random weights: two tiny layers each, its own tokenizer and image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig,
        LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast,
    )  # fmt: skip

    folder = tmp_path_factory.mktemp("llava")
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]
    words += data.QUESTION.split()
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", additional_special_tokens=["<image>"],
    )  # fmt: skip
    size = {"height": 28, "width": 28}
    template = (
        "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}ASSISTANT:{% endfor %}"
    )
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size)
    LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1,
                   chat_template=template).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                              num_attention_heads=2, image_size=28, patch_size=14)  # fmt: skip
    text = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                       num_attention_heads=2, num_key_value_heads=2, vocab_size=len(vocabulary),
                       max_position_embeddings=512)  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-1,
                         image_token_id=vocabulary["<image>"])  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.suppress_tokens = list(range(5))  # it answers with words alone
    model.save_pretrained(folder)
    return folder
