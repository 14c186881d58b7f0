"""Distillation: a converted network learns from its original, which stays as it is."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from distilling import SHORT, Classifier
from helpers import contents, fingerprint, randomized
from torch import Tensor, nn

import normswap
from normswap.distillation.augmentation import mirrored, shifted
from normswap.distillation.distil import suited_rate
from normswap.distillation.report import Progress
from normswap.distillation.stream import held_of, stream_of
from normswap.errors import RevertError
from normswap.training.losses import distance, divergence


def mean_loss(original: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        p, q = ((m(x).double() / 2).log_softmax(1) for m in (original, model))
    return 4 * float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize("features", [0.0, 2.0])
def test_the_loss_is_that_of_the_outputs_and_of_the_norms_on_half_of_the_images(
    original: nn.Module, model: nn.Module, images: Tensor, features: float
) -> None:
    original.stem[2] = nn.ReLU(inplace=True)  # which writes into what the norm gave
    x = images[:9]
    seen: dict[nn.Module, list[Tensor]] = {original: [], model: []}
    for network, outs in seen.items():
        norms = (network.stem[1], network.block.bn1, network.block.bn2)
        handles = [n.register_forward_hook(lambda m, a, out, o=outs: o.append(out.detach().clone())) for n in norms]
        with torch.no_grad():
            network.eval()(x)
        for handle in handles:
            handle.remove()
    a, b = ([t[:5].double() for t in outs] for outs in seen.values())
    inner = sum(float((p - q).square().sum() / p.square().sum()) for p, q in zip(a, b, strict=True)) / 3
    expected = mean_loss(original, model, x) + features * inner
    report = normswap.distil(model, original, [x], steps=1, features=features)
    assert report.loss_first == pytest.approx(expected, rel=1e-4)


def test_norms_with_several_calls_are_compared_call_by_call(images: Tensor) -> None:
    class Twice(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.block(self.stem(x))).mean((2, 3)))

    original = randomized(Twice())
    model = normswap.convert(original, "gn", groups=2)
    for train in ("all", "norm"):
        report = normswap.distil(model, original, images, steps=20, batch_size=8, lr=0.05, train=train)
        assert report.loss_last < report.loss_first


def test_the_loss_falls_and_agreement_rises(original: nn.Module, model: nn.Module, images: Tensor) -> None:
    before = mean_loss(original, model, images)
    report = normswap.distil(model, original, images, steps=40, batch_size=8, lr=0.05)
    assert mean_loss(original, model, images) < before / 3
    assert report.loss_last < report.loss_first
    assert report.drift_after < report.drift_before
    assert report.agreement_after >= report.agreement_before
    assert (report.steps, report.planned, report.images, report.interrupted) == (40, 40, 40, False)
    assert json.loads(json.dumps(report.to_dict()))["steps"] == 40
    assert "loss" in str(report)


def test_reference_flags_gradients_and_random_state_stay(original: nn.Module, model: nn.Module, images: Tensor) -> None:
    original.train()
    original.block.bn1.eval()
    model.train()
    model.head.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones(5)
    head = model.head.weight.clone()
    before, state = fingerprint(original), torch.random.get_rng_state()
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    normswap.distil(model, original, images, **SHORT)
    assert fingerprint(original) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert flags == [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.head.bias.grad, torch.ones(5))
    assert model.head.weight.grad is None


def test_the_reference_is_rebuilt_when_none_is_given(original: nn.Module, model: nn.Module, images: Tensor) -> None:
    other = copy.deepcopy(model)
    normswap.distil(model, original, images, **SHORT)
    normswap.distil(other, data=images, **SHORT)
    assert contents(model) == contents(other)
    with pytest.raises(RevertError, match="trained since"):
        normswap.distil(other, data=images, **SHORT)


def test_labels_are_not_looked_at(original: nn.Module, model: nn.Module, images: Tensor) -> None:
    other = copy.deepcopy(model)
    batches = list(images.split(8))
    normswap.distil(model, original, batches, **SHORT)
    normswap.distil(other, original, [(x, torch.full((8,), 3)) for x in batches], **SHORT)
    assert contents(model) == contents(other)


def test_accuracy_is_that_on_eval_data(original: nn.Module, model: nn.Module, images: Tensor) -> None:
    labels = original(images).argmax(1)
    report = normswap.distil(model, original, images, eval_data=[(images, labels)], **SHORT)
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean()
    assert (report.accuracy_original, report.accuracy_after, report.compared) == (1.0, pytest.approx(float(right)), 40)


def test_a_seed_gives_the_same_weights_and_another_gives_others(
    original: nn.Module, model: nn.Module, images: Tensor
) -> None:
    results = []
    for seed in (0, 0, 1):
        student = copy.deepcopy(model)
        torch.manual_seed(len(results))
        normswap.distil(student, original, images, seed=seed, **SHORT)
        results.append(contents(student))
    assert results[0] == results[1] != results[2]


def test_augmented_images_give_other_weights_by_the_seed(original: nn.Module, model: nn.Module, images: Tensor) -> None:
    results = []
    for augment in ("none", "auto", "auto", "flip"):
        student = copy.deepcopy(model)
        normswap.distil(student, original, images, augment=augment, **SHORT)
        results.append(contents(student))
    assert results[0] != results[1] == results[2]
    assert results[3] not in results[:3]


def agreeing(original: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((original(x).argmax(1) == model(x).argmax(1)).float().mean())


@pytest.mark.parametrize("lr", [0.02, 0.3])
def test_the_state_with_the_smallest_loss_is_kept_if_no_fewer_images_agree(
    original: nn.Module, model: nn.Module, images: Tensor, lr: float
) -> None:
    seen = [(mean_loss(original.eval(), model, images), agreeing(original, model, images))]

    def note(progress: Progress) -> None:
        seen.append((mean_loss(original, model, images), agreeing(original, model, images)))

    report = normswap.distil(
        model, original, images, steps=8, batch_size=8, lr=lr, eval_data=images, features=0.0, progress=note
    )
    loss, step = min((loss, step) for step, (loss, same) in enumerate(seen) if same >= seen[0][1])
    assert report.kept == step
    assert (report.eval_loss_before, report.eval_loss_after) == pytest.approx((seen[0][0], loss), rel=1e-4)
    assert mean_loss(original, model, images) == pytest.approx(loss, rel=1e-4)


def test_a_run_that_only_hurts_leaves_the_network_and_its_history_as_they_were(
    original: nn.Module, images: Tensor
) -> None:
    model = normswap.convert(original, "gn", groups=2)
    normswap.distil(model, original, images, steps=60, batch_size=8)
    before, history = contents(model), list(model._normswap.history)
    report = normswap.distil(model, original, images, steps=5, batch_size=8, lr=5.0)
    assert contents(model) == before
    assert model._normswap.history == history
    assert (report.steps, report.kept) == (5, 0)
    assert report.eval_loss_after == report.eval_loss_before
    assert report.agreement_after == report.agreement_before
    assert "as it was" in str(report)


@pytest.mark.parametrize("count", [1, 3, 12, 40, 400, 5000])
def test_images_held_back_are_never_trained_on(count: int) -> None:
    stream = stream_of(torch.arange(float(count)).view(-1, 1, 1, 1), 4, seed=3)
    trained = {float(v) for number in range(4) for args in stream.epoch(number, 0) for v in args[0].flatten()}
    held = [float(v) for args in stream.held() for v in args[0].flatten()]
    assert len(held) == len(set(held)) == {1: 0, 3: 0, 12: 3, 40: 10, 400: 40, 5000: 256}[count] == held_of(count)
    assert not trained & set(held)
    assert trained | set(held) <= set(map(float, range(count)))
    assert len(trained) >= count - len(held) - 3


def test_of_a_list_of_batches_the_last_are_held_back_and_of_one_batch_none() -> None:
    batches = [torch.full((2, 1, 1, 1), float(i)) for i in range(20)]
    stream = stream_of(batches, 4, seed=0)
    assert [float(args[0][0]) for args in stream.epoch(0, 0)] == list(range(18))
    assert [float(args[0][0]) for args, _ in stream.compared(1).batches] == [18, 19]
    alone = stream_of(batches[:1], 4, seed=0).compared(1)
    assert [len(args[0]) for args, _ in alone.batches] == [2]
    assert "trained on" in alone.origin


def test_the_default_rate_suits_the_number_of_steps() -> None:
    assert [suited_rate(steps) for steps in (15, 150, 300, 3000)] == pytest.approx([5e-5, 0.005, 0.02, 0.02])


def test_divergence_and_distance_are_their_formulas() -> None:
    a, b = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    p, q = ((t / 3).exp() / (t / 3).exp().sum(1, keepdim=True) for t in (a, b))
    assert float(divergence(a, b, 3.0)) == pytest.approx(9 * float((p * (p / q).log()).sum()) / 6)
    assert float(distance(a, b)) == pytest.approx(float(((a - b) ** 2).sum() / (a**2).sum()))
    assert float(distance(torch.zeros(4), torch.full((4,), 2.0))) == 4.0


def test_the_learning_rate_rises_then_falls(original: nn.Module, model: nn.Module, images: Tensor) -> None:
    seen: list[Progress] = []
    normswap.distil(model, original, images, steps=50, batch_size=2, lr=0.01, progress=seen.append)
    rates = [progress.lr for progress in seen]
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.0001)


def test_a_step_moves_each_parameter_by_a_share_of_its_size(
    original: nn.Module, model: nn.Module, images: Tensor
) -> None:
    """Adam's first step is the learning rate, up or down, whatever the gradient."""
    with torch.no_grad():
        model.block.conv1.weight.mul_(100)
        model.stem[1].bias.zero_()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    normswap.distil(model, original, images, steps=1, lr=0.01, weight_decay=0.0)
    for name, p in model.named_parameters():
        size = max(0.1 if p.dim() == 1 else 0.001, float(before[name].square().mean().sqrt()))
        assert float((p.detach() - before[name]).abs().max()) == pytest.approx(0.01 * size, rel=1e-2), name


def test_augmentation_mirrors_and_shifts_each_image_by_itself() -> None:
    x = torch.arange(2 * 16 * 16.0).view(1, 2, 16, 16).expand(64, -1, -1, -1)
    flipped = [bool(torch.equal(out, x[0].flip(2))) for out in mirrored(x)]
    assert 10 < sum(flipped) < 54
    out = shifted(x)
    assert out.shape == x.shape
    shifts = {tuple((out[i, 0, 8, 8] - x[0, 0, 8, 8]).reshape(1).tolist()) for i in range(64)}
    assert len(shifts) > 10
    padded = torch.nn.functional.pad(x[0], (2, 2, 2, 2), mode="reflect")
    windows = [padded[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
    assert all(any(torch.equal(image, window) for window in windows) for image in out)
