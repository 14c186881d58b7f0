"""Every recipe runs, tiny, prints its figures, and says at its top what it is for."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import normswap
from normswap.demo.network import pretrained

pytestmark = pytest.mark.usefixtures("pictures")
FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.py"), key=lambda file: file.stem)
FIGURES = {
    "batch_size_sweep": r"(?:frozen )?(?:BatchNorm|GroupNorm) +(0\.\d{4}) +(0\.\d{4})",
    "differential_privacy": r"accuracy (0\.\d{4}).* epsilon (\d+\.\d\d)",
    "ema_policy": r"success (\d\.\d{3})",
    "faster_rcnn_gn_batch_1": r"(?:frozen|BatchNorm|GroupNorm) +\d +(0\.\d{4}) +(0\.\d{4})",
    "federated_averaging": r"accuracy (0\.\d{4})",
    "flower_clients": r"Fed(?:Avg|Prox), (?:BatchNorm|GroupNorm): accuracy (0\.\d{4})",
    "freeze_statistics": r"statistics (?:move|frozen): accuracy (0\.\d{4})",
    "freeze_statistics_and_affine": r"norms (?:train|frozen): accuracy (0\.\d{4})",
    "gradual_unfreezing": r"(?:all at once|gradually): accuracy (0\.\d{4})",
    "groupnorm_at_batch_2": r"(?:BatchNorm|GroupNorm) +(0\.\d{4}) +(0\.\d{4})",
    "large_model_fsdp": r"accuracy (0\.\d{4})",
    "lerobot_diffusion_policy": r"success (\d\.\d{3})",
    "monai_volumes": r"(?:BatchNorm|GroupNorm): Dice .* and (0\.\d{4}) after",
    "per_sample_gradients": r"accuracy (0\.\d{4}) at epsilon (\d+\.\d\d)",
    "recurrent_groupnorm": r"F1 (0\.\d{4})",
    "segmentation_groupnorm": r"(?:BatchNorm|GroupNorm), batch [12]: mean IoU (0\.\d{4})",
    "smp_unet": r"(?:BatchNorm|GroupNorm): mean IoU .* and (0\.\d{4}) after",
    "style_transfer": r"(?:own being 1|photograph's): (-?\d\.\d{4})",
    "test_time_adaptation": r"(?:BatchNorm|GroupNorm): accuracy .*, (0\.\d{4}) adapted with batches of 1,",
    "transformers_trainer": r"(?:BatchNorm|GroupNorm): accuracy .* (0\.\d{4}) after",
    "train_digits": r"held-out accuracy (0\.\d{4})",
    "ultralytics_trainer": r"(?:BatchNorm|GroupNorm): mAP50 (0\.\d{4})",
}
"""What a run prints, at least once for each thing it compares."""
DRAWN = {"batch_size_sweep"}
"""Those that draw by themselves; the curves of a run of theirs are drawn in the tests of runs."""
RUNS = {
    "batch_size_sweep": 3,
    "ema_policy": 7,
    "faster_rcnn_gn_batch_1": 6,
    "federated_averaging": 4,
    "flower_clients": 4,
    "lerobot_diffusion_policy": 5,
    "recurrent_groupnorm": 6,
    "segmentation_groupnorm": 4,
    "train_digits": 1,
}
TOGETHER = {"large_model_fsdp"}  # for several processes
SLOW = {"differential_privacy"}  # its accounting
ELSEWHERE = {
    "flower_clients": "flwr",
    "lerobot_diffusion_policy": "lerobot",
    "monai_volumes": "monai",
    "smp_unet": "segmentation_models_pytorch",
    "ultralytics_trainer": "ultralytics",
}
"""Recipes for packages that are no dependency, not even of the tests; `.ci/run recipes` installs them."""
TRAINERS = (
    "differential_privacy",
    "flower_clients",
    "lerobot_diffusion_policy",
    "transformers_trainer",
    "ultralytics_trainer",
)
"""Those that hand the network to a trainer, or policy, of another package, and get it back."""
BEGIN, END = (f"# --- The part to copy {where} here. ---" for where in ("begins", "ends"))
ALONE = [file for file in RECIPES if file.stem not in TOGETHER | ELSEWHERE.keys()]
FROZEN = ("freeze_statistics", "freeze_statistics_and_affine", "gradual_unfreezing")
FOLDER_RECIPES = [
    *FROZEN,
    "groupnorm_at_batch_2",
    "batch_size_sweep",
]

NETWORK = """
from torch import nn

def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 2))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`run(name, *arguments)` runs a recipe in this process and an empty folder, and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def started(name: str, *arguments: object) -> str:
        if name not in DRAWN:
            monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return started


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_header_says_goal_command_time_and_expected_result(file: Path) -> None:
    header = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    title, _, rest = header.partition("\n\n")
    assert title.endswith(".")
    assert [key for key, _, text in (line.partition(":") for line in rest.splitlines()) if key.isalpha() and text] == [
        "Goal", "Command", "Time", "Expected",
    ]  # fmt: skip
    assert f"{'torchrun --nproc-per-node=2' if file.stem in TOGETHER else 'python'} recipes/{file.name}" in rest
    assert re.search(r"\d", rest.partition("Time:")[2].partition("Expected:")[0])
    assert re.search(r"\d", rest.partition("Expected:")[2])


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_part_to_copy_is_marked_in_the_same_words_in_all(file: Path) -> None:
    lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    assert [line for line in lines if "part to copy" in line] == [BEGIN, END]
    part = "\n".join(lines[lines.index(BEGIN) : lines.index(END)])
    assert "normswap." in part or file.stem == "train_digits"
    if file.stem in TRAINERS:
        assert re.search(r"normswap\.save\(.*(\n.*)*normswap\.load\(", part)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_only_public_names_are_used(file: Path) -> None:
    # Beside `normswap` itself.
    public = {"normswap.data", "normswap.demo", "normswap.demo.digits", "normswap.demo.network", "normswap.detection"}
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            assert {a.name for a in node.names if a.name.startswith("normswap")} <= {"normswap"}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("normswap"):
            assert node.module in public
            assert not any(a.name.startswith("_") for a in node.names)


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=pytest.mark.slow) if f.stem in SLOW else f for f in ALONE],
    ids=[f.stem for f in ALONE],
)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")  # opacus's, when it is imported
def test_it_runs_tiny_and_prints_its_figures(file: Path, run, tmp_path: Path) -> None:
    """And those that freeze say that what was frozen did not move; the sweep draws its table."""
    printed = run(file.stem, "--tiny")
    found = re.findall(FIGURES[file.stem], printed)
    assert len(found) == RUNS.get(file.stem, 2), printed
    if file.stem in FROZEN:
        assert printed.rstrip().endswith("12 frozen layers: nothing moved")
    if file.stem == "batch_size_sweep":
        with Image.open(tmp_path / "batch_size_sweep.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ELSEWHERE)
def test_it_runs_with_a_package_that_is_no_dependency(name: str, tmp_path: Path) -> None:
    """In a process of its own, since these packages change torch, pictures and logs for everybody."""
    if importlib.util.find_spec(ELSEWHERE[name]) is None:
        pytest.skip(f"{ELSEWHERE[name]} is not installed; .ci/run recipes installs it")
    # lerobot does without transformers, and of one that happens to be there it takes few versions.
    hidden = "sys.modules['transformers'] = None; " if name.startswith("lerobot") else ""
    code = f"import runpy, sys; {hidden}sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(FOLDER / f"{name}.py"), "--tiny"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent), "YOLO_CONFIG_DIR": str(tmp_path)},
    )  # fmt: skip
    if missing := re.search(r"^ModuleNotFoundError: No module named '(?!normswap)(.+)'", ran.stderr, re.MULTILINE):
        pytest.skip(f"{ELSEWHERE[name]} is installed without {missing[1]}, which it imports")
    assert ran.returncode == 0, ran.stderr
    assert len(re.findall(FIGURES[name], ran.stdout)) == RUNS.get(name, 2), ran.stdout
    if name == "ultralytics_trainer":
        assert "57 GroupNorm and 0 BatchNorm layers were trained" in ran.stdout


@pytest.mark.parametrize("name", FOLDER_RECIPES)
def test_it_takes_a_folder_of_images_and_a_network(name: str, run, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label, colour in (("green", (20, 230, 30)), ("red", (250, 20, 10))):
            (tmp_path / "photos" / part / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (16, 16), tuple(c // (i + 1) for c in colour)).save(
                    tmp_path / "photos" / part / label / f"{i}.png"
                )
    (tmp_path / "mine.py").write_text(NETWORK)
    network = runpy.run_path(str(tmp_path / "mine.py"))["network"]()
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "mine.pt")
    arguments = ["--data", "photos", "--network", "mine.py:network", "--weights", "mine.pt"]
    arguments += ["--images", 4, "--batch", 1, 2] if name == "batch_size_sweep" else ["--steps", 2]
    if name in FROZEN:
        arguments += ["--size", 16]
    assert len(re.findall(FIGURES[name], run(name, *arguments))) == RUNS.get(name, 2)


def sharded(folder: Path, processes: int, *more: str) -> str:
    """What the recipe that shards prints, run by so many processes."""
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    ran = subprocess.run(
        [*launcher, str(FOLDER / "large_model_fsdp.py"), "--tiny", *more],
        cwd=folder, env=own | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def losses(printed: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss (\d\.\d+)", printed)}


@pytest.mark.parametrize("name", [*FOLDER_RECIPES, *TOGETHER])
def test_options_for_a_folder_of_ones_own_are_checked_first(name: str, run, tmp_path: Path, capsys) -> None:
    (tmp_path / "net.py").write_text(NETWORK)
    Path("weights.pth").touch()
    whole = {"--data": "data", "--network": "net.py:network", "--weights": "weights.pth"}

    def refused(**changed: str | None) -> str:
        words = whole | {f"--{option}": value for option, value in changed.items()}
        with pytest.raises(SystemExit) as end:
            run(name, *(word for option, value in words.items() if value for word in (option, value)))
        assert end.value.code == 2
        return capsys.readouterr().err

    for left_out in ("data", "network", "weights"):
        assert "--data, --network and --weights go together" in refused(**{left_out: None})
    assert "--network network is not FILE.py:FUNCTION" in refused(network="network")
    assert "--weights none.pth is not there" in refused(weights="none.pth")
    (tmp_path / "data" / "train").mkdir(parents=True)
    assert "--data data has no folder train, or neither val nor test beside it" in refused()


@pytest.fixture(scope="module")
def shared_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two processes without interruption: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("shared_out")
    return folder, sharded(folder, 2)


@pytest.mark.slow
def test_two_processes_share_a_network_out_and_save_it_whole(shared_out: tuple[Path, str]) -> None:
    folder, printed = shared_out
    count, here = map(int, re.findall(r"(\d+) parameters, (\d+) of them", printed)[0])
    assert count / 2 <= here < 0.6 * count
    _, in_shards, from_file = re.findall(FIGURES["large_model_fsdp"], printed)
    assert in_shards == from_file
    folder = folder / "runs" / "large_model_fsdp"
    start, end = (normswap.load(folder / f"{name}.safetensors", pretrained()) for name in ("start", "trained"))
    assert sum(p.numel() for p in end.parameters()) == count
    assert all(not torch.equal(p, q) for p, q in zip(start.parameters(), end.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_what_was_shared_out(
    first: int, then: int, shared_out: tuple[Path, str], tmp_path: Path
) -> None:
    whole = losses(shared_out[1])
    begun = losses(sharded(tmp_path, first, "--stop-after", "3"))
    goes_on = losses(sharded(tmp_path, then, "--resume"))
    assert (list(begun), list(goes_on)) == ([1, 2, 3], [4, 5, 6])
    assert begun | goes_on == pytest.approx(whole, abs=1e-5)
    name = Path("runs", "large_model_fsdp", "trained.safetensors")
    there, here = (normswap.load(folder / name, pretrained()).state_dict() for folder in (shared_out[0], tmp_path))
    for key, value in there.items():
        torch.testing.assert_close(here[key], value, rtol=1e-4, atol=1e-5)


def test_the_index_has_a_row_for_every_recipe() -> None:
    index = (FOLDER / "README.md").read_text("utf-8")
    for file in RECIPES:
        assert f"[{file.name}]({file.name})" in index
