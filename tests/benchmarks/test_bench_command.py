import json

from sigmoe.launch.main import main

SMALL = [
    *("model=tiny", "model.dim=16", "model.expert_dim=16", "model.vocab_size=40"),
    *("train.rounds=1", "train.steps=1", "train.warmup=0", "train.batch=1", "train.sequence_length=4"),
    *("train.threads=1", "train.peers=[]", "train.allocators=[default]"),
]


def test_the_table_is_printed_and_kept(tmp_path, capsys):
    assert main(["bench", *SMALL, f"out={tmp_path}/new/speed"]) == 0
    printed = capsys.readouterr().out
    assert "sigmoe" in printed
    assert "vocabulary 40" in printed
    assert (tmp_path / "new" / "speed.md").read_text().startswith("# Training step on a CPU\n\n| contender |")
    assert json.loads((tmp_path / "new" / "speed.json").read_text())["settings"]["model"]["dim"] == 16


def test_mistakes_are_one_line(capsys):
    for override, message in {
        "suite=speed": "moe, norm, loss, attention, got 'speed'",
        "train.rounds=0": "train: rounds must be at least 1, got 0",
        "router=rre train.peers=[eager]": "peers are Mixtrals",
    }.items():
        assert main(["bench", *SMALL, *override.split()]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_tokenising_is_measured_beside_the_library(tmp_path, capsys):
    small = ["suite=tokenize", "tokenize.megabytes=0.2", "tokenize.vocab_size=400", "tokenize.rounds=2"]
    assert main(["bench", *small, f"out={tmp_path}/tokenize"]) == 0
    assert "encode_batch_fast" in capsys.readouterr().out
    record = json.loads((tmp_path / "tokenize.json").read_text())["megabytes_per_second"]
    assert {name: len(rates) for name, rates in record.items()} == dict.fromkeys(record, 2)
    assert min(min(rates) for rates in record.values()) > 0
