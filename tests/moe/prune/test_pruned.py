"""What `sigmoe prune` writes: in transformers it computes what its parent does with the dropped experts masked."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sigmoe.launch.main import main
from sigmoe.moe.extract.in_transformers import load_in_transformers
from sigmoe.moe.stored import load_model, open_model

BUDGETS = {
    "keep": ["keep=0.5"],
    "experts": ["experts=3", "criterion=weight"],
    "whole": ["keep=1.0", "criterion=random"],
    "bytes": ["bytes=180kB", "criterion=easy_ep"],
    "subsets": ["experts=4", "criterion=reconstruction"],
}
UNEQUAL = ["global=0.7", "criterion=gate_activation", "format=sigmoe"]


@pytest.fixture(scope="module", params=["mixtral", "mixtral tied", "qwen3_moe", "olmoe"])
def parent(request, hf_model, jsonl, tmp_path_factory):
    """A model in memory and on disk; prunes it into a new folder, calibrating once."""
    model, stored = hf_model(request.param)
    folder = tmp_path_factory.mktemp("pruned")

    def prune(name, *keys):
        out = folder / name
        text = [f"data={jsonl}", "tokens=600", f"stats={folder}/sums"]
        assert main(["prune", f"model={stored.path}", f"out={out}", "threads=1", *text, *keys]) == 0
        return out, json.loads((out / "report.json").read_text())

    # The sums with all subsets, which serve every criterion.
    prune("first", "experts=4", "criterion=reconstruction")
    return model, stored, prune


@torch.no_grad()
def masked_logits(model, kept, token_BS):
    """The parent's logits with the dropped experts' router logits at minus infinity."""
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    renormalize = getattr(model.config, "norm_topk_prob", True)

    def masked(gate, ids):
        def hook(module, arguments, output):
            logits_TE = torch.full_like(output[0], -torch.inf)
            logits_TE[:, ids] = output[0][:, ids]
            weight_TK, expert_TK = logits_TE.float().softmax(-1).topk(gate.top_k, -1)
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True) if renormalize else weight_TK
            return logits_TE, weight_TK, expert_TK

        return gate.register_forward_hook(hook)

    hooks = [masked(gate, ids) for gate, ids in zip(gates, kept, strict=True)]
    logits = model(input_ids=token_BS).logits
    for hook in hooks:
        hook.remove()
    return logits


def tokens():
    return torch.randint(331, (3, 40), generator=torch.Generator().manual_seed(7))


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def by_name(path):
    found = {}
    for file in sorted(Path(path).glob("model*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("budget", BUDGETS)
def test_it_is_the_masked_parent_in_transformers(parent, budget):
    model, stored, prune = parent
    out, report = prune(budget, *BUDGETS[budget])
    kept = [layer["kept"] for layer in report["layers"]]
    theirs = load_in_transformers(str(out))
    theirs.set_experts_implementation("eager")  # torch's grouped product wants widths of multiples of four
    with torch.no_grad():
        logits = theirs(input_ids=tokens()).logits
    assert relative(logits, masked_logits(model, kept, tokens())) < 1e-5
    assert report["experts"] == [len(ids) for ids in kept]
    before = json.loads((stored.path / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed <= {"num_local_experts", "num_experts"}
    assert (out / "tokenizer.json").read_bytes() == (stored.path / "tokenizer.json").read_bytes()


def test_unequal_layers_are_the_masked_parent_in_our_format(parent):
    model, _, prune = parent
    out, report = prune("unequal", *UNEQUAL)
    kept = [layer["kept"] for layer in report["layers"]]
    ours = load_model(open_model(out))
    found = ours(tokens(), domain_B=torch.zeros(3, dtype=torch.int64)).logits_BSV
    assert relative(found, masked_logits(model, kept, tokens())) < 1e-5
    assert sum(map(len, kept)) == int(0.7 * sum(report["parent"]["experts"]) + 0.5)


def test_kept_tensors_are_the_parents_bytes(parent):
    _, stored, prune = parent
    out, report = prune("bytes kept", "keep=0.5")
    child = by_name(out)
    assert set(report["tensors"]) == set(child)
    for name, told in report["tensors"].items():
        whole = stored.tensors.read(told["source"])
        expected = whole if told["rows"] is None else whole[told["rows"]]
        assert torch.equal(child[name], expected)
        assert told["sha256"] == hashlib.sha256(expected.numpy().tobytes()).hexdigest()


def test_merged_experts_are_the_weighted_means(parent):
    _, stored, prune = parent
    out, report = prune("merged", "keep=0.5", "merge=true")
    plain, _ = prune("bytes kept", "keep=0.5")
    load_in_transformers(str(out))
    merged, cut = open_model(out).tensors, open_model(plain).tensors
    averaged = 0
    for layer in report["layers"]:
        assert sorted(expert for group in layer["merged"] for expert in group) == list(range(len(layer["saliency"])))
        for new, group in enumerate(layer["merged"]):
            assert layer["kept"][new] in group
            for weight in ("w1", "w2", "w3"):
                prefix = f"model.layers.{layer['layer']}.block_sparse_moe.experts"
                shares = [layer["load_before"][expert] for expert in group]
                parts = [stored.tensors.read(f"{prefix}.{expert}.{weight}.weight").double() for expert in group]
                expected = sum(share * part for share, part in zip(shares, parts)) / sum(shares)
                found = merged.read(f"{prefix}.{new}.{weight}.weight")
                assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-7)
                averaged += len(group) > 1 and not torch.equal(found, cut.read(f"{prefix}.{new}.{weight}.weight"))
    assert averaged
