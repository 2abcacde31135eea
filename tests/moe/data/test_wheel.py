import gzip
import hashlib
import zipfile
from pathlib import Path

import pytest

from sigmoe.moe.data.source import Workspace
from sigmoe.moe.data.wheel import Wheel

LINES = "# comment\n" + "".join(f"詞{i} 词{i} [ci2] /word {i}/\n" for i in range(70))


def build_wheel(folder: Path, extra: dict[str, bytes] | None = None, name: str = "tinydict") -> Path:
    """A wheel by hand: a zip with its metadata and a data file."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    members = {
        f"{name}/dict.gz": gzip.compress(LINES.encode()),
        f"{name}/__init__.py": b"raise SystemExit('nothing of it may run')",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **(extra or {}),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/RECORD", "".join(f"{member},,\n" for member in [*members, f"{info}/RECORD"]))
    return path


def source_of(path: Path, **keys: str) -> Wheel:
    settings = {
        "package": "tinydict",
        "version": "1.0",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "member": "tinydict/dict.gz",
        "licence": "CC0-1.0",
    }
    return Wheel(reader="cedict", **{**settings, **keys})


def workspace_of(folder: Path) -> Workspace:
    return Workspace(cache=folder / "cache", pip_options=("--no-index", "--find-links", str(folder)))


def test_a_wheel_is_fetched_checked_and_read_without_being_installed(tmp_path: Path) -> None:
    path = build_wheel(tmp_path)
    source, workspace = source_of(path), workspace_of(tmp_path)
    first, second = source.documents(workspace)
    assert first.count("\n") == 50
    assert first + second == LINES.partition("\n")[2]
    kept = tmp_path / "cache" / "tinydict-1.0" / path.name
    assert sorted(p for p in (tmp_path / "cache").rglob("*") if p.is_file()) == [kept]
    path.unlink()  # from now on the cache is all there is
    assert list(source.documents(workspace)) == [first, second]
    kept.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="could not be downloaded"):
        list(source.documents(workspace))
    assert source.provenance().sha256 == source.sha256


def test_a_damaged_cache_is_fetched_again(tmp_path: Path) -> None:
    path = build_wheel(tmp_path)
    source, workspace = source_of(path), workspace_of(tmp_path)
    source.fetch(workspace).write_bytes(b"damaged")
    assert source.fetch(workspace).read_bytes() == path.read_bytes()


def test_another_hash_is_refused_and_not_kept(tmp_path: Path) -> None:
    path = build_wheel(tmp_path)
    with pytest.raises(ValueError, match=r"has the SHA-256 .*, the config wants 0000: not read"):
        source_of(path, sha256="0000").fetch(workspace_of(tmp_path))
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_missing_package_says_what_to_do(tmp_path: Path) -> None:
    path = build_wheel(tmp_path)
    with pytest.raises(ValueError, match=r"tinydict==2\.0 could not be downloaded \(.*check the network") as error:
        source_of(path, version="2.0").fetch(workspace_of(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("member", ["../outside", "/absolute", "a/../../outside", "a\\..\\b", "C:/x"])
def test_members_that_leave_the_archive_are_refused(member: str, tmp_path: Path) -> None:
    source = source_of(build_wheel(tmp_path, {member: b"x"}))
    folder = tmp_path / "cache" / "tinydict-1.0"
    folder.mkdir(parents=True)
    (tmp_path / "tinydict-1.0-py3-none-any.whl").rename(folder / "tinydict-1.0-py3-none-any.whl")
    with pytest.raises(ValueError, match="leaves its directory"):
        list(source.documents(workspace_of(tmp_path)))
    assert not (tmp_path / "outside").exists()


def test_links_in_the_archive_are_refused(tmp_path: Path) -> None:
    path = build_wheel(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("tinydict/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match="leaves its directory"):
        list(source_of(path).documents(workspace_of(tmp_path)))


def test_a_missing_member_and_a_broken_archive_are_named(tmp_path: Path) -> None:
    path = build_wheel(tmp_path)
    with pytest.raises(ValueError, match="no member 'tinydict/none'"):
        list(source_of(path, member="tinydict/none").documents(workspace_of(tmp_path)))
    folder = tmp_path / "cache" / "broken-1.0"
    folder.mkdir(parents=True)
    (folder / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    source = source_of(folder / "broken-1.0-py3-none-any.whl", package="broken")
    with pytest.raises(ValueError, match="cannot be read"):
        list(source.documents(workspace_of(tmp_path)))


@pytest.mark.network
def test_a_real_package_can_be_had(tmp_path: Path) -> None:
    source = Wheel(
        package="simple-icd-10-cm",
        version="1.5.0",
        sha256="6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
        member="simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml",
        reader="icd10",
        licence="MIT",
    )
    workspace = Workspace(cache=tmp_path)
    try:
        source.fetch(workspace)
    except ValueError as error:
        if "could not be downloaded" in str(error):
            pytest.skip("no package index can be reached")
        raise
    documents = list(source.documents(workspace))
    assert documents[0].startswith("A00 Cholera\n")
    assert sum(len(text.encode()) for text in documents) > 4_000_000
