"""`sigmoe data`: prepares a dataset from public text or from the user's own files."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from ..moe.data.config import DataConfig
from ..moe.data.dataset import Dataset, open_dataset
from ..moe.data.files import Files
from ..moe.data.installed import Docstrings, PackageFiles, StandardLibrary
from ..moe.data.prepare import prepare
from ..moe.data.source import Workspace
from ..moe.data.wheel import Wheel
from ..moe.parsing import from_mapping
from ..moe.workers import Workers
from .console import notes, print_table, progress_sink
from .main import main
from .offline_ranks import offline_ranks

AnySource = Files | StandardLibrary | PackageFiles | Docstrings | Wheel
_KINDS: dict[str, type[AnySource]] = {
    "files": Files,
    "stdlib": StandardLibrary,
    "package": PackageFiles,
    "docstrings": Docstrings,
    "wheel": Wheel,
}


@dataclass(frozen=True, kw_only=True)
class DataSettings(DataConfig):
    """The config group `data`: DataConfig's keys and those of the sources.

    A domain's value is a pattern of files, a group with a `kind`, or a list of such. `text_field` is the default of
    the user's files, `pip_options` go to the downloads.
    """

    domains: Mapping[str, object]
    text_field: str = "text"
    pip_options: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataCommand:
    """The keys of `sigmoe data`."""

    data: DataSettings
    out: str
    cache: str
    overwrite: bool = False


def run(config: Mapping[str, object]) -> None:
    """Prepare the dataset that the resolved `config` describes and print what it holds."""
    with offline_ranks() as ranks:
        _prepare(config, ranks)


def _prepare(config: Mapping[str, object], ranks: Workers) -> None:
    with ranks.together():
        command = from_mapping(DataCommand, config)
        settings, of = command.data, command.data.text_field
        domains = {name: _sources(value, f"data.domains.{name}", of) for name, value in settings.domains.items()}
        plain = DataConfig(**{field.name: getattr(settings, field.name) for field in fields(DataConfig)})
    out, cache = Path(command.out).expanduser(), Path(command.cache).expanduser()
    began = time.perf_counter()
    with progress_sink() as progress:
        workspace = Workspace(cache=cache, pip_options=settings.pip_options, progress=progress)
        made = prepare(plain, domains, out, workspace, overwrite=command.overwrite, workers=ranks)
    if made:
        notes().print(f"{out} prepared in {time.perf_counter() - began:.1f} s")
    else:
        notes().print(f"{out} is up to date: the same settings and files made it; nothing was done")
    ranks.from_first(lambda: _print_summary(open_dataset(out, check_ids=False), out))


def _sources(value: object, path: str, text_field: str) -> tuple[AnySource, ...]:
    if isinstance(value, list | tuple):
        return tuple(_source(item, f"{path}[{number}]", text_field) for number, item in enumerate(value))
    return (_source(value, path, text_field),)


def _source(value: object, path: str, text_field: str) -> AnySource:
    if isinstance(value, str):
        return Files(files=value, text_field=text_field)
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} must be a pattern of files or a group with a kind, got {value!r}")
    keys = dict(value)
    kind = keys.pop("kind", "files")
    if kind not in _KINDS:
        raise ValueError(f"{path}.kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    if kind == "files":
        keys = {"text_field": text_field, **keys}
    return from_mapping(_KINDS[kind], keys, path)


def _print_summary(dataset: Dataset, out: Path) -> None:
    rows = []
    for entry in dataset.manifest["domains"]:
        train, heldout = entry["splits"]["train"], entry["splits"]["heldout"]
        rows.append(
            [
                entry["name"],
                ", ".join(f"{source['name']} {source['version']}".strip() for source in entry["sources"]),
                f"{train['documents'] + heldout['documents']:,}",
                f"{entry['duplicates']:,}",
                f"{train['bytes'] + heldout['bytes']:,}",
                f"{train['tokens'] + heldout['tokens']:,}",
                f"{heldout['tokens']:,}",
                f"{(train['bytes'] + heldout['bytes']) / (train['tokens'] + heldout['tokens']):.2f}",
            ]
        )
    columns = ["domain", "source", "documents", "duplicates", "bytes", "tokens", "held-out tokens", "bytes/token"]
    title = f"{out}: vocabulary of {dataset.vocab_size:,}"
    expendable = ("source", "bytes/token", "duplicates", "documents")
    print_table(title, columns, rows, left=2, expendable=expendable)


if __name__ == "__main__":
    sys.exit(main(["data", *sys.argv[1:]]))
