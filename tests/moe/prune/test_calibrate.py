"""Every criterion against a naive computation in float64 on models of transformers, and the same bits however run."""

import itertools
import math

import pytest
import torch

from sigmoe.moe.canonical import expert_of
from sigmoe.moe.data.dataset import open_dataset
from sigmoe.moe.prune.budget import choose_experts, choose_subsets, parse_budget
from sigmoe.moe.prune.calibrate import calibrate
from sigmoe.moe.prune.criteria import DATA_CRITERIA, saliency, subset_errors
from sigmoe.moe.prune.spill import Spill
from sigmoe.moe.prune.sums import save_sums
from sigmoe.moe.prune.text import dataset_text, jsonl_text
from sigmoe.moe.storage.hashing import WriteError

MODELS = ("mixtral", "mixtral tied", "qwen3_moe", "olmoe")
TOLERANCE = 1e-6


def norm_relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def documents_of(text):
    """Every document as a sequence of ids of its own, cut where a sequence ends."""
    for batch in map(text.batch, range(len(text))):
        for token_S, start_S in zip(batch.token_BS, batch.start_BS):
            for start in start_S.unique():
                yield token_S[start_S == start]


class Naive:
    """Runs a model of transformers in float64 over one document after the other, and sums with plain loops."""

    def __init__(self, model, text):
        self.model, config = model.double(), model.config
        self.top_k = config.num_experts_per_tok
        self.renormalize = getattr(config, "norm_topk_prob", True)
        self.layers = [layer for layer in model.model.layers if hasattr(layer.mlp, "gate")]
        self.sums = [self._zeros(layer.mlp) for layer in self.layers]
        for index, layer in enumerate(self.layers):
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args, i=index: self._before(i, args[0]))
            layer.mlp.register_forward_hook(lambda _, args, out, i=index: self._experts(i, args[0], out))
            layer.register_forward_hook(lambda _, args, out, i=index: self._after(i, out))
        with torch.no_grad():
            for token_S in documents_of(text):
                self.seen = {}
                model(token_S[None])

    def _zeros(self, block):
        number = block.gate.weight.shape[0]
        names = ("frequency", "gate", "norm", "gate_activation", "easy_ep")
        vectors = {name: torch.zeros(number, dtype=torch.float64) for name in names}
        subsets = [s for k in range(self.top_k, number + 1) for s in itertools.combinations(range(number), k)]
        return {
            **vectors,
            "prob": torch.zeros(number, number, dtype=torch.float64),
            "subsets": dict.fromkeys(subsets, 0.0),
        }

    def _before(self, index, x_BSD):
        self.seen[index, "before"] = x_BSD[0]

    def _chosen(self, logits, among):
        power = {e: math.exp(logits[e]) for e in among}
        best = sorted(among, key=lambda e: -power[e])[: self.top_k]
        total = sum(power[e] for e in (best if self.renormalize else among))
        return {e: power[e] / total for e in best}

    def _output(self, outputs_ED, chosen):
        weight_E = torch.tensor([chosen.get(e, 0.0) for e in range(len(outputs_ED))], dtype=torch.float64)
        return weight_E @ outputs_ED

    def _experts(self, index, x_BSD, out_BSD):
        block, sums, self.seen[index, "chosen"] = self.layers[index].mlp, self.sums[index], []
        for x_D, out_D in zip(x_BSD[0], out_BSD.reshape(x_BSD.shape)[0]):
            outputs = []
            for gate_up_GD, down_DF in zip(block.experts.gate_up_proj, block.experts.down_proj):
                gate_F, up_F = (gate_up_GD @ x_D).chunk(2)
                outputs.append(down_DF @ (torch.nn.functional.silu(gate_F) * up_F))
            logits_E = block.gate.weight @ x_D
            prob_E = logits_E.softmax(0)
            sums["prob"] += torch.outer(prob_E, prob_E)
            logits, outputs_ED = logits_E.tolist(), torch.stack(outputs)
            chosen = self._chosen(logits, range(len(logits)))
            whole_D = self._output(outputs_ED, chosen)
            assert norm_relative(whole_D, out_D) < 1e-6  # what transformers itself computes
            for subset in sums["subsets"]:
                part_D = self._output(outputs_ED, self._chosen(logits, subset))
                sums["subsets"][subset] += float((whole_D - part_D).square().sum())
            self.seen[index, "chosen"].append({e: (g, float(outputs[e].norm())) for e, g in chosen.items()})

    def _after(self, index, out):
        after_SD = (out[0] if isinstance(out, tuple) else out).reshape(self.seen[index, "before"].shape)
        for before_D, after_D, chosen in zip(self.seen[index, "before"], after_SD, self.seen[index, "chosen"]):
            turned = max(1 - float(before_D @ after_D / before_D.norm() / after_D.norm()), 0)
            for e, (g, norm) in chosen.items():
                for name, value in {
                    "frequency": 1,
                    "gate": g,
                    "norm": norm,
                    "gate_activation": g * norm,
                    "easy_ep": g * norm * turned,
                }.items():
                    self.sums[index][name][e] += value

    def saliency(self, criterion):
        match criterion:
            case "activation":
                return [sums["norm"] / sums["frequency"].clamp(min=1) for sums in self.sums]
            case "reap":
                return [sums["gate_activation"] / sums["frequency"].clamp(min=1) for sums in self.sums]
            case "reconstruction":
                alone = [list(itertools.combinations(range(len(s["gate"])), len(s["gate"]) - 1)) for s in self.sums]
                # The subset without expert e comes last but e.
                return [torch.tensor([s["subsets"][x] for x in a[::-1]]).double() for s, a in zip(self.sums, alone)]
        return [sums[criterion] for sums in self.sums]

    def best(self, criterion, keep):
        """The kept experts of each layer, by plain sorting, or by trying all."""
        if criterion == "reconstruction":
            return tuple(
                min((s for s in sums["subsets"] if len(s) == keep), key=sums["subsets"].get) for sums in self.sums
            )
        ranked = [sorted(range(len(v)), key=lambda e: (-v[e], e)) for v in self.saliency(criterion)]
        return tuple(tuple(sorted(order[:keep])) for order in ranked)


@pytest.fixture(scope="module", params=MODELS)
def both(request, hf_model, dataset, tmp_path_factory):
    """The naive sums, and ours: short sequences of several documents, odd batches, a rest of another length."""
    theirs, model = hf_model(request.param)
    text = dataset_text(model, open_dataset(dataset), tokens=150, sequence_length=41, batch_size=3, seed=5)
    assert len({text.batch(i).token_BS.shape for i in range(len(text))}) >= 2
    assert any(text.batch(i).start_BS.max() > 0 for i in range(len(text)))
    return Naive(theirs, text), calibrate(model, text, tmp_path_factory.mktemp("work") / "w", subsets=True), model


@pytest.mark.parametrize("criterion", DATA_CRITERIA)
def test_every_criterion_is_the_naive_one(both, criterion):
    naive, sums, model = both
    for ours_E, theirs_E in zip(saliency(sums.layers, criterion), naive.saliency(criterion), strict=True):
        assert norm_relative(ours_E, theirs_E) < TOLERANCE
    for keep in (3, 4, 5):
        budget = parse_budget({"experts": keep})
        if criterion == "reconstruction":
            kept = choose_subsets([subset_errors(layer) for layer in sums.layers], budget, model.config)
        else:
            kept = choose_experts(saliency(sums.layers, criterion), budget, model.config)
        assert kept == naive.best(criterion, keep)


def test_every_sum_is_the_naive_one(both):
    naive, sums, model = both
    for ours, theirs in zip(sums.layers, naive.sums, strict=True):
        assert torch.equal(ours.count_E, theirs["frequency"].long())
        assert int(ours.count_E.sum()) == model.config.router.top_k * ours.tokens == 150 * model.config.router.top_k
        assert norm_relative(ours.prob_EE, theirs["prob"]) < TOLERANCE
        named = {sum(1 << e for e in subset): error for subset, error in theirs["subsets"].items()}
        finite = ours.subset_error.isfinite().nonzero().flatten().tolist()
        assert sorted(named) == finite
        assert norm_relative(ours.subset_error[finite], torch.tensor([named[i] for i in finite]).double()) < TOLERANCE
        if model.config.router.renormalize:
            assert ours.subset_error[-1] == 0


def bytes_of(folder, sums):
    save_sums(folder, sums)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_workers_get_the_bits_of_one(hf_model, jsonl, tmp_path, in_threads):
    _, model = hf_model("qwen3_moe")
    text = jsonl_text(model, jsonl, tokens=400, sequence_length=32, batch_size=2)
    alone = bytes_of(tmp_path / "alone", calibrate(model, text, tmp_path / "work"))
    results = in_threads(3, lambda workers: calibrate(model, text, tmp_path / "shared", workers=workers))
    for rank, sums in enumerate(results):
        assert bytes_of(tmp_path / f"rank{rank}", sums) == alone


@pytest.mark.parametrize("method", ["prepare", "write_hidden", "finish", "sums"])
def test_what_the_disk_refuses_one_all_are_told(hf_model, jsonl, tmp_path, in_threads, monkeypatch, method):
    _, model = hf_model("olmoe")
    text = jsonl_text(model, jsonl, tokens=200, sequence_length=32, batch_size=2)

    def refuse(*args):
        raise WriteError("full")

    monkeypatch.setattr(Spill, method, refuse)
    results = in_threads(2, lambda workers: calibrate(model, text, tmp_path / "work", workers=workers))
    assert [(type(error), str(error)) for error in results] == [(WriteError, "full")] * 2


def test_it_goes_on_and_other_settings_begin_anew(hf_model, jsonl, tmp_path):
    _, model = hf_model("olmoe")
    text = jsonl_text(model, jsonl, tokens=200, sequence_length=32, batch_size=2)
    steps = 1 + model.config.num_layers
    heard = []
    first = calibrate(model, text, tmp_path / "work", progress=lambda done, total: heard.append((done, total)))
    number = len(text)
    assert heard == [(done, steps * number) for done in range(1, steps * number + 1)]
    assert {file.name for file in (tmp_path / "work").glob("hidden-*")} == set()
    heard.clear()
    again = calibrate(model, text, tmp_path / "work", progress=lambda done, total: heard.append(done))
    assert heard == []  # all was there
    assert bytes_of(tmp_path / "first", first) == bytes_of(tmp_path / "again", again)
    other = jsonl_text(model, jsonl, tokens=200, sequence_length=32, batch_size=2, seed=1)
    calibrate(model, other, tmp_path / "work", progress=lambda done, total: heard.append(done))
    assert len(heard) == steps * len(other)


def test_of_the_weights_only_what_is_needed_is_read(hf_model, jsonl, tmp_path, monkeypatch):
    """Neither head nor last norm; each expert that is chosen once a batch, and none that is not."""
    _, model = hf_model("mixtral")
    text = jsonl_text(model, jsonl, domains=["any"], tokens=2, sequence_length=8)
    names, read_into = [], type(model.tensors).read_into
    monkeypatch.setattr(
        type(model.tensors), "read_into", lambda self, name, target: (names.append(name), read_into(self, name, target))
    )
    sums = calibrate(model, text, tmp_path / "work")
    assert len(set(names)) == len(names)
    assert not any(name.startswith(("lm_head", "model.norm")) for name in names)
    chosen = {(layer, e) for layer, s in enumerate(sums.layers) for e in s.count_E.nonzero().flatten().tolist()}
    assert {expert_of(name) for name in names} - {None} == chosen
    assert len(chosen) < 3 * 8
