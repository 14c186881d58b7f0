"""`calibrate`: moments, exact pooling, every target, odd data, and nothing else touched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Residual, bits, broadcast, contents, conv_bn, fingerprint, randomized, relative, run
from memory import Held, Wasteful, peak
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

import normswap
from normswap.calibration.balance import rescale, signs, sizes
from normswap.calibration.calibrate import calibrate
from normswap.calibration.footprint import Footprint, fitting, footprint
from normswap.calibration.lockstep import Lockstep
from normswap.calibration.matching import thread_context
from normswap.calibration.moments import Moments, moments_of
from normswap.calibration.norm_targets import targets_of
from normswap.calibration.refit import fitted
from normswap.conversion.apply import inner_norm
from normswap.conversion.record import record_of
from normswap.detection import detector
from normswap.errors import DataError, NormswapError, OptionError, RevertError
from normswap.modules.tree import module_at

PER_SAMPLE = [("gn", {"groups": 2}), ("ln", {}), ("ln-channel", {}), ("in", {})]
STATISTICS = ["bn", "sync", "renorm"]


class Net(nn.Module):
    """Convolutions with BN, two residual blocks whose ReLU works in place, a classifier: (N, 3, H, W) -> (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.body = nn.Sequential(Residual(), Residual())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small only wait for their threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def net() -> nn.Module:
    """A network whose statistics are those of `images()`, as after training."""
    return trained(randomized(Net()), images(40, seed=7))


def images(count: int = 12, size: int = 6, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator) * 1.5 + 0.3


@torch.no_grad()
def trained(model: nn.Module, data: Tensor) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()(data)
    return model.eval()


def outputs(model: nn.Module, paths: list[str], batches: list[Any]) -> dict[str, Tensor]:
    """What the norms at these paths give over all batches, `(values, C)` float64, taken inside a hook.

    With the channels in the order of the original, which regrouping may have changed.
    """
    record = record_of(model)
    orders = {} if record is None else {order.path: order.rows for order in record.undo.orders}
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    handles = []
    for path in paths:

        def hook(module: nn.Module, args: Any, out: Tensor, path: str = path) -> None:
            seen[path].append(out.detach().double().movedim(1, -1).flatten(0, -2).clone())

        handles.append(inner_norm(module_at(model, path)).register_forward_hook(hook))
    for batch in batches:
        run(model, batch)
    for handle in handles:
        handle.remove()
    found = {path: torch.cat(values) for path, values in seen.items()}
    for path, values in found.items():
        if (rows := orders.get(path)) is not None:
            found[path] = torch.empty_like(values)
            found[path][:, rows] = values
    return found


def assert_same_moments(model: nn.Module, reference: nn.Module, batches: list[Any], tolerance: float = 1e-4) -> None:
    paths = [step.path for step in record_of(model).plan.steps]
    new, old = outputs(model, paths, batches), outputs(reference, paths, batches)
    for path in paths:
        size = old[path].std(0, correction=0).square().mean().sqrt()
        alive = old[path].std(0, correction=0) > 1e-5 * size
        mean = (new[path].mean(0) - old[path].mean(0)).abs().max() / size
        std = (new[path].std(0, correction=0) - old[path].std(0, correction=0))[alive].abs().max() / size
        assert mean < tolerance, path
        assert std < tolerance, path


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone().double() for name, t in model.state_dict().items()}


def assert_close(a: nn.Module, b: nn.Module, tolerance: float = 1e-5) -> None:
    one, other = tensors(a), tensors(b)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(("to", "options"), PER_SAMPLE)
@pytest.mark.parametrize("transfer", ["fold", "copy", "reset"])
def test_one_pass_gives_every_norm_the_moments_of_the_original(
    net: nn.Module, to: str, options: dict[str, int], transfer: str
) -> None:
    data = images()
    model = normswap.convert(net, to=to, transfer=transfer, **options)
    report = calibrate(model, net, data, batch_size=5)
    assert_same_moments(model, net, list(data.split(4)))
    assert report.passes == 1
    assert report.images == 12
    assert report.error_before > 1e-2
    assert report.error_after < 1e-5
    assert len(report.layers) == 5


def test_the_network_comes_closer_to_the_original(net: nn.Module) -> None:
    data = images(32)
    model = normswap.convert(net, to="gn", groups=1)
    before = relative(run(net, data), run(model, data))
    report = calibrate(model, net, data)
    assert relative(run(net, data), run(model, data)) < before
    assert report.drift_after < report.drift_before
    assert report.drift_after == pytest.approx(relative(run(net, data[:16]), run(model, data[:16])), rel=1e-3)


@pytest.mark.parametrize(("to", "method"), [("gn", "balance"), ("gn", "refit"), ("in", "balance"), ("bn", "balance")])
def test_the_result_depends_on_neither_batch_size_nor_order(net: nn.Module, to: str, method: str) -> None:
    data = images(13)
    results = []
    batches = [data.split(13), data.split(4), data.split(1), data[torch.randperm(13)].split(5), [data[:9], data[9:]]]
    for parts in batches:
        model = normswap.convert(net, to=to, **({"groups": 2} if to == "gn" else {}))
        calibrate(model, net, list(parts), method=method)
        results.append(model)
    for other in results[1:]:
        assert_close(results[0], other, 1e-4 if method == "refit" else 1e-5)


def test_two_layers_equal_a_computation_by_hand() -> None:
    def norm(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        parts = x.reshape(len(x), groups, -1)
        parts = (parts - parts.mean(-1, keepdims=True)) / np.sqrt(parts.var(-1, keepdims=True) + 1e-5)
        return parts.reshape(x.shape) * weight + bias

    def batch_norm(x: np.ndarray, bn: nn.BatchNorm1d) -> np.ndarray:
        mean, var, weight, bias = (
            t.detach().double().numpy() for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        )
        return (x - mean) / np.sqrt(var + bn.eps) * weight + bias

    def repaired(y: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        k = np.sqrt(wanted.var(0) / y.var(0))
        shift = wanted.mean(0) - k * y.mean(0)
        return k, shift, k * y + shift

    net = randomized(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4)))
    model = normswap.convert(net, to="gn", groups=2)
    x = torch.randn(9, 3)
    first, one, _, second, two = net
    u = x.double().numpy() @ first.weight.detach().double().numpy().T + first.bias.detach().double().numpy()
    wanted_one = batch_norm(u, one)
    h = np.maximum(wanted_one, 0)
    v = h @ second.weight.detach().double().numpy().T + second.bias.detach().double().numpy()
    wanted_two = batch_norm(v, two)

    def folded(u: np.ndarray, bn: nn.BatchNorm1d) -> np.ndarray:
        return (u - bn.running_mean.double().numpy()) / np.sqrt(bn.running_var.double().numpy() + bn.eps)

    w1, b1 = one.weight.detach().double().numpy(), one.bias.detach().double().numpy()
    w2, b2 = two.weight.detach().double().numpy(), two.bias.detach().double().numpy()
    k1, c1, y1 = repaired(norm(folded(u, one), 2, w1, b1), wanted_one)
    v = np.maximum(y1, 0) @ second.weight.detach().double().numpy().T + second.bias.detach().double().numpy()
    k2, c2, _ = repaired(norm(folded(v, two), 2, w2, b2), wanted_two)

    calibrate(model, net, x, batch_size=4, method="moments")
    for layer, (k, c, w, b) in ((model[1], (k1, c1, w1, b1)), (model[4], (k2, c2, w2, b2))):
        np.testing.assert_allclose(layer.weight.detach().numpy(), k * w, rtol=1e-4)
        np.testing.assert_allclose(layer.bias.detach().numpy(), k * b + c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", STATISTICS)
def test_running_statistics_are_those_of_all_the_data(net: nn.Module, to: str) -> None:
    data = images(11, seed=3)
    model = normswap.convert(net, to=to)
    gamma = bits(inner_norm(model.stem[1]).weight)
    calibrate(model, net, [data[:7], data[7:8], data[8:]])
    inputs: dict[str, Tensor] = {}
    for path in ("stem.1", "body.0.bn1", "body.1.bn2"):
        keep = lambda module, args, path=path: inputs.update({path: args[0].double().clone()})  # noqa: E731
        inner_norm(module_at(model, path)).register_forward_pre_hook(keep)
    run(model, data)
    for path, x in inputs.items():
        norm = inner_norm(module_at(model, path))
        torch.testing.assert_close(norm.running_mean.double(), x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), x.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert bits(inner_norm(model.stem[1]).weight) == gamma


def test_batch_norms_built_without_statistics_get_them_and_the_moments() -> None:
    net = randomized(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4))
    )
    model = normswap.convert(net, to="bn", missing_statistics="later", example_inputs=images(2))
    data = images(10)
    calibrate(model, net, data, batch_size=3)
    assert_same_moments(model, net, [data])
    x = run(net[0], data).view(10, 4, 4, 4).double()
    torch.testing.assert_close(model[1].running_mean.double(), x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var.double(), x.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["frozen", "fused"])
def test_frozen_and_fused_need_nothing_and_change_nothing(net: nn.Module, to: str) -> None:
    model = normswap.convert(net, to=to)
    before = fingerprint(model)
    report = calibrate(model, net, images())
    assert fingerprint(model) == before
    assert report.layers == ()
    assert "nothing to calibrate" in str(report)


class Shared(nn.Module):
    """Two convolutions whose norms are shared by three levels, each norm behind the other: a detector's head."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.tower(x), self.tower(x[..., ::2, ::2]), self.tower(x[..., ::3, ::3] * 2)]


@pytest.mark.parametrize("batch_size", [12, 5])
def test_norms_with_several_calls_pool_their_moments(batch_size: int) -> None:
    net = trained(randomized(Shared()), images(40, seed=7))
    model = normswap.convert(net, to="gn", groups=2)
    data = images()
    report = calibrate(model, net, data, batch_size=batch_size)
    assert_same_moments(model, net, [data])
    assert [layer.calls for layer in report.layers] == [3, 3]
    assert report.passes > 1


def test_pooled_statistics_of_shared_batch_norms() -> None:
    net = randomized(Shared())
    model = normswap.convert(net, to="sync")
    data = images()
    calibrate(model, net, data, batch_size=5)
    levels = (data, data[..., ::2, ::2], data[..., ::3, ::3] * 2)
    x = torch.cat([run_at(net.tower[0], level).movedim(1, -1).flatten(0, -2) for level in levels])
    torch.testing.assert_close(model.tower[1].running_mean, x.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.tower[1].running_var, x.var(0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def run_at(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.norm(self.conv(x)))
        return x


def test_recurrent_use_pools_too_and_settles() -> None:
    net = trained(randomized(Recurrent()), images(40))
    model = normswap.convert(net, to="in")
    data = images()
    report = calibrate(model, net, data, batch_size=5)
    assert report.error_after < 1e-3
    assert_same_moments(model, net, [data], 1e-3)


def test_a_dead_channel_keeps_gamma_and_gets_its_mean(net: nn.Module) -> None:
    with torch.no_grad():
        net.stem[0].weight[1] = 0
        net.body[0].bn1.weight[2] = 0
        net.stem[1].running_mean[1], net.stem[1].running_var[1] = net.stem[0].bias[1], 0
    model = normswap.convert(net, to="gn", groups=2)
    gamma = float(model.body[0].bn1.weight[2].detach())
    data = images()
    report = calibrate(model, net, data)
    rows = {order.path: order.rows for order in record_of(model).undo.orders}["body.0.bn1"]
    assert float(model.body[0].bn1.weight[int((rows == 2).nonzero())].detach()) == gamma == 0
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    paths = ["stem.1", "body.0.bn1", "body.1.bn2"]
    new, old = outputs(model, paths, [data]), outputs(net, paths, [data])
    for path in paths:
        torch.testing.assert_close(new[path].mean(0), old[path].mean(0), rtol=1e-4, atol=1e-4)
    assert {layer.path: layer.dead for layer in report.layers}["body.0.bn1"] >= 1


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
    monkeypatch.setattr("normswap.calibration.calibrate.free_memory", lambda model: 2 * 9.5 * plain)
    report = calibrate(model, net, images(30), batch_size=15)
    assert 5 <= report.images <= 10
    assert f"{report.images} of 30 images" in str(report)
    monkeypatch.undo()
    calibrate(expected, net, images(30)[: report.images])
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


def test_a_norm_without_gamma_and_beta_gets_them() -> None:
    net = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU()), images(40))
    model = normswap.convert(net, to="gn", groups=2)
    data = images()
    calibrate(model, net, data)
    assert model[1].affine
    assert not model[1].weight.requires_grad
    assert_same_moments(model, net, [data])


def test_prescaled_norms_and_norms_fused_with_an_activation() -> None:
    timm = pytest.importorskip("timm.layers")

    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), timm.BatchNormAct2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.act(y + self.norm(y)) + y

    net = randomized(PreActivation())
    model = normswap.convert(net, to="gn", groups=2)
    seen: list[Tensor] = []
    net.act.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    data = images()
    calibrate(model, net, data)
    run(net, data)
    bn = nn.BatchNorm2d(4).eval()
    bn.load_state_dict({k: v for k, v in net.act.state_dict().items() if k in bn.state_dict()})
    wanted = run_at(bn, seen[-1]).double()
    got = outputs(model, ["act"], [data])["act"]
    torch.testing.assert_close(got.mean(0), wanted.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.std(0), wanted.std((0, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(net: nn.Module, dtype: torch.dtype) -> None:
    net = net.to(dtype)
    model = normswap.convert(net, to="gn", groups=2, check=False)
    data = images()
    calibrate(model, net, data, batch_size=5)
    assert model.stem[1].weight.dtype == dtype
    assert_same_moments(model, net, [data.to(dtype)], 1e-6 if dtype == torch.float64 else 2e-2)


def test_under_autocast(net: nn.Module) -> None:
    model, plain = normswap.convert(net, to="gn", groups=2), normswap.convert(net, to="gn", groups=2)
    calibrate(plain, net, images(), batch_size=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calibrate(model, net, images(), batch_size=5)
        assert_same_moments(model, net, [images()], 2e-2)
    assert_close(model, plain, 5e-2)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_wrong_options_are_named(net: nn.Module) -> None:
    model = normswap.convert(net, to="gn")
    with pytest.raises(OptionError, match="balance, refit, moments"):
        calibrate(model, net, images(), method="magic")
    with pytest.raises(OptionError, match="eps"):
        calibrate(model, net, images(), eps=-1)


def test_calibrating_again_changes_nothing_more(net: nn.Module) -> None:
    model = normswap.convert(net, to="gn", groups=2)
    calibrate(model, net, images())
    before = tensors(model)
    report = calibrate(model, net, images())
    assert report.error_before < 1e-5
    for name, value in tensors(model).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-5)
    assert [entry.action for entry in record_of(model).history] == ["calibrate", "calibrate"]


def test_balancing_leaves_what_a_norm_with_fixed_statistics_would_compute(net: nn.Module) -> None:
    model = normswap.convert(net, to="gn", groups=2)
    target = next(t for t in targets_of(model, net) if t.path == "stem.1")
    x = images()

    def fixed() -> Tensor:
        return run_at(model.stem[0], x) * broadcast(model.stem[1].weight.detach(), x)

    before, factor = fixed(), torch.tensor([-2.0, 0.7, 1.3, -0.5], dtype=torch.float64)
    record = record_of(model)
    rescale(model, target, record.plan.steps[0], factor, record.undo)
    torch.testing.assert_close(fixed(), before)


def test_balancing_a_prescaled_norm_scales_and_shifts_what_enters_it_alike() -> None:
    net = randomized(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)))
    model = normswap.convert(net, to="gn", groups=2)
    (target,), record = targets_of(model, net), record_of(model)
    assert record.plan.steps[0].transfer == "prescale"
    x, factor = torch.randn(2, 4, 5, 5), torch.tensor([-2.0, 0.7, 1.3, -0.5])
    mean, scale = (broadcast(t, x) for t in (net[1].running_mean, (net[1].running_var + net[1].eps).rsqrt()))
    rescale(model, target, record.plan.steps[0], factor.double(), record.undo)
    torch.testing.assert_close(run_at(model[1].standardize, x), (x - mean) * scale * broadcast(factor, x))
    torch.testing.assert_close(model[1].norm.weight, net[1].weight / factor)


def test_signs_come_close_to_the_best_of_all() -> None:
    means = torch.randn(30, 2 * 6, dtype=torch.float64) + 2 * torch.randn(30, 1, dtype=torch.float64)
    means = means - means.mean(0)
    found = (means * signs(means, 2)).view(30, 2, 6).sum(2).square().sum(0)
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6)
    best = torch.stack([(means[:, g * 6 : g * 6 + 6] @ every.T).square().sum(0).min() for g in (0, 1)])
    assert (found <= 2 * best).all()
    assert (found < 0.3 * means.view(30, 2, 6).sum(2).square().sum(0)).all()


def test_sizes_bring_a_group_norm_closer_to_batch_norm() -> None:
    x = torch.randn(64, 8, 5, 5, dtype=torch.float64)
    x[:, 1] *= torch.rand(64, 1, 1, dtype=torch.float64) * 3  # its power differs from sample to sample
    x[:, 6] += 2 * torch.randn(64, 1, 1, dtype=torch.float64)  # its mean does
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)

    def error(t: Tensor) -> float:
        y = nn.functional.group_norm(x * broadcast(t, x), 2, eps=1e-5)
        k = x.std((0, 2, 3), keepdim=True) / y.std((0, 2, 3), keepdim=True)
        return float((k * (y - y.mean((0, 2, 3), keepdim=True)) - x).square().mean())

    means, squares = x.mean((2, 3)), x.square().mean((2, 3))
    t = sizes(means, squares, torch.ones(8), 2, 1e-5)
    assert error(t) < 0.7 * error(torch.ones(8, dtype=torch.float64))
    assert t[1] < 1
    assert t[6] < 1
    assert (t >= 0.5).all()
    assert (t <= 2).all()


def test_eps_is_raised_only_where_the_conversion_was_given_none(net: nn.Module) -> None:
    for given, asked, expected in ((None, None, 1.0), (0.1, None, 0.1), (0.1, 2.0, 2.0), (None, 0, 1e-5)):
        model = normswap.convert(net, to="gn", groups=2, eps=given)
        calibrate(model, net, images(), eps=asked)
        assert model.stem[1].eps == expected
        assert_same_moments(model, net, [images()])
    copied = normswap.convert(net, to="gn", groups=2, transfer="copy")
    calibrate(copied, net, images())
    assert copied.stem[1].eps == 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_a_balanced_network_is_saved_loaded_and_reverted(net: nn.Module, tmp_path: Any, bias: bool) -> None:
    if not bias:
        net.stem[0].register_parameter("bias", None)
    before = contents(net)
    model = normswap.convert(net, to="gn", groups=1)
    calibrate(model, net, images())
    assert (model.stem[1].weight < 0).any()  # some channel was negated
    normswap.save(model, tmp_path / "model.safetensors")
    loaded = normswap.load(tmp_path / "model.safetensors", model=Net())
    assert loaded.stem[1].eps == 1.0
    assert torch.equal(run(loaded, images()), run(model, images()))
    for each in (model, loaded):
        normswap.revert(each)
        assert contents(each) == before


def ridge(rows: np.ndarray, aim: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Weights (and a free bias, the last) that minimise `|aim - w rows|^2 + ridge |w - now|^2`, by stacked rows."""
    power = (rows**2).sum(1).mean()
    held = np.sqrt(np.diag([0.1 * power] * (len(rows) - 1) + [1e-6 * power]))
    return (
        now
        + np.linalg.lstsq(np.hstack([rows, held]).T, np.hstack([aim - now @ rows, 0 * now @ held]).T, rcond=None)[0].T
    )


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 7, 6)),
        (nn.Conv2d(4, 6, (1, 3), padding=(0, 2), dilation=2, groups=2), (3, 4, 5, 6)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (3, 4, 5, 5)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
        (nn.Conv2d(4, 6, 1), (3, 4, 5, 5)),
        (nn.Linear(4, 6), (30, 4)),
    ],
)
def test_a_refitted_layer_is_a_ridge_regression(layer: Any, shape: tuple[int, ...]) -> None:
    randomized(layer)
    x = torch.randn(shape)
    with torch.no_grad():
        z = layer(x) + torch.randn(layer(x).shape)
        scale, shift = torch.rand(z.shape[1]) + 0.5, torch.randn(z.shape[1])
        weight, bias = fitted(layer, [(x[:1], z[:1]), (x[1:], z[1:])], scale, shift)
        # Each weight's input at every position is what the layer gives when that weight alone is 1.
        groups, outs = getattr(layer, "groups", 1), z.shape[1]
        probe = type(layer).__new__(type(layer))
        probe.__dict__.update(layer.__dict__, _parameters=dict(layer._parameters))
        probe._parameters["bias"] = nn.Parameter(torch.zeros(outs))
        size = layer.weight[0].numel()
        for group in range(groups):
            channels = slice(group * outs // groups, (group + 1) * outs // groups)
            rows = []
            for i in range(size):
                only = torch.zeros_like(layer.weight)
                only.view(outs, -1)[channels.start, i] = 1
                probe._parameters["weight"] = nn.Parameter(only)
                rows.append(probe(x)[:, channels.start].flatten())
            table = torch.stack([*rows, torch.ones_like(rows[0])]).double().numpy()
            aim = (z * broadcast(scale, z) + broadcast(shift, z))[:, channels].movedim(1, 0).flatten(1).double().numpy()
            now = torch.cat([layer.weight.view(outs, -1), layer.bias[:, None]], 1)[channels].double().numpy()
            found = torch.cat([weight.view(outs, -1), bias[:, None]], 1)[channels].double().numpy()
            np.testing.assert_allclose(found, ridge(table, aim, now), rtol=1e-3, atol=1e-4)


def test_a_layer_is_refitted_on_positions_from_all_over_the_image() -> None:
    layer = nn.Conv2d(1, 1, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    x = torch.randn(4, 1, 20, 20).sign()
    z = 2 * x
    z[:, :, :10] = 0  # nothing above, twice the input below: the input itself on the whole, less what the ridge holds
    weight, _ = fitted(layer, [(x, z)], torch.ones(1), torch.zeros(1))
    assert float(weight) == pytest.approx(1 / 1.1, abs=0.1)


def test_refitting_brings_what_enters_the_norms_closer_to_the_original_and_keeps_the_moments(net: nn.Module) -> None:
    data, unexplained = images(60), {}
    wanted = run_at(net.body[1].conv1, run_at(net.body[0], run_at(net.stem, data))).movedim(1, 0).flatten(1)
    for method in ("balance", "refit"):
        model = normswap.convert(net, to="gn", groups=2)
        calibrate(model, net, data.split(17), method=method)
        assert_same_moments(model, net, [data])
        order = {order.path: order.rows for order in record_of(model).undo.orders}["body.1.conv1"]
        found = run_at(model.body[1].conv1, run_at(model.body[0], run_at(model.stem, data))).movedim(1, 0).flatten(1)
        pairs = zip(wanted[order], found, strict=True)
        unexplained[method] = np.mean([1 - np.corrcoef(a, b)[0, 1] ** 2 for a, b in pairs])
    assert unexplained["refit"] < unexplained["balance"]


def test_a_refitted_network_is_saved_loaded_and_reverted_unless_it_was_trained(net: nn.Module, tmp_path: Any) -> None:
    before = contents(net)
    model = normswap.convert(net, to="gn", groups=2)
    calibrate(model, net, images(), method="refit")
    calibrate(model, data=images(), method="refit")
    normswap.save(model, tmp_path / "model.safetensors")
    loaded, moved = (normswap.load(tmp_path / "model.safetensors", model=Net()) for _ in range(2))
    for each in (model, loaded):
        normswap.revert(each)
        assert contents(each) == before
    moved.stem[0].weight.data[0, 0, 0, 0] += 1
    with pytest.raises(RevertError, match=r"stem\.0"):
        normswap.revert(moved)


def test_layers_that_cannot_be_refitted_are_left(net: nn.Module) -> None:
    net.stem[0] = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    net = trained(randomized(net), images(40))
    balanced, refitted = (normswap.convert(net, to="gn", groups=2) for _ in range(2))
    calibrate(balanced, net, images())
    calibrate(refitted, net, images(), method="refit")
    assert torch.equal(balanced.stem[0].weight, refitted.stem[0].weight)
    assert not torch.equal(balanced.body[0].conv1.weight, refitted.body[0].conv1.weight)
    assert_same_moments(refitted, net, [images()])


def test_prescaled_channels_are_balanced_in_front_of_the_norm() -> None:
    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y + torch.relu(self.norm(y))

    net = trained(randomized(PreActivation()), images(40))
    model = normswap.convert(net, to="gn", groups=1)
    scale = model.norm.standardize.scale.clone()
    report = calibrate(model, net, images())
    assert not torch.equal(model.norm.standardize.scale, scale)
    assert report.error_after < 1e-5
    assert_same_moments(model, net, [images()])


def test_the_report_is_json_values_and_readable(net: nn.Module) -> None:
    import json

    report = calibrate(normswap.convert(net, to="gn"), net, images())
    values = json.loads(json.dumps(report.to_dict()))
    assert values["images"] == 12
    assert values["layers"][0]["path"] == "stem.1"
    assert "calibrated 5 layers on 12 images" in str(report)


def test_moments_pool_exactly_and_keep_precision_far_from_zero() -> None:
    x = torch.randn(7, 3, 5, 4, dtype=torch.float64) * torch.tensor([1.0, 0.01, 5.0]).view(3, 1, 1) + 40
    pooled = Moments()
    for part in x.float().split(2):
        pooled.add(moments_of(part))
    exact = x.float().double()
    torch.testing.assert_close(pooled.mean, exact.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(pooled.var, exact.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)
    assert pooled.count == 140


def test_a_mean_far_from_zero_is_closer_than_float32_holds_it() -> None:
    x = torch.randn(4, 3, 9) * 0.01 + 1000.3
    torch.testing.assert_close(moments_of(x).mean, x.double().mean((0, 2)), rtol=0, atol=1e-8)


def test_lockstep_waits_for_all_that_will_come_and_for_no_other() -> None:
    log: list[Any] = []
    places = [["a", "b"], ["a"], ["b", "a"]]

    def job(i: int) -> Any:
        def body() -> None:
            for place in places[i]:
                log.append((i, place))
                lockstep.arrive(place)

        return body

    from contextlib import nullcontext

    lockstep = Lockstep([job(i) for i in range(3)], [set(p) for p in places], log.append, nullcontext)
    lockstep.run()
    assert [entry for entry in log if isinstance(entry, tuple)].__len__() == 5
    assert set(log) >= {"a", "b"}


def test_layers_on_regions_that_a_detector_proposes_are_not_fitted_anew() -> None:
    """Each network proposes regions of its own, so what these layers see cannot be compared one by one."""
    few = {"rpn_post_nms_top_n_test": 10, "rpn_pre_nms_top_n_test": 20, "min_size": 64, "max_size": 64}
    torch.manual_seed(0)
    original = detector("fasterrcnn", backbone=resnet18(), num_classes=3, norm="bn", width=32, **few).eval()
    model = normswap.convert(original, "gn", groups=4)
    calibrate(model, original, [[torch.rand(3, 64, 64), torch.rand(3, 48, 64)]], method="refit")
    anew = [layer.path for layer in record_of(model).undo.layers if layer.given is not None]
    assert any(path.startswith("backbone.fpn") for path in anew)
    assert not any(path.startswith("roi_heads") for path in anew)


def test_of_any_norm_fused_with_an_activation_the_norm_alone_is_matched() -> None:
    timm = pytest.importorskip("timm.layers")
    original = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), timm.LayerNormAct2d(4)))
    converted = normswap.convert(original, to="gn", groups=2, sources=["ln-channel"])
    x = torch.randn(32, 3, 6, 6)
    calibrate(converted, original, x, method="moments")
    norm = original[1]
    wanted = F.layer_norm(original[0](x).movedim(1, -1), (4,), norm.weight, norm.bias, norm.eps).movedim(-1, 1)
    given = converted[1].norm(converted[0](x))
    torch.testing.assert_close(given.mean((0, 2, 3)), wanted.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(given.var((0, 2, 3)), wanted.var((0, 2, 3)), rtol=1e-3, atol=1e-4)
