"""Which process of how many this is: read from a launcher's environment, or refused in one line."""

import sys
from dataclasses import replace

import pytest

from sigmoe.launch.launcher import Cluster, find_cluster, find_mpi, launch_command
from sigmoe.launch.main import COMMANDS, main

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
DEEPSPEED = {key: value for key, value in TORCHRUN.items() if key != "LOCAL_WORLD_SIZE"} | {
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
}
# What the shell of a batch job has, and what srun adds for its tasks.
BATCH = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NODELIST": "gpu[07-09],login1",
    "SLURM_NTASKS": "5",
    "SLURM_NNODES": "4",
    "SLURM_TASKS_PER_NODE": "1(x3),2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SRUN = BATCH | {
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "gpu[08-09,12],login1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3),2",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "3",
}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "3"}

BY_TORCHRUN = Cluster(
    launcher="torchrun", rank=3, size=4, local_rank=1, local_size=2, address="10.0.0.1", port=29500, attempt=0
)
BY_SRUN = Cluster(
    launcher="srun", rank=4, size=5, local_rank=1, local_size=2, address="gpu08", port=12_000 + (16 * 4242 + 1) % 20_000
)


def test_every_launchers_environment():
    assert find_cluster(TORCHRUN) == BY_TORCHRUN
    assert find_cluster(DEEPSPEED) == replace(BY_TORCHRUN, launcher="deepspeed")
    assert find_cluster(SRUN) == BY_SRUN
    for environment in (OPEN_MPI, MPICH):
        found = find_cluster(environment)
        assert (found.launcher, found.rank, found.size) == ("mpirun", 1, 3)
        assert find_mpi(environment) == found


def test_torchruns_store_and_restarts_are_known():
    found = find_cluster(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"})
    assert found == replace(BY_TORCHRUN, launcher_keeps_store=True, attempt=2)


def test_the_innermost_launcher_counts():
    assert find_cluster(SRUN | OPEN_MPI | TORCHRUN) == BY_TORCHRUN
    assert find_cluster(SRUN | OPEN_MPI).launcher == "mpirun"
    # MPICH's mpirun in a job starts its proxies by srun; srun --mpi=pmi2 speaks PMI itself.
    assert find_cluster(SRUN | MPICH).launcher == "mpirun"
    assert find_cluster(SRUN | {"PMI_RANK": "4", "PMI_SIZE": "5"}) == BY_SRUN


def test_without_a_launcher_there_is_one_process():
    assert find_cluster({}) is None
    assert find_cluster({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}) is None
    assert find_cluster(BATCH) is None
    # salloc's shell, where Slurm makes it a step of its own (slurm.h: 0xfffffffa), whatever its number of tasks.
    assert find_cluster(SRUN | {"SLURM_STEP_ID": "4294967290"}) is None


def test_a_task_of_slurm_without_its_step_is_refused():
    with pytest.raises(ValueError, match="SLURM_PROCID is set, as by srun, but SLURM_STEP_ID is not: use srun"):
        find_cluster({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"})


def test_a_launcher_of_one_process_is_none():
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert find_cluster(TORCHRUN | alone) is None
    assert find_mpi({"PMI_RANK": "0", "PMI_SIZE": "1"}) is None
    one = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert find_cluster(SRUN | one | {"SLURM_STEP_TASKS_PER_NODE": "1"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("b7,a", "b7"),
        ("node[001-003]", "node001"),
        ("rack[2,4]n[10-12]-ib,x", "rack2n10-ib"),
        ("n-1.cluster[3]", "n-1.cluster3"),
    ],
)
def test_the_first_host_of_slurms_list(nodes, first):
    assert find_cluster(SRUN | {"SLURM_STEP_NODELIST": nodes}).address == first


def test_srun_meets_where_it_is_told_to():
    found = find_cluster(SRUN | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4000"})
    assert (found.address, found.port) == ("10.0.0.9", 4000)
    ports = {find_cluster(SRUN | {"SLURM_JOB_ID": str(job)}).port for job in range(70_000, 71_000)}
    assert len(ports) == 1000 and min(ports) >= 12_000 and max(ports) < 32_000


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        *((TORCHRUN, key) for key in TORCHRUN),
        *((DEEPSPEED, key) for key in DEEPSPEED if not key.startswith(("LOCAL_SIZE", "CROSS"))),
        *((SRUN, key) for key in SRUN if key not in BATCH or key in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")),
        *((OPEN_MPI, key) for key in OPEN_MPI),
        *((MPICH, key) for key in MPICH),
    ],
)
def test_what_is_missing_is_named(environment, missing):
    told = rf"\A[A-Z_]+ is set, as by (a launcher|srun|mpirun), but {missing} is not: use [^\n]+ or unset [A-Z_]+\Z"
    with pytest.raises(ValueError, match=told):
        find_cluster({key: value for key, value in environment.items() if key != missing})


@pytest.mark.parametrize(
    ("environment", "change", "told"),
    [
        (TORCHRUN, {"RANK": "first"}, "RANK is 'first'"),
        (TORCHRUN, {"RANK": "-1"}, "RANK is '-1'"),
        (TORCHRUN, {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (TORCHRUN, {"RANK": "4"}, "torchrun says rank 4 of 4"),
        (TORCHRUN, {"LOCAL_RANK": "2"}, "on its machine 2 of 2"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "5"}, "rank 3 of 4, and on its machine 1 of 5"),
        (DEEPSPEED, {"LOCAL_SIZE": "two"}, "LOCAL_SIZE is 'two'"),
        (SRUN, {"SLURM_NODEID": "5"}, "SLURM_NODEID is 5"),
        (SRUN, {"SLURM_PROCID": "5"}, "srun says rank 5 of 5"),
        (SRUN, {"SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE is 'many'"),
        (SRUN, {"SLURM_STEP_NODELIST": ","}, "SLURM_STEP_NODELIST is ','"),
        (SRUN, {"MASTER_PORT": "none"}, "MASTER_PORT is 'none'"),
        (OPEN_MPI, {"OMPI_COMM_WORLD_RANK": "3"}, "mpirun says rank 3 of 3"),
    ],
)
def test_what_does_not_fit_is_named(environment, change, told):
    with pytest.raises(ValueError, match=told):
        find_cluster(environment | change)


def test_half_a_launcher_is_one_line(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "dataset=x", "out=y"]) == 2
    assert capfd.readouterr().err == (
        "sigmoe train: WORLD_SIZE is set, as by a launcher, but RANK is not: use torchrun, or unset WORLD_SIZE\n"
    )


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"train", "data", "extract", "convert", "prune"}))
def test_commands_of_one_process_refuse_mpirun(monkeypatch, capfd, command, rank, lines):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert main([command]) == 2
    told = capfd.readouterr().err.splitlines()
    assert len(told) == lines
    assert all("mpirun" in line for line in told)


def test_offline_commands_refuse_other_launchers(monkeypatch, capfd):
    for key, value in DEEPSPEED.items():
        monkeypatch.setenv(key, "0" if key == "RANK" else value)
    assert main(["prune"]) == 2
    assert capfd.readouterr().err == (
        "sigmoe prune: deepspeed started 4 processes, this command runs in one: start it alone, or under mpirun\n"
    )


def test_deepspeeds_argument_is_no_setting(capfd):
    assert main(["train", "--local_rank=0", "--cfg", "dataset=x", "out=y", "seed=7"]) == 0
    assert "seed: 7" in capfd.readouterr().out


def test_the_command_starts_the_same_run_on_more_processes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/sigmoe", "train", "out=a b", "parallel.tp=2"])
    expected = "torchrun --standalone --nproc-per-node 2 -m sigmoe.launch.train 'out=a b' parallel.tp=2"
    assert launch_command(2, "train") == expected
    monkeypatch.setattr(sys, "argv", ["/site/sigmoe/launch/train.py", "out=a b", "parallel.tp=2"])
    assert launch_command(2, "train") == expected
    expected = "srun --ntasks 2 python -m sigmoe.launch.train 'out=a b' parallel.tp=2"
    assert launch_command(2, "train", BATCH) == expected


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
