"""What the linters cannot say about the tree: packages, doors, environment, sizes."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "configs", "kernels", "launch", "moe", "parallel")
SOURCES = [*sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")), ROOT / "__init__.py"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DOORS = {
    # Training has one; the other measures DeepSpeed's own layer beside ours, in a process of its own.
    "deepspeed": ("parallel/zero.py", "benchmarks/deepspeed_step.py"),
    "megatron": ("parallel/megatron.py",),
    "mpi4py": ("launch/mpi.py",),
    "hydra": ("launch/compose.py",),
    "omegaconf": ("launch/compose.py",),
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def below(*folders):
    return [path for path in SOURCES if name_of(path).startswith(tuple(f"{folder}/" for folder in folders))]


def offences(paths, check):
    """What `check` finds in the files, each with the file's name."""
    return [f"{name_of(path)}: {found}" for path in paths for found in check(parse(path))]


def dotted(node):
    """`a.b.c` of a chain of attributes, else an empty text."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imports(nodes):
    """Absolute modules and names that `nodes` import, written `module` or `module.name`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


def at_import_time(tree):
    """Nodes that run when the module is imported: all but the bodies of functions."""
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))


def closed_doors(tree, path):
    roots = {name.split(".")[0] for name in imports(ast.walk(tree))}
    return [module for module, doors in DOORS.items() if module in roots and path not in doors]


def environment_reads(tree):
    nodes = list(ast.walk(tree))
    names = [dotted(node) for node in nodes if isinstance(node, ast.Attribute)] + list(imports(nodes))
    return [name for name in names if name.startswith(("os.environ", "os.getenv", "os.putenv"))]


def process_groups(tree):
    nodes = list(ast.walk(tree))
    names = [dotted(node) for node in nodes if isinstance(node, ast.Attribute)] + list(imports(nodes))
    return [name for name in names if name.startswith("torch.distributed")]


def dangers(tree):
    """Ways to run what a file brings, and state that changes behind the reader's back."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"global {', '.join(node.names)}"
        if isinstance(node, ast.Call) and dotted(node.func) in ("eval", "exec"):
            yield dotted(node.func)
        if isinstance(node, ast.Call) and dotted(node.func) == "torch.load":
            safe = {keyword.arg: keyword.value for keyword in node.keywords}.get("weights_only")
            if not (isinstance(safe, ast.Constant) and safe.value is True):
                yield "torch.load"
    for name in imports(ast.walk(tree)):
        if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"):
            yield name


def triton_imports(tree):
    """Imports of Triton, or of a file that is named after it, when the module is imported."""
    nodes = list(at_import_time(tree))
    relative = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level > 0]
    names = [*imports(nodes), *(f"{node.module or ''}.{alias.name}" for node in relative for alias in node.names)]
    return [name for name in names if any(part.startswith("triton") for part in name.split("."))]


def long_functions(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > 60:
            yield node.name


def undocumented(tree):
    for node in tree.body:
        documentable = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if documentable and not node.name.startswith("_") and not ast.get_docstring(node):
            yield node.name


def test_packages_are_the_folders_of_the_tree():
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = tables["tool"]["setuptools"]["packages"]
    found = {"sigmoe"}
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent != ROOT:
            found.add("sigmoe." + ".".join(path.parent.relative_to(ROOT).parts))
    assert listed == sorted(listed)
    assert set(listed) == found


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for path in SOURCES}
    assert [name_of(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
    with_code = {path.parent.name for path in ROOT.glob("[!.]*/*.py")}
    assert with_code - {"tests"} == set(FOLDERS)


def test_heavy_libraries_have_one_door():
    assert [
        f"{name_of(path)}: {module}" for path in SOURCES for module in closed_doors(parse(path), name_of(path))
    ] == []


def test_only_launch_reads_the_environment():
    assert offences(set(SOURCES) - set(below("launch")), environment_reads) == []


def test_models_and_kernels_know_no_process_groups():
    assert offences(below("moe", "kernels"), process_groups) == []


def test_nothing_runs_what_a_file_brings_and_no_global_changes():
    assert offences(SOURCES, dangers) == []


def test_triton_is_imported_only_where_it_is_chosen():
    paths = [path for path in below("kernels") if not path.name.startswith("triton")]
    assert offences(paths, triton_imports) == []


def test_package_roots_import_nothing():
    for path in (ROOT / "__init__.py", ROOT / "kernels" / "__init__.py"):
        assert [node for node in ast.walk(parse(path)) if isinstance(node, ast.Import | ast.ImportFrom)] == []


def test_files_are_short():
    lines = {name_of(path): path.read_text(encoding="utf-8").count("\n") for path in SOURCES + TESTS}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_functions_are_short():
    assert offences([path for path in SOURCES + TESTS if not path.name.startswith("triton")], long_functions) == []


def test_public_names_are_documented():
    assert offences(SOURCES, undocumented) == []


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (lambda tree: closed_doors(tree, "moe/x.py"), "import deepspeed"),
        (lambda tree: closed_doors(tree, "moe/x.py"), "def f():\n    from megatron.core import parallel_state"),
        (lambda tree: closed_doors(tree, "moe/x.py"), "import importlib\nimportlib.import_module('mpi4py.MPI')"),
        (lambda tree: closed_doors(tree, "launch/train.py"), "from hydra import compose"),
        (environment_reads, "import os\nx = os.environ['A']"),
        (environment_reads, "import os\nx = os.getenv('A')"),
        (environment_reads, "from os import environ"),
        (process_groups, "import torch.distributed as dist"),
        (process_groups, "from torch import distributed"),
        (process_groups, "import torch\ntorch.distributed.get_rank()"),
        (dangers, "import pickle"),
        (dangers, "from pickle import loads"),
        (dangers, "import torch\ntorch.load('x')"),
        (dangers, "import torch\ntorch.load('x', weights_only=False)"),
        (dangers, "eval('1')"),
        (dangers, "exec('1')"),
        (dangers, "def f():\n    global x"),
        (long_functions, "def f():\n" + "    x = 1\n" * 60),
        (undocumented, "class A:\n    x = 1"),
        (triton_imports, "try:\n    import triton\nexcept ImportError:\n    pass"),
        (triton_imports, "import triton.language as tl"),
        (triton_imports, "from .triton import kernel"),
        (triton_imports, "from . import triton"),
    ],
)
def test_the_checks_see_what_they_look_for(check, code):
    assert list(check(ast.parse(code)))


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (lambda tree: closed_doors(tree, "parallel/zero.py"), "import deepspeed"),
        (lambda tree: closed_doors(tree, "moe/x.py"), "from .deepspeed import x"),
        (environment_reads, "import os\nos.fsync(1)"),
        (process_groups, "import torch\ntorch.zeros(1)"),
        (dangers, "import torch\ntorch.load('x', weights_only=True)\nmodel.eval()"),
        (long_functions, "def f():\n" + "    x = 1\n" * 59),
        (undocumented, "def _f(): pass"),
        (triton_imports, "def f():\n    from .triton import kernel"),
    ],
)
def test_the_checks_let_the_rest_pass(check, code):
    assert not list(check(ast.parse(code)))
