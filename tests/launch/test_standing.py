"""What stands where a command would write: known again by its report, or refused by what differs."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sigmoe.launch.standing import check_place, require_proofs, standing_report
from sigmoe.moe.storage.checkpoint import encode_json, write_manifest
from sigmoe.moe.storage.durable import durable_directory

SETTINGS = {"dtype": None, "verify": True, "file_bytes": 4 << 30, "inherits": {"seed": 0, "domains": ["law"]}}


@pytest.fixture
def stand(tmp_path):
    """Write a directory with this report; returns what `standing_report` says of it."""

    def run(wanted, **report):
        data = {"format_version": 1, "parent": {"identity": "me"}, **report}
        with durable_directory(tmp_path / "out", replace=True) as directory:
            directory.write("report.json", encode_json(data))
            write_manifest(directory, ())
        return standing_report(tmp_path / "out", "report.json", version=1, parent="me", settings=wanted)

    return run


def test_a_report_from_before_file_bytes_had_its_default(stand):
    old = {key: value for key, value in SETTINGS.items() if key != "file_bytes"}
    assert stand(SETTINGS, **old) == {"format_version": 1, "parent": {"identity": "me"}, **old}
    with pytest.raises(ValueError, match="with file_bytes=4294967296: remove it or give another out="):
        stand(SETTINGS | {"file_bytes": 1 << 20}, **old)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dtype": "bf16"}, 'dtype="bf16"'),
        ({"verify": False}, "verify=false"),
        ({"inherits": None}, "inherits=null"),
        ({"inherits": {"seed": 7, "domains": ["law"]}}, "inherits.seed=7"),
        ({"inherits": {"seed": 0, "domains": ["code"]}}, "another value of inherits.domains"),
    ],
)
def test_the_key_that_differs_is_named(stand, change, told):
    for wanted, report, told_as in (
        (SETTINGS, SETTINGS | change, told),
        ({"settings": SETTINGS}, {"settings": SETTINGS | change}, told),
        ({"text": SETTINGS}, {"text": SETTINGS | change}, told.replace("value of ", "value of text.")),
    ):
        with pytest.raises(ValueError, match="exists already, made of this model with ") as caught:
            stand(wanted, **report)
        whole = told_as if "text." in told_as or "text" not in wanted else f"text.{told_as}"
        assert str(caught.value).endswith(f"with {whole}: remove it or give another out=")


def test_another_parent_or_format_is_another_model(stand):
    for report in ({"format_version": 2}, {"parent": {"identity": "you"}}):
        with pytest.raises(ValueError, match="is another model: remove it"):
            stand({}, **report)


def test_a_place_where_nothing_can_be_made(tmp_path):
    parent = SimpleNamespace(path=tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    places = [(tmp_path / "file/out", tmp_path / "file"), (tmp_path / "file/deep/out", tmp_path / "file")]
    if sys.platform == "linux":
        places.append((Path("/proc/nowhere/out"), Path("/proc")))
    for out, place in places:
        with pytest.raises(ValueError, match=f"out={out} cannot be made in {place}: .*: give another place"):
            check_place(out, parent)
    check_place(tmp_path / "new/deep/out", parent)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ValueError, match="lies inside the model that is given"):
        check_place(tmp_path / "model/out", parent)


def test_the_first_proof_that_is_lacking_is_named(tmp_path):
    require_proofs(tmp_path, "cut", {"check=true": False})
    with pytest.raises(ValueError, match="holds this very cut, made without verify=9: remove it or give another out="):
        require_proofs(tmp_path, "cut", {"check=true": False, "verify=9": True, "more=1": True})
