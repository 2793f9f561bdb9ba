#!/usr/bin/env bash
# torch.compile compiles nothing of a module whose forward is a functools.partial.
#
# torch 2.14.1. Activation checkpointing can be added to a module from outside by replacing its forward.
# With a nested function that calls torch.utils.checkpoint the module is then compiled; with
# functools.partial(checkpoint, forward) it runs eagerly, without an error or a warning, and with right
# results. torch._dynamo.utils.counters shows it.
#
# Output seen:
#   nested function   1 graphs
#   functools.partial 0 graphs
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from functools import partial

import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint


def graphs(make):
    """The graphs compiled for a module whose forward is make(old forward)."""
    torch._dynamo.reset()
    counters.clear()
    module = torch.nn.Linear(8, 8)
    module.forward = make(module.forward)
    module.compile(backend="aot_eager")
    module(torch.randn(2, 8, requires_grad=True)).sum().backward()
    return counters["stats"]["unique_graphs"]


def nested(forward):
    def checkpointed(x):
        return checkpoint(forward, x, use_reentrant=False)

    return checkpointed


found = {
    "nested function": graphs(nested),
    "functools.partial": graphs(lambda f: partial(checkpoint, f, use_reentrant=False)),
}
for name, count in found.items():
    print(f"{name:17} {count} graphs")
assert found == {"nested function": 1, "functools.partial": 0}
PYTHON
