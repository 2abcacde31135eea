"""What one of two ranks does wrong: hangs, signals, gradients, data, damage. rank_faults.py runs them all."""

from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None or find_spec("megatron") is None, reason="needs deepspeed and megatron-core"
)


@pytest.fixture(scope="module")
def runs(run_program, memory_folder, tiny):
    return run_program("rank_faults.py", memory_folder / "rank_faults", *tiny)


@pytest.fixture
def holds(survived):
    """Count points that hold for a row of the table, then assert them."""

    def check(row, points):
        survived(row, len(points), sum(points.values()))
        assert all(points.values()), [name for name, held in points.items() if not held]

    return check


def losses(run):
    return [row["loss"] for row in run["rows"] if "loss" in row]


def lines(run, rank=0):
    return run["words"][rank].splitlines()


def own_line(run):
    """The line with which rank 0 ended the run; empty where it said none or several."""
    own = [line for line in lines(run) if line.startswith("sigmoe train: ")]
    return own[0] if len(own) == 1 else ""


def alike(run, other):
    """Whether two runs saw the same losses, but for the order of sums."""
    return losses(run) == pytest.approx(losses(other), rel=1e-4) and len(losses(run)) > 0


def test_a_hang_is_named_and_ended(runs, holds):
    waits = "(step 3) waits in all_reduce, parallel/collectives.py:"
    # Name: who says what, exit statuses, whose stacks are there.
    expected = {
        "oversleeps": (0, ("rank 1 (step 3) sits at faults/inject.py:", "; rank 0 " + waits), [75, 75], [0, 1]),
        "rank 1 is stopped": (0, ("rank 1 does not answer; ", "; rank 0 " + waits), [75, -9], [0]),
        "rank 0 is stopped": (1, ("rank 0 does not answer; ", "; rank 1 " + waits), [-9, 75], [1]),
    }
    points = {}
    for name, (speaker, parts, status, stacks) in expected.items():
        said = [line for line in lines(runs[name], speaker) if "no rank has moved for 2 s" in line]
        named = len(said) == 1 and all(part in said[0] for part in parts)
        dumped = runs[name]["stacks"] == [f"stacks-rank{rank}.txt" for rank in stacks]
        points[name] = named and dumped and runs[name]["status"] == status
    holds("a rank that hangs", points)


def test_a_signal_saves_on_all_ranks_after_the_same_step(runs, holds):
    points = {name: (runs[name]["status"], runs[name]["steps"]) for name in ("SIGTERM", "SIGUSR1", "SIGINT")}
    points = {name: found == ([0, 0], [3]) for name, found in points.items()}
    loading = runs["SIGTERM while loading"]
    points["while loading"] = (loading["status"], loading["steps"], loading["rows"]) == ([0, 0], [], [])
    points["SIGUSR1"] &= any(
        "stopped at step 3, saved; to resume, run again: " in line for line in lines(runs["SIGUSR1"])
    )
    points["while loading"] &= any(
        "stopped at step 0, before there was anything to save" in line for line in lines(loading)
    )
    holds("a signal to one rank", points)


def test_a_signal_in_the_last_evaluation_costs_no_step(runs, holds):
    stopped, ended = runs["SIGTERM in the last evaluation"], runs["evaluated"]
    saved = (stopped["status"], stopped["steps"], len(stopped["rows"])) == ([0, 0], [6], 7)
    rows = [row["step"] for row in ended["rows"]] == [0, 1, 2, 3, 4, 5, 6, 6]
    kept = ended["model"] == stopped["model"] and ended["all"] != stopped["all"]  # the last evaluation is in it now
    made_up = saved and rows and kept and ended["status"] == [0, 0]
    holds("a signal in the last evaluation", {"it is made up for": made_up})


def test_all_ranks_skip_a_step_whose_gradient_is_not_finite_on_one(runs, holds):
    once, good = runs["nan once"], runs["inf for good"]
    told = (
        "3 steps in a row were skipped; at step 5 the loss is 5.",
        "the newest checkpoint before them is of step 2: ",
    )
    holds(
        "NaN or Inf in one rank's gradient",
        {
            "one step": [row["skipped"] for row in once["rows"] if "loss" in row]
            == [step == 3 for step in range(1, 7)],
            "weights": once["model"]["3"] == once["model"]["2"] != once["model"]["4"],
            "again and again": good["model"]["4"] == good["model"]["2"],
            "the end": good["status"] == [2, 2] and good["steps"] == [1, 2, 3, 4],
            "one line": all(part in own_line(good) for part in told),
        },
    )


def test_a_spike_that_lasts_is_gone_behind_once(runs, holds):
    two, one, again = runs["spike"], runs["whole spike"], runs["interrupted spike"]
    spikes, spikes_of_two = ([row["step"] for row in run["rows"] if row.get("spike")] for run in (one, two))
    told = "step 28: back to the weights and moments of step 24, without the data of the 4 steps"
    holds(
        "a loss spike",
        {
            "logged": spikes[:3] == [26, 27, 28],
            "gone behind once": {step: state["rolled_back"] for step, state in one["guard"].items() if int(step) > 24}
            == {step: [24, 28] for step in ("28", "32", "36", "40")},
            "weights": one["model"]["28"] == one["model"]["24"],
            "resumed in the midst": again["status"] == [0] and again["all"] | {"25": ""} == one["all"] | {"25": ""},
            "two ranks": two["status"] == [0, 0] and alike(two, one) and spikes_of_two == spikes,
            "two ranks go back": two["guard"]["40"]["rolled_back"] == [24, 28]
            and any(told in line for line in lines(two)),
        },
    )


def test_no_sample_is_repeated_or_lost_when_ranks_change(runs, holds):
    changed = runs["ranks"]
    taken = [sample for samples in changed["samples"] for sample in samples]
    ended = changed["status"] == [0, 0]
    samples, same = sorted(taken) == list(range(24)), alike(changed, runs["whole"])
    holds("ranks changed: 2, 1, 2", {"samples": ended and samples, "losses": ended and same})


def test_experts_and_a_rank_without_a_token(runs, holds):
    run = runs["no token"]
    holds(
        "a rank whose experts get no token",
        {"ends": run["status"] == [0, 0], "losses": alike(run, runs["whole token"])},
    )


@pytest.mark.parametrize("damage", ["cut", "lose"])
def test_a_damaged_shard_is_the_same_line_on_all_ranks(runs, holds, damage):
    run = runs[damage]
    refused = run["status"] == [2, 2] and "00001-of-00001.safetensors: " in own_line(run)
    alone = lines(run, 1) == []  # rank 0 has told it
    holds("a truncated or missing shard", {"refused": refused and alone})


def test_a_flipped_bit_is_told_and_costs_that_checkpoint_alone(runs, holds):
    run = runs["flip"]
    told = [line for line in lines(run) if "model-00001-of-00001.safetensors" in line and "before it" in line]
    resumed = any("resuming run at step 5" in line for line in lines(run))
    holds("a flipped bit in a shard", {"back to step 5": len(told) == 1 and resumed and run["status"] == [0, 0]})


@pytest.mark.parametrize(
    ("which", "told"),
    [
        ("config", "optim.weight_decay is 0.5 there"),
        ("version", "the version of torch is '0' there"),
    ],
)
def test_ranks_that_differ_are_told_apart(runs, holds, which, told):
    run = runs[f"another {which}"]
    named = f"rank 1 differs from rank 0: {told}" in own_line(run)
    holds("ranks that differ", {"nothing is written": named and (run["status"], run["begun"]) == ([2, 2], False)})


def test_a_rank_that_does_not_see_the_run_is_told_before_the_first_step(runs, holds):
    run = runs["another machine"]
    begin = "sigmoe train: rank 1: what rank 0 writes into run is not there: out= must be the same"
    told = own_line(run).startswith(begin)
    holds("a rank without the run's directory", {"one line": told and (run["status"], run["begun"]) == ([2, 2], False)})
