"""kill -9 anywhere in `sigmoe extract`: a whole submodel or none; run again, the same bytes. And damage is found."""

import shutil

import pytest

from sigmoe.launch.main import main


def test_a_killed_extraction_leaves_a_whole_submodel_or_none(run_program, memory_folder, tiny, survived):
    found = run_program("kill_extract.py", memory_folder, *tiny)
    for scenario, outcome in found.items():
        points, problems = outcome["points"], outcome["problems"]
        survived("kill -9 in an extraction", points, points - len(problems))
        assert problems == {}
        assert points >= {"one": 20, "both": 8}[scenario]
        assert {"mkdir", "write", "fsync", "rename"} <= set(outcome["operations"])
        assert {"extraction.json", "manifest.json", "tokenizer.json"} <= set(outcome["files"])


@pytest.fixture(scope="module")
def submodels(tiny, tmp_path_factory):
    """A run, one domain of it (a directory of transformers'), and both of its domains (sigmoe's own format)."""
    folder = tmp_path_factory.mktemp("submodels")
    assert main(["train", *tiny, "steps=1", "threads=1", f"out={folder}/run"]) == 0
    for name, domain in {"one": "ships", "both": "[recipes,ships]"}.items():
        command = ["extract", f"checkpoint={folder}/run", f"domain={domain}", "verify=0", f"out={folder}/{name}"]
        assert main(command) == 0
    return folder


@pytest.mark.parametrize(("name", "files"), [("one", 8), ("both", 8)])
def test_one_flipped_byte_in_any_file_is_found(submodels, tmp_path, capfd, name, files):
    copy = tmp_path / name
    shutil.copytree(submodels / name, copy)
    assert main(["verify", f"checkpoint={copy}"]) == 0
    paths = sorted(path for path in copy.rglob("*") if path.is_file())
    assert len(paths) == files
    for path in paths:
        whole = path.read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1}:
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            capfd.readouterr()
            assert main(["verify", f"checkpoint={copy}"]) == 2, (path.name, place)
            (line,) = capfd.readouterr().err.splitlines()
            assert path.name in line
        path.write_bytes(whole)
    assert main(["verify", f"checkpoint={copy}"]) == 0
