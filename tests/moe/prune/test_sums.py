"""Sums on disk: what was written is read, equal sums have equal bytes, damage is named."""

import pytest
import torch

from sigmoe.moe.identity import model_identity
from sigmoe.moe.prune.sums import CalibrationSums, LayerSums, load_sums, save_sums

E = 3


def layer(seed, subsets=True):
    random = torch.Generator().manual_seed(seed)
    vectors = {
        f"{name}_E": torch.rand(E, dtype=torch.float64, generator=random)
        for name in ("gate", "norm", "gate_norm", "easy_ep")
    }
    return LayerSums(
        tokens=2**40 + seed,
        count_E=torch.tensor([2**52 + 1, 0, seed]),
        prob_EE=torch.rand(E, E, dtype=torch.float64, generator=random),
        subset_error=torch.rand(1 << E, dtype=torch.float64, generator=random) if subsets else None,
        **vectors,
    )


def same(a, b):
    tensors, others = a.tensors(), b.tensors()
    return (
        a.tokens == b.tokens and tensors.keys() == others.keys() and all(tensors[n].equal(others[n]) for n in tensors)
    )


@pytest.mark.parametrize("subsets", [True, False])
def test_a_vector_holds_all(subsets):
    sums = layer(5, subsets)
    assert same(LayerSums.unpack(sums.pack(), E), sums)


def test_what_is_saved_is_loaded(tmp_path):
    sums = CalibrationSums(model="a" * 64, text={"name": "Zürich", "tokens": 7}, layers=(layer(1), layer(2, False)))
    save_sums(tmp_path / "one", sums)
    save_sums(tmp_path / "two", sums)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    loaded = load_sums(tmp_path / "one")
    assert (loaded.model, loaded.text) == (sums.model, sums.text)
    assert all(same(ours, theirs) for ours, theirs in zip(loaded.layers, sums.layers, strict=True))
    with pytest.raises(ValueError, match="exists already"):
        save_sums(tmp_path / "one", sums)


def test_damage_is_named(tmp_path):
    save_sums(tmp_path / "sums", CalibrationSums(model="", text={}, layers=(layer(1),)))
    files = sorted((tmp_path / "sums").iterdir())
    assert [path.name for path in files] == ["manifest.json", "sums.json", "sums.safetensors"]
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with pytest.raises(ValueError, match=path.name):
            load_sums(tmp_path / "sums")
        path.write_bytes(whole)
    with pytest.raises(ValueError, match="holds no calibration sums"):
        load_sums(tmp_path)


def test_another_training_is_another_model(hf_model):
    theirs, model = hf_model("olmoe")
    _, again = hf_model("olmoe")
    assert model_identity(model) == model_identity(again)
    with torch.no_grad():
        theirs.model.layers[1].mlp.experts.down_proj[4] += 0.01
    theirs.save_pretrained(again.path)
    assert model_identity(model) != model_identity(again)
