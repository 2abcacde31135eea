"""`sigmoe COMMAND key=value ...`: finds the command, composes its config, maps a user's mistake to one line."""

import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from .launcher import find_cluster, find_mpi

COMMANDS = {
    "data": "fetch or read domain-tagged text, train the tokenizer, write token files",
    "train": "train a model; continues a run that was interrupted",
    "evaluate": "loss, perplexity and bits per byte of held-out text, by domain; models beside each other",
    "generate": "continue prompts, greedily or by sampling; streams the text as it comes",
    "extract": "cut the exact submodel of some domains out of a model, verified against its parent",
    "convert": "write a model in transformers' format or ours, or a dense one as a sparse one that begins equal",
    "prune": "drop the experts that matter least to calibration text, offline; of a model larger than memory too",
    "verify": "hash every file of a checkpoint, find every expert exactly once; or hash a dataset",
    "bench": "measure sigmoe beside its peers on this machine",
}
# What may run as several processes; the rest refuses launchers.
_DISTRIBUTED = ("train",)
_OFFLINE = ("data", "extract", "convert", "prune")  # by mpirun
# Values that are taken as they stand: Hydra would read `prompt=def f(x):` as a call, `model=` as a choice of its group.
_LITERAL = {"generate": ("prompt",), "convert": ("model",), "prune": ("model", "data")}
_OPTIONS = """options:
  --help            help; after a COMMAND with every key, its default and every choice
  --cfg             print the composed config and stop
  --config-dir DIR  a folder with config groups of your own
  --traceback       show where an error came from"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 2 (one line: what the user can mend), 1 (a failing machine) or 130 (interrupted).

    Under a launcher all processes return the same, and only rank 0 prints.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _drop_package_root()
    try:
        cluster = find_cluster()
    except ValueError as error:
        return _told(arguments, (2, str(error)))
    mpi = find_mpi() if cluster is None else None
    if mpi is not None and arguments and arguments[0] in COMMANDS and arguments[0] not in _OFFLINE:
        refusal = "this command does not run under mpirun: start it without (train: with torchrun)"
        return _told(arguments, (2, refusal if mpi.rank == 0 else None))
    if cluster is None and mpi is None:
        return _told(arguments, _guarded(arguments))
    from .cluster import leave, only_first_speaks  # torch takes a while: not for `sigmoe --help`

    if mpi is not None:
        with only_first_speaks(mpi):
            return _told(arguments, _guarded(arguments))
    assert cluster is not None
    with only_first_speaks(cluster):
        code, line = _guarded(arguments, distributed=True)
        _told(arguments, (code, line))
    code, known = leave(cluster, code)
    if not known:  # rank 0 knows nothing of it, and may wait for this process
        _told(arguments, (code, f"rank {cluster.rank}: {line}"))
    return code


def _told(arguments: Sequence[str], result: tuple[int, str | None]) -> int:
    """Print the line, if there is one, and return the exit code."""
    code, line = result
    if line is not None:
        print(f"sigmoe {arguments[0]}: {line}" if arguments else f"sigmoe: {line}", file=sys.stderr)  # noqa: T201
    return code


def _guarded(arguments: Sequence[str], *, distributed: bool = False) -> tuple[int, str | None]:
    """Run the command; return the exit code, and the line to print of what went wrong."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_usage())  # noqa: T201
        return 0, None
    command, *rest = arguments
    try:
        if distributed and command in COMMANDS and command not in _DISTRIBUTED:
            raise ValueError("this command runs in one process: start it without the launcher")
        _run(command, rest)
    except KeyboardInterrupt:
        return 130, "interrupted"
    except (ValueError, OSError) as error:
        if "--traceback" in rest:
            traceback.print_exc()
        return 2 if isinstance(error, ValueError) else 1, " ".join(str(error).split())
    except RuntimeError as error:
        line = _lost_peer(error) if distributed else None
        if line is None:
            raise
        return 1, line
    return 0, None


def _lost_peer(error: RuntimeError) -> str | None:
    from .cluster import lost_peer  # torch takes a while

    return lost_peer(error)


def _run(command: str, rest: list[str]) -> None:
    if command not in COMMANDS:
        raise ValueError(f"unknown command; commands: {', '.join(COMMANDS)}")
    from .compose import compose_command, describe_command  # Hydra takes a while: not for `sigmoe --help`

    config_dir, overrides, flags = _split(rest)
    if flags & {"--help", "-h"}:
        head = f"sigmoe {command} key=value ...: {COMMANDS[command]}"
        print("\n\n".join([head, _OPTIONS, describe_command(command)]))  # noqa: T201
        return
    literal, overrides = _take_literal(command, overrides)
    config = compose_command(command, overrides, config_dir) | literal
    if "--cfg" in flags:
        import yaml

        print(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), end="")  # noqa: T201
        return
    importlib.import_module(f".{command}", __package__).run(config)


def _take_literal(command: str, overrides: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the value that is taken as it stands, by its key, where it is given; and the other overrides."""
    literal, others = dict[str, str](), list[str]()
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and key in _LITERAL.get(command, ()):
            literal[key] = value
        else:
            others.append(override)
    return literal, others


def _split(rest: list[str]) -> tuple[str | None, list[str], set[str]]:
    """Split the arguments into the config folder, the overrides and the flags."""
    config_dir, overrides, flags = None, [], set()
    pending = iter(rest)
    for argument in pending:
        if argument == "--config-dir":
            config_dir = next(pending, None)
            if config_dir is None:
                raise ValueError("--config-dir needs a folder")
        elif argument in ("--help", "-h", "--cfg", "--traceback"):
            flags.add(argument)
        elif argument.startswith("-"):
            raise ValueError(f"unknown option {argument}; options: --help, --cfg, --config-dir DIR, --traceback")
        else:
            overrides.append(argument)
    return config_dir, overrides, flags


def _usage() -> str:
    rows = [f"  {name:8} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: sigmoe COMMAND key=value ...", "", *rows, "", _OPTIONS])


def _drop_package_root() -> None:
    """Take the package's own folder off sys.path: there our `kernels` would shadow Hugging Face's."""
    root = Path(__file__).resolve().parent.parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]


if __name__ == "__main__":
    sys.exit(main())
