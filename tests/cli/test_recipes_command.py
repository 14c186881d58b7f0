from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from ran import Cli

from normswap.cli import recipe_catalog

FOLDER = Path(__file__).parents[2] / "recipes"
NAMES = sorted(file.stem for file in FOLDER.glob("*.py"))


def test_every_recipe_is_one_line_that_says_what_it_is_for(cli: Cli) -> None:
    ran = cli("recipes")
    assert ran.code == 0, ran.err
    assert max(map(len, ran.out.splitlines())) <= 120
    rows = {line.split()[0]: line for line in ran.out.splitlines()[1:] if line.strip()}
    for name in NAMES:
        text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text("utf-8"))) or ""
        goal = " ".join(text.partition("Goal:")[2].partition("Command:")[0].split())
        assert rows[name].removeprefix(name).strip() in goal
        assert goal.startswith(rows[name].removeprefix(name).strip())


def test_a_terminal_is_shown_the_whole_goal_and_the_time(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setattr("normswap.cli.terminal.render.is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "100")
    shown = "".join(cli("recipes").out.split())
    assert "45s" in shown
    assert "time" in shown


def test_json_holds_all_that_a_header_says(cli: Cli) -> None:
    found = cli("recipes", "--json").json["recipes"]
    assert [recipe["name"] for recipe in found] == NAMES
    for recipe in found:
        assert Path(recipe["file"]) == FOLDER / f"{recipe['name']}.py"
        assert recipe["title"].endswith(".")
        starts = ("python", "torchrun --nproc-per-node=2")  # the second for those of several processes
        assert recipe["command"].startswith(tuple(f"{start} recipes/{recipe['name']}.py" for start in starts))
        assert all(recipe[key] for key in ("goal", "time", "expected"))


@pytest.mark.parametrize("name", ["train_digits", "train_digits.py"])
def test_one_is_copied_next_to_the_user(cli: Cli, folder: Path, name: str) -> None:
    ran = cli("recipes", name)
    assert ran.code == 0, ran.err
    assert (folder / "train_digits.py").read_bytes() == (FOLDER / "train_digits.py").read_bytes()
    assert "Written: train_digits.py" in ran.out
    assert "python train_digits.py" in ran.out


def test_to_another_file_or_folder(cli: Cli, folder: Path) -> None:
    (folder / "mine").mkdir()
    assert cli("recipes", "train_digits", "-o", "mine").code == 0
    ran = cli("recipes", "train_digits", "--output", "mine/other.py", "--json")
    assert ran.json["written"] == str(Path("mine", "other.py"))
    assert sorted(file.name for file in (folder / "mine").iterdir()) == ["other.py", "train_digits.py"]


def test_what_exists_is_replaced_by_force_alone(cli: Cli, folder: Path) -> None:
    (folder / "train_digits.py").write_text("mine")
    ran = cli("recipes", "train_digits")
    assert (ran.code, ran.out) == (1, "")
    assert "train_digits.py exists already" in ran.err
    assert "--force" in ran.err
    assert (folder / "train_digits.py").read_text() == "mine"
    assert cli("recipes", "train_digits", "--force").code == 0
    assert (folder / "train_digits.py").read_bytes() == (FOLDER / "train_digits.py").read_bytes()


def test_an_unknown_name_is_an_error_with_the_names_and_a_near_match(cli: Cli, folder: Path) -> None:
    before = sorted(folder.iterdir())
    ran = cli("recipes", "train_digit")
    assert (ran.code, ran.out) == (2, "")
    assert all(name in ran.err for name in NAMES)
    assert "Did you mean train_digits?" in ran.err
    assert sorted(folder.iterdir()) == before


def test_a_folder_that_does_not_exist_is_an_error(cli: Cli) -> None:
    ran = cli("recipes", "train_digits", "-o", "nowhere/x.py")
    assert ran.code == 1
    assert "the folder nowhere does not exist" in ran.err


@pytest.mark.parametrize("arguments", [("--force",), ("-o", "x.py")])
def test_options_of_copying_without_a_name_are_a_wrong_call(cli: Cli, arguments: tuple[str, ...]) -> None:
    ran = cli("recipes", *arguments)
    assert ran.code == 2
    assert "--output and --force go with the name of a recipe" in ran.err


def test_quiet_prints_nothing(cli: Cli, folder: Path) -> None:
    ran = cli("recipes", "train_digits", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert (folder / "train_digits.py").is_file()


def test_a_wheel_brings_them_within_the_package(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "_recipes").mkdir()
    text = '"""Do it.\n\nGoal:      all\n           done\nCommand:   python x.py\nTime:      1 s\nExpected:  0.5\n"""\n'
    (folder / "_recipes" / "x.py").write_text(text)
    monkeypatch.setattr(recipe_catalog, "FOLDERS", (folder / "_recipes", FOLDER))
    (found,) = cli("recipes", "--json").json["recipes"]
    assert (found["name"], found["title"], found["goal"], found["expected"]) == ("x", "Do it.", "all done", "0.5")


def test_without_any_folder_the_error_says_where_they_should_be(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe_catalog, "FOLDERS", (folder / "_recipes",))
    ran = cli("recipes")
    assert (ran.code, ran.out) == (1, "")
    assert "there are no recipes in" in ran.err


def test_neither_listing_nor_copying_waits_for_torch(folder: Path) -> None:
    script = (
        "import sys\nfrom normswap.cli import app\n"
        "try:\n    app(['recipes', 'train_digits', '--quiet'])\n"
        "except SystemExit as end:\n    sys.exit(end.code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=folder).returncode == 0
    assert (folder / "train_digits.py").is_file()
