"""Imports go one way, by the floors of docs/architecture.md, and nothing heavy is imported before it is needed."""

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


def floors(heading: str) -> list[list[str]]:
    """Names by floor, from the lowest, as the table under a heading of docs/architecture.md has them."""
    text = (
        (ROOT / "docs" / "architecture.md").read_text("utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    )
    rows = [line.split("|")[2] for line in text.splitlines() if re.match(r"\| *\d", line)]
    assert rows, heading
    return [re.findall(r"`([^`/]+)/?`", row) for row in rows]


def modules_imported(path: Path) -> Iterator[tuple[str, ...]]:
    """What a file imports from normswap, as parts below the package, anywhere in it."""
    here = ["normswap", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "normswap":
                while len(name) > 1 and not is_module(name[1:]):
                    name = name[:-1]
                yield tuple(name[1:])


def is_module(parts: list[str]) -> bool:
    place = PACKAGE.joinpath(*parts)
    return place.is_dir() or place.with_suffix(".py").is_file()


def place_of(path: Path, below: Path = PACKAGE) -> str:
    """A file's floor: the folder or file right below the package."""
    return path.relative_to(below).with_suffix("").parts[0]


HOUSE = floors("Floors")
TRAINER = floors("Fine-tuning")


def test_every_file_and_folder_has_a_floor_and_only_those() -> None:
    names = [name for floor in HOUSE for name in floor]
    assert sorted(names) == sorted({place_of(path) for path in FILES}), "docs/architecture.md has the floors"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_lower_floors(path: Path) -> None:
    level = {name: number for number, floor in enumerate(HOUSE) for name in floor}
    mine = place_of(path)
    theirs = {parts[0] if parts else "__init__" for parts in modules_imported(path)}
    assert {name for name in theirs if name != mine and level[name] >= level[mine]} == set()


@pytest.mark.parametrize("path", sorted((PACKAGE / "finetuning").rglob("*.py")), ids=lambda path: path.stem)
def test_within_fine_tuning_a_file_imports_only_from_lower_floors(path: Path) -> None:
    level = {name: number for number, floor in enumerate(TRAINER) for name in floor}
    mine = place_of(path, PACKAGE / "finetuning")
    theirs = {parts[1] for parts in modules_imported(path) if parts[:1] == ("finetuning",) and len(parts) > 1}
    assert {name for name in theirs if name != mine and level[name] >= level[mine]} == set()


def test_no_more_than_eight_files_lie_directly_in_the_package() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_no_package_offers_a_function_under_the_name_of_one_of_its_files() -> None:
    """It would hide the file from `import`."""
    for init in PACKAGE.rglob("__init__.py"):
        beside = {path.stem for path in init.parent.glob("*.py")} | {
            p.name for p in init.parent.iterdir() if p.is_dir()
        }
        found = re.findall(r"^_HOME = \{(.*?)^\}", init.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        assert not beside & set(re.findall(r'"(\w+)":', found[0] if found else "")), init


def test_only_the_record_s_own_file_touches_the_attribute_that_holds_it() -> None:
    speaks = re.compile(r"_normswap\b|\bRECORD\b")
    named = {str(path.relative_to(PACKAGE)) for path in FILES if speaks.search(path.read_text("utf-8"))}
    assert named == {"modules/attributes.py", "conversion/record.py"}


def test_the_core_imports_no_other_library_at_the_top_of_a_file() -> None:
    core = {name for floor in HOUSE[: next(n for n, f in enumerate(HOUSE) if "conversion" in f) + 1] for name in floor}
    light = core - {"sources", "data", "heads", "files"}
    for path in FILES:
        if place_of(path) in light:
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
    for module in (normswap.data, normswap.detection):
        for name in module.__all__:
            assert getattr(module, name) is not None
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = module.nothing
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = normswap.nothing
    assert set(dir(normswap)) >= set(normswap.__all__)
