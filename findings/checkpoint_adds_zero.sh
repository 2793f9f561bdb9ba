#!/usr/bin/env bash
# Inductor cannot compile a checkpointed function that begins by adding 0.0 to its input.
#
# torch 2.14.1. A value that is absent, such as a position embedding that only the first block of a
# network gets, is often passed as 0.0, so that every block adds something. Eagerly this is right, and
# compiled without activation checkpointing too. With both, Inductor's pass over the joint graph
# replaces x + 0.0 by x, an input of the graph, and the partitioner, which had to recompute x + 0.0 in
# the backward pass, raises an AssertionError when the backward pass is compiled. Backend "aot_eager",
# which has no such pass, does not show it. Pass None and add nothing. (A C++ compiler is needed.)
#
# Output seen:
#   x, checkpointed            compiled
#   x + 0.0                    compiled
#   x + 0.0, checkpointed      AssertionError: Node add_3 was invalid, but is output
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

linear = torch.nn.Linear(8, 8)


def branch(x):
    return x + linear(F.layer_norm(x, (8,)))


def branch_of_sum(x):
    return branch(x + 0.0)


def checkpointed(function):
    return lambda x: checkpoint(function, x, use_reentrant=False)


def outcome(function):
    torch._dynamo.reset()
    try:
        torch.compile(function)(torch.randn(4, 8, requires_grad=True)).sum().backward()
    except BackendCompilerFailed as error:
        return str(error).split("\n")[1]
    return "compiled"


found = {
    "x, checkpointed": outcome(checkpointed(branch)),
    "x + 0.0": outcome(branch_of_sum),
    "x + 0.0, checkpointed": outcome(checkpointed(branch_of_sum)),
}
for name, text in found.items():
    print(f"{name:26} {text}")
assert [text == "compiled" for text in found.values()] == [True, True, False]
assert found["x + 0.0, checkpointed"].startswith("AssertionError")
PYTHON
