"""The tutorial holds what it says: its blocks run, its numbers are those of the session, its names,
links, figures and commands exist, its exercises can be solved.

    python tests/test_tutorial.py      # brings the line numbers of its links up to date
"""

import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import data
import sample
import train

TEXT = (ROOT / "tutorial.md").read_text()
SCRIPTS = ("stdit.py", "sample.py", "data.py", "train.py")
DOCUMENTS = ("README.md", "tutorial.md", "benchmarks/README.md")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
# 19.4<!--= 100 * left[1] -->, with an allowance 36.5<!--= psnr ±1 -->, a word: left<!--= way -->
STATED = re.compile(r"([-+\w.,]+)<!--=(.*?)(?:±(.*?))?-->", re.DOTALL)
LINK = re.compile(r"\[`?([^\]`]*)`?\]\(([^)#\s]+)(?:#L(\d+))?\)")
EXERCISES = {"causal": "1_causal", "flow": "2_flow", "qk_norm": "3_qk_norm",
             "first_frame": "4_first_frame"}  # fmt: skip


def test_blocks_run_in_order_and_give_the_numbers_of_the_text(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # what they write goes there
    parts = sorted([*BLOCK.finditer(TEXT), *STATED.finditer(TEXT)], key=lambda m: m.start())
    session, checked, blocks = {}, 0, 0
    for part in parts:
        line = TEXT[: part.start()].count("\n") + 1
        if part.re is BLOCK:  # errors show the tutorial's line
            exec(compile("\n" * line + part[1], "tutorial.md", "exec"), session)
            blocks += 1
            continue
        stated, expression, allowance = part.groups()
        with torch.no_grad():
            found = eval(" ".join(expression.split()), session)  # lines may break anywhere
        if isinstance(found, (str, type(None))):
            right = stated == str(found)
        else:  # to the last digit of what is stated
            number, decimals = stated.replace(",", ""), len(stated.partition(".")[2])
            allowed = float(allowance or 0) + 0.5001 * 10**-decimals
            right = math.isclose(float(found), float(number), rel_tol=0, abs_tol=allowed)
        assert right, f"tutorial.md, line {line}: it says {stated}, {expression.strip()} is {found}"
        checked += 1
    assert blocks >= 12 and checked >= 20


def line_of(name, file):
    """The line where a script defines a name."""
    pattern = rf"^\s*(?:def|class) {re.escape(name)}\b|^{re.escape(name)}\b.* = "
    for number, line in enumerate((ROOT / file).read_text().splitlines(), 1):
        if re.match(pattern, line):
            return number
    return None


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_what_they_name(document):
    for name, target, line in LINK.findall((ROOT / document).read_text()):
        if "://" in target:
            continue
        path = (ROOT / document).parent / target
        assert path.exists(), f"{document} links to {target}, which is not there"
        if path.suffix in (".png", ".gif"):
            limit = 200 if path.suffix == ".png" else 1024
            assert path.stat().st_size <= limit * 1024, f"{target} is larger than {limit} KB"
        if line:
            assert int(line) == line_of(name, target), (
                f"{name} is not in line {line} of {target}: run python tests/test_tutorial.py"
            )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_in_the_text_exist(document):
    """Whatever stands between backticks and looks like a file, a function, a field or an option."""
    text = (ROOT / document).read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    code = "\n".join(BLOCK.findall(text))
    scripts = (p for folder in (".", "tests", "assets", "benchmarks") for p in
               (ROOT / folder).glob("*.py") if p.name != Path(__file__).name)  # fmt: skip
    sources = code + "\n".join(p.read_text() for p in scripts)
    for quoted in set(re.findall(r"`([^`\n]+)`", prose)):
        for option in re.findall(r"(?<!\S)--([a-zA-Z][\w-]*)", quoted):
            name = option.replace("-", "_")
            known = rf"^    {name}: |[\"']--{option}[\"']"
            assert option in NOT_FIELDS or re.search(known, sources, re.MULTILINE), (
                f"{document}: nothing has an option --{option}"
            )
        if re.fullmatch(r"[A-Za-z_][\w./]*\.(py|md|json|csv|png|gif|txt|jsonl)", quoted):
            made = rf"{re.escape(Path(quoted).name)}"  # by a run, if it is not in the project
            assert (ROOT / quoted).exists() or re.search(made, sources), f"{document}: {quoted}?"
        elif re.fullmatch(r"[A-Za-z_]\w*(_\w+)+|[a-z_]+\.[a-z_]+", quoted):
            name = re.escape(quoted.split(".")[-1])
            assert quoted in NOT_OURS or re.search(rf"\b{name}\b", sources), (
                f"{document}: nothing is called {quoted}"
            )


def test_commands_of_the_documents_are_understood(monkeypatch):
    """Options and presets of every shell command on this project's scripts, parsed as they would
    be; they are run by the slow test below, or elsewhere.
    """
    parsers = {"train.py": train.parse_command_line, "sample.py": sample.parse_command_line,
               "data.py": data.parse_command_line}  # fmt: skip
    count = 0
    for document in DOCUMENTS:
        for block in SHELL.findall((ROOT / document).read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                script = next((w for w in words if w in parsers), None)
                if script:
                    monkeypatch.setattr(sys, "argv", words[words.index(script) :])
                    parsers[script]()
                    count += 1
    assert count >= 20


NOT_FIELDS = {"shutdown-timeout", "help"}  # of torchrun and argparse
NOT_OURS = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
SHORTER = {"train.py": "--steps 4 --toy_clips 84 --warmup 1 --films 1 --film_steps 2 --eval_every 4"
                       " --film_every 4 --save_every 4", "sample.py": "--steps 2"}  # fmt: skip


def copy_of_the_project(folder):
    for file in (*SCRIPTS, "tests/conftest.py", "tests/exercises.py"):
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    shutil.copytree(ROOT / "assets", folder / "assets")


@pytest.mark.slow
def test_shell_blocks_of_the_tutorial_run_in_order(tmp_path, monkeypatch):
    """As they stand, but of fewer and shorter steps; all but those that want the Hub. 3 minutes:

    python -m pytest -m slow tests/test_tutorial.py
    """
    copy_of_the_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    session, count = {}, 0
    parts = sorted([*BLOCK.finditer(TEXT), *SHELL.finditer(TEXT)], key=lambda m: m.start())
    for part in parts:
        if part.re is BLOCK:
            exec(part[1], session)
        elif "PixArt" not in part[1]:
            for line in part[1].splitlines():
                more = next((more for script, more in SHORTER.items() if script in line), "")
                command = [sys.executable, *shlex.split(f"{line} {more}")[1:]]
                done = subprocess.run(command, capture_output=True, text=True)
                assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}{done.stderr[-1000:]}"
                count += 1
    assert count >= 10 and Path("samples/sheet.png").exists()


def exercise(name, folder, monkeypatch):
    """tests/exercises.py's test of an exercise, on the scripts in a folder."""
    for module in ("stdit", "data", "sample", "train"):
        monkeypatch.delitem(sys.modules, module, raising=False)  # to be imported from there
    monkeypatch.syspath_prepend(folder)
    return runpy.run_path(folder / "tests/exercises.py")[f"test_{name}"]


@pytest.mark.skipif(not shutil.which("git"), reason="git applies the patches")
@pytest.mark.parametrize("name", EXERCISES)
def test_exercises_fail_before_and_pass_with_their_solution(name, tmp_path, monkeypatch):
    """If you did an exercise, this is expected to fail: the code is not what the patches change."""
    copy_of_the_project(tmp_path)
    patch = tmp_path / f"assets/exercises/{EXERCISES[name]}.patch"
    assert sum(line[:1] == "+" for line in patch.read_text().splitlines()) <= 30  # short
    before = exercise(name, tmp_path, monkeypatch)
    with pytest.raises((AssertionError, TypeError)):  # TypeError: no keyword `first`
        before()
    done = subprocess.run(["git", "apply", "--unsafe-paths", str(patch)], cwd=tmp_path,
                          env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, f"{patch.name} does not apply: {done.stderr}"
    exercise(name, tmp_path, monkeypatch)()


def refresh():
    """Write into the documents' links the lines where names are now."""
    for document in DOCUMENTS:
        path = ROOT / document

        def now(link, folder=path.parent):
            name, target, line = link.groups()
            found = line_of(name, (folder / target).resolve().relative_to(ROOT)) if line else None
            return link[0].replace(f"#L{line}", f"#L{found}") if found else link[0]

        path.write_text(LINK.sub(now, path.read_text()))


if __name__ == "__main__":
    refresh()
