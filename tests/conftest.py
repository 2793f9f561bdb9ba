"""Shared by all tests: the path to the scripts, a tiny data set, comparisons."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402


def pytest_configure(config):
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
    # One thread, here and in processes that tests start: at these sizes threads mostly wait for
    # each other. pytest -n 2 uses two cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "slow: minutes; run them with: python -m pytest -m slow")
    quick = (
        "quick: network and diffusion process, while changing a block: python -m pytest -m quick"
    )
    config.addinivalue_line("markers", quick)
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def assert_close(found, expected, atol, cause):
    """Equal up to atol, which has this cause; a failure prints the largest difference."""
    worst = (found - expected).abs().max().item()
    assert found.shape == expected.shape and worst <= atol, (
        f"differs by up to {worst:.3g}, allowed {atol:g} ({cause})"
    )


def randomize(model, seed=0):
    """Give every weight a random value, also those that start at zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.3 if p.ndim < 2 else p[0].numel() ** -0.5
            p.copy_(torch.randn_like(p) * scale)
    return model.eval()


def hand_attention(q, k, v, heads, mask=None):
    """softmax(q k^T / sqrt(d)) v, head by head, without the keys where mask [B, M] is False.
    q [B, N, D], k and v [B, M, D] -> [B, N, D].
    """
    out = []
    for q, k, v in zip(*(z.chunk(heads, dim=-1) for z in (q, k, v))):
        scores = q @ k.mT / q.shape[-1] ** 0.5  # [B, N, M]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        out.append(scores.softmax(-1) @ v)
    return torch.cat(out, dim=-1)


WORKER = """
import os, sys, time, traceback
from pathlib import Path

folder, root, parent = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sys.path[:0] = [root, root + "/tests"]
import data

distributed = data.init_distributed("cpu")
job = 0
while os.kill(parent, 0) is None:  # raises when the tests are gone
    code = folder / f"{job}.py"
    if not code.exists():
        time.sleep(0.01)
        continue
    try:
        exec(code.read_text(), {"distributed": distributed})
        result = ""
    except BaseException:
        result = traceback.format_exc()
    data.atomic_write(folder / f"{job}.{distributed.rank}", lambda tmp: tmp.write_text(result))
    job += 1
"""


class Processes:
    """n processes of one gloo group that live as long as the tests and run one code after another,
    so that Python starts and torch is imported once.
    """

    def __init__(self, n, folder):
        self.n, self.folder, self.jobs = n, folder, 0
        (folder / "worker.py").write_text(WORKER)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, f"--nproc-per-node={n}", folder / "worker.py", folder, ROOT]
        with open(folder / "log", "w") as log:
            self.process = subprocess.Popen([*command, str(os.getpid())], stdout=log, stderr=log)

    def run(self, code):
        """Run Python code, which finds `distributed`, in all processes; an error fails the test."""
        done = [self.folder / f"{self.jobs}.{rank}" for rank in range(self.n)]
        data.atomic_write(self.folder / f"{self.jobs}.py", lambda tmp: tmp.write_text(code))
        self.jobs += 1
        while not all(path.exists() for path in done):
            failed = "".join(path.read_text() for path in done if path.exists())
            assert not failed, failed
            assert self.process.poll() is None, (self.folder / "log").read_text()[-3000:]
            time.sleep(0.01)
        failed = "".join(path.read_text() for path in done)
        assert not failed, failed


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """processes(n): the Processes, started when first asked for."""
    started = {}

    def start(n):
        if n not in started:
            started[n] = Processes(n, tmp_path_factory.mktemp(f"processes{n}"))
        return started[n]

    yield start
    for pool in started.values():
        pool.process.terminate()


@pytest.fixture(scope="session")
def encoders():
    """The toy's frozen VAE and T5, as shipped."""
    return data.VAE("assets/vae"), data.T5("assets/t5", 16)


@pytest.fixture(scope="session")
def toy(tmp_path_factory, encoders):
    """A folder with caches of the toy, "train" of 24 clips and "validation" of 96."""
    folder = tmp_path_factory.mktemp("toy")
    for split, clips in (("train", 24), ("validation", 96)):
        data.write_cache(data.Toy(split, clips), folder / split, *encoders)
    return folder
