"""`sigmoe extract`: a submodel that is proved equal, or one line and nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sigmoe.launch.main import main
from sigmoe.moe.identity import model_identity
from sigmoe.moe.storage.checkpoint import open_checkpoint
from sigmoe.moe.stored import load_model, open_model

MODEL = "model/model-00001-of-00001.safetensors"
STEP = "checkpoints/step-00000003"


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Three steps, fp32, two sparse layers, a set of two experts for each of recipes and ships."""
    return train_run(tmp_path_factory.mktemp("extract") / "run", tiny)


@pytest.fixture(scope="module")
def three(dataset, tiny, tmp_path_factory):
    """A run over three domains of which two share an expert."""
    folder = tmp_path_factory.mktemp("three")
    texts = {name: folder / name for name in ("recipes", "ships", "trains")}
    for name, place in texts.items():
        place.mkdir()
        for number in range(40):
            (place / f"{number:02}.txt").write_text(f"{name} {number}: " + f"{name} and {number * 7} more. " * 12)
    domains = ", ".join(f"{name}: '{place}/*.txt'" for name, place in texts.items())
    data = ["data", "data=files", f"data.domains={{{domains}}}", "data.vocab_size=290", f"out={folder}/data"]
    assert main(data) == 0
    sets = "router.sets={recipes: [0, 1], ships: [1, 2], trains: [3, 4, 5]}"
    return train_run(folder / "run", [*tiny[1:], f"dataset={folder}/data", sets, "model.vocab_size=300"])


def train_run(out, settings):
    assert main(["train", *settings, "steps=3", "threads=1", "model.init_std=0.3", f"out={out}"]) == 0
    return out


@pytest.fixture
def extract(tmp_path, monkeypatch, capfd):
    """Run the command in a folder of its own; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides):
        capfd.readouterr()
        code = main(["extract", *overrides])
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def refused(extract, tmp_path):
    """The one line of a refusal, after which nothing new is there."""

    def call(*overrides, exits=2):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = extract(*overrides)
        assert (code, out) == (exits, "")
        (line,) = err.splitlines()
        assert sorted(tmp_path.rglob("*")) == before
        return line.removeprefix("sigmoe extract: ")

    return call


def report_of(path):
    return json.loads((path / "extraction.json").read_text())


def contents(path, *without):
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(f.relative_to(path)): f.read_bytes() for f in files if f.name not in without}


def test_one_domain_is_a_mixtral(extract, trained, tmp_path):
    code, out, err = extract(f"checkpoint={trained}", "domain=ships", "out=models/ships")
    assert code == 0
    assert "written as mixtral: one gate, 2 experts in each sparse layer, every layer sparse, no QK-norm" in err
    assert "ships has 1,838 held-out tokens, fewer than verify=100,000: all are taken" in err
    assert [word in out for word in ("all 2 domains", "ships", "mixtral", "1,838")] == [True] * 4
    path = tmp_path / "models/ships"
    assert sorted(contents(path)) == [
        "config.json",
        "extraction.json",
        "generation_config.json",
        "manifest.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (path / "tokenizer.json").read_bytes() == (trained / STEP / "tokenizer.json").read_bytes()
    stored = open_model(path)
    assert (stored.format, stored.registry.names, stored.needs_domain) == ("mixtral", ("ships",), False)
    token_BS, ones = torch.arange(60).view(2, 30), torch.ones(2, dtype=torch.int64)
    whole, alone = load_model(open_model(trained / STEP)), load_model(stored)
    assert torch.equal(whole(token_BS, domain_B=ones).logits_BSV, alone(token_BS).logits_BSV)


def test_the_report_says_what_was_done(extract, trained, tmp_path):
    assert extract(f"checkpoint={trained}", "domain=ships", "verify=500", "out=ships")[0] == 0
    report, parent = report_of(tmp_path / "ships"), open_model(trained / STEP)
    tensors = report.pop("tensors")
    size = sum(tensor.nbytes for tensor in written(tmp_path / "ships").values())
    assert report.pop("bytes") == {
        "formula": size,
        "tensors": size,
        "files": (tmp_path / "ships/model-00001-of-00001.safetensors").stat().st_size,
    }
    assert report.pop("parent") == {
        "name": "step-00000003",
        "identity": model_identity(parent),
        "format": "sigmoe",
        "domains": 2,
        "parameters": {"total": sum(parameters(trained / STEP / "model")), "active": report["parameters"]["active"]},
        "bytes": {"tensors": 4 * sum(parameters(trained / STEP / "model"))},
    }
    assert report["parameters"]["total"] == size // 4
    assert report["checks"] == [{"domain": "ships", "tokens": 500, "max_abs_difference": 0.0}]
    asked = {key: report[key] for key in ("format_version", "domains", "format", "dtype", "format_asked", "file_bytes")}
    assert asked == {
        "format_version": 1,
        "domains": ["ships"],
        "format": "mixtral",
        "dtype": None,
        "format_asked": "auto",
        "file_bytes": 4 << 30,
    }
    assert set(tensors) == set(written(tmp_path / "ships"))
    expert, gate = "model.layers.1.block_sparse_moe.experts.{}.w2.weight", "model.layers.1.block_sparse_moe.gate.weight"
    assert tensors[expert.format(1)]["source"] == expert.format(3)
    assert tensors[gate]["rows"] == [2, 3]
    assert {len(tensor["sha256"]) for tensor in tensors.values()} == {64}


def written(path):
    tensors = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    return tensors


def parameters(path):
    return [tensor.numel() for tensor in written(path).values()]


def test_several_domains_are_a_checkpoint_of_sigmoes(extract, trained, tmp_path):
    code, _, err = extract(f"checkpoint={trained}", "domain=[ships,recipes]", "out=both")
    assert code == 0
    assert "written as sigmoe: it has several domains" in err
    opened = open_checkpoint(tmp_path / "both")
    opened.verify()
    assert (opened.state, opened.config["sequence_length"]) == ({"step": 3}, 32)
    assert contents(tmp_path / "both/model") == {
        name: data for name, data in contents(trained / STEP / "model").items() if name != "config.json"
    }
    assert [check["domain"] for check in report_of(tmp_path / "both")["checks"]] == ["recipes", "ships"]
    assert main(["verify", f"checkpoint={tmp_path}/both"]) == 0


@pytest.mark.parametrize("options", [[], ["format=sigmoe"], ["dtype=bf16"]], ids=["auto", "sigmoe", "bf16"])
def test_from_a_submodel_it_is_the_same(extract, three, tmp_path, options):
    """Several domains first, one of them then: byte for byte what is cut out of the whole."""
    data = f"dataset={three.parent}/data"
    assert extract(f"checkpoint={three}", "domain=[ships,trains]", "out=two")[0] == 0
    assert extract(f"checkpoint={three}", "domain=ships", "out=direct", *options)[0] == 0
    assert extract("checkpoint=two", "domain=ships", "out=again", data, *options)[0] == 0
    differing = ("extraction.json", "manifest.json")  # these name the parent
    assert contents(tmp_path / "again", *differing) == contents(tmp_path / "direct", *differing)
    again, direct = (report_of(tmp_path / name)["tensors"] for name in ("again", "direct"))
    assert {n: t["sha256"] for n, t in again.items()} == {n: t["sha256"] for n, t in direct.items()}


def test_a_submodel_refuses_what_it_does_not_hold(extract, refused, three):
    assert extract(f"checkpoint={three}", "domain=[ships,trains]", "verify=0", "out=two")[0] == 0
    assert extract(f"checkpoint={three}", "domain=trains", "verify=0", "out=one")[0] == 0
    line = refused("checkpoint=two", "domain=recipes", "verify=0", "out=again")
    assert line == "unknown domain 'recipes'; known domains: ships, trains"
    line = refused("checkpoint=one", "domain=ships", "verify=0", "out=again")
    assert line == "unknown domain 'ships'; known domains: trains"
    two = load_model(open_model(Path("two")))
    with pytest.raises(ValueError, match="domain id 2 is not one of this model's 2"):
        two(torch.zeros(1, 4, dtype=torch.int64), domain_B=torch.tensor([2]))
    with pytest.raises(ValueError, match="this model routes by domain: give domain=, one of ships, trains"):
        two(torch.zeros(1, 4, dtype=torch.int64))


def test_the_whole_of_a_submodel_can_be_rounded(extract, trained, dataset, tmp_path):
    assert extract(f"checkpoint={trained}", "domain=ships", "verify=0", "out=ships")[0] == 0
    rounded = ["domain=ships", "dtype=bf16", "verify=300", f"dataset={dataset}"]
    assert extract("checkpoint=ships", *rounded, "out=again")[0] == 0
    assert extract(f"checkpoint={trained}", *rounded, "out=direct")[0] == 0
    for path in (tmp_path / "again", tmp_path / "direct"):
        assert {tensor.dtype for tensor in written(path).values()} == {torch.bfloat16}
        assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
        assert report_of(path)["checks"][0]["max_abs_difference"] == 0
    again, direct = written(tmp_path / "again"), written(tmp_path / "direct")
    assert all(torch.equal(again[name], tensor) for name, tensor in direct.items())


def test_without_verification_no_dataset_is_needed(extract, trained, tmp_path):
    shutil.copytree(trained / STEP, tmp_path / "moved/there")
    code, out, _ = extract("checkpoint=moved/there", "domain=ships", "verify=0", "out=ships")
    assert code == 0
    assert "ships" in out
    assert report_of(tmp_path / "ships")["checks"] == []


def test_the_same_command_twice_does_nothing_but_tell(extract, trained, tmp_path):
    command = [f"checkpoint={trained}", "domain=ships", "verify=500", "out=ships"]
    _, first, _ = extract(*command)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "ships").iterdir()}
    code, again, err = extract(*command)
    assert (code, again) == (0, first)
    assert "ships holds this very extraction already" in err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "ships").iterdir()} == times


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("domain=recipes", "made of this model with another value of domains"),
        ("dtype=bf16", "made of this model with dtype=null"),
        ("format=sigmoe", 'made of this model with format_asked="auto"'),
        ("checkpoint=both", "and is another model"),
        ("file_bytes=1MiB", "made of this model with file_bytes=4294967296"),
    ],
)
def test_what_stands_there_is_not_replaced(extract, refused, trained, change, why):
    assert extract(f"checkpoint={trained}", "domain=[recipes,ships]", "verify=0", "out=both")[0] == 0
    command = [f"checkpoint={trained}", "domain=ships", "verify=0", "out=ships"]
    assert extract(*command)[0] == 0
    line = refused(*command, change)
    assert line.startswith("out=ships exists already") and line.endswith(f"{why}: remove it or give another out=")


def test_what_was_made_unchecked_does_not_do_for_checked(extract, refused, trained):
    command = [f"checkpoint={trained}", "domain=ships", "verify=0", "out=ships"]
    assert extract(*command, "check=false")[0] == 0
    assert "out=ships holds this very extraction, made without check=true" in refused(*command)


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "run"])
def test_what_is_no_extraction_is_left_alone(refused, trained, tmp_path, kind):
    match kind:
        case "file":
            (tmp_path / "ships").write_text("mine")
        case "folder":
            (tmp_path / "ships").mkdir()
            (tmp_path / "ships/diary.txt").write_text("dear diary")
        case "empty folder":
            (tmp_path / "ships").mkdir()
        case "run":
            shutil.copytree(trained, tmp_path / "ships")
    line = refused(f"checkpoint={trained}", "domain=ships", "verify=0", "out=ships")
    assert line == "out=ships exists already and is another model: remove it or give another out="


def test_a_damaged_extraction_is_not_taken_for_one(extract, refused, trained, tmp_path):
    command = [f"checkpoint={trained}", "domain=ships", "verify=0", "out=ships"]
    assert extract(*command)[0] == 0
    flip(tmp_path / "ships/model-00001-of-00001.safetensors", -3)
    assert "ships/model-00001-of-00001.safetensors is damaged" in refused(*command)


MISTAKES = {
    "domain=planes": "unknown domain 'planes'; known domains: recipes, ships",
    "domain=[ships,ships]": "name each domain once, got ships, ships",
    "domain=[]": "name each domain once, got none",
    "domain=3": "domain must be text or a list of text, got 3",
    "dtype=int8": "dtype must be one of fp32, bf16, fp16, got 'int8'",
    "format=gguf": "format must be one of auto, sigmoe, got 'gguf'",
    "verify=-1": "verify must be at least 0",
    "verify=all": "verify must be a whole number, got 'all'",
    "threads=0": "threads at least 1",
    "file_bytes=1KB": "file_bytes must be at least 1048576, got 1KB",
    "check=1": "check must be true or false, got 1",
    "checkpoint=nowhere": "nowhere is no model: it does not exist",
    "checkpoint=.": ". is no model: it holds neither manifest.json (sigmoe) nor config.json (transformers)",
    "dataset=nowhere": "nowhere is no dataset",
    "domian=ships": "unknown key domian; did you mean domain",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(refused, trained, mistake):
    assert MISTAKES[mistake] in refused(f"checkpoint={trained}", "domain=ships", "out=models/ships", mistake)


@pytest.mark.parametrize("key", ["checkpoint", "domain", "out"])
def test_missing_keys_are_named(refused, trained, key):
    given = {"checkpoint": str(trained), "domain": "ships", "out": "ships"}
    line = refused(*(f"{name}={value}" for name, value in given.items() if name != key))
    assert line.startswith(f"missing key {key}")


def test_a_dataset_is_asked_for_where_none_is_known(refused, trained, tmp_path):
    shutil.copytree(trained / STEP, tmp_path / "moved/there")
    line = refused("checkpoint=moved/there", "domain=ships", "out=ships")
    assert line.startswith("missing key dataset: give the held-out text to verify with, dataset=DIR (or verify=0)")


def test_a_dataset_of_another_tokenizer_is_refused(refused, trained, three):
    line = refused(f"checkpoint={trained}", "domain=ships", "out=ships", f"dataset={three.parent}/data")
    assert f"{trained} has another tokenizer than {three.parent}/data" in line


def test_a_dataset_with_ids_beyond_the_vocabulary_is_refused(extract, refused, trained, dataset, tmp_path):
    assert extract(f"checkpoint={trained}", "domain=ships", "verify=0", "out=small")[0] == 0
    path = tmp_path / "small/model-00001-of-00001.safetensors"
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    save_file({n: t[:200].clone() if n in tables else t for n, t in written(path.parent).items()}, path)
    config = json.loads((path.parent / "config.json").read_text()) | {"vocab_size": 200}
    (path.parent / "config.json").write_text(json.dumps(config))
    (path.parent / "manifest.json").unlink()
    line = refused("checkpoint=small", "domain=ships", f"dataset={dataset}", "out=cut")
    assert "small has a vocabulary of 200" in line and "has token ids up to 299" in line


def test_the_space_is_looked_at_before_anything_is_written(extract, refused, trained, tmp_path, monkeypatch):
    """As many bytes as will be written: half where they are rounded to half."""
    usage, needed = shutil.disk_usage(tmp_path), 4 << 20
    parameters = load_model(open_model(trained / STEP)).parameters()
    assert extract(f"checkpoint={trained}", "domain=ships", "verify=0", "out=ships")[0] == 0
    needed += report_of(tmp_path / "ships")["bytes"]["tensors"] // 2
    assert needed < (4 << 20) + sum(parameter.nbytes for parameter in parameters) // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    command = [f"checkpoint={trained}", "domain=ships", "verify=0", "out=new"]
    assert "not enough disk space" in refused(*command, exits=1)
    assert extract(*command, "dtype=bf16")[0] == 0


def test_a_full_disk_is_one_line(refused, trained, limit_files):
    limit_files(10_000)
    assert "writing failed" in refused(f"checkpoint={trained}", "domain=ships", "verify=0", "out=ships", exits=1)


def test_a_global_gate_cannot_be_cut(refused, tiny, tmp_path):
    router = ["router=top_k", "router.num_experts=4", "model.num_layers=1"]
    settings = [setting for setting in tiny if not setting.startswith("router.sets")]
    train_run(tmp_path / "run", [*settings, *router])
    line = refused("checkpoint=run", "domain=ships", "out=ships")
    assert line.startswith("its router is top_k, one gate over the experts of all domains: no domain can be cut out")


def test_out_inside_its_parent_is_refused(refused, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    line = refused("checkpoint=run", "domain=ships", "verify=0", f"out=run/{STEP}/ships")
    assert "lies inside the model that is given" in line


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [MODEL, "tokenizer.json", "state.json", "model/model.safetensors.index.json"])
def test_a_damaged_parent_is_named(refused, trained, tmp_path, name):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / STEP / name).write_bytes((trained / STEP / name).read_bytes() + b" ")
    line = refused("checkpoint=run", "domain=ships", "verify=0", "out=ships")
    assert f"run/{STEP}/{name}" in line


def test_a_registry_that_was_tampered_with_is_found(refused, trained, tmp_path):
    """It still parses, and every expert is there: the submodel would be another domain's."""
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / STEP / "registry.json"
    registry = json.loads(path.read_text())
    first, second = registry["domains"]
    first["experts"], second["experts"] = second["experts"], first["experts"]
    path.write_text(json.dumps(registry, indent=1) + "\n")
    assert f"{STEP}/registry.json is damaged" in refused("checkpoint=run", "domain=ships", "verify=0", "out=ships")


def test_check_false_takes_the_parent_as_it_is(extract, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    flip(tmp_path / "run" / STEP / MODEL, -3)
    command = ["checkpoint=run", "domain=ships", "out=ships"]
    assert extract(*command)[0] == 2
    assert extract(*command, "check=false")[0] == 0


def test_help_lists_every_key(extract):
    code, out, _ = extract("--help")
    assert code == 0
    for key in "checkpoint domain out format dtype verify dataset check transformers file_bytes threads".split():
        assert f"\n{key}: " in out
