"""A checkpoint's bytes do not depend on the layout that wrote it, and any layout goes on where another one stopped."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from checkpoint_layouts import END, SAVED, SINGLE, WORLD, build, files, interrupted, pairs, save, savers, uninterrupted
from worlds import run_ranks

from sigmoe.moe.storage.checkpoint import open_checkpoint
from sigmoe.parallel.mesh import single_mesh

ALONE = single_mesh().world


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """One process trains first, then a world of four does all its layouts; returns the folder and what was told."""
    pytest.importorskip("megatron.core")
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("layouts")
    alone = {
        f"{model}/{saver}": uninterrupted(model, saver, dataset, ALONE, folder / model / saver)
        for model, saver in savers()
        if saver == SINGLE
    }
    wrong = run_ranks("checkpoint_world.py", WORLD, folder, str(dataset))
    assert wrong is None, wrong
    told = json.loads((folder / "told.json").read_text())
    told["losses"] |= alone
    return folder, told


@pytest.mark.parametrize(("model", "saver", "loader"), list(pairs()))
def test_saved_under_one_and_loaded_under_another(runs, model, saver, loader):
    folder, told = runs
    name = f"{model}/{saver}-{loader}"
    assert files(folder / name, SAVED) == files(folder / model / saver, SAVED)
    ours, theirs = told["losses"][name], told["losses"][f"{model}/{saver}"]
    assert [x for row in ours for x in row] == pytest.approx([x for row in theirs for x in row], rel=1e-6)
    if saver == loader:
        assert files(folder / name, END) == files(folder / model / saver, END)
        assert ours == theirs


@pytest.mark.parametrize(("model", "saver"), [pair for pair in savers() if pair[1] != SINGLE])
def test_one_process_goes_on_from_any_layout(runs, dataset, tmp_path, model, saver):
    folder, told = runs
    ours = interrupted(model, SINGLE, dataset, ALONE, folder / model / saver, tmp_path)
    assert files(tmp_path, SAVED) == files(folder / model / saver, SAVED)
    theirs = told["losses"][f"{model}/{saver}"]
    assert [x for row in ours for x in row] == pytest.approx([x for row in theirs for x in row], rel=1e-6)
    open_checkpoint(folder / model / saver / f"step-{END:08}").verify()


def test_a_fresh_checkpoint_is_the_same_everywhere(runs, dataset, tmp_path):
    """Initial weights are drawn by shard, and gathered to the bytes of one process."""
    folder, _ = runs
    save(build("gates", SINGLE, dataset, ALONE), tmp_path, at=1)
    assert files(tmp_path, 1) == files(folder / "full", 1)


def test_a_full_disk_on_any_rank_is_one_line_on_all(runs):
    folder, told = runs
    failed = 0
    for unlucky, end in told["failures"].items():
        lines = end["lines"]
        assert len(set(lines)) == 1, lines
        if lines[0] is not None:
            failed += 1
            assert "writing failed: File too large" in lines[0]
            assert lines[0].startswith(f"rank {unlucky}: ") or unlucky == "0"
            assert end["left"] == ["latest", "step-00000001"]
        else:  # this rank owns no file
            assert int(unlucky) >= 2
            assert "step-00000002" in end["left"]
    assert failed >= 2
    assert files(folder / "full", 3) == files(folder / "full", 1)


def test_what_a_step_of_the_trainer_sends_is_what_the_formulas_say(runs):
    told = runs[1]["traffic"]
    assert len(told) == 3
    for layout, ranks in told.items():
        for sent, formula in ranks:
            assert sent == formula, layout


def test_many_small_files_of_random_pieces(runs):
    assert runs[1]["files"] > 10
