"""What `sigmoe convert` proves of a model that it wrote: tensors read back, logits compared.

Shape letters: B sequences, S positions, V vocabulary.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor

from ..moe.batch import IGNORED, Batch
from ..moe.extract.in_transformers import load_in_transformers
from ..moe.extract.verify import max_difference
from ..moe.keyed import numpy_generator
from ..moe.storage.tensor_reader import TensorReader
from ..moe.stored import StoredModel
from ..moe.streaming import StreamedModel
from .console import notes
from .convert_plan import Conversion, ConvertCommand
from .memory import host_memory

TOLERANCE = 1e-5  # of the largest logit
_BATCH, _LENGTH = 2, 96
_HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class LogitCheck:
    """How logits compare. `max_relative_difference` is max |a - b| / max |b|, on token ids that a key draws."""

    against: str  # transformers and its version, or the dense parent
    tokens: int
    max_relative_difference: float


def check_head(parent: StoredModel) -> None:
    """Raise ValueError where a tied model of transformers' has a head of its own all the same, which would be lost."""
    if parent.format == "sigmoe" or not parent.config.tie_embeddings:
        return
    tensors, embedding = TensorReader(parent.path, "model"), parent.tensors
    if _HEAD not in tensors.names():
        return
    if not torch.equal(tensors.read(_HEAD), embedding.read("model.embed_tokens.weight")):
        raise ValueError(
            f"{parent.path} holds a {_HEAD} that differs from the embedding, but config.json says "
            "tie_word_embeddings: set it to false there"
        )
    notes().print(f"{_HEAD} is the embedding once more (tie_word_embeddings): it is left out")


def require_transformers(command: ConvertCommand, parent: StoredModel, conversion: Conversion) -> None:
    """Raise ValueError where the logits could not be compared in transformers, which holds the whole model."""
    if not command.verify or conversion.inherits or "sigmoe" == parent.format == conversion.format:
        return
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("transformers is not installed: pip install 'sigmoe[hf]', or verify=false")
    memory = host_memory()
    needed = 4 * conversion.num_parameters
    if needed > memory:
        raise ValueError(
            f"verify=true opens the model in transformers in fp32, {needed / 1e9:,.1f} GB, and there are "
            f"{memory / 1e9:,.1f} GB of memory: verify=false reads the tensors back all the same"
        )


def check_logits(parent: StoredModel, child: StoredModel, rounding: torch.dtype | None) -> LogitCheck | None:
    """Compare transformers' logits of the one that is its own with ours of the other; None where neither is.

    Parameters of the parent are rounded to `rounding` first, as the child's were. Raises ValueError where they differ.
    """
    if child.format != "sigmoe":
        theirs, ours = load_in_transformers(str(child.path)), StreamedModel(parent, rounding=rounding)
    elif parent.format != "sigmoe":
        theirs, ours = load_in_transformers(str(parent.path)), StreamedModel(child)
        if rounding is not None:
            for parameter in theirs.parameters():
                parameter.data = parameter.data.to(rounding).float()
    else:
        return None
    batch = _batch(parent.config.vocab_size, 0)
    with torch.no_grad():
        theirs_BSV = theirs(input_ids=batch.token_BS).logits
    (ours_BSV,) = _logits(ours, batch)
    relative = max_difference(theirs_BSV, ours_BSV) / float(ours_BSV.abs().max())
    return _checked(f"transformers {version('transformers')}", batch, relative)


def check_inherited(parent: StoredModel, child: StoredModel) -> LogitCheck:
    """Compare the logits of a sparse model, under each of its domains, with those of the dense one it begins as."""
    batch, size = _batch(parent.config.vocab_size, 0), parent.config.vocab_size
    (dense_BSV,) = _logits(StreamedModel(parent), batch)
    relative = 0.0
    for domain in child.registry.domains:
        (sparse_BSV,) = _logits(StreamedModel(child, domains=[domain.id]), _batch(size, domain.id))
        relative = max(relative, max_difference(sparse_BSV[..., :size], dense_BSV) / float(dense_BSV.abs().max()))
    return _checked("the dense parent", batch, relative)


def _checked(against: str, batch: Batch, relative: float) -> LogitCheck:
    if not relative <= TOLERANCE:
        raise ValueError(
            f"the logits differ from those of {against} by {relative:g} of the largest, above {TOLERANCE:g}: nothing "
            "was kept; verify=false leaves the comparison out"
        )
    return LogitCheck(against=against, tokens=batch.token_BS.numel(), max_relative_difference=relative)


def _logits(model: StreamedModel, batch: Batch) -> Iterator[Tensor]:
    return model.run_head(model.run_layers([batch]))


def _batch(vocab_size: int, domain: int) -> Batch:
    """Token ids that a key draws, one document a sequence."""
    ids = numpy_generator("convert").integers(0, vocab_size, (_BATCH, _LENGTH))
    token_BS = torch.from_numpy(ids)
    return Batch(
        token_BS=token_BS,
        start_BS=torch.zeros_like(token_BS),
        label_BS=torch.full_like(token_BS, IGNORED),
        domain_B=torch.full((_BATCH,), domain),
        sample_B=torch.arange(_BATCH),
    )
