"""Everything imports downwards, and no two files import each other, as docs/structure.md draws it."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "twins_fast"
# Lowest first; those of one row do not know each other.
ROWS = [
    {"kernels", "devices", "json_text"},
    {"deferred", "verdicts"},
    {"validation"},
    {"options", "ops"},
    {"nn"},
    {"models"},
    {"attacks"},
    {"methods", "checkpoints", "qualify"},
    {"evaluation", "compat"},
    {"train"},
]


def imports():
    """Module -> the package's modules that it imports anywhere, those inside functions too."""
    files = {
        ".".join(("twins_fast", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/**/*.py")]
    }
    graph = {}
    for module, path in files.items():
        graph[module] = set()
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*parents, *([node.module] if node.module else [])])
                names = [f"{base}.{alias.name}" for alias in node.names if alias.name != "_C"]  # compiled
                names = [name if name in files else base for name in names]
            else:
                continue
            graph[module] |= {name for name in names if name in files} - {module}
    return graph


def test_no_circle():
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_arrow_runs_up():
    rows = {name: number for number, row in enumerate(ROWS) for name in row}
    upwards = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if module.count(".") and other.count(".")
        for own, its in [(module.split(".")[1], other.split(".")[1])]
        if own != its and module != "twins_fast.__main__" and rows[its] >= rows[own]
    ]
    assert not upwards, upwards


def test_the_graph_is_not_empty():
    graph = imports()
    assert "twins_fast.attacks.pgd" in graph["twins_fast.methods.at"]
    assert {"twins_fast.kernels.attack", "twins_fast.kernels.twin_bn"} <= graph.keys()
