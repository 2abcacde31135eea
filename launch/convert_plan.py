"""What `sigmoe convert` is given, and what it will write."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..moe.canonical import expected_shapes
from ..moe.config import ModelConfig, RouterConfig
from ..moe.counts import count_parameters
from ..moe.data.dataset import Dataset, open_dataset
from ..moe.data.tokenizer import open_tokenizer, parse_tokenizer
from ..moe.domains import DomainRegistry
from ..moe.extract import Piece, Submodel, SubmodelWriter, plan_submodel
from ..moe.hf.formats import choose_format
from ..moe.inherit_plan import inherited_config, inherited_registry
from ..moe.inherit_write import Inheritance, InheritanceWriter
from ..moe.parsing import to_mapping
from ..moe.stored import ANY_DOMAIN, StoredModel
from .file_bytes import DEFAULT_FILE_BYTES, parse_file_bytes

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OF_INHERITANCE = ("domains", "dataset", "sparse_layers", "embedding_slots")
_SIGMOE = "sigmoe"


@dataclass(frozen=True, kw_only=True)
class ConvertCommand:
    """The keys of `sigmoe convert`."""

    model: str | None = None
    out: str
    to: Literal["auto", "sigmoe", "mixtral", "qwen3_moe", "olmoe", "mistral", "qwen3"] = "auto"
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    verify: bool = True
    check: bool = True
    threads: int | None = None
    router: RouterConfig | None = None
    domains: tuple[str, ...] | None = None
    dataset: str | None = None
    sparse_layers: str | None = None
    embedding_slots: Mapping[str, int] | None = None
    seed: int = 0
    file_bytes: int | str = DEFAULT_FILE_BYTES

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("missing key model: give model=... (sigmoe convert --help)")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1 (or null), got {self.threads}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in [0, 2^63), got {self.seed}")
        given = [key for key in _OF_INHERITANCE if getattr(self, key) is not None]
        self.max_file_bytes  # noqa: B018 - it validates itself
        if self.router is None and given:
            raise ValueError(f"{given[0]} says how a dense model becomes sparse: give router= too, or leave it out")
        if self.router is not None and (self.to not in ("auto", _SIGMOE) or self.dtype is not None):
            raise ValueError("router= writes sigmoe's format, parameters as they are: convert the result once more")
        if self.domains is not None and self.dataset is not None:
            raise ValueError("domains and dataset both name the domains: give one of them")

    @property
    def given(self) -> str:
        """The model that is converted."""
        assert self.model is not None
        return self.model

    @property
    def rounding(self) -> torch.dtype | None:
        """What parameters are rounded to."""
        return None if self.dtype is None else _DTYPES[self.dtype]

    @property
    def max_file_bytes(self) -> int:
        """The most that a weight file holds."""
        return parse_file_bytes(self.file_bytes)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What will be written, and what writes it."""

    config: ModelConfig
    registry: DomainRegistry
    format: str  # sigmoe, or transformers' model type
    inherits: bool
    sources: frozenset[str]  # the parent's tensors that are read
    settings: Mapping[str, Any]  # by which the same conversion is known again
    writer: SubmodelWriter | InheritanceWriter

    @property
    def num_parameters(self) -> int:
        """Trained parameters."""
        return count_parameters(self.config, self.registry).total


def plan_conversion(command: ConvertCommand, parent: StoredModel) -> Conversion:
    """Say what `command` makes of `parent`; ValueError in one line where it cannot be."""
    if command.router is not None:
        return _inherit(command, command.router, parent)
    to_sigmoe = command.to == _SIGMOE or (command.to == "auto" and parent.format != _SIGMOE)
    submodel = _whole(parent, to_sigmoe)
    format, reason = (_SIGMOE, "sigmoe's own format") if to_sigmoe else _fitting(command, submodel)
    return Conversion(
        config=submodel.config,
        registry=submodel.registry,
        format=format,
        inherits=False,
        sources=submodel.sources,
        settings={"format": format, "dtype": command.dtype, "inherits": None, "file_bytes": command.max_file_bytes},
        writer=SubmodelWriter(
            parent,
            submodel,
            dtype=command.rounding,
            sigmoe_format=to_sigmoe,
            reason=reason,
            max_file_bytes=command.max_file_bytes,
        ),
    )


def _whole(parent: StoredModel, to_sigmoe: bool) -> Submodel:
    """The model itself; for transformers, one of a single domain without its registry's traces."""
    if not to_sigmoe and len(parent.registry.domains) == 1:
        return plan_submodel(parent.config, parent.registry, parent.registry.names)
    pieces = {name: Piece(source=name) for name in expected_shapes(parent.config, parent.registry)}
    return Submodel(config=parent.config, registry=parent.registry, pieces=pieces)


def _fitting(command: ConvertCommand, submodel: Submodel) -> tuple[str, str]:
    choice = choose_format(submodel.config, submodel.registry)
    if choice.format is None:
        raise ValueError(f"transformers knows no such model: {choice.reason}")
    if command.to not in ("auto", choice.format):
        raise ValueError(f"to={command.to} cannot hold it; to={choice.format} can: {choice.reason}")
    return choice.format, choice.reason


def _inherit(command: ConvertCommand, router: RouterConfig, parent: StoredModel) -> Conversion:
    dataset = None if command.dataset is None else _open(command.dataset, parent)
    names = _names(command, router, dataset)
    config = inherited_config(
        parent.config,
        router,
        sparse_layers=command.sparse_layers or "all",
        embedding_slots=command.embedding_slots,
        vocab_size=max(parent.config.vocab_size, 0 if dataset is None else dataset.vocab_size),
    )
    plan = Inheritance(
        parent=parent,
        config=config,
        registry=inherited_registry(config, names),
        counts={} if dataset is None else {name: dataset.token_counts(name) for name in names},
        tokenizer=parent.tokenizer if dataset is None else dataset.tokenizer_path.read_bytes(),
        seed=command.seed,
    )
    inherits = {"model": to_mapping(config), "seed": command.seed, "domains": list(names)}
    return Conversion(
        config=config,
        registry=plan.registry,
        format=_SIGMOE,
        inherits=True,
        sources=frozenset(parent.tensors.names()),
        settings={
            "format": _SIGMOE,
            "dtype": None,
            "inherits": inherits | {"dataset": None if dataset is None else dataset.digest},
            "file_bytes": command.max_file_bytes,
        },
        writer=InheritanceWriter(plan, max_file_bytes=command.max_file_bytes),
    )


def _names(command: ConvertCommand, router: RouterConfig, dataset: Dataset | None) -> tuple[str, ...]:
    if dataset is not None:
        return dataset.domain_names
    if router.name == "rre":
        raise ValueError("router=rre builds its tables from how often tokens occur: give dataset=")
    if command.domains is None and router.name != "top_k":
        raise ValueError(f"router={router.name} routes by domain: give domains=[...] or dataset=")
    return command.domains or (ANY_DOMAIN,)


def _open(path: str, parent: StoredModel) -> Dataset:
    """Open the dataset whose token ids the sparse model will know: the parent's, and perhaps more."""
    dataset = open_dataset(Path(path).expanduser(), check_ids=False)
    if parent.tokenizer is None:
        raise ValueError(f"{parent.path} has no tokenizer.json: nothing says that it reads the token ids of {path}")
    theirs = parse_tokenizer(parent.tokenizer, f"{parent.path}/tokenizer.json").get_vocab(with_added_tokens=True)
    ours = open_tokenizer(dataset.tokenizer_path)
    moved = sorted(token for token, id in theirs.items() if ours.token_to_id(token) != id)
    if moved:
        raise ValueError(
            f"{path} has another tokenizer than {parent.path}: {len(moved)} of its {len(theirs)} tokens ({moved[0]!r}) "
            "have another id there, or none; give a dataset whose tokenizer is the model's, or extends it"
        )
    return dataset
