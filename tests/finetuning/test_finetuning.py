"""`normswap.finetune` on the real digits network: what trains and what stays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuned import SMALL, changed, lines, settings, stop_at, tensors
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.conversion.stabilize import factors_of
from normswap.demo.network import pretrained
from normswap.errors import Interrupted, TrainingError
from normswap.finetuning.engine.checkpointer import RunState
from normswap.finetuning.engine.monitor import Monitor
from normswap.finetuning.engine.optimizer import averaged


@pytest.mark.parametrize(("steps", "warm"), [(100, 10), (100, 0), (40, 5)])
def test_the_rate_rises_in_equal_parts_from_one_part_and_falls_along_a_cosine(steps: int, warm: int) -> None:
    schedule = settings(steps=steps, lr=0.4, warmup=warm / steps).schedule
    rates = [schedule.at(step) for step in range(steps)]
    assert rates[:warm] == pytest.approx([0.4 * part / (warm + 1) for part in range(1, warm + 1)])
    left = steps - warm
    assert rates[warm:] == pytest.approx([0.2 * (1 + math.cos(math.pi * k / left)) for k in range(left)])
    assert max(rates) == rates[warm] == 0.4


def test_the_average_follows_the_weights_fast_at_first_and_then_by_the_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    values = [math.sin(i) for i in range(60)]
    average, expected = averaged(model, 0.8), 0.0
    for count, value in enumerate(values):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update_parameters(model)
        decay = 0.0 if count == 0 else min(0.8, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "loss", "better"),
    [(0.6, 9.0, True), (0.4, 0.1, False), (0.5, 0.9, True), (0.5, 1.0, False), (0.5, 1.1, False), (0.5, None, False)],
)
def test_of_two_networks_that_are_equally_accurate_the_one_with_less_loss_is_the_best(
    value: float, loss: float | None, better: bool
) -> None:
    monitor = Monitor(settings(steps=1, lr=1.0, warmup=0.0), "val_accuracy")
    figures = {"val_accuracy": value} | ({} if loss is None else {"val_loss": loss})
    assert monitor.judge(RunState(best=0.5, best_loss=1.0), 1, figures) == better
    assert monitor.judge(RunState(), 1, figures)


def test_the_best_file_is_that_of_the_smaller_loss_where_the_accuracy_is_the_same(
    gn: nn.Module, data: Any, tmp_path: Path
) -> None:
    x = data[0][0]
    few = (x[:4], gn.eval()(x[:4]).argmax(1))  # all right from the beginning
    report = normswap.finetune(gn, few, few, output=tmp_path / "run", batch_size=2, epochs=3, lr=1e-3, device="cpu")
    losses = {line["step"]: line["val_loss"] for line in lines(tmp_path / "run") if "val_loss" in line}
    assert report.best == 1.0
    assert report.best_at == min(losses, key=losses.__getitem__) > 0


@pytest.mark.usefixtures("every_step")
def test_every_figure_says_what_it_is_over_also_after_a_stop(gn: nn.Module, data: Any) -> None:
    train, validation = data
    with pytest.raises(Interrupted) as caught:
        normswap.finetune(gn, train, validation, batch_size=2, epochs=2, device="cpu", progress=stop_at(26))
    report = caught.value.report
    assert (report.steps, report.window, report.validated_at, report.validation_images) == (26, (21, 26), 20, 50)
    assert report.over("loss") == "over steps 21 to 26"
    assert report.over("val_accuracy") == "over 50 images at step 20"
    assert "over steps 21 to 26" in str(report)


def test_training_lowers_the_loss_on_a_new_task(data: Any) -> None:
    (x, y), _ = data
    model = normswap.convert(pretrained(), "gn", groups=4)
    parity = (x, y % 2)  # even or odd: the old head knows nothing of it
    report = normswap.finetune(model, parity, parity, batch_size=4, epochs=6, num_classes=2, lr=2e-3)
    assert report.before["val_accuracy"] < 0.8
    assert report.figures["val_accuracy"] > 0.9
    assert model.classifier.out_features == 2


def test_validation_figures_are_those_of_the_network(gn: nn.Module, data: Any) -> None:
    train, (x, y) = data
    report = normswap.finetune(gn, train, (x, y), **SMALL)
    with torch.no_grad():
        scores = gn.eval()(x)
    assert report.figures["val_accuracy"] == pytest.approx(float((scores.argmax(1) == y).float().mean()))
    assert report.figures["val_loss"] == pytest.approx(float(F.cross_entropy(scores, y)), rel=1e-5)


def test_one_sgd_step_is_the_formula(data: Any) -> None:
    (x, y), _ = data
    model, twin = (normswap.convert(pretrained(), "gn", groups=4) for _ in range(2))
    normswap.finetune(
        model, (x, y), batch_size=40, steps=1, lr=0.01, optimizer="sgd", weight_decay=0.1, warmup=0.0,
        clip_grad=None, label_smoothing=0.2, stabilize=False,
    )  # fmt: skip
    twin.train()
    share = torch.full((40, 10), 0.02).scatter(1, y[:, None], 0.82)  # smoothing by hand
    loss = -(share * twin(x).log_softmax(1)).sum(1).mean()
    loss.backward()
    for name, p in twin.named_parameters():
        decay = 0.1 if p.dim() > 1 else 0.0
        gradient = p.grad + decay * p.detach()
        expected = p.detach() - 0.01 * (gradient + 0.9 * gradient)  # Nesterov's first step
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_equal_one_large_batch(data: Any) -> None:
    models = [normswap.convert(pretrained(), "gn", groups=4) for _ in range(2)]
    for model, batch_size, accumulate in zip(models, (8, 2), (1, 4), strict=True):
        normswap.finetune(model, data[0], batch_size=batch_size, accumulate=accumulate, steps=4, lr=1e-3)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_network_and_another_seed_another(data: Any) -> None:
    found = []
    for seed in (3, 3, 4):
        model = normswap.convert(pretrained(), "gn", groups=4)
        normswap.finetune(model, data[0], **SMALL, seed=seed)
        found.append(model)
    assert not changed(found[1], tensors(found[0]))
    assert changed(found[2], tensors(found[0]))


def test_the_callers_random_state_does_not_matter(data: Any) -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = normswap.convert(pretrained(), "gn", groups=4)
        normswap.finetune(model, data[0], **SMALL)
        found.append(model)
    assert not changed(found[1], tensors(found[0]))


@pytest.mark.parametrize(
    ("train", "touched"),
    [
        ("norm", lambda name: ".bn" in name or name.startswith("bn") or "shortcut.1" in name),
        ("head", lambda name: name.startswith("classifier")),
        ("blocks.4.*", lambda name: name.startswith("blocks.4.")),
        ("classifier.bias", lambda name: name == "classifier.bias"),
    ],
)
def test_only_what_was_asked_for_trains(gn: nn.Module, data: Any, train: str, touched: Any) -> None:
    before = tensors(gn)
    normswap.finetune(gn, data[0], **SMALL, train=train)
    assert changed(gn, before) == {name for name in before if touched(name)}
    assert all(p.requires_grad for p in gn.parameters())


def test_statistics_outside_of_what_trains_stay(data: Any) -> None:
    model = pretrained()
    before = tensors(model)
    normswap.finetune(model, data[0], **SMALL, train="blocks.4.*")
    assert all(name.startswith("blocks.4.") for name in changed(model, before))
    assert "blocks.4.bn1.running_mean" in changed(model, before)


def test_frozen_statistics_and_affine_do_not_move(data: Any) -> None:
    model = pretrained()
    before = tensors(model)
    report = normswap.finetune(model, data[0], **SMALL, freeze_stats=True, freeze_affine=True)
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {name.rpartition(".")[0] for name in changed(model, before)}.isdisjoint(norms)
    assert any("nothing moved" in note for note in report.notes)
    assert model.bn.train().training  # no longer frozen
    assert model.bn.weight.requires_grad


def test_batch_norm_at_small_batches_gets_a_note(data: Any) -> None:
    report = normswap.finetune(pretrained(), data[0], **SMALL)
    assert any("freeze_stats=True" in note and "12 BatchNorm layers" in note for note in report.notes)
    assert not normswap.finetune(pretrained(), data[0], batch_size=8, steps=1).notes


def test_batch_norm_on_single_values_says_what_to_do() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    data = torch.randn(8, 1, 2, 2), torch.randint(2, (8,))
    with pytest.raises(TrainingError, match="single value per channel") as error:
        normswap.finetune(model, data, batch_size=1, steps=2)
    assert "freeze_stats=True" in str(error.value)


def test_modes_and_gradients_come_back(gn: nn.Module, data: Any) -> None:
    gn.train()
    gn.blocks[1].eval()
    modes = {n: m.training for n, m in gn.named_modules()}
    normswap.finetune(gn, *data, **SMALL)
    assert modes == {n: m.training for n, m in gn.named_modules()}
    assert all(p.grad is None for p in gn.parameters())


def test_the_average_is_what_is_returned(data: Any) -> None:
    plain, averaged = (normswap.convert(pretrained(), "gn", groups=4) for _ in range(2))
    start = tensors(plain)
    settings = {"batch_size": 40, "steps": 2, "lr": 1e-3, "optimizer": "sgd", "warmup": 0.0, "stabilize": False}
    weights = []
    for steps in (1, 2):
        model = normswap.convert(pretrained(), "gn", groups=4)
        _first_steps(model, data[0], steps)
        weights.append(tensors(model))
    normswap.finetune(averaged, data[0], **settings, ema=0.5)
    # The average begins with the weights after the first step; then the decay is min(0.5, 2 / 11).
    decay = 2 / 11
    name = "blocks.0.conv1.weight"
    expected = decay * weights[0][name] + (1 - decay) * weights[1][name]
    torch.testing.assert_close(averaged.state_dict()[name], expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(start[name], expected)


def _first_steps(model: nn.Module, data: tuple[Tensor, Tensor], count: int) -> None:
    """The first steps of a run of two, by hand: SGD with a cosine, batch of all 40 samples, clipped to norm 1."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    weights = [p for p in model.parameters() if p.dim() > 1]
    model.train()
    for step in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for p in weights:
            p.grad += 0.01 * p.detach()
        optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / 2))
        optimizer.step()


def test_the_average_is_what_is_validated(gn: nn.Module, data: Any) -> None:
    report = normswap.finetune(gn, *data, batch_size=20, epochs=1, lr=0.01, ema=0.99, device="cpu")
    x, y = data[1]
    with torch.no_grad():
        loss = F.cross_entropy(gn.eval()(x), y)
    assert report.figures["val_loss"] == pytest.approx(float(loss), rel=1e-4)


class Drawing(nn.Module):
    """Its input, after a random number has been drawn in training."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.drawn.append(float(torch.rand(())))
        return x


def test_each_step_draws_other_random_numbers(gn: nn.Module, data: Any) -> None:
    drawing = Drawing()
    gn.classifier = nn.Sequential(drawing, gn.classifier)
    normswap.finetune(gn, data[0], batch_size=2, steps=3, device="cpu")
    assert len(drawing.drawn) == len(set(drawing.drawn)) == 3


@pytest.mark.usefixtures("every_step")
def test_what_does_not_train_needs_no_gradient_after_a_file_was_written(
    gn: nn.Module, data: Any, tmp_path: Path
) -> None:
    seen = []

    def progress(p: Any) -> None:
        seen.append({name for name, parameter in gn.named_parameters() if parameter.requires_grad})

    normswap.finetune(gn, data[0], batch_size=20, epochs=2, train="head", output=tmp_path / "run", progress=progress)
    assert seen
    assert all(names == {"classifier.weight", "classifier.bias"} for names in seen)


def test_the_teacher_pulls_the_network_towards_it(data: Any) -> None:
    (x, y), _ = data
    wrong = (x, (y + 1) % 10)  # labels that contradict the teacher
    distances = []
    teacher = pretrained()
    before = tensors(teacher)
    for share in (0.0, 1.0):
        model = normswap.convert(pretrained(), "gn", groups=4)
        normswap.finetune(model, wrong, batch_size=8, steps=20, distil=share, reference=teacher)
        with torch.no_grad():
            distances.append(float((model.eval()(x) - teacher(x)).norm()))
    assert distances[1] < distances[0] / 2
    assert not changed(teacher, before)


def test_the_original_is_rebuilt_as_teacher(gn: nn.Module, data: Any) -> None:
    report = normswap.finetune(gn, *data, **SMALL, distil=0.5)
    assert report.figures["val_accuracy"] > 0.8


def test_stabilized_sgd_is_sgd_on_weights_of_the_old_size(data: Any) -> None:
    """By hand, on the folded weights themselves: the gradient, centralized, counts 1/c^2 where the weight is 1/c."""
    (x, y), _ = data
    model, twin = (normswap.convert(pretrained(), "gn", groups=4) for _ in range(2))
    settings = {"batch_size": 40, "steps": 1, "lr": 1e-3, "optimizer": "sgd", "warmup": 0.0, "weight_decay": 0.0}
    normswap.finetune(model, (x, y), **settings, clip_grad=None)
    factors = factors_of(twin)
    by_layer = {path: factors.get(s.path, 1.0) for s in twin._normswap.plan.steps for path in s.producers}
    assert len(set(by_layer.values())) > 1
    twin.train()
    F.cross_entropy(twin(x), y).backward()
    for name, p in twin.named_parameters():
        layer, _, leaf = name.rpartition(".")
        gradient = p.grad
        if layer in by_layer and leaf == "weight":
            gradient = gradient - gradient.mean((1, 2, 3), keepdim=True)
        expected = p.detach() - 1e-3 * 1.9 * gradient / by_layer.get(layer, 1.0) ** 2
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-4, atol=1e-6)
    assert [m.eps for m in model.modules() if isinstance(m, nn.GroupNorm)] == [1e-5] * 12
