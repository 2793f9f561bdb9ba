"""Runs the Python blocks of tutorial.md, writes below each what it prints, and writes the notebook.

    python tools/make_notebook.py                   # a minute or two; writes videos to out/clips
    python tools/make_notebook.py --keep-outputs    # after a change of the text alone: a second

Blocks are fed line by line to Python's interactive console, as if they were pasted. The notebook,
assets/tutorial.ipynb, has the same text, code and outputs, a first cell that finds the project, and
a cell for each exercise, with the functions to change. Outputs that change, as after training a new
toy model, are printed: the text next to them may state the same numbers.
"""

import argparse
import ast
import code
import contextlib
import difflib
import io
import json
import os
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A block, and what it prints, if that is there.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)

FIRST_CELL = """\
REPOSITORY = ""  # an address for git, or a folder; empty: this notebook lies in the project

import importlib.util, os, subprocess, sys

if not os.path.exists("stdit.py"):
    if REPOSITORY and not os.path.isdir(REPOSITORY):
        subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "stdit"], check=True)
        REPOSITORY = "stdit"
    os.chdir(REPOSITORY or "..")
needed = ("torch", "einops", "transformers", "diffusers", "av", "tyro", "pytest", "matplotlib")
if not all(importlib.util.find_spec(name) for name in needed):
    install = [sys.executable, "-m", "pip", "install", "-q", "-r", "requirements.txt"]
    subprocess.run(install, check=True)
sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
"""

EXERCISES = {  # name: the script, and what to change in it; what does not exist yet is left out
    "causal": ("stdit", "SelfAttention", "CausalBlock", "BLOCKS", "STDiT.initialize_weights"),
    "flow": ("sample", "tau", "q_sample", "predict_x0", "diffusion_loss", "flow_step", "SAMPLERS"),
    "qk_norm": ("stdit", "SelfAttention"),
    "first_frame": ("sample", "q_sample", "diffusion_loss", "sample_latents"),
}
EXERCISE_CELL = """\
import importlib, runpy
from IPython.core.magic import register_cell_magic

@register_cell_magic
def exercise(line, code):
    \"\"\"Runs a cell inside a script, in place of its own functions, and then a test.\"\"\"
    script, name = line.split()
    for module in ("stdit", "sample"):
        importlib.reload(importlib.import_module(module))  # without the other exercises
    exec(code, vars(importlib.import_module(script)))
    try:
        runpy.run_path("tests/exercises.py")[f"test_{name}"]()
        print(f"{name}: passed")
    except (AssertionError, TypeError) as error:
        print(f"{name}: not yet. {error}")
"""


def source_of(script, name):
    """Returns the source of a function, class, variable or method of a script, or None."""
    text = (ROOT / f"{script}.py").read_text()
    body, (outer, _, method) = ast.parse(text).body, name.partition(".")
    for node in body:
        names = [getattr(target, "id", "") for target in getattr(node, "targets", [])]
        if outer in [getattr(node, "name", ""), *names]:
            if method:
                node = next(part for part in node.body if getattr(part, "name", "") == method)
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            lines = text.splitlines()[first - 1 : node.end_lineno]
            source = textwrap.dedent("\n".join(lines)) + "\n"
            return source + (f"\n{name} = {method}\n" if method else "")


def exercise_cell(name):
    """Returns the code of an exercise's cell: the present code of what is to be changed."""
    script, *parts = EXERCISES[name]
    sources = [source for part in parts if (source := source_of(script, part))]
    head = f"%%exercise {script} {name}\n# From {script}.py. Change it until the test passes.\n\n"
    return head + "\n\n".join(sources)


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
    return BLOCK.sub(lambda b: f"```python\n{b[1]}```\n```text\n{next(outputs)}```\n", text)


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
    add_code(FIRST_CELL)
    for block in BLOCK.finditer(text):
        add("markdown", text[end : block.start()])
        add_code(block[1], block[2] or "")
        end = block.end()
    start = text.index("\n## 17.")
    add("markdown", text[end:start])
    for cell in (EXERCISE_CELL, *map(exercise_cell, EXERCISES)):
        add_code(cell)
    add("markdown", text[start:])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}


def write_notebook(text):
    path = ROOT / "assets/tutorial.ipynb"
    path.write_text(json.dumps(notebook(text), indent=1) + "\n")


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
    write_notebook(text)


if __name__ == "__main__":
    main()
