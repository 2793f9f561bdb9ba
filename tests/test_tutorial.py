"""The documents agree with the code: blocks run and give the numbers of the text; names, options,
links, line counts and commands are right; the exercises have solutions.

    python tests/test_tutorial.py      # writes line numbers, line counts and the notebook
"""

import importlib
import json
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from conftest import ROOT

import data
import sample
import train

sys.path.insert(0, str(ROOT / "tools"))
import make_notebook  # noqa: E402

TUTORIAL = (ROOT / "tutorial.md").read_text()
DOCUMENTS = ("README.md", "tutorial.md", "benchmarks/README.md", "assets/claims.md")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[`?([^\]`]*)`?\]\(([^)#\s]+)(?:#L(\d+))?\)")
COUNTED = re.compile(r"^\| \[[^\]]+\]\(([^)]+)\) \| (\d+) \|", re.MULTILINE)
UPDATE = "run python tests/test_tutorial.py"


NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def test_blocks_of_the_tutorial_print_what_stands_below_them(monkeypatch, tmp_path):
    """Pasted line by line into a console. Numbers may differ by 3% and a unit of the last digit."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)  # for the files they write
    found = make_notebook.run_blocks(TUTORIAL)
    expected = [block[2] for block in make_notebook.BLOCK.finditer(TUTORIAL)]
    assert len(found) == len(expected) > 12
    for a, b in zip(found, expected):
        assert NUMBER.sub("#", a) == NUMBER.sub("#", b), f"printed:\n{a}\nin tutorial.md:\n{b}"
        for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)):
            unit = 10.0 ** -len(y.partition(".")[2])
            assert abs(float(x) - float(y)) <= 0.03 * abs(float(y)) + 1.01 * unit, f"{x} in:\n{a}"


def test_the_notebook_is_that_of_the_tutorial():
    stored = json.loads((ROOT / "assets/tutorial.ipynb").read_text())
    assert stored == make_notebook.notebook(TUTORIAL), UPDATE


def test_numbers_in_the_prose_of_the_tutorial():
    text = " ".join(TUTORIAL.split())
    assert "507 are distinct" in text and torch.arange(1000).bfloat16().unique().numel() == 507
    assert "= 1/157" in text and round(1 / sample.TRAIN_SCHEDULE.alpha[999].item()) == 157
    u = torch.arange(1, 1000) / 1000  # the density of 1000 sigmoid(0.4 + n)
    density = (-0.5 * (torch.logit(u) - 0.4) ** 2).exp() / (u * (1 - u))
    assert "densest at 682" in text and density.argmax() + 1 == 682
    assert "are 3.2 GB" in text and round(28 * (4 + 2) * 32768 * 1152 / 2 / 1e9, 1) == 3.2
    for frames, patches in ("10.0", 256), ("3.3", 1024):  # where full attention costs the same
        assert f"{frames} " in text and f"{(patches + 2 * 1152) / (patches - 1):.1f}" == frames
    assert "= 90%" in text and round(100 * 0.9999**1000) == 90
    assert "98.5%" in text and round(100 * 64 / 65, 1) == 98.5
    snr = (sample.TRAIN_SCHEDULE.alpha[100] / sample.TRAIN_SCHEDULE.sigma[100]) ** 2
    assert "0.0059 at t = 100" in text and round(train.TOY.min_snr / snr.item(), 4) == 0.0059
    for factor, inputs in ("1.28", 4096), ("0.68", 1152), ("0.16", 64), ("0.23", 128):
        assert factor in text and f"{0.02 * inputs**0.5:.2f}" == factor


def line_of(name, file):
    """The line where a script defines a name, or None."""
    pattern = rf"^\s*(?:def|class) {re.escape(name)}\b|^{re.escape(name)}\b.* = "
    lines = enumerate((ROOT / file).read_text().splitlines(), 1)
    return next((i for i, line in lines if re.match(pattern, line)), None)


def test_line_counts_of_the_readme():
    counts = dict(COUNTED.findall((ROOT / "README.md").read_text()))
    assert set(counts) == {"stdit.py", "sample.py", "data.py", "train.py"}
    for file, stated in counts.items():
        found = len((ROOT / file).read_text().splitlines())
        assert int(stated) == found, f"README.md: {file} has {found} lines, not {stated}: {UPDATE}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_what_they_name(document):
    for name, target, line in LINK.findall((ROOT / document).read_text()):
        path = (ROOT / document).parent / target
        assert "://" in target or path.exists(), f"{document} links to {target}: it does not exist"
        limit = 1024 * {".png": 200, ".gif": 1024}.get(path.suffix, math.inf)
        assert "://" in target or path.stat().st_size <= limit, f"{target} is larger than {limit}"
        if line:
            found = line_of(name, target)
            assert int(line) == found, f"{document}: {name} is in line {found}: {UPDATE}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tables_have_one_header_and_rows_of_its_width(document):
    """A blank line inside a table would turn the rows after it into plain text."""
    text = (ROOT / document).read_text()
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, line, *rows = table.splitlines()
        assert re.fullmatch(r"\|(-+\|)+", line), f"{document}: no header above {header}"
        for row in rows:
            assert row.count("|") == header.count("|"), f"{document}: {row}"


TORCHRUN = ("help", "shutdown-timeout", "nnodes", "nproc-per-node", "rdzv-id")
TORCHRUN += ("rdzv-backend", "rdzv-endpoint")


def has_option(option, source):
    """Whether it is torchrun's, a field or parameter for tyro, or an argument for argparse."""
    field = rf"\b{option.replace('-', '_')}: (?:str|int|float|bool|tuple|Literal|Path|tyro)"
    argument = rf"[\"']--{option}[\"']"
    return re.search(f"{field}|{argument}", source) or option in TORCHRUN


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_in_the_text_exist(document):
    """Whatever is between backticks and looks like an option, a file, a function or a field."""
    text = (ROOT / document).read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    scripts = [p for d in (".", "tests", "tools", "benchmarks") for p in (ROOT / d).glob("*.py")]
    scripts += (ROOT / "tests/exercises").glob("*.patch")
    source = "\n".join([*BLOCK.findall(text), *(p.read_text() for p in scripts)])
    for quoted in set(re.findall(r"`([^`\n]+)`", prose)):
        for option in re.findall(r"(?<!\S)--([a-zA-Z][\w-]*)", quoted):
            assert has_option(option, source), f"{document}: nothing has an option --{option}"
        if re.fullmatch(r"[A-Za-z_][\w./]*\.(py|md|json|csv|png|gif|txt|jsonl|patch)", quoted):
            made = Path(quoted).name in source  # by a run, if it is not in the project
            assert (ROOT / quoted).exists() or made, f"{document}: there is no {quoted}"
        elif re.fullmatch(r"[A-Za-z_]\w*(_\w+)+|[a-z_]+\.[a-z_]+", quoted):
            defined = re.search(rf"\b{re.escape(quoted.split('.')[-1])}\b", source)
            assert defined, f"{document}: nothing is called {quoted}"


def test_commands_of_the_documents_parse(monkeypatch, tmp_path):
    """The options of every command, by the scripts' own parsers or as names in their source."""
    monkeypatch.chdir(tmp_path)  # a folder without runs that would need --resume
    configs = {"sample.py": sample.SampleConfig, "data.py": data.CacheConfig}
    text = "\n".join((ROOT / document).read_text() for document in DOCUMENTS)
    lines = "\n".join(SHELL.findall(text)).replace("\\\n", " ").splitlines()
    commands = [found[0] for line in lines if (found := re.findall(r"(\S+\.py)(.*)", line))]
    for script, args in commands:
        args, source = shlex.split(args, comments=True), (ROOT / script).read_text()
        for option in (arg[2:] for arg in args if arg.startswith("--")):
            assert has_option(option, source), f"{script} has no option --{option}"
        if script == "train.py":
            train.parse_command_line(args)
        elif script in configs:
            tyro.cli(configs[script], args=args)
    assert len(commands) >= 13


def copy_project(folder):
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for name in ("assets", "tests", "tools"):
        shutil.copytree(ROOT / name, folder / name)


@pytest.mark.slow
def test_shell_blocks_of_the_tutorial_run_in_order(tmp_path, monkeypatch):
    """With fewer and shorter steps. 4 minutes."""
    few = "--steps 4 --toy-clips 84 --warmup 1 --num-samples 1 --sample-steps 2"
    copy_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    make_notebook.run_blocks(TUTORIAL)  # one of them writes clips
    for block in SHELL.findall(TUTORIAL):
        for line in block.splitlines():
            more = {"train.py": few, "sample.py": "--steps 2"}.get(line.split()[1], "")
            command = [sys.executable, *shlex.split(f"{line} {more}")[1:]]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}{done.stderr[-1000:]}"
    assert Path("samples/sheet.png").exists()


def exercise(name, folder, monkeypatch, cell=""):
    """The test of an exercise in tests/exercises.py, with the scripts of a folder, after the code
    of a notebook's cell has replaced some of it.
    """
    for module in ("stdit", "data", "sample", "train"):
        monkeypatch.delitem(sys.modules, module, raising=False)  # to be imported from there
    monkeypatch.syspath_prepend(folder)
    if cell:
        magic, code = cell.split("\n", 1)
        exec(code, vars(importlib.import_module(magic.split()[1])))
    return runpy.run_path(folder / "tests/exercises.py")[f"test_{name}"]


@pytest.mark.skipif(not shutil.which("git"), reason="git applies the patches")
@pytest.mark.parametrize("name", ["causal", "flow", "qk_norm", "first_frame"])
def test_exercises_fail_before_and_pass_with_their_solution(name, tmp_path, monkeypatch):
    """Expected to fail after you did an exercise: the patches change the original code."""
    copy_project(tmp_path)
    (patch,) = (tmp_path / "tests/exercises").glob(f"?_{name}.patch")
    stub = make_notebook.exercise_cell(name)
    with pytest.raises((AssertionError, TypeError)):  # TypeError: no keyword `first`
        exercise(name, tmp_path, monkeypatch, stub)()
    command = ["git", "apply", "--unsafe-paths", str(patch)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"{patch.name} does not apply: {done.stderr}"
    exercise(name, tmp_path, monkeypatch)()
    monkeypatch.setattr(make_notebook, "ROOT", tmp_path)
    solved = make_notebook.exercise_cell(name)  # the notebook's cell has all that was to be changed
    exercise(name, ROOT, monkeypatch, solved)()


def update():
    """Writes the current line numbers into links, line counts into the README, and the notebook."""
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for name, target, _ in (link for link in LINK.findall(text) if link[2]):
            link = f"[`{name}`]({target}#L"
            text = re.sub(rf"{re.escape(link)}\d+", f"{link}{line_of(name, target)}", text)
        for file, count in COUNTED.findall(text):
            found = len((ROOT / file).read_text().splitlines())
            text = text.replace(f"]({file}) | {count} |", f"]({file}) | {found} |")
        (ROOT / document).write_text(text)
    make_notebook.write_notebook((ROOT / "tutorial.md").read_text())


if __name__ == "__main__":
    update()
