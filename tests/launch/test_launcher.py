"""Which process of how many this is: read from a launcher's environment, or refused in one line."""

import sys

import pytest

from sigmoe.launch.launcher import Cluster, find_cluster, find_mpi, torchrun_command
from sigmoe.launch.main import COMMANDS, main

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def test_torchruns_environment():
    assert find_cluster(TORCHRUN) == Cluster(rank=3, size=4, local_rank=1, local_size=2)


def test_without_a_launcher_there_is_one_process():
    assert find_cluster({}) is None
    assert find_cluster({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}) is None
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert find_cluster(TORCHRUN | alone) is None


@pytest.mark.parametrize("prefix", ["OMPI_COMM_WORLD", "PMI"])
def test_mpiruns_environment(prefix):
    found = find_mpi({f"{prefix}_RANK": "1", f"{prefix}_SIZE": "3"})
    assert found is not None and (found.rank, found.size) == (1, 3)
    assert find_mpi({f"{prefix}_RANK": "0", f"{prefix}_SIZE": "1"}) is None
    assert find_mpi({}) is None


@pytest.mark.parametrize("missing", TORCHRUN)
def test_what_is_missing_is_named(missing):
    with pytest.raises(ValueError, match=rf"\A[A-Z_]+ is set, as by a launcher, but {missing} is not: [^\n]+\Z"):
        find_cluster({key: value for key, value in TORCHRUN.items() if key != missing})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"RANK": "first"}, "RANK is 'first'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"RANK": "4"}, "RANK is 4 and WORLD_SIZE is 4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is 2 and LOCAL_WORLD_SIZE is 2"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE is 5 and WORLD_SIZE is 4"),
    ],
)
def test_what_does_not_fit_is_named(change, told):
    with pytest.raises(ValueError, match=told):
        find_cluster(TORCHRUN | change)


def test_half_a_launcher_is_one_line(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "dataset=x", "out=y"]) == 2
    assert capfd.readouterr().err == (
        "sigmoe train: WORLD_SIZE is set, as by a launcher, but RANK is not: use torchrun, or unset WORLD_SIZE\n"
    )


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"data", "extract", "convert", "prune"}))
def test_commands_of_one_process_refuse_mpirun(monkeypatch, capfd, command, rank, lines):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert main([command]) == 2
    told = capfd.readouterr().err.splitlines()
    assert len(told) == lines
    assert all("mpirun" in line for line in told)


def test_the_command_starts_the_same_run_on_more_processes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/sigmoe", "train", "out=a b", "parallel.tp=2"])
    expected = "torchrun --standalone --nproc-per-node 2 -m sigmoe.launch.train 'out=a b' parallel.tp=2"
    assert torchrun_command(2, "train") == expected
    monkeypatch.setattr(sys, "argv", ["/site/sigmoe/launch/train.py", "out=a b", "parallel.tp=2"])
    assert torchrun_command(2, "train") == expected


@pytest.mark.parametrize(
    ("words", "processes"),
    [
        ("parallel.tp=2", 2),
        ("parallel.ep=4", 4),
        ("parallel.tp=2 parallel.ep=2", 4),
        ("parallel.tp=2 parallel.ep=2 parallel.etp=1", 2),
    ],
)
def test_one_process_cannot_be_several(train, tmp_path, capfd, words, processes):
    assert train("out=run", *words.split()) == 2
    told = capfd.readouterr().err
    assert f"takes {processes} processes: torchrun --standalone --nproc-per-node {processes} " in told
    assert told.count("\n") == 1, told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("parallel.tp=0", "parallel.tp must be at least 1"),
        ("parallel.zero_stage=3", "parallel.zero_stage must be 1 or 2, got 3: DeepSpeed's stage 3 takes experts"),
        ("parallel.recompute=all", "parallel.recompute must be one of none, layer, experts, attention"),
        ("parallel=many", "unknown choice parallel=many; sigmoe's choices: single"),
        ("parallel.tpp=2", "unknown key parallel.tpp; did you mean parallel.tp"),
    ],
)
def test_mistakes_of_the_group_are_one_line(train, tmp_path, capfd, mistake, told):
    assert train("out=run", mistake) == 2
    error = capfd.readouterr().err
    assert told in error
    assert error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())


def test_recomputation_changes_no_bit_and_may_change_on_resume(train, tmp_path):
    assert train("out=kept", "steps=4") == 0
    assert train("out=again", "steps=4", "stop_at=2", "parallel.recompute=layer") == 0
    assert train("out=again", "steps=4", "parallel.recompute=experts") == 0
    kept, again = (tmp_path / name / "checkpoints/step-00000004/manifest.json" for name in ("kept", "again"))
    assert kept.read_text() == again.read_text()
