"""Runs the Python blocks of tutorial.md, writes below each what it prints, and writes the notebook.

    python tools/make_notebook.py                   # a minute or two; writes videos to out/clips
    python tools/make_notebook.py --keep-outputs    # after a change of the text alone: a second

Blocks are fed line by line to Python's interactive console, as if they were pasted. The notebook,
assets/tutorial.ipynb, has the same text, code and outputs. Outputs that change, as after training
a new toy model, are printed: the text next to them may state the same numbers.
"""

import argparse
import code
import contextlib
import difflib
import io
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A block, and what it prints, if that is there.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


def run_blocks(text):
    """Runs all blocks in one session. Returns what each prints; an error raises SystemExit."""
    console, outputs = code.InteractiveConsole({}), []
    for block in BLOCK.finditer(text):
        with (
            contextlib.redirect_stdout(io.StringIO()) as printed,
            contextlib.redirect_stderr(io.StringIO()) as errors,
        ):
            for line in [*block[1].splitlines(), ""]:
                console.push(line)
        line = text[: block.start()].count("\n") + 1
        if "Error" in errors.getvalue() or not printed.getvalue():
            raise SystemExit(f"tutorial.md, block in line {line}:\n{errors.getvalue()}")
        outputs.append(printed.getvalue())
    return outputs


def with_outputs(text, outputs):
    """Returns the tutorial with these outputs."""
    outputs = iter(outputs)
    return BLOCK.sub(lambda b: f"```python\n{b[1]}```\n\n```text\n{next(outputs)}```\n", text)


def notebook(text):
    """Returns the tutorial as a notebook in nbformat 4.4. It starts in the folder assets."""
    cells, end = [], 0

    def add(kind, source, **more):
        lines = source.strip("\n").splitlines(keepends=True)
        cells.append({"cell_type": kind, "metadata": {}, "source": lines} | more)

    def add_code(source, output=""):
        stream = {"output_type": "stream", "name": "stdout"}
        outputs = [stream | {"text": output.splitlines(keepends=True)}] if output else []
        add("code", source, execution_count=None, outputs=outputs)

    text = re.sub(r"\]\((?!http)", "](../", text)  # links, from the folder assets
    add_code("%cd -q ..")
    for block in BLOCK.finditer(text):
        add("markdown", text[end : block.start()])
        add_code(block[1], block[2] or "")
        end = block.end()
    add("markdown", text[end:])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}


def print_changes(old, new):
    """Prints the lines of outputs that differ, and the first line of their block."""
    for before, after in zip(BLOCK.finditer(old), BLOCK.finditer(new)):
        lines = ((block[2] or "").splitlines() for block in (before, after))
        changed = [line for line in difflib.ndiff(*lines) if line[0] in "-+"]
        if changed:
            line = new[: after.start()].count("\n") + 1
            print(f"tutorial.md, line {line}:", *changed, sep="\n    ")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    help = "do not run the blocks; write the notebook with the outputs that stand in the tutorial"
    parser.add_argument("--keep-outputs", action="store_true", help=help)
    keep_outputs = parser.parse_args().keep_outputs
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    path = Path("tutorial.md")
    text = path.read_text()
    if not keep_outputs:
        text = with_outputs(text, run_blocks(text))
        print_changes(path.read_text(), text)
        path.write_text(text)
    Path("assets/tutorial.ipynb").write_text(json.dumps(notebook(text), indent=1) + "\n")


if __name__ == "__main__":
    main()
