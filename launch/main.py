"""`sigmoe COMMAND key=value ...`: finds the command, composes its config, maps a user's mistake to one line."""

import importlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..moe.storage.hashing import WriteError
from .launcher import Cluster, UnreachableError, find_cluster, find_mpi

if TYPE_CHECKING:  # it brings torch: not for `sigmoe --help`
    from .cluster import Peers

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
  -m, --multirun    train: one run for each of several values (key=a,b), one after the other, in folders under out
  --traceback       show where an error came from"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 2 (one line: what the user can mend), 1 (a failing machine) or 130 (interrupted).

    Under a launcher all processes return the same, and only rank 0 prints.
    """
    arguments = [
        word for word in (sys.argv[1:] if argv is None else argv) if not re.fullmatch(r"--local[-_]rank=\d+", word)
    ]  # deepspeed says to each of its processes what is in the environment as well
    _drop_package_root()
    try:
        cluster, mpi = find_cluster(), find_mpi()
    except ValueError as error:
        return _told(arguments, 2, str(error))
    if cluster is None:
        return _told(arguments, *_guarded(arguments))
    from .cluster import only_first_speaks  # torch takes a while: not for `sigmoe --help`

    if mpi is not None and arguments and arguments[0] in _OFFLINE:
        with only_first_speaks(mpi):
            return _told(arguments, *_guarded(arguments))
    refusal = _refusal(arguments, cluster)
    if refusal is not None:
        return _told(arguments, 2, refusal if cluster.rank == 0 else None)
    return _together(arguments, cluster)


def _refusal(arguments: Sequence[str], cluster: Cluster) -> str | None:
    """Return why this is not for several processes; None where it is."""
    if arguments and arguments[0] in COMMANDS and arguments[0] not in _DISTRIBUTED:
        several = "alone, or under mpirun" if arguments[0] in _OFFLINE else "without the launcher"
        return f"{cluster.launcher} started {cluster.size} processes, this command runs in one: start it {several}"
    if {"-m", "--multirun"}.intersection(arguments):
        return f"-m starts one job after the other: start it without {cluster.launcher}"
    return None


def _together(arguments: Sequence[str], cluster: Cluster) -> int:
    """Run the command as one of several processes; return the exit code of all."""
    from .cluster import Peers, only_first_speaks
    from .mpi import agree

    try:
        peers = Peers(agree(cluster))
        with only_first_speaks(cluster):
            code, line = _guarded(arguments, peers)
            _told(arguments, code, line)
    except UnreachableError as error:  # nobody else can say it
        return _told(arguments, 2, str(error))
    except ValueError as error:  # no agreement: all know it
        return _told(arguments, 2, str(error) if cluster.rank == 0 else None)
    code, known = peers.leave(code)
    if code == 0 and cluster.rank == 0 and "SIGMOE_RUNNING" in os.environ:
        Path(os.environ["SIGMOE_RUNNING"]).unlink(missing_ok=True)  # mpirun.sh looks whether it is there
    if not known:  # rank 0 knows nothing of it, and may wait for this process
        _told(arguments, code, f"rank {cluster.rank}: {line}")
    if any(thread.daemon for thread in threading.enumerate()):
        # One that waits in C++, for a store that is gone, would abort the process when Python ends.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _told(arguments: Sequence[str], code: int, line: str | None) -> int:
    """Print the line, if there is one, and return the exit code."""
    if line is not None:
        print(f"sigmoe {arguments[0]}: {line}" if arguments else f"sigmoe: {line}", file=sys.stderr)  # noqa: T201
    return code


def _guarded(arguments: Sequence[str], peers: "Peers | None" = None) -> tuple[int, str | None]:
    """Run the command; return the exit code, and the line to print of what went wrong."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(_usage())  # noqa: T201
        return 0, None
    command, *rest = arguments
    try:
        return _run(command, rest, peers), None
    except KeyboardInterrupt:
        return 130, "interrupted"
    except UnreachableError:
        raise
    except (ValueError, OSError) as error:
        if "--traceback" in rest:
            traceback.print_exc()
        mistake = isinstance(error, ValueError) and not isinstance(error, WriteError)
        return 2 if mistake else 1, " ".join(str(error).split())
    except RuntimeError as error:
        if peers is None:
            raise
        from .lost_peer import lost_peer  # torch takes a while

        line = lost_peer(error)
        if line is None:
            raise
        return 1, line


def _run(command: str, rest: list[str], peers: "Peers | None") -> int:
    """Run the command; return the exit code."""
    if command not in COMMANDS:
        raise ValueError(f"unknown command; commands: {', '.join(COMMANDS)}")
    from .compose import compose_command, describe_command  # Hydra takes a while: not for `sigmoe --help`

    config_dir, overrides, flags = _split(rest)
    if flags & {"--help", "-h"}:
        head = f"sigmoe {command} key=value ...: {COMMANDS[command]}"
        print("\n\n".join([head, _OPTIONS, describe_command(command)]))  # noqa: T201
        return 0
    if flags & {"--multirun", "-m"}:
        from .sweep import sweep

        return sweep(command, overrides, config_dir)
    literal, overrides = _take_literal(command, overrides)
    config = compose_command(command, overrides, config_dir) | literal
    if "--cfg" in flags:
        import yaml

        print(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), end="")  # noqa: T201
        return 0
    module = importlib.import_module(f".{command}", __package__)
    if command in _DISTRIBUTED:
        module.run(config, peers)
    else:
        module.run(config)
    return 0


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
        elif argument in ("--help", "-h", "--cfg", "--traceback", "--multirun", "-m"):
            flags.add(argument)
        elif argument.startswith("-"):
            raise ValueError(f"unknown option {argument}; options: --help, --cfg, --config-dir DIR, -m, --traceback")
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
