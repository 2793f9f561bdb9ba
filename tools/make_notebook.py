"""Run the Python blocks of tutorial.md, write below each what it prints, and write the notebook.

    python tools/make_notebook.py        # about a minute; also writes small videos to out/clips

Blocks are fed line by line to Python's interactive console, as if they were pasted. The notebook,
assets/tutorial.ipynb, has the same text, code and outputs.
"""

import code
import contextlib
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
    """Run all blocks in one session -> what each prints. Any error ends it with a SystemExit."""
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
    """The tutorial with these outputs."""
    outputs = iter(outputs)
    return BLOCK.sub(lambda b: f"```python\n{b[1]}```\n\n```text\n{next(outputs)}```\n", text)


def notebook(text):
    """The tutorial as a notebook in nbformat 4.4, a dict. It starts in the folder assets."""
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


def main():
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    path = Path("tutorial.md")
    text = with_outputs(path.read_text(), run_blocks(path.read_text()))
    path.write_text(text)
    Path("assets/tutorial.ipynb").write_text(json.dumps(notebook(text), indent=1) + "\n")


if __name__ == "__main__":
    main()
