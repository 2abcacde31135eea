"""`sigmoe generate` on a model that `sigmoe train` made."""

import io
import json

import pytest
import torch

from sigmoe.launch.main import main

MODEL = ["model=tiny", "model.dim=16", "model.expert_dim=16"]
SIZES = ["steps=1", "global_batch=2", "sequence_length=32", "schedule.warmup_steps=1", "evaluate.tokens=64"]


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """A run of a model that routes by domain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "routed"
    assert main(["train", f"dataset={dataset}", "logger=jsonl", f"out={out}", *MODEL, *SIZES, "router.sets=2"]) == 0
    yield out
    torch.set_num_threads(threads)


@pytest.fixture
def say(run, capfd):
    """Run the command; returns its exit code, stdout and stderr."""

    def of(*words, checkpoint=run):
        capfd.readouterr()
        code = main(["generate", f"checkpoint={checkpoint}", *words])
        return code, *capfd.readouterr()

    return of


def texts_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_text_is_streamed(say, tmp_path):
    words = ["domain=ships", "prompt=sail the", "max_tokens=9", "temperature=1", "seed=4"]
    code, streamed, told = say(*words)
    assert code == 0 and streamed.endswith("\n")
    assert "9 tokens in" in told and "tokens/s" in told
    assert say(*words, "stream=false")[1] == streamed
    assert say(*words, f"out={tmp_path}/new/texts.jsonl")[:2] == (0, "")
    (kept,) = texts_of(tmp_path / "new/texts.jsonl")
    assert kept["text"] + "\n" == streamed
    assert (kept["prompt"], kept["domain"], kept["tokens"], kept["finish"]) == ("sail the", "ships", 9, "max_tokens")
    assert say(*words[:-1], "seed=5")[1] != streamed


def test_prompts_are_taken_as_they_stand(say, tmp_path):
    for number, prompt in enumerate(("def f(x, y={}): # ${x} 'a' \"b\"", " \\ [1,2", "null", "=", "a\nb")):
        out = tmp_path / f"{number}.jsonl"
        assert say("domain=ships", f"prompt={prompt}", "max_tokens=1", f"out={out}")[0] == 0
        assert texts_of(out)[0]["prompt"] == prompt


def test_many_prompts(say, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("sail the\n\nbake a cake\r\n")
    (tmp_path / "a.jsonl").write_text('{"text": "sail the"}\n{"text": "bake a cake", "id": 1}\n')
    sources = ("prompts=[sail the,bake a cake]", f"prompts_file={tmp_path}/a.txt", f"prompts_file={tmp_path}/a.jsonl")
    kept = []
    for number, source in enumerate(sources):
        out = tmp_path / f"{number}"
        assert say(source, "domain=auto", "max_tokens=4", "batch=1", f"out={out}")[0] == 0
        kept.append(texts_of(out))
    assert kept[0] == kept[1] == kept[2]
    assert [text["prompt"] for text in kept[0]] == ["sail the", "bake a cake"]
    _, printed, told = say(sources[0], "domain=auto", "max_tokens=4")
    for number, text in enumerate(kept[0], 1):
        assert f"--- {number} ({text['domain']}): {text['prompt']}\n{text['text']}\n" in printed
        assert f"prompt {number}: domain {text['domain']}" in told
    monkeypatch.setattr("sys.stdin", io.StringIO("sail the\n"))
    assert say("prompt=-", f"domain={kept[0][0]['domain']}", "max_tokens=4")[1] == kept[0][0]["text"] + "\n"


def test_stdin_that_is_not_utf8(say, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    code, _, told = say("prompt=-", "domain=ships")
    assert code == 2
    assert "the prompt on stdin is not valid Unicode" in told


def test_a_link_is_no_place_and_nothing_is_generated(say, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    code, _, told = say("prompt=sail", "domain=ships", f"out={tmp_path}/link")
    assert code == 2
    assert "is a link or a directory: give another out=" in told
    assert "tokens after" not in told


def test_tokens_are_counted_where_no_text_is_streamed(say, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes stderr for a terminal
    words = ["domain=ships", "max_tokens=4"]
    assert "8/8" in say("prompts=[sail the,bake a cake]", *words)[2]
    assert "4/4" in say("prompt=sail the", "stream=false", *words)[2]
    assert "4/4" not in say("prompt=sail the", *words)[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares the interpreter with torch on a CPU")
def test_triton_writes_the_same_text(say):
    pytest.importorskip("triton")
    words = ["prompts=[sail the,bake a cake]", "domain=ships", "max_tokens=3"]
    assert say(*words, "kernels=triton")[1] == say(*words)[1]


def test_a_model_that_transformers_reads(dataset, say, tmp_path):
    out = tmp_path / "mixtral"
    router = ["router=top_k", "router.num_experts=2"]
    assert main(["train", f"dataset={dataset}", "logger=jsonl", f"out={out}", *MODEL, *SIZES, *router]) == 0
    words = ["prompt=sail the", "max_tokens=6"]
    code, text, _ = say(*words, checkpoint=out / "checkpoints/step-00000001/model")
    assert code == 0
    assert say(*words, checkpoint=out)[1] == text


def test_beyond_the_trained_length_is_a_note(say):
    code, _, told = say("prompt=sail", "domain=ships", "max_tokens=40")
    assert code == 0
    assert "go beyond the 32 that the model was trained on" in told
    assert "go beyond" not in say("prompt=sail", "domain=ships", "max_tokens=4")[2]


MISTAKES = {
    ("prompt=a",): "routes by domain: give domain=auto (the prompt's tokens choose), or one of recipes, ships",
    ("prompt=a", "domain=trains"): "knows no domain 'trains': give domain=auto or one of recipes, ships",
    ("prompt=", "domain=ships"): "prompt 1 of 1 is empty",
    ("prompts=[]", "domain=ships"): "there are no prompts",
    ("domain=ships",): "give one of prompt=TEXT",
    ("prompt=a", "prompts=[b]", "domain=ships"): "give one of prompt=TEXT",
    ("prompts_file=missing.txt", "domain=ships"): "missing.txt cannot be read: No such file",
    ("prompt=a", "domain=ships", "temperature=-1"): "temperature must be at least 0",
    ("prompt=a", "domain=ships", "top_p=0"): "top_p must lie in (0, 1]",
    ("prompt=a", "domain=ships", "top_p=1.5"): "top_p must lie in (0, 1]",
    ("prompt=a", "domain=ships", "top_k=0"): "top_k must be at least 1",
    ("prompt=a", "domain=ships", "max_tokens=0"): "max_tokens must be at least 1",
    ("prompt=a", "domain=ships", "batch=0"): "batch must be at least 1",
    ("prompt=a", "domain=ships", "threads=0"): "threads must be at least 1",
    ("prompt=a", "domain=ships", "kernels=cuda"): "kernels must be one of auto, torch, triton, got 'cuda'",
    ("prompt=a", "domain=ships", "out=."): "out=.: . is a link or a directory: give another out=",
    ("prompt=a", "domain=ships", "out=/dev/null/a"): "/dev/null is no directory that can be written to",
    ("prompt=a \udcff", "domain=ships"): "prompt 1 of 1 is not valid Unicode (U+DCFF at character 3): give UTF-8",
}


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_mistakes_are_one_line(say, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed, told = say(*words)
    assert (code, printed) == (2, "")
    assert MISTAKES[words] in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{', "line 2 is no JSON"),
        ("a.jsonl", '{"txt": "a"}', "line 1 is no object with a field text"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}', "prompt 2 of 2 is not valid Unicode (U+D800 at character 1)"),
        ("a.txt", " \n", "there are no prompts"),
    ],
)
def test_bad_files_are_named(say, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    code, _, told = say(f"prompts_file={tmp_path}/{name}", "domain=ships")
    assert code == 2
    assert message in told


def test_a_model_without_a_tokenizer(say, run, tmp_path):
    sub = tmp_path / "sub"
    assert main(["extract", f"checkpoint={run}", "domain=ships", f"out={sub}"]) == 0
    assert say("prompt=sail", "max_tokens=2", checkpoint=sub)[0] == 0
    (sub / "tokenizer.json").unlink()
    code, _, told = say("prompt=sail", checkpoint=sub)
    assert code == 2
    assert "has no tokenizer.json" in told


def test_a_submodel_writes_the_same_text(say, run, tmp_path):
    sub = tmp_path / "sub"
    assert main(["extract", f"checkpoint={run}", "domain=ships", f"out={sub}"]) == 0
    words = ["prompt=sail the", "max_tokens=12", "temperature=1"]
    assert say(*words, checkpoint=sub)[1] == say(*words, "domain=ships")[1]


def test_help_lists_every_key(capsys):
    assert main(["generate", "--help"]) == 0
    told = capsys.readouterr().out
    for key in ("prompts_file", "top_p", "domain", "stream", "precision"):
        assert f"{key}:" in told


def test_a_damaged_model_is_refused(say, run, tmp_path):
    sub = tmp_path / "sub"
    assert main(["extract", f"checkpoint={run}", "domain=ships", f"out={sub}"]) == 0
    (path,) = sub.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, _, told = say("prompt=sail", "max_tokens=2", checkpoint=sub)
    assert code == 2
    assert f"{path} is damaged" in told
    assert say("prompt=sail", "max_tokens=2", "check=false", checkpoint=sub)[0] == 0
