"""Imports go one way, in the order of docs/architecture.md, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "normswap"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torchvision", "timm", "transformers", "accelerate", "matplotlib", "safetensors", "rich", "typer"}


def order() -> list[str]:
    """Files and folders in the order of the first table in docs/architecture.md; `normswap` is the package itself."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)]


def layer_of(parts: tuple[str, ...]) -> str:
    """The row of a module, from its path below the package."""
    return {"__init__": "normswap", "__main__": "cli"}.get(parts[0], parts[0])


def imported_layers(path: Path) -> Iterator[str]:
    """The rows of what a file imports from normswap, by a relative or an absolute import, anywhere in it."""
    here = ["normswap", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names] if len(base) == 1 else [base]
        else:
            continue
        for name in names:
            if name[0] == "normswap" and name[1:] and name[1] != "__version__":
                is_file = (PACKAGE / name[1]).is_dir() or (PACKAGE / f"{name[1]}.py").exists()
                yield layer_of(tuple(name[1:])) if is_file else "normswap"


def test_every_file_has_its_place_in_the_order() -> None:
    layers = {layer_of(path.relative_to(PACKAGE).with_suffix("").parts) for path in FILES}
    assert layers <= set(order()), "add the file to the table in docs/architecture.md"


def test_every_place_in_the_order_has_its_file() -> None:
    for name in set(order()) - {"normswap"}:
        assert (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file(), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_what_comes_before_it(path: Path) -> None:
    places = {name: place for place, name in reversed(list(enumerate(order())))}
    mine = layer_of(path.relative_to(PACKAGE).with_suffix("").parts)
    place = places.get(mine, len(places))  # what has no place yet is reported once, above
    late = {layer for layer in imported_layers(path) if layer != mine and places.get(layer, -1) >= place}
    assert late == set(), f"{mine} comes before {late}"


def test_the_core_imports_no_other_library_at_the_top_of_a_file() -> None:
    names = order()
    core = names[: names.index("conversion") + 1]
    for path in FILES:
        if layer_of(path.relative_to(PACKAGE).with_suffix("").parts) in core:
            top = ast.parse(path.read_text("utf-8")).body
            found = {a.name.split(".")[0] for n in top if isinstance(n, ast.Import) for a in n.names}
            found |= {str(n.module).split(".")[0] for n in top if isinstance(n, ast.ImportFrom) and not n.level}
            assert not found & (HEAVY | {"numpy"}), path


SCRIPT = """
import sys
import normswap
dir(normswap), normswap.__version__
early = sorted({"torch", *HEAVY} & {name.partition(".")[0] for name in sys.modules})
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
known = {name.partition(".")[0] for name in sys.modules}
normswap.revert(normswap.convert(net, to="gn", groups=2))
late = sorted(HEAVY & {name.partition(".")[0] for name in sys.modules} - known)
print(early, late)
"""


def test_importing_normswap_imports_no_library_and_converting_none_but_torch() -> None:
    script = f"HEAVY = {HEAVY - {'safetensors'}!r}\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[] []"


def test_every_public_name_exists() -> None:
    import normswap

    for name in normswap.__all__:
        assert getattr(normswap, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = normswap.nothing
    assert set(dir(normswap)) >= set(normswap.__all__)
