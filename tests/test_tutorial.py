"""Every Python block of the tutorial runs, in order, in one session."""

import re

from conftest import ROOT


def test_the_tutorials_blocks_run_in_order(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # what they write goes there
    text = (ROOT / "tutorial.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 8
    session = {}
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        # errors show the tutorial's line
        exec(compile("\n" * line + block, "tutorial.md", "exec"), session)
