"""`sigmoe generate`: continues prompts, greedily or by sampling."""

import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from ..moe.data.tokenizer import END_OF_TEXT, parse_tokenizer
from ..moe.domain_choice import choose_domains
from ..moe.generation.generate import GenerationConfig, OnToken, generate
from ..moe.generation.text import TextStream
from ..moe.model import Transformer
from ..moe.parsing import from_mapping
from ..moe.storage.durable import make_directory, write_file
from ..moe.stored import StoredModel, load_model, read_json
from .console import notes, progress_sink
from .kernel_choice import Kernels, backends_note, choose_backends
from .main import main
from .models import check_files, open_given_model
from .places import check_out
from .prompts import read_prompts
from .trainer import pick_device

_AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class GenerateCommand:
    """The keys of `sigmoe generate`."""

    checkpoint: str
    prompt: str | None = None
    prompts: tuple[str, ...] | None = None
    prompts_file: str | None = None
    domain: str | None = None
    max_tokens: int = 100
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    batch: int = 8
    check: bool = True
    stream: bool = True
    out: str | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    kernels: Kernels = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        self.generation()  # which validates itself

    def generation(self) -> GenerationConfig:
        """How tokens are chosen, and how many."""
        return GenerationConfig(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            batch=self.batch,
        )


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What followed a prompt."""

    prompt: str
    domain: str | None
    text: str
    tokens: int
    ended: bool  # by end-of-text

    def to_json(self) -> dict[str, object]:
        """Return plain JSON data."""
        finish = "end_of_text" if self.ended else "max_tokens"
        told = {"prompt": self.prompt, "domain": self.domain, "text": self.text}
        return {**told, "tokens": self.tokens, "finish": finish}


def run(config: Mapping[str, object]) -> None:
    """Continue the prompts that `config` names. Raises ValueError for a user's mistake, with nothing written."""
    command = from_mapping(GenerateCommand, config)
    out = None if command.out is None else Path(command.out).expanduser()
    if out is not None:
        check_out(out, out)
    device = torch.device(pick_device(command.device))
    texts = read_prompts(command.prompt, command.prompts, command.prompts_file)
    stored = open_given_model(command.checkpoint)
    check_domain(command, stored)
    tokenizer = tokenizer_of(command, stored)
    backends = choose_backends(command.kernels, stored.config, command.precision, device)
    prompts = [encode(tokenizer, number, text) for number, text in enumerate(texts, 1)]
    if command.threads is not None:
        torch.set_num_threads(command.threads)
    _note_length(command, stored, max(map(len, prompts)))
    if command.check:
        check_files(stored)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[command.precision]
    model = load_model(stored, device=device, dtype=dtype, backends=backends)
    if note := backends_note(command.kernels, backends, device):
        notes().print(note)
    domain_ids = choose(command, stored, model, prompts)
    names = [None] * len(texts) if domain_ids is None else [stored.registry.names[id] for id in domain_ids]
    model.pack()
    streams = command.stream and len(texts) == 1 and out is None
    tokens = continue_prompts(command, stored, tokenizer, model, prompts, domain_ids, streams=streams)
    done = [
        Continuation(
            prompt=text,
            domain=name,
            text=tokenizer.decode(ids, skip_special_tokens=True),
            tokens=len(ids),
            ended=len(ids) < command.max_tokens,
        )
        for text, name, ids in zip(texts, names, tokens)
    ]
    if out is not None:
        _keep(done, out)
    elif not streams:
        _show(done)


def check_domain(command: GenerateCommand, stored: StoredModel) -> None:
    """Raise ValueError where the model needs a domain and got none, or does not know the one it got."""
    known, listed = stored.registry.names, ", ".join(stored.registry.names)
    if command.domain is None and stored.needs_domain:
        raise ValueError(
            f"{command.checkpoint} routes by domain: give domain=auto (the prompt's tokens choose), or one of {listed}"
        )
    if command.domain not in (None, _AUTO, *known):
        raise ValueError(
            f"{command.checkpoint} knows no domain {command.domain!r}: give domain=auto or one of {listed}"
        )


def tokenizer_of(command: GenerateCommand, stored: StoredModel) -> Tokenizer:
    """Return the model's tokenizer; ValueError where it has none."""
    if stored.tokenizer is None:
        raise ValueError(f"{command.checkpoint} has no tokenizer.json: put the model's own beside its weights")
    return parse_tokenizer(stored.tokenizer, f"{stored.path}/tokenizer.json")


def encode(tokenizer: Tokenizer, number: int, text: str) -> list[int]:
    """Return a prompt's ids, with what the tokenizer puts before a text; ValueError where there are none."""
    ids: list[int] = tokenizer.encode(text).ids
    if not ids:
        raise ValueError(f"prompt {number} has no tokens: give it text")
    return ids


def end_of_text(stored: StoredModel, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that end a text: what a config.json of transformers says, else our own tokenizers' token."""
    given = read_json(stored.path / "config.json").get("eos_token_id") if stored.format != "sigmoe" else None
    given = tokenizer.token_to_id(END_OF_TEXT) if given is None else given
    return frozenset(id for id in (given if isinstance(given, list) else [given]) if isinstance(id, int))


def choose(
    command: GenerateCommand, stored: StoredModel, model: Transformer, prompts: list[list[int]]
) -> list[int] | None:
    """Return each prompt's domain id; None where the model computes the same for all of several."""
    if command.domain == _AUTO and stored.needs_domain:
        ids = choose_domains(model, prompts)
        for number, id in enumerate(ids, 1):
            notes().print(f"prompt {number}: domain {stored.registry.names[id]}")
        return ids
    if command.domain in (None, _AUTO):
        return [0] * len(prompts) if len(stored.registry.names) == 1 else None
    return [stored.registry.id_of(command.domain or "")] * len(prompts)


def continue_prompts(
    command: GenerateCommand,
    stored: StoredModel,
    tokenizer: Tokenizer,
    model: Transformer,
    prompts: list[list[int]],
    domain_ids: list[int] | None,
    *,
    streams: bool,
) -> list[list[int]]:
    """Return the tokens that follow the prompts; note how fast they came.

    Where `streams` they are printed as they come, else counted by a bar.
    """
    end = end_of_text(stored, tokenizer)
    begin = time.perf_counter()
    with _printed(tokenizer) if streams else _counted(len(prompts) * command.max_tokens) as on_token:
        tokens = generate(
            model, prompts, command.generation(), domain_ids=domain_ids, end_of_text=end, on_token=on_token
        )
    seconds, count = time.perf_counter() - begin, sum(map(len, tokens))
    read = sum(map(len, prompts))
    notes().print(f"{count:,} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s, after prompts of {read:,}")
    return tokens


@contextmanager
def _printed(tokenizer: Tokenizer) -> Iterator[OnToken]:
    """Yield what prints the text of tokens as they come."""
    text = TextStream(tokenizer)

    def print_piece(row: int, token: int) -> None:
        sys.stdout.write(text.push(token))
        sys.stdout.flush()

    try:
        yield print_piece
    finally:
        sys.stdout.write(text.finish() + "\n")
        sys.stdout.flush()


@contextmanager
def _counted(most: int) -> Iterator[OnToken]:
    """Yield what counts tokens, of which there are `most` at the most, in a bar that vanishes at the end."""
    number = itertools.count(1)
    with progress_sink(transient=True) as progress:
        progress("tokens, at the most", 0, most)
        yield lambda row, token: progress("tokens, at the most", next(number), most)


def _note_length(command: GenerateCommand, stored: StoredModel, longest: int) -> None:
    limit = stored.sequence_length
    if limit is not None and longest + command.max_tokens > limit:
        notes().print(
            f"note: {longest} tokens of prompt and up to {command.max_tokens} new ones go beyond the {limit} that the "
            "model was trained on"
        )


def _keep(done: list[Continuation], path: Path) -> None:
    make_directory(path.absolute().parent)
    lines = [json.dumps(continuation.to_json(), ensure_ascii=False) + "\n" for continuation in done]
    write_file(path, "".join(lines).encode())
    notes().print(f"wrote {path}")


def _show(done: list[Continuation]) -> None:
    for number, continuation in enumerate(done, 1):
        if len(done) > 1:
            domain = "" if continuation.domain is None else f" ({continuation.domain})"
            sys.stdout.write(f"--- {number}{domain}: {continuation.prompt}\n")
        sys.stdout.write(continuation.text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
