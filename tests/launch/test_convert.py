"""`sigmoe convert`: transformers' models to ours and back, byte for byte; or one line and nothing written."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sigmoe.launch.main import main
from sigmoe.moe.storage.checkpoint import read_manifest, verify_files
from sigmoe.moe.storage.tensor_reader import TensorReader
from sigmoe.moe.stored import load_model, open_model

transformers = pytest.importorskip("transformers")

# Odd sizes; the head's width is not D / H.
COMMON = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "attention_dropout": 0.1,
}
MIXTRAL = {"intermediate_size": 20, "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 10}
QWEN = {
    "intermediate_size": 28,
    "moe_intermediate_size": 20,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "head_dim": 10,
}
OLMOE = {"intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2}
DENSE = {"intermediate_size": 20, "head_dim": 10}
TIED = {"tie_word_embeddings": True}
ROWS = {
    "mixtral": ("mixtral", {**MIXTRAL, "sliding_window": 5}, torch.float32),
    "mixtral-tied-bf16": ("mixtral", {**MIXTRAL, **TIED}, torch.bfloat16),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "norm_topk_prob": True}, torch.float32),
    "qwen3_moe-dense-layers-bf16": ("qwen3_moe", {**QWEN, "mlp_only_layers": [0]}, torch.bfloat16),
    "olmoe": ("olmoe", {**OLMOE, **TIED}, torch.float32),
    "olmoe-bf16": ("olmoe", {**OLMOE, "norm_topk_prob": True}, torch.bfloat16),
    "mistral": ("mistral", {**DENSE, "sliding_window": 5}, torch.bfloat16),
    "qwen3": ("qwen3", {**DENSE, **TIED}, torch.float32),
    "llama": ("llama", DENSE, torch.float32),
}
CARRIED = ("tokenizer.model", "special_tokens_map.json", "chat_template.jinja", "LICENSE.txt")


@pytest.fixture(scope="module")
def room():
    """A folder in memory where there is one: fsync costs nothing there."""
    shm = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def hf_model(room):
    """Write a model of transformers' with random weights, in several files, once; returns its folder."""

    def write(row):
        format, changes, dtype = ROWS[row]
        folder = room / f"{row}-hf"
        if folder.exists():
            return folder
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(format, **COMMON, **changes)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                _ = parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(std=0.2)
        model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
        for name in CARRIED:
            (folder / name).write_bytes(f"{name} of {row}\r\n".encode())
        return folder

    return write


@pytest.fixture(scope="module")
def convert():
    def run(*overrides):
        threads = torch.get_num_threads()
        try:
            return main(["convert", *map(str, overrides), "threads=1"])
        finally:
            torch.set_num_threads(threads)

    return run


@pytest.fixture
def refused(convert, room, capsys):
    """Run a command that must fail in one line, with nothing written; returns the line."""

    def run(*overrides):
        before = sorted(room.rglob("*"))
        assert convert(*overrides) == 2
        assert sorted(room.rglob("*")) == before
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sigmoe convert: ")]
        return line.removeprefix("sigmoe convert: ")

    return run


@pytest.fixture(scope="module", params=ROWS)
def there_and_back(request, hf_model, convert, room):
    """(what it began with, ours, theirs again)"""
    folder = hf_model(request.param)
    ours, again = room / f"{request.param}-ours", room / f"{request.param}-again"
    assert convert(f"model={folder}", f"out={ours}") == 0
    assert convert(f"model={ours}", f"out={again}") == 0
    return folder, ours, again


def bits(folder, stem="model"):
    """Every tensor's dtype, shape and bytes."""
    read = TensorReader(folder, stem)
    return {
        n: (read.dtype(n), read.shape(n), read.read(n).flatten().view(torch.uint8).numpy().tobytes())
        for n in read.names()
    }


def test_every_bit_comes_back(there_and_back):
    folder, _, again = there_and_back
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert bits(again) == bits(folder)


def test_all_other_files_come_back(there_and_back):
    folder, _, again = there_and_back
    written = {path.name for path in again.iterdir()} - {"conversion.json", "manifest.json"}
    kept = {path.name for path in folder.iterdir() if path.suffix != ".safetensors"}
    assert {name for name in written if not name.startswith("model-")} == kept
    for name in (*CARRIED, "generation_config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    if json.loads((folder / "config.json").read_text())["model_type"] != "llama":
        assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_llama_comes_back_as_a_mistral(hf_model, convert, room):
    folder, again = hf_model("llama"), room / "llama-mistral"
    assert convert(f"model={folder}", f"out={again}", "to=mistral") == 0
    data = json.loads((again / "config.json").read_text())
    assert (data["model_type"], data["sliding_window"], data["eos_token_id"]) == ("mistral", None, [2, 3])
    assert (data["bos_token_id"], data["pad_token_id"], data["max_position_embeddings"]) == (1, None, 64)


@torch.no_grad()
def test_ours_computes_what_theirs_computes(there_and_back):
    folder, ours, again = there_and_back
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token_BS = torch.randint(97, (3, 17), generator=torch.Generator().manual_seed(1))
    theirs_BSV = theirs(input_ids=token_BS).logits
    for path in (folder, ours, again):
        ours_BSV = load_model(open_model(path))(token_BS).logits_BSV
        assert float((ours_BSV - theirs_BSV).abs().max() / theirs_BSV.abs().max()) < 1e-5, path


def test_everything_is_vouched_for(there_and_back):
    for path in there_and_back[1:]:
        verify_files(path, read_manifest(path), lambda done, total: None)
        report = json.loads((path / "conversion.json").read_text())
        assert report["logits"]["max_relative_difference"] < 1e-5
        assert report["logits"]["against"].startswith("transformers ")
        assert main(["verify", f"checkpoint={path}"]) == 0
    assert (there_and_back[1] / "transformers/tokenizer.model").is_file()


def test_the_same_command_twice_does_nothing_but_tell(there_and_back, convert, refused, capsys):
    folder, ours, again = there_and_back
    times = {path: path.stat().st_mtime_ns for path in ours.rglob("*")}
    assert json.loads((ours / "conversion.json").read_text())["parent_checked"]
    assert convert(f"model={folder}", f"out={ours}") == 0
    assert "holds this very conversion already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in ours.rglob("*")} == times
    for change, why in ((f"model={again}", "is another model"), ("dtype=fp16", "with dtype=null: remove it")):
        assert why in refused(f"model={folder}", "to=sigmoe", f"out={ours}", change)


def test_what_was_made_unchecked_does_not_do_for_checked(hf_model, convert, refused, room):
    command = [f"model={hf_model('llama')}", f"out={room}/unchecked", "verify=false"]
    assert convert(*command, "check=false") == 0
    assert "holds this very conversion, made without check=true" in refused(*command)
    assert convert(*command, "check=false") == 0


def test_mixed_dtypes_stay_mixed(hf_model, convert, room):
    mixed = room / "mixed"
    shutil.copytree(hf_model("olmoe-bf16"), mixed, ignore=shutil.ignore_patterns("model*safetensors*"))
    stored = TensorReader(hf_model("olmoe-bf16"), "model")
    wide = {n: stored.read(n).float() if "gate.weight" in n else stored.read(n) for n in stored.names()}
    save_file(wide, mixed / "model.safetensors", metadata={"format": "pt"})
    assert convert(f"model={mixed}", f"out={room}/mixed-ours") == 0
    assert convert(f"model={room}/mixed-ours", f"out={room}/mixed-again") == 0
    assert bits(room / "mixed-again") == bits(mixed)
    assert {dtype for dtype, _, _ in bits(mixed).values()} == {torch.float32, torch.bfloat16}


def test_rounding(hf_model, convert, room):
    folder, ours, again = hf_model("mixtral"), room / "rounded", room / "rounded-again"
    assert convert(f"model={folder}", f"out={ours}", "dtype=bf16") == 0
    assert convert(f"model={folder}", f"out={again}", "to=mixtral", "dtype=bf16") == 0
    expected = {name: tensor.bfloat16() for name, tensor in tensors(folder).items()}
    for path in (ours / "model", again):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(path).items())
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, again))
    assert after == before | {"dtype": "bfloat16"}


def tensors(folder):
    read = TensorReader(folder, "model")
    return {name: read.read(name) for name in read.names()}


def test_a_tied_head_that_is_stored_twice(hf_model, convert, refused, room):
    twice = room / "twice"
    shutil.copytree(hf_model("olmoe"), twice, ignore=shutil.ignore_patterns("model*safetensors*"))
    held = tensors(hf_model("olmoe"))
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, twice / "model.safetensors", metadata={"format": "pt"})
    assert convert(f"model={twice}", f"out={room}/once") == 0
    assert "lm_head.weight" not in tensors(room / "once/model")
    held["lm_head.weight"][0, 0] += 1
    save_file(held, twice / "model.safetensors", metadata={"format": "pt"})
    line = refused(f"model={twice}", f"out={room}/other")
    assert "holds a lm_head.weight that differs from the embedding" in line


def test_logits_that_differ_are_found(hf_model, refused, room):
    broken = room / "broken"
    shutil.copytree(hf_model("olmoe"), broken, ignore=shutil.ignore_patterns("model*safetensors*"))
    held = tensors(hf_model("olmoe"))
    held["model.layers.1.mlp.experts.2.up_proj.weight"][0, 0] = torch.nan
    save_file(held, broken / "model.safetensors", metadata={"format": "pt"})
    line = refused(f"model={broken}", f"out={room}/other")
    assert line.startswith("the logits differ from those of transformers")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"attention_bias": True}, "attention_bias is True; sigmoe reads models with False alone"),
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0; sigmoe reads models with None alone"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling is {'type': 'yarn', 'factor': 4.0}"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters is {'rope_type': 'linear'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"n_shared_experts": 1}, "n_shared_experts is 1"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; sigmoe reads mixtral, qwen3_moe, olmoe, mistral, qwen3, llama"),
        ({"num_experts": 7}, "lacks model.layers.0.mlp.experts.6.down_proj.weight"),
        ({"num_experts": 5}, "config.json says nothing of it"),
        ({"vocab_size": 96}, "model.embed_tokens.weight is [97, 24], config.json says [96, 24]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_sigmoe_lacks_is_refused_by_name(hf_model, refused, tmp_path, changes, line):
    folder = tmp_path / "odd"
    shutil.copytree(hf_model("olmoe-bf16"), folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("num_local_experts", None)
    (folder / "config.json").write_text(json.dumps(config | {"num_experts": 6} | changes))
    assert line in refused(f"model={folder}", f"out={tmp_path}/out")


MISTAKES = {
    "to=olmoe": "to=olmoe cannot hold it; to=mixtral can: one gate, 5 experts in each sparse layer",
    "to=gguf": "to must be one of auto, sigmoe, mixtral, qwen3_moe, olmoe, mistral, qwen3, got 'gguf'",
    "dtype=int8": "dtype must be one of fp32, bf16, fp16, got 'int8'",
    "threads=0": "threads must be at least 1",
    "file_bytes=many": "file_bytes must be a number, with a unit if wanted (2GB, 1.5GiB), got 'many'",
    "seed=-1": "seed must lie in [0, 2^63), got -1",
    "domains=[a]": "domains says how a dense model becomes sparse: give router= too",
    "router=top_k": "its layers are sparse already: router= makes a sparse model of a dense one",
    "model=nowhere": "nowhere is no model: it does not exist",
    "model=": "missing key model: give model=...",
    "modle=x": "unknown key modle",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(hf_model, convert, capsys, tmp_path, mistake):
    words = [f"model={hf_model('mixtral')}", f"out={tmp_path}/out"]
    assert main(["convert", *words, mistake]) == 2
    assert MISTAKES[mistake] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_out_inside_its_model_is_refused(hf_model, refused):
    assert "lies inside the model" in refused(f"model={hf_model('mixtral')}", f"out={hf_model('mixtral')}/ours")


def test_a_model_that_transformers_lacks_says_why(refused, tiny, room):
    assert main(["train", *tiny, "steps=1", f"out={room}/run"]) == 0
    line = refused(f"model={room}/run", f"out={room}/out")
    assert line.startswith("transformers knows no such model: it has several domains")


def test_a_run_becomes_a_mixtral_with_our_tokenizer(tiny, convert, room, dataset):
    gate = ["router=top_k", "router.num_experts=3", "~router.sets"]
    assert main(["train", *tiny, *gate, "steps=1", f"out={room}/gated"]) == 0
    assert convert(f"model={room}/gated", f"out={room}/gated-hf") == 0
    assert (room / "gated-hf/tokenizer.json").read_bytes() == (dataset / "tokenizer.json").read_bytes()
    assert open_model(room / "gated-hf").registry.names == ("recipes", "ships")
    with safe_open(next(room.glob("gated-hf/model-*.safetensors")), framework="pt") as file:
        assert "model.layers.0.block_sparse_moe.gate.weight" in file.keys()  # noqa: SIM118


def test_help_lists_every_key(capsys):
    assert main(["convert", "--help"]) == 0
    out = capsys.readouterr().out
    for key in (
        "model out to dtype verify check file_bytes threads domains dataset sparse_layers embedding_slots seed".split()
    ):
        assert f"\n{key}: " in out
