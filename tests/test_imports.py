"""The directions of imports (DESIGN, section 7) and what may never be read, found in the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "photon_train"
# Importer -> what of ours it may import besides itself. Modules of one file go by their name.
HELPERS = {"errors", "files", "host_memory", "layouts", "linears", "logits", "config"}
ALLOWED = {
    "config": {"errors", "files", "linears"},
    "errors": set(),
    "files": {"errors"},
    "host_memory": set(),
    "layouts": {"linears"},
    "linears": set(),
    "logits": set(),
    "models": {"photon_kernels"},
    "checkpoints": {"models", "errors"},
    "accounting": {"errors", "layouts", "linears"},
    "conversion": {"checkpoints", "models", "accounting", "manifest", *HELPERS},
    "data": {"checkpoints", "models", "manifest", *HELPERS},
    "training": {"models", "data", "accounting", "manifest", *HELPERS},
    "export": {"checkpoints", "models", "accounting", "manifest", *HELPERS},
    "inference": {"checkpoints", "models", "accounting", "manifest", "photon_kernels", *HELPERS},
    "evaluation": {"checkpoints", "models", "data", "inference", "accounting", "manifest", *HELPERS},
}
# The stages put together, as the commands call them.
ALLOWED["pipeline"] = {"manifest", *ALLOWED}
# What the console script and the recipes run; nothing in the library imports it.
ALLOWED["commands"] = {"cli", "pipeline", *ALLOWED}
# The scripts of `tools/` and what they share, by the names that they have while one of them (or a test) runs.
TOOLS = {"tools", *(path.stem for path in (ROOT / "tools").glob("*.py"))}
# What the library never imports.
ENTRY_POINTS = {"recipes", "tests", "lib", *TOOLS}
# Importer -> which of these it may import nevertheless: nobody imports recipes, and only tests a script.
MAY_ENTER = {"recipes": set(), "tools/lib": {"lib"}, "tools": {"lib"}, "tests": ENTRY_POINTS - {"recipes"}}
LAZY = {"deepspeed", "matplotlib", "wandb", "liger_kernel", "tensorboard", "tensorboardX", "datasets", "pyarrow"}
LAZY |= {"lm_eval", "vllm", "gguf", "bitsandbytes"}


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def statements(tree: ast.AST, path: Path, root: Path = ROOT) -> Iterator[tuple[str, list[str]]]:
    """Each import, wherever it stands, as (module, names taken from it); absolute, as seen from `root`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = path.relative_to(root).parts[: -node.level]
                base = ".".join([*parents, *([base] if base else [])])
            yield base, [alias.name for alias in node.names]


def imported(tree: ast.AST, path: Path) -> Iterator[str]:
    """Absolute dotted names of everything that is imported, wherever it stands; relative imports resolved."""
    for base, names in statements(tree, path):
        yield base
        yield from (f"{base}.{name}" for name in names)


def ours(name: str) -> str | None:
    """The part of ours that a dotted name belongs to, else None."""
    parts = name.split(".")
    if parts[0] in ("photon_kernels", "photon_vllm") or parts[0] in ENTRY_POINTS:
        return parts[0]
    return parts[1] if parts[0] == "photon_train" and len(parts) > 1 else None


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def wrong_imports(tree: ast.AST, path: Path, own: str, allowed: set[str]) -> set[str]:
    known = {part_of(other) for other in sources(PACKAGE)} | ENTRY_POINTS | {"photon_kernels", "photon_vllm"}
    return {part for name in imported(tree, path) if (part := ours(name)) in known} - allowed - {own, "__init__"}


def test_parts_import_only_what_they_may() -> None:
    wrong = {}
    for path in sources(PACKAGE):
        allowed = ALLOWED.get(part_of(path), HELPERS)
        if found := wrong_imports(parse(path), path, part_of(path), allowed):
            wrong[str(path.relative_to(ROOT))] = found
    assert not wrong


@pytest.mark.parametrize("folder", MAY_ENTER)
def test_entry_points_import_only_what_they_may(folder: str) -> None:
    files = sources(ROOT / folder)
    assert files, f"{folder} moved: fix this test"
    for path in files:
        if folder == "tools" and "lib" in path.relative_to(ROOT / folder).parts:
            continue
        found = {ours(name) for name in imported(parse(path), path)} & (ENTRY_POINTS - MAY_ENTER[folder])
        assert not found, f"{path} imports {found}"


def test_kernels_import_nothing_of_ours() -> None:
    folder = ROOT / "kernels"
    assert sources(folder), "the kernels moved: fix this test"
    for path in sources(folder):
        names = {ours(name) for name in imported(parse(path), path)} - {None, "photon_kernels"}
        assert not names, path


def test_the_plugin_imports_models_alone() -> None:
    """vLLM's processes need nothing of training, and what computes a step nothing of vLLM."""
    files = sources(ROOT / "photon_vllm")
    assert files, "the plugin moved: fix this test"
    for path in files:
        names = set(imported(parse(path), path))
        assert {ours(name) for name in names} <= {None, "host_memory", "models", "photon_vllm"}, path
        if path.stem in ("steps", "stores"):
            assert "vllm" not in {name.split(".")[0] for name in names}, path


def import_graph(folder: Path) -> dict[str, set[str]]:
    """Module of a package -> the modules of it that it imports: at its top, inside functions, for types alone."""
    root = folder.parent
    files = {".".join(path.relative_to(root).with_suffix("").parts): path for path in sources(folder)}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        graph[module] = set()
        for base, names in statements(parse(path), path, root):
            # `from package import module` needs the module; the package itself, only for what it defines.
            targets = {f"{base}.{name}" if f"{base}.{name}" in files else base for name in names} or {base}
            graph[module] |= targets & files.keys()
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each is imported by the next, and the first by the last; none where there is no such circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize(
    "folder", [PACKAGE, ROOT / "kernels" / "photon_kernels", ROOT / "photon_vllm"], ids=lambda folder: folder.name
)
def test_no_module_is_imported_by_what_it_imports(folder: Path) -> None:
    graph = import_graph(folder)
    assert graph and any(graph.values())
    assert not cycle(graph)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"a": "from package import b", "b": "from package.a import x"}, True),
        ({"a": "import package.b", "b": "def f():\n    from . import a"}, True),
        ({"a": "import package.b", "b": "if TYPE_CHECKING:\n    from .a import X"}, True),
        ({"__init__": "from package.a import f", "a": "from package import f"}, True),
        ({"__init__": "from package.a import f", "a": "from package import b", "b": ""}, False),
        ({"a": "import package.b, c", "b": "import c", "c": "import a"}, False),
    ],
)
def test_cycles_are_seen(files: dict[str, str], found: bool, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    for name, code in {"__init__": "", **files}.items():
        (package / f"{name}.py").write_text(code)
    assert bool(cycle(import_graph(package))) == found


def test_models_ship_alone() -> None:
    """An export carries the files of `models` flat: they may import each other relatively and nothing else of ours."""
    for path in sources(PACKAGE / "models"):
        assert path.parent == PACKAGE / "models", f"{path} is in a subfolder"
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, path
                assert node.level == 1 or not (node.module or "").startswith("photon_train"), path
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("photon_train") for alias in node.names), path


def test_optional_packages_are_imported_inside_functions() -> None:
    for path in sources(PACKAGE):
        top_level = parse(path)
        for node in ast.walk(top_level):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                node.body = []
        found = {name.split(".")[0] for name in imported(top_level, path)} & LAZY
        assert not found, f"{path} imports {found} when it is imported itself"


def unsafe_reads(tree: ast.AST, path: Path) -> list[str]:
    """Ways to unpickle: the pickle family, `torch.load` without weights_only=True, unsafe YAML."""
    found = [name for name in imported(tree, path) if name.split(".")[0] in {"pickle", "dill", "joblib", "shelve"}]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if options.get("weights_only") != "True":
                found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"yaml.unsafe_load", "yaml.full_load"}:
            found.append(ast.unparse(node))
    return found


def test_nothing_is_unpickled() -> None:
    for folder in ("photon_train", "photon_vllm", "kernels", "recipes", "tools"):
        for path in sources(ROOT / folder):
            assert not unsafe_reads(parse(path), path), path


def test_kernels_folder_is_no_package() -> None:
    """A package named `kernels` would shadow the one of Hugging Face that transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("own", "code", "found"),
    [
        ("training", "from photon_train.conversion import plan", {"conversion"}),
        ("training", "def f():\n    from ..conversion.plan import x", {"conversion"}),
        ("training", "from photon_train import conversion, models", {"conversion"}),
        ("training", "import recipes.convert_llama", {"recipes"}),
        ("pipeline", "from photon_train.commands import convert", {"commands"}),
        ("training", "from lib.shapes import SHAPES", {"lib"}),
        ("training", "import bench_kernels", {"bench_kernels"}),
        ("training", "from .loop import x\nfrom ..models import y\nimport torch", set()),
        ("models", "from ..errors import PhotonError", {"errors"}),
        ("models", "import photon_kernels.chunker", set()),
        ("config", "import photon_train.models", {"models"}),
        ("inference", "from photon_vllm.steps import Step", {"photon_vllm"}),
    ],
)
def test_the_walk_sees_what_it_must(own: str, code: str, found: set[str]) -> None:
    path = PACKAGE / own / "file.py"
    assert wrong_imports(ast.parse(code), path, own, ALLOWED[own]) == found


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("import pickle", 1),
        ("torch.load(f)", 1),
        ("torch.load(f, weights_only=False)", 1),
        ("torch.load(f, weights_only=True)", 0),
        ("yaml.unsafe_load(f)", 1),
    ],
)
def test_unsafe_reads_are_seen(code: str, count: int) -> None:
    assert len(unsafe_reads(ast.parse(code), PACKAGE / "file.py")) == count
