"""lm-eval on an extracted submodel, without a network: its figures are those of the domain in the full model."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sigmoe.launch.main import main
from sigmoe.launch.models import open_given_model
from sigmoe.moe.data.dataset import open_dataset
from sigmoe.moe.data.tokenizer import END_OF_TEXT, open_tokenizer, parse_tokenizer
from sigmoe.moe.stored import load_model

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed", allow_module_level=True)

HERE = Path(__file__).parent
LENGTH = 256  # longer than every document, so that lm-eval cuts none into windows
# fp32 on both sides and the same weights, but transformers sums in another order: a document's loss was found to differ
# by 4e-8 of itself, and other processors sum in yet other orders.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run of two domains, trained for a moment; large initial weights make every token's loss its own."""
    out = tmp_path_factory.mktemp("lm-eval") / "run"
    settings = [f"sequence_length={LENGTH}", "model.init_std=0.2", "steps=3", "threads=1"]
    assert main(["train", *tiny, *settings, f"out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def texts(dataset):
    """Held-out documents on ships."""
    tokenizer, heldout = open_tokenizer(dataset / "tokenizer.json"), open_dataset(dataset).domain("ships").heldout
    return [tokenizer.decode(heldout.document(index).tolist()) for index in range(8)]


@pytest.fixture(scope="module")
def questions(texts):
    """Three endings each, the right one in another place every time."""
    made = []
    for number, text in enumerate(texts):
        head, _, tail = text.strip().rpartition(" ")
        endings = ["oven.", "starboard deck."]
        endings.insert(number % 3, tail)
        made.append({"text": head, "endings": endings, "answer": number % 3})
    return made


@pytest.fixture(scope="module")
def measured(run, texts, questions, tmp_path_factory):
    """What lm-eval found for the submodel that `sigmoe extract` cut out."""
    folder = tmp_path_factory.mktemp("offline")
    assert main(["extract", f"checkpoint={run}", "domain=ships", f"out={folder}/ships", "verify=500"]) == 0
    documents = {"heldout": [{"text": text} for text in texts], "next_words": questions}
    for task, rows in documents.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"), "1")
    done = subprocess.run(
        [sys.executable, HERE / "lm_eval_worker.py", "ships", HERE / "tasks", "results.json"],
        cwd=folder,
        env={**os.environ, **offline, "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(run):
    return parse_tokenizer(open_given_model(str(run)).tokenizer, "tokenizer.json")


@pytest.fixture(scope="module")
def token_losses(run):
    """The full model's loss of each of some ids but the first, nats, under a domain's experts."""
    stored = open_given_model(str(run))
    model = load_model(stored)

    def losses(ids, domain="ships"):
        assert len(ids) <= LENGTH
        token_BS, domain_B = torch.tensor([ids]), torch.tensor([stored.registry.id_of(domain)])
        return model(token_BS[:, :-1], domain_B=domain_B, label_BS=token_BS[:, 1:]).loss_BS[0].double()

    return losses


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def document(tokenizer, text):
    """lm-eval scores a text's first token too, after end-of-text."""
    return [tokenizer.token_to_id(END_OF_TEXT), *encode(tokenizer, text)]


def test_rolling_perplexity_is_the_domains_loss(measured, texts, tokenizer, token_losses):
    nats = [float(token_losses(document(tokenizer, text)).sum()) for text in texts]
    num_bytes = sum(len(text.encode()) for text in texts)
    for (theirs,), ours in zip(measured["answers"]["heldout"], nats, strict=True):
        assert -float(theirs) == pytest.approx(ours, rel=TOLERANCE)
    totals = measured["results"]["heldout"]
    assert totals["bits_per_byte,none"] == pytest.approx(sum(nats) / num_bytes / math.log(2), rel=TOLERANCE)
    words = sum(len(re.split(r"\s+", text)) for text in texts)  # lm-eval counts one more after a final line end
    assert math.log(totals["word_perplexity,none"]) == pytest.approx(sum(nats) / words, rel=TOLERANCE)


def test_another_domains_experts_would_be_noticed(measured, texts, tokenizer, token_losses):
    for (theirs,), text in zip(measured["answers"]["heldout"], texts, strict=True):
        ours = float(token_losses(document(tokenizer, text), "recipes").sum())
        assert abs(-float(theirs) / ours - 1) > 100 * TOLERANCE


def test_multiple_choice_takes_the_likeliest_ending(measured, questions, tokenizer, token_losses):
    right = []
    for question, answers in zip(questions, measured["answers"]["next_words"], strict=True):
        context, scores = len(encode(tokenizer, question["text"])), []
        for ending, (theirs, _) in zip(question["endings"], answers, strict=True):
            ids = encode(tokenizer, f"{question['text']} {ending}")
            scores.append(-float(token_losses(ids)[context - 1 :].sum()))
            assert float(theirs) == pytest.approx(scores[-1], rel=TOLERANCE)
        right.append(scores.index(max(scores)) == question["answer"])
    assert measured["results"]["next_words"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right)
