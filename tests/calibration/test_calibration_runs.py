"""`calibrate`: odd data, little memory, what stays as it is, and what is said."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from calibrated import Net, assert_close, assert_same_moments, images, tensors, trained
from helpers import contents, conv_bn, fingerprint, randomized, run
from memory import Held, Wasteful, peak
from torch import Tensor, nn

import normswap
from normswap.calibration.calibrate import calibrate
from normswap.calibration.footprint import Footprint, fitting, footprint
from normswap.calibration.matching import thread_context
from normswap.conversion.record import record_of
from normswap.errors import DataError, NormswapError, OptionError, RevertError


@pytest.mark.parametrize(
    "data", [torch.zeros(3, 3, 6, 6), torch.zeros(1, 3, 6, 6), images(1)], ids=["zero", "one-zero", "one"]
)
@pytest.mark.parametrize("to", ["gn", "bn"])
def test_one_image_or_constant_images_never_give_nan(net: nn.Module, data: Tensor, to: str) -> None:
    model = normswap.convert(net, to=to)
    report = calibrate(model, net, data)
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    assert torch.isfinite(run(model, images())).all()
    assert math.isfinite(report.error_after)


def test_fewer_images_than_asked_for_are_used_and_counted(net: nn.Module) -> None:
    model = normswap.convert(net, to="gn")
    assert calibrate(model, net, images(5), images=64).images == 5
    assert record_of(model).history[-1].images == 5


def test_too_few_images_for_running_statistics_are_an_error(net: nn.Module) -> None:
    model = normswap.convert(net, to="sync")
    before = contents(model)
    with pytest.raises(DataError, match="64 images, the data has 5"):
        calibrate(model, net, images(5), images=64)
    assert contents(model) == before


def test_no_more_images_are_used_than_memory_holds(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = normswap.convert(net, to="gn"), normswap.convert(net, to="gn")
    with torch.no_grad():
        plain = peak(lambda: net(images(1)))
    monkeypatch.setattr("normswap.calibration.run.free_memory", lambda model: 2 * 9.5 * plain)
    report = calibrate(model, net, images(30), batch_size=15, method="balance")
    assert 5 <= report.images <= 10
    assert f"{report.images} of 30 images" in str(report)
    monkeypatch.undo()
    calibrate(expected, net, images(30)[: report.images], method="balance")
    assert_close(model, expected)


@pytest.mark.parametrize("method", ["balance", "refit"])
def test_calibration_holds_a_plain_run_and_what_lies_between_two_layers(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = trained(randomized(Wasteful()), torch.randn(8, 3, 24, 24)), torch.randn(12, 3, 24, 24)
    model = normswap.convert(net, to="gn", groups=2)
    with torch.no_grad():
        plain = peak(lambda: net(x[:2]))
    held, context = Held(), thread_context(model)

    @contextmanager
    def watched() -> Iterator[None]:
        with context(), held:
            yield

    monkeypatch.setattr("normswap.calibration.matching.thread_context", lambda model: watched)
    with held:
        calibrate(model, net, x, batch_size=2, method=method)
    between = 12 * 8 * 24 * 24 * 4  # what a layer gives for all images
    # At a norm there are its input, its output, and what entered the layer before it, which the network's loop holds.
    # Refit has two networks, and the original's values; a fit needs as much as its equations.
    assert held.peak < 1.2 * plain + (3 if method == "balance" else 9) * between


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_fewer_images_run_at_once_where_memory_runs_out(net: nn.Module, error: type[Exception]) -> None:
    class Small(Net):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 3:
                raise error("out of memory")
            return super().forward(x)

    small = Small().eval()
    small.load_state_dict(net.state_dict())
    model, expected = normswap.convert(small, to="gn"), normswap.convert(net, to="gn")
    assert calibrate(model, small, images(12)).images == 12
    calibrate(expected, net, images(12))
    assert_close(model, expected)


def test_what_a_network_takes_is_measured_on_one_image() -> None:
    net, x = Wasteful().eval(), torch.randn(1, 3, 16, 16)
    size = 8 * 16 * 16 * 4
    with torch.no_grad():
        assert footprint(net, (x,), [net.norm, net.norm2]) == Footprint(peak(lambda: net(x)), 3 * size)
    one = Footprint(100.0, 20.0)
    batches = [(torch.zeros(4, 2),), (torch.zeros(4, 4),)]
    parts, _, used = fitting(batches, [None, None], one, 250)
    assert [len(args[0]) for args in parts] == [2, 2, 1, 1, 1, 1]  # those of the second are twice as large
    assert used == 2  # 80 of four images and 160 of one that runs; two more of 40 do not fit


def test_no_more_images_than_asked_for_are_read(net: nn.Module) -> None:
    read = 0

    def loader() -> Iterator[Tensor]:
        nonlocal read
        for part in images(30).split(4):
            read += len(part)
            yield part

    model, again = normswap.convert(net, to="gn"), normswap.convert(net, to="gn")
    assert calibrate(model, net, loader(), images=10).images == 10
    assert read == 12
    calibrate(again, net, images(30)[:10])
    assert_close(model, again)


def test_images_of_different_sizes_weigh_by_their_positions(net: nn.Module) -> None:
    batches = [images(3, 6), images(1, 9), images(2, 5)]
    model = normswap.convert(net, to="gn", groups=2)
    calibrate(model, net, batches)
    assert_same_moments(model, net, batches)


class Detector(nn.Module):
    """Takes a list of images of any size, as torchvision's detectors do; a head that runs on images with content."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = conv_bn(4)
        self.head = conv_bn(4)
        self.head[0] = nn.Conv2d(4, 4, 1)

    def forward(self, batch: list[Tensor]) -> list[dict[str, Tensor]]:
        size = [max(x.shape[d] for x in batch) for d in (1, 2)]
        padded = torch.stack([nn.functional.pad(x, (0, size[1] - x.shape[2], 0, size[0] - x.shape[1])) for x in batch])
        x = self.backbone(padded)
        if padded.mean() > 10:  # a branch that only some batches take
            x = self.head(x)
        return [{"boxes": x.new_zeros(0, 4), "scores": x.new_zeros(0), "labels": x.new_zeros(0).long()} for _ in batch]


def test_lists_of_images_of_different_sizes_and_branches_that_some_batches_take() -> None:
    net = Detector().eval()
    batches = [[torch.rand(3, 8, 6), torch.rand(3, 5, 9)], [torch.rand(3, 7, 7) + 100], [torch.rand(3, 4, 4)]]
    model = normswap.convert(net, to="gn", groups=2, check=False)
    report = calibrate(model, net, [(batch, [{"boxes": torch.zeros(1, 4)} for _ in batch]) for batch in batches])
    assert_same_moments(model, net, batches)
    assert report.images == 4
    assert report.passes == 1
    assert report.drift_after is None


@pytest.mark.slow
def test_a_torchvision_detector() -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    net = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, min_size=96, max_size=128
    )
    net = randomized(net)
    model = normswap.convert(net, to="gn", check=False)
    batches = [[torch.rand(3, 90, 70), torch.rand(3, 60, 100)], [torch.rand(3, 80, 80)]]
    report = calibrate(model, net, batches)
    assert report.error_after < 0.05 < report.error_before  # random depthwise layers leave many channels dead
    assert_same_moments(model, net, batches)


@pytest.mark.parametrize("method", ["moments", "balance", "refit"])
def test_the_reference_and_everything_but_the_norms_stay_as_they_are(net: nn.Module, method: str) -> None:
    net.body[0].train()
    net.stem.register_forward_hook(lambda module, args, out: None)
    model = normswap.convert(net, to="gn", groups=2)
    model.body[1].train()
    steps = record_of(model).plan.steps
    may_change = {f"{step.path}.{name}" for step in steps for name in ("weight", "bias")}
    if method != "moments":
        may_change |= {f"{path}.{name}" for step in steps for path in step.producers for name in ("weight", "bias")}
        may_change |= {f"{step.path}.attributes" for step in steps}  # eps
    mine, theirs, state = fingerprint(model), fingerprint(net), torch.get_rng_state()
    calibrate(model, net, images(), method=method)
    after = fingerprint(model)
    changed = {key for key in mine if mine[key] != after[key]}
    assert {".".join(map(str, key[:2])) for key in changed} == may_change
    assert all(mine[key][0] == after[key][0] for key in changed if key[1] != "attributes")  # the same Parameters
    assert fingerprint(net) == theirs
    assert torch.equal(torch.get_rng_state(), state)


def test_the_reference_is_rebuilt_from_the_model(net: nn.Module) -> None:
    model, given = normswap.convert(net, to="gn"), normswap.convert(net, to="gn")
    before = contents(net)
    calibrate(model, data=images())
    calibrate(given, net, images())
    assert_close(model, given)
    normswap.revert(model)
    assert contents(model) == before


def test_a_reference_that_cannot_be_rebuilt_is_asked_for(net: nn.Module) -> None:
    model = normswap.convert(net, to="gn", undo=False)
    with pytest.raises(RevertError, match="as reference"):
        calibrate(model, data=images())
    with pytest.raises(OptionError, match="no norm at"):
        calibrate(model, nn.Sequential(nn.Conv2d(3, 4, 3)), images())
    with pytest.raises(OptionError, match="itself"):
        calibrate(model, model, images())


def test_a_network_that_was_swapped_by_hand(net: nn.Module) -> None:
    model = normswap.convert(net, to="gn", groups=2)
    expected = normswap.convert(net, to="gn", groups=2)
    del model._normswap
    calibrate(model, net, images())
    calibrate(expected, net, images(), method="moments")
    assert_close(model, expected)
    with pytest.raises(OptionError, match="as reference"):
        calibrate(model, data=images())


class Fails(nn.Module):
    """Passes its input on until it has seen enough of them."""

    def __init__(self, after: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = after, error

    def forward(self, x: Tensor) -> Tensor:
        if len(FAILURES) >= self.left:
            raise self.error
        FAILURES.append(None)
        return x


FAILURES: list[None] = []


@pytest.mark.parametrize("batch_size", [12, 5])
@pytest.mark.parametrize(("error", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (ValueError("x"), DataError)])
def test_an_exception_or_an_interrupt_restores_the_model(
    net: nn.Module, batch_size: int, error: BaseException, raised: type[BaseException]
) -> None:
    model = normswap.convert(net, to="gn", groups=2)
    reference = normswap.convert(net, to="frozen")
    FAILURES.clear()
    model.body[1] = nn.Sequential(model.body[1], Fails(1, error))
    steps = tuple(s for s in record_of(model).plan.steps if not s.path.startswith("body.1"))
    object.__setattr__(record_of(model).plan, "steps", steps)
    before = fingerprint(model)
    with pytest.raises(raised):
        calibrate(model, reference, images(), batch_size=batch_size)
    assert fingerprint(model) == before
    assert record_of(model).history == []


def test_nan_in_the_data_is_an_error_and_changes_nothing(net: nn.Module) -> None:
    model = normswap.convert(net, to="gn")
    before = contents(model)
    data = images()
    data[3, 0, 0, 0] = math.nan
    with pytest.raises(DataError, match="NaN"):
        calibrate(model, net, data, batch_size=5)
    assert contents(model) == before


def test_no_data_is_an_error(net: nn.Module) -> None:
    model = normswap.convert(net, to="gn")
    for data in (None, images(0), []):
        with pytest.raises(NormswapError):
            calibrate(model, net, data)
    with pytest.raises(OptionError, match="positive"):
        calibrate(model, net, images(), images=0)


def test_labels_give_accuracies(net: nn.Module) -> None:
    data = images(12)
    labels = run(net, data).view(12, 5).argmax(1)
    model = normswap.convert(net, to="gn", groups=2)
    folded = run(model, data).view(12, 5).argmax(1)
    report = calibrate(model, net, list(zip(data.split(5), labels.split(5), strict=True)))
    assert report.accuracy_original == 1
    assert report.accuracy_before == pytest.approx(float((folded == labels).float().mean()))
    assert report.accuracy_after == pytest.approx(
        float((run(model, data).view(12, 5).argmax(1) == labels).float().mean())
    )
    assert "accuracy" in str(report)


def test_figures_of_the_images_that_it_was_fitted_to_are_said_to_be_so(net: nn.Module) -> None:
    batches = [(images(6), torch.tensor([0, 1, 2, 3, 4, 0]))]
    told = str(calibrate(normswap.convert(net, "gn", groups=2), reference=net, data=batches)).splitlines()
    assert next(line for line in told if "drift" in line).endswith("(on 6 images that it was calibrated on)")
    assert all(line.endswith("on these") for line in told if line.startswith(("agreement", "accuracy")))
    assert "on other images it may do less well: normswap.verify tells" in told


def test_wrong_options_are_named(net: nn.Module) -> None:
    model = normswap.convert(net, to="gn")
    with pytest.raises(OptionError, match="balance, refit, moments"):
        calibrate(model, net, images(), method="magic")
    with pytest.raises(OptionError, match="eps"):
        calibrate(model, net, images(), eps=-1)


def test_calibrating_again_changes_nothing_more(net: nn.Module) -> None:
    model = normswap.convert(net, to="gn", groups=2)
    calibrate(model, net, images(), method="balance")
    before = tensors(model)
    report = calibrate(model, net, images(), method="balance")
    assert report.error_before < 1e-5
    for name, value in tensors(model).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-5)
    assert [entry.action for entry in record_of(model).history] == ["calibrate", "calibrate"]


def test_the_report_is_json_values_and_readable(net: nn.Module) -> None:
    import json

    report = calibrate(normswap.convert(net, to="gn"), net, images())
    values = json.loads(json.dumps(report.to_dict()))
    assert values["images"] == 12
    assert values["layers"][0]["path"] == "stem.1"
    assert "calibrated 5 layers on 12 images" in str(report)


def test_layers_are_fitted_on_about_64_of_many_large_images_unless_more_are_asked_for() -> None:
    net = trained(
        randomized(nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())), torch.randn(2, 3, 9, 9)
    )
    large, small = torch.randn(130, 3, 96, 96), torch.randn(130, 3, 90, 90)
    used = [
        calibrate(normswap.convert(net, "gn", groups=2), net, x, progress=False, **options).images
        for x, options in ((large, {}), (small, {}), (large, {"images": 128}), (large, {"method": "balance"}))
    ]
    assert used == [65, 130, 128, 130]  # every second


def test_few_images_come_with_a_word_of_warning(net: nn.Module) -> None:
    told = [str(calibrate(normswap.convert(net, "gn", groups=2), net, images(count))) for count in (15, 16)]
    assert "15 images tell little of others" in told[0]
    assert "tell little" not in told[1]
