from __future__ import annotations

import shutil
from pathlib import Path

import torch
from PIL import Image
from ran import COLOURS, Cli
from torch import Tensor, nn

import normswap
from normswap.conversion.record import record_of


def moments(model: nn.Module, path: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a layer's output, per channel."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: seen.append(out.detach().clone()))
    with torch.no_grad():
        model.eval()(x)
    handle.remove()
    return seen[0].mean((0, 2, 3)), seen[0].var((0, 2, 3), correction=0)


def converted(cli: Cli, *more: str) -> None:
    ran = cli("convert", "nets.py:tiny", "--to", "gn", "--groups", "4", *more)
    assert ran.code == 0, ran.err


def test_the_calibrated_file_has_the_moments_of_the_original(cli: Cli, images: Path) -> None:
    converted(cli)
    ran = cli("calibrate", "tiny-gn.safetensors", "--data", "photos", "--trust-code", "--mean", "0", "--std", "1")
    assert ran.code == 0, ran.err
    assert "tiny-gn-calibrated.safetensors" in ran.out
    calibrated = normswap.load("tiny-gn-calibrated.safetensors", trust_code=True)
    original = normswap.revert(normswap.load("tiny-gn.safetensors", trust_code=True))
    from normswap.data.image_folder import open_images
    from normswap.data.preprocess import Preprocess

    batches = open_images(images).batches(Preprocess(mean=(0.0,), std=(1.0,)), 12)
    x = next(iter(batches))[0]
    orders = {order.path: order.rows for order in record_of(calibrated).undo.orders}
    for path in ("1", "4"):
        for now, wanted in zip(moments(calibrated, path, x), moments(original, path, x), strict=True):
            order = orders.get(path, torch.arange(len(wanted)))
            torch.testing.assert_close(now, wanted[order], rtol=1e-3, atol=1e-4)


def test_converting_and_calibrating_in_one_go_gives_the_same_weights(cli: Cli, images: Path) -> None:
    converted(cli)
    cli("calibrate", "tiny-gn.safetensors", "--data", "photos", "--trust-code", "--output", "two.safetensors")
    converted(cli, "--calibrate", "photos", "--output", "one.safetensors")
    one, two = (normswap.load(f, trust_code=True).state_dict() for f in ("one.safetensors", "two.safetensors"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)


def test_calibrating_without_an_undo_uses_the_network_from_before(cli: Cli, images: Path) -> None:
    converted(cli, "--calibrate", "photos", "--output", "one.safetensors")
    converted(cli, "--calibrate", "photos", "--no-undo", "--output", "two.safetensors")
    one, two = (normswap.load(f, trust_code=True).state_dict() for f in ("one.safetensors", "two.safetensors"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)


def test_a_bn_gets_the_statistics_that_a_gn_never_had(cli: Cli, images: Path) -> None:
    (images.parent / "grouped.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))\n"
    )
    refused = cli("convert", "grouped.py:net", "--to", "bn")
    assert refused.code == 1
    assert "--calibrate" in refused.err
    ran = cli("convert", "grouped.py:net", "--to", "bn", "--calibrate", "photos")
    assert ran.code == 0, ran.err
    norm = normswap.load("net-bn.safetensors", trust_code=True)[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert not torch.equal(norm.running_var, torch.ones(8))
    more = cli(
        "convert", "grouped.py:net", "--to", "bn", "--calibrate", "photos", "--calibrate-images", "500", "--force"
    )
    assert more.code == 0, more.err  # a folder that holds fewer is told, and will do
    assert "fewer than the 500 asked for" in more.err


def test_a_folder_that_is_not_there_is_told_with_what_stands_in(cli: Cli) -> None:
    ran = cli("convert", "nets.py:tiny", "--to", "gn", "--groups", 4, "--calibrate", "Photos")
    assert ran.code == 1
    assert "there is no folder Photos\nGive a folder of images; photos and synthetic stand in for one." in ran.err
    assert not Path("tiny-gn.safetensors").exists()


def test_the_report_is_json_with_accuracies_where_there_are_labels(cli: Cli, images: Path) -> None:
    converted(cli)
    ran = cli("calibrate", "tiny-gn.safetensors", "--data", "photos", "--trust-code", "--json")
    assert ran.json["images"] == 12
    assert len(ran.json["layers"]) == 2
    assert 0 <= ran.json["accuracy_after"] <= 1


def test_a_network_that_is_not_converted_is_refused_with_the_way_out(cli: Cli, images: Path) -> None:
    ran = cli("calibrate", "nets.py:tiny", "--data", "photos")
    assert ran.code == 1
    assert "--calibrate" in ran.err


def test_the_result_does_not_replace_a_file_without_force(cli: Cli, images: Path) -> None:
    converted(cli)
    arguments = ("calibrate", "tiny-gn.safetensors", "--data", "photos", "--trust-code")
    assert cli(*arguments).code == 0
    again = cli(*arguments)
    assert again.code == 1
    assert "--force" in again.err
    assert cli(*arguments, "--force").code == 0


def test_images_without_calibrate_are_a_wrong_call(cli: Cli) -> None:
    ran = cli("convert", "nets.py:tiny", "--to", "gn", "--images", "8")
    assert ran.code == 2
    assert "--calibrate" in ran.err


def test_refitting_changes_weights_and_is_undone_from_the_file(cli: Cli, images: Path) -> None:
    converted(cli)
    arguments = ("calibrate", "tiny-gn.safetensors", "--data", "photos", "--trust-code", "--method")
    assert cli(*arguments, "refit").code == 0
    assert cli(*arguments, "balance", "--output", "balanced.safetensors").code == 0
    refitted, balanced, plain = (
        normswap.load(f"{name}.safetensors", trust_code=True) for name in ("tiny-gn-calibrated", "balanced", "tiny-gn")
    )
    assert not torch.equal(refitted[3].weight, balanced[3].weight)
    back, original = (normswap.revert(model).state_dict() for model in (refitted, plain))
    assert all(torch.equal(tensor, original[name]) for name, tensor in back.items())
    assert cli(*arguments, "magic", "--force").code == 2


def test_converting_and_refitting_in_one_go_equals_two_commands(cli: Cli, images: Path) -> None:
    fixed = ("convert", "nets.py:tiny", "--to", "gn", "--groups", "4")
    assert cli(*fixed, "--calibrate", "photos", "--method", "refit", "--output", "one.safetensors").code == 0
    assert cli(*fixed, "--output", "two.safetensors").code == 0
    assert cli("calibrate", "two.safetensors", "--data", "photos", "--method", "refit", "--trust-code").code == 0
    one, two = (normswap.load(f, trust_code=True) for f in ("one.safetensors", "two-calibrated.safetensors"))
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
    alone = cli(*fixed, "--method", "balance", "--output", "three.safetensors")
    assert alone.code == 2
    assert "--calibrate" in alone.err


def test_converting_a_calibrated_file_again_says_that_calibrating_is_not_carried_over(cli: Cli, images: Path) -> None:
    converted(cli, "--calibrate", "photos")
    words = "note: this starts from the original of tiny-gn.safetensors: what calibrating gave is not carried over"
    again = ("convert", "tiny-gn.safetensors", "--to", "gn", "--groups", "2", "--trust-code", "--output")
    alone, plain = cli(*again, "two.safetensors"), cli("convert", "nets.py:tiny", "--to", "ln-channel")
    assert f"{words}; calibrate again\n" in alone.err
    assert f"{words}\n" in cli(*again, "too.safetensors", "--calibrate", "photos", "--json").err
    assert (alone.code, plain.code) == (0, 0)
    assert "carried over" not in cli("convert", "tiny-ln-channel.safetensors", *again[2:], "3.safetensors").err


def test_no_accuracy_is_printed_where_the_labels_are_of_other_classes(cli: Cli, images: Path) -> None:
    converted(cli)
    shutil.rmtree(next(folder for folder in sorted(images.iterdir())))
    arguments = ("calibrate", "tiny-gn.safetensors", "--data", "photos", "--trust-code", "--force")
    ran = cli(*arguments, "--json")
    assert ran.json["accuracy_after"] is None
    assert "the data has 3 classes, the networks tell 4 apart" in " ".join(ran.json["notes"])
    page = cli(*arguments).out
    assert not any(line.startswith("accuracy") for line in page.splitlines())
    assert "no accuracy" in page


def test_every_figure_says_how_many_images_it_is_over(cli: Cli, images: Path) -> None:
    converted(cli)
    arguments = ("calibrate", "tiny-gn.safetensors", "--data", "photos", "--trust-code", "--batch-size", "1")
    for file in images.rglob("1.png"):
        file.rename(images / f"{file.parent.name}.png")
    for folder in COLOURS:
        shutil.rmtree(images / folder)
    ran = cli(*arguments)
    assert ran.code == 0, ran.err
    for name in ("output", "agreement"):
        line = next(line for line in ran.out.splitlines() if line.startswith(name))
        assert line.endswith("on 4 images that it was calibrated on")
    assert "normswap verify --data with other images tells" in ran.out
    assert "on 1 image that" in cli(*arguments, "--images", "1", "--force").out


def test_auto_with_images_takes_as_many_groups_as_the_budget_allows(cli: Cli, images: Path) -> None:
    fixed = ("convert", "nets.py:tiny", "--to", "gn", "--groups", "auto", "--calibrate", "photos", "--force")
    found = {}
    for budget in ("1e-9", "1e9"):
        ran = cli(*fixed, "--budget", budget, "--output", "auto.safetensors")
        assert ran.code == 0, ran.err
        model = normswap.load("auto.safetensors", trust_code=True)
        found[budget] = [m.num_groups / m.num_channels for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert all(a < b == 0.5 for a, b in zip(found["1e-9"], found["1e9"], strict=True))
    for wrong in (("--groups", "4", "--calibrate", "photos"), ()):
        refused = cli("convert", "nets.py:tiny", "--to", "gn", *wrong, "--budget", "0.1")
        assert refused.code == 2
        assert "--budget" in refused.err


def test_a_network_is_calibrated_without_any_images(cli: Cli) -> None:
    said = ("--size", "16", "--mean", "0", "--std", "1")
    for kind in ("photos", "synthetic"):
        ran = cli("convert", "nets.py:real", "--to", "gn", "--groups", "4", "--calibrate", kind, *said, "--force")
        assert ran.code == 0, ran.err
        assert "3x16x16" in ran.out
        assert "what the network was trained on" in ran.out
    ran = cli("calibrate", "real-gn.safetensors", "--data", "photos", "--trust-code", "--images", "13", "--json")
    assert ran.json["images"] == 13
    assert "13 crops of photographs 3x16x16" in ran.json["stand_ins"], "the file remembers size and values"


def test_none_leaves_calibration_out(cli: Cli) -> None:
    ran = cli("convert", "nets.py:tiny", "--to", "gn", "--groups", "4", "--calibrate", "none", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["calibration"] is None


def test_a_folder_goes_before_the_word_for_stand_ins(cli: Cli, images: Path) -> None:
    ran = cli("convert", "nets.py:tiny", "--to", "gn", "--groups", "4", "--calibrate", "photos", "--json")
    assert ran.json["calibration"]["images"] == 12
    assert "taken for the folder" in ran.err


def test_a_folder_that_is_written_as_one_is_no_word(cli: Cli, images: Path) -> None:
    fixed = ("convert", "nets.py:tiny", "--to", "gn", "--groups", "4", "--calibrate", "photos/", "--json")
    ran = cli(*fixed)
    assert ran.json["calibration"]["images"] == 12
    assert "taken for the folder" not in ran.err
    shutil.rmtree(images)
    ran = cli(*fixed, "--force")
    assert ran.code == 1
    assert "photos" in ran.err
    assert "crops" not in ran.err


def test_groups_are_chosen_on_stand_ins_too(cli: Cli) -> None:
    said = ("--size", "16", "--mean", "0", "--std", "1")
    fixed = ("convert", "nets.py:real", "--to", "gn", "--groups", "auto", "--calibrate", "photos", *said)
    ran = cli(*fixed, "--budget", "1e9", "--calibrate-images", "13", "--json")
    assert ran.code == 0, ran.err
    assert [step["options"]["num_groups"] for step in ran.json["plan"]["steps"]] == [4, 8]
    assert ran.json["calibration"]["images"] == 13


def test_what_stands_in_is_refused_in_the_words_of_the_command(cli: Cli) -> None:
    ran = cli("convert", "nets.py:tiny", "--to", "gn", "--groups", "4", "--calibrate", "photos", "--size", "16")
    assert ran.code == 1
    said = " ".join(ran.err.split())
    assert "no photos fit this network" in said
    assert "--calibrate synthetic" in said
    assert "data=" not in said
    undone = cli("convert", "x.safetensors", "--to", "original", "--calibrate", "photos")
    assert undone.code == 2
    assert "--calibrate cannot change" in " ".join(undone.err.split())


def test_more_than_256_images_are_used_where_so_many_are_asked_for(cli: Cli, folder: Path) -> None:
    converted(cli)
    (folder / "many").mkdir()
    for i in range(260):
        Image.new("RGB", (8, 8), (i % 256, 9 * i % 256, 99)).save(folder / "many" / f"{i}.png")
    fixed = ("calibrate", "tiny-gn.safetensors", "--trust-code", "--data", "many", "--size", "8", "--json")
    assert cli(*fixed, "--images", "260").json["images"] == 260
    assert cli(*fixed, "--force").json["images"] == 256


def test_of_a_data_set_in_parts_one_repairs_on_train_and_measures_on_val(cli: Cli, images: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(images, Path("parts", part))
    for kept in Path("parts", "val").glob("*/0.png"):
        kept.unlink()
    ran = cli("convert", "nets.py:tiny", "--to", "gn", "--groups", 4, "--calibrate", "parts", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["calibration"]["images"] == 12
    ways = (("calibrate", "train"), 12), (("verify", "val"), 8)
    for (command, part), count in ways:
        ran = cli(command, "tiny-gn.safetensors", "--trust-code", "--data", "parts", "--json")
        assert ran.code == 0, ran.err
        assert f"parts holds parts of a data set; parts/{part} is taken" in ran.err
        assert "fewer than" not in ran.err
        assert ran.json["images"] == count
