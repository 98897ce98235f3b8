"""Two processes train as one does with the whole batch."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blip2_search.retrieval.distributed import World, gather, joined_world
from blip2_search.retrieval.errors import RecipeError
from blip2_search.retrieval.recipe import TrainConfig
from blip2_search.retrieval.trainer import Trainer
from tiny import build_tiny_model

SCRIPT = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from blip2_search.retrieval.batches import CachedTokens
from blip2_search.retrieval.data import CaptionedImage
from blip2_search.retrieval.distributed import joined_world
from blip2_search.retrieval.feature_cache import encoder_tokens
from blip2_search.retrieval.recipe import DataConfig, TrainConfig
from blip2_search.retrieval.trainer import Trainer
from tiny import build_tiny_model

torch.set_num_threads(1)
folder = Path(sys.argv[1])
images = [
    CaptionedImage(path=path, captions=(f"a {{path.stem}}" + " on black" * (i % 3),), group=path.stem)
    for i, path in enumerate(sorted((folder / "photos").iterdir()))
]
with joined_world(use_gpu=False) as world:
    model = build_tiny_model()  # without dropout, which differs between processes
    cache = encoder_tokens(
        model, [i.path for i in images], folder / f"cache{{world.rank}}", DataConfig()
    )
    config = TrainConfig(steps=4, batch_size=8, lr=4e-3, precision="fp32", accumulate=2)
    history = Trainer(model, CachedTokens(images, cache), config, world=world).run()
    weights = {{name: float(p.detach().norm()) for name, p in model.named_parameters()}}
    out = folder / f"{{sys.argv[2]}}{{world.rank}}.json"
    out.write_text(json.dumps({{"history": history, "weights": weights}}))
"""


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run(script, folder, name, processes, attempts=2):
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(processes):
        env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        if processes == 1:
            env = dict(os.environ)
        command = [sys.executable, "-W", "ignore", str(script), str(folder), name]
        started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=300)[1] for process in started]
    if attempts > 1 and any(process.returncode == -signal.SIGABRT for process in started):
        # gloo's threads may abort a process at its very end; once is chance, twice is a fault.
        run(script, folder, name, processes, attempts - 1)
        return
    for process, text in zip(started, errors, strict=True):
        assert process.returncode == 0, text


def test_two_processes_equal_one(photos, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent.parent)))
    run(script, tmp_path, "one", 1)
    run(script, tmp_path, "two", 2)
    one = json.loads((tmp_path / "one0.json").read_text())
    for rank in (0, 1):
        two = json.loads((tmp_path / f"two{rank}.json").read_text())
        for ours, theirs in zip(two["history"], one["history"], strict=True):
            for name in ("itc", "itm", "itg", "loss", "gradient_norm", "temperature"):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-4), name
        # Softmax ignores the biases of keys: their gradients are noise.
        names = [name for name in one["weights"] if not name.endswith("key.bias")]
        for name in names:
            assert two["weights"][name] == pytest.approx(one["weights"][name], rel=1e-3), name


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined_world(use_gpu=False) as world:
        assert world == World()
        x = torch.randn(3)
        assert gather(x) is x


def test_a_batch_is_divided_evenly():
    world = World(rank=1, size=2)
    assert world.own(8) == slice(4, 8)
    with pytest.raises(RecipeError, match=r"train\.batch_size=7 cannot be divided evenly among 2"):
        Trainer(build_tiny_model(), None, TrainConfig(steps=1, batch_size=7), world=world)
