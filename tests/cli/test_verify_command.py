from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ran import COLOURS, Cli


def pixels(images: Path, mean: float = 0.0, std: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels, read without normswap."""
    x, labels = [], []
    for label, name in enumerate(sorted(COLOURS)):
        for file in sorted((images / name).iterdir()):
            x.append(torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).view(20, 20, 3))
            labels.append(label)
    return (torch.stack(x).permute(0, 3, 1, 2) / 255 - mean) / std, torch.tensor(labels)


def test_a_network_equals_itself(cli: Cli) -> None:
    ran = cli("verify", "nets.py:tiny", "nets.py:tiny", "--json")
    assert ran.code == 0
    assert ran.json["error"] == 0
    assert ran.json["agreement"] == 1
    assert ran.json["first_jump"] is None


def test_random_inputs_are_said_to_be_random(cli: Cli) -> None:
    ran = cli("verify", "nets.py:tiny", "nets.py:tiny")
    assert "random inputs" in ran.out
    assert "--data" in ran.out


def test_random_inputs_say_nothing_about_agreement_and_the_drift_is_shown(cli: Cli) -> None:
    assert cli("convert", "nets.py:tiny", "--to", "gn", "--groups", 2).code == 0
    ask = ("verify", "tiny-gn.safetensors", "--trust-code")
    shown, values = cli(*ask).out, cli(*ask, "--json").json
    assert "agreement   random inputs are of no class, and say nothing about it; --data FOLDER does\n" in shown
    assert f"drift       relative error {values['error']:.3g}" in shown
    assert "KL(A, B)" not in shown
    assert f"agreement   {values['agreement']:.4f}" in cli(*ask, "--fail-below", "0").out


def test_the_size_taken_is_shown(cli: Cli, images: Path) -> None:
    for ask in (("verify", "nets.py:tiny", "nets.py:tiny"), ("evaluate", "nets.py:tiny")):
        ran = cli(*ask, "--data", images)
        assert "; size 20x20, mean" in ran.out
        assert cli(*ask, "--data", images, "--json").json["preprocess"]["size"] == [20, 20]


def test_a_converted_file_alone_is_compared_with_its_original(cli: Cli, nets: Any) -> None:
    assert cli("convert", "nets.py:tiny", "--to", "gn", "--groups", 2).code == 0
    alone = cli("verify", "tiny-gn.safetensors", "--trust-code", "--json")
    pair = cli("verify", "nets.py:tiny", "tiny-gn.safetensors", "--trust-code", "--json")
    assert alone.code == pair.code == 0
    assert alone.json["error"] == pair.json["error"] > 0
    assert [layer["path"] for layer in alone.json["layers"]] == ["1", "4", "7"]
    assert "as it was before the conversion" in cli("verify", "tiny-gn.safetensors", "--trust-code").out


def test_the_error_is_that_of_the_two_outputs(cli: Cli, nets: Any) -> None:
    ran = cli("verify", "nets.py:tiny", "nets.py:residual", "--input", "2,3,8,8")
    assert ran.code == 1
    assert "cannot be compared" in ran.err
    torch.save(nets.tiny(seed=1).state_dict(), "other.pth")
    ran = cli("verify", "nets.py:tiny", "nets.py:tiny", "--weights", "other.pth", "--input", "5,3,9,9", "--json")
    x = torch.randn(5, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (nets.tiny(seed=seed).eval()(x) for seed in (1, 0))
    assert ran.json["images"] == 5
    assert ran.json["random_inputs"] is True
    assert ran.json["error"] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-5)


def test_labelled_images_give_both_accuracies(cli: Cli, nets: Any, images: Path) -> None:
    torch.save(nets.tiny(seed=3).state_dict(), "other.pth")
    arguments = ["--weights", "other.pth", "--data", images, "--mean", "0.5", "--std", "0.25,0.25,0.25"]
    ran = cli("verify", "nets.py:tiny", "nets.py:tiny", *arguments, "--batch-size", 5, "--json")
    x, labels = pixels(images, 0.5, 0.25)
    right = [float((nets.tiny(seed=seed).eval()(x).argmax(1) == labels).float().mean()) for seed in (3, 0)]
    assert [ran.json["accuracy_a"], ran.json["accuracy_b"]] == pytest.approx(right)
    assert ran.json["labelled"] == ran.json["images"] == 12
    assert ran.json["preprocess"]["mean"] == [0.5] * 3
    shown = cli("verify", "nets.py:tiny", "nets.py:tiny", *arguments).out
    assert f"accuracy    A {right[0]:.4f}, B {right[1]:.4f} on 12 labelled images" in shown
    assert "mean 0.5 0.5 0.5, std 0.25 0.25 0.25" in shown


def test_fewer_images_of_another_size_on_request(cli: Cli, images: Path) -> None:
    ran = cli("verify", "nets.py:tiny", "nets.py:tiny", "--data", images, "--images", 4, "--size", "16,12", "--json")
    assert ran.json["images"] == 4
    assert ran.json["preprocess"]["size"] == [16, 12]
    assert cli("verify", "nets.py:tiny", "nets.py:tiny", "--data", images, "--size", "native").code == 0


def test_grey_networks_get_grey_images(cli: Cli, folder: Path, images: Path) -> None:
    text = "from torch import nn\n\ndef grey():\n    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))\n"
    (folder / "grey.py").write_text(text)
    assert cli("verify", "grey.py:grey", "grey.py:grey", "--data", images, "--json").json["preprocess"]["channels"] == 1


def test_detectors_get_lists_of_images_at_their_own_size(cli: Cli, images: Path) -> None:
    pair = ["nets.py:Detector", "nets.py:Detector"]
    ran = cli("verify", *pair, "--data", images, "--images", 2, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["images"] == 2
    assert ran.json["preprocess"]["size"] == "native"
    assert ran.json["preprocess"]["mean"] == [0.0] * 3
    assert "boxes agree  1.0000" in cli("verify", *pair, "--data", images, "--images", 2).out


def test_the_worst_layers_first_and_all_in_order(cli: Cli, nets: Any) -> None:
    moved = {k: v + 0.1 if k.endswith("1.weight") else v for k, v in nets.deep().state_dict().items()}
    torch.save(moved, "moved.pth")
    ran = cli("verify", "nets.py:deep", "nets.py:deep", "--weights", "moved.pth")
    assert "worst layers" in ran.out
    assert "more; --all shows every layer in order" in ran.out
    shown = cli("verify", "nets.py:deep", "nets.py:deep", "--weights", "moved.pth", "--all").out
    order = [shown.index(f"\n{i}.1 ") for i in range(12)]
    assert order == sorted(order)


def test_untrained_networks_are_said_to_be_untrained(cli: Cli) -> None:
    assert "statistics of A were never updated" in cli("verify", "nets.py:fresh", "nets.py:fresh").out
    assert "statistics of A were never updated" not in cli("verify", "nets.py:tiny", "nets.py:tiny").out


def test_a_trained_file_names_the_network_to_compare_with(cli: Cli) -> None:
    assert cli("convert", "nets.py:tiny", "--to", "ln", "--no-undo").code == 0
    ran = cli("verify", "tiny-ln.safetensors", "--trust-code")
    assert ran.code == 1
    assert "nets.py:tiny" in ran.err
    assert "normswap verify nets.py:tiny tiny-ln.safetensors" in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["nets.py:tiny"],
        ["nets.py:tiny", "nets.py:tiny", "--images", "3"],
        ["nets.py:tiny", "nets.py:tiny", "--size", "32"],
        ["nets.py:tiny", "nets.py:tiny", "--data", "photos", "--input", "1,3,8,8"],
        ["nets.py:tiny", "nets.py:tiny", "--data", "photos", "--size", "1,2,3"],
        ["nets.py:tiny", "nets.py:tiny", "--data", "photos", "--mean", "grey"],
        ["nets.py:tiny", "nets.py:tiny", "--batch-size", "0"],
    ],
)
def test_calls_that_make_no_sense_are_usage_errors(cli: Cli, arguments: list[str]) -> None:
    ran = cli("verify", *arguments)
    assert (ran.code, ran.out) == (2, "")


def test_a_folder_without_images_is_named(cli: Cli, folder: Path) -> None:
    (folder / "none").mkdir()
    assert "there is no image in none" in cli("verify", "nets.py:tiny", "nets.py:tiny", "--data", "none").err
    assert cli("verify", "nets.py:tiny", "nets.py:tiny", "--data", "nowhere").code == 1


def test_a_device_that_does_not_exist_is_named(cli: Cli) -> None:
    ran = cli("verify", "nets.py:tiny", "nets.py:tiny", "--device", "cuda:99")
    assert ran.code == 2
    assert "cuda:99" in ran.err
    assert cli("verify", "nets.py:tiny", "nets.py:tiny", "--device", "cpu").code == 0
