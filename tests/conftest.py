"""A small dataset of two domains, made once by the real command, and a way to run commands in this process."""

import os
import random
import resource
from pathlib import Path

import pytest
import torch

from sigmoe.launch.main import main

if not torch.cuda.is_available():
    # Before anything imports Triton: what its kernels are is settled then. A test of the compiler starts a process.
    os.environ["TRITON_INTERPRET"] = "1"

_WORDS = {
    "recipes": "butter flour sugar oven bake whisk egg milk salt pepper onion garlic stir simmer boil roast".split(),
    "ships": "mast sail keel anchor harbor captain storm wave deck rope compass north starboard hull crew tide".split(),
}


def write_texts(folder: Path, documents: int = 240) -> None:
    """Write `documents` short made-up texts a domain."""
    for domain, words in _WORDS.items():
        chooser = random.Random(domain)
        (folder / domain).mkdir(parents=True)
        for number in range(documents):
            text = " ".join(chooser.choice(words) for _ in range(chooser.randint(3, 60)))
            (folder / domain / f"{number:03}.txt").write_text(f"{number}: {text}.\n", encoding="utf-8")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """The path of a prepared dataset with domains recipes and ships, vocabulary 300."""
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    out = tmp_path_factory.mktemp("prepared") / "two"
    sets = ", ".join(f"{domain}: '{folder}/{domain}/*.txt'" for domain in _WORDS)
    assert main(["data", "data=files", f"data.domains={{{sets}}}", "data.vocab_size=300", f"out={out}"]) == 0
    return out


@pytest.fixture
def train(tiny, tmp_path, monkeypatch):
    """Run `sigmoe train` on a tiny model, in this process; returns the exit code."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> int:
        return main(["train", *tiny, *overrides])

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(dataset):
    """Overrides for a run of ten steps that takes a second."""
    model = ["model=tiny", "model.dim=16", "model.expert_dim=16", "router.sets=2"]
    sizes = [
        "steps=10",
        "global_batch=4",
        "sequence_length=32",
        "schedule.warmup_steps=2",
        "optim.lr=3e-3",
        "evaluate.tokens=256",
    ]
    return [f"dataset={dataset}", "logger=jsonl", "logger.every=1", *model, *sizes]


@pytest.fixture
def limit_files():
    """Let every write beyond so many bytes of a file fail, as on a full disk (EFBIG); None: no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(num_bytes):
        # Python ignores SIGXFSZ, so that the write itself fails.
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if num_bytes is None else num_bytes, hard))

    yield limit
    limit(None)


@pytest.fixture
def little_memory():
    """Let whoever wants another GB fail, rather than take the machine's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
