"""Caption clips that have no caption, with LLaVA, as Open-Sora v1 does: three frames, one prompt.

    python tools/caption.py SOURCE

A SOURCE is a folder of clips or a CSV with the header "path,text". A caption goes to a .txt file
next to its clip, or to the column text of the CSV, after every batch, so an interrupted run
continues where it stopped. The default model has 7 billion parameters: use a GPU.
"""

import csv
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402

PROMPT = (
    "These three images are frames of one video, in order. Describe the video in two to four "
    "sentences: who or what is seen and where, what moves and how, how the camera moves, and the "
    "style, such as drawing, movie or aerial view. Describe only what is visible. Do not mention "
    "images or frames."
)


@dataclass(frozen=True)
class CaptionConfig:
    source: tyro.conf.Positional[str]  # folder of clips, or CSV with the header path,text
    llava: str = "llava-hf/llava-1.5-7b-hf"  # folder or Hub name of LLaVA or a similar model
    prompt: str = PROMPT  # question about the three frames
    max_tokens: int = 200  # maximum length of a caption; an unfinished last sentence is removed
    batch_size: int = 8  # clips at a time
    overwrite: bool = False  # also replace existing captions
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else MPS, else CPU


def three_frames(path):
    """PIL images of a clip at 20%, 50% and 80% of its length; of an image, three times the same."""
    frames = data.read_chosen(path, lambda n: [int(part * (n - 1)) for part in (0.2, 0.5, 0.8)])
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]


def load_llava(source, device):
    """(model, processor); the model in bf16 on CUDA, else in fp32."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    load = AutoModelForImageTextToText.from_pretrained
    model = data.load_frozen(load, source, "LLaVA", dtype=data.default_dtype(device))
    processor = data.load_frozen(AutoProcessor.from_pretrained, source, "LLaVA")
    processor.tokenizer.padding_side = "left"  # the answers of a batch begin together
    return model.to(device), processor


def describe(model, processor, question, clips, max_tokens):
    """Captions for B clips, 3 PIL images each, by greedy decoding."""
    content = [{"type": "image"}] * 3 + [{"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    options = {"padding": True, "return_tensors": "pt"}
    inputs = processor(text=[prompt] * len(clips), images=clips, **options)
    inputs = inputs.to(model.device, model.dtype)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
    answers = ids[:, inputs["input_ids"].shape[1] :]  # without the prompt
    answers = processor.batch_decode(answers, skip_special_tokens=True)
    return [" ".join(re.sub(r"([.!?])[^.!?]*$", r"\1", text).split()) for text in answers]


def write_csv(path, table):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table[0].keys())
        writer.writeheader()
        writer.writerows(table)


def write_captions(config, device="cpu"):
    """Caption the clips of a folder or CSV. Returns the number of captions written."""
    c, source, rows, written = config, Path(config.source), data.list_clips(config.source), 0
    table = data.read_table(source) if source.is_file() else []  # in the order of rows
    todo = [row for row, (_, text) in enumerate(rows) if c.overwrite or not text]
    if todo:
        model, processor = load_llava(c.llava, device)
    batches = [todo[i : i + c.batch_size] for i in range(0, len(todo), c.batch_size)]
    for batch in data.progress(batches, f"captioning, {c.batch_size} clips at a time"):
        clips = {}  # row: its images
        for row in batch:
            try:
                clips[row] = three_frames(rows[row][0])
            except data.UnreadableClip as error:
                print(f"warning: skipped {rows[row][0]}: {error}", file=sys.stderr, flush=True)
        if not clips:
            continue
        captions = describe(model, processor, c.prompt, list(clips.values()), c.max_tokens)
        for row, text in zip(clips, captions):
            if source.is_file():
                table[row]["text"] = text
            else:
                path = rows[row][0].with_suffix(".txt")
                data.atomic_write(path, lambda tmp: tmp.write_text(text + "\n", "utf-8"))
        if source.is_file():
            data.atomic_write(source, lambda tmp: write_csv(tmp, table))
        written += len(clips)
    return written


def main():
    start, c = time.time(), tyro.cli(CaptionConfig, description=__doc__)
    written = write_captions(c, data.init_distributed(c.device).device)
    print(f"{c.source}: {written} captions written, {time.time() - start:.0f} s")


if __name__ == "__main__":
    data.run_command(main)
