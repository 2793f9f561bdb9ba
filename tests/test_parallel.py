"""Sequence parallelism: one video on several processes gives the numbers of one process. Training
runs are in test_train.py.
"""

import pytest

CODE = """
from dataclasses import replace
import torch, torch.distributed as dist
from conftest import randomize
from stdit import MODELS, STDiT, set_up_scaling
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

mesh = init_device_mesh("cpu", (distributed.world_size,), mesh_dim_names=("sp",))
for variant in ("sequential", "parallel"):
    for T, H, W in ((4, 8, 8), (12, 6, 8)):
        torch.manual_seed(1)
        x, y = torch.randn(2, 4, T, H, W), torch.randn(2, 7, 64)
        t, mask = torch.tensor([3, 700]), torch.rand(2, 7) < 0.7
        weight = torch.randn(2, 8, T, H, W)

        def gradients(mode=None):
            model = randomize(STDiT(replace(MODELS["toy"], variant=variant, depth=2)))
            if mode:
                set_up_scaling(model, activation_checkpointing=mode, sp_mesh=mesh)
            with CommDebugMode() as comm:
                out = model(x, t, y, mask)
                (out * weight).mean().backward()
            named = model.named_parameters()
            grads = {name: p.grad for name, p in named if p.grad is not None}
            return out.detach(), grads, comm.get_total_counts()

        expected, of_one, communication = gradients()
        assert communication == 0
        for mode in ("none", "full", "selective"):
            found, of_many, communication = gradients(mode)
            # two all-to-alls per block (Ulysses has four), as many backward, and the last layer's
            # all-gather. (gloo has no all-to-all: "selective" keeps that of NCCL alone.)
            assert communication == 2 * (2 + 2 + 2 * (mode != "none")) + 1, (mode, communication)
            assert torch.equal(found, expected), (variant, T, mode)  # each frame is computed alike
            assert of_many.keys() == of_one.keys()
            for name, gradient in of_many.items():  # the sum over processes
                dist.all_reduce(gradient)
                off = (gradient - of_one[name]).norm() / of_one[name].norm().clamp(min=1e-6)
                assert off < 5e-6, (variant, T, mode, name, off)  # fp32, sums in another order
"""


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_outputs_and_gradients_of_several_processes_are_those_of_one(n, processes):
    """Outputs bit for bit, and the sum over processes of each weight's gradient."""
    processes(n).run(CODE)
