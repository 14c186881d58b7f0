"""Distillation: a converted network learns from its original, which stays as it is."""

from __future__ import annotations

import copy
import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Residual, contents, fingerprint, randomized
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.distillation.augmentation import mirrored, shifted
from normswap.distillation.distil import suited_rate
from normswap.distillation.judging import Judge, Look
from normswap.distillation.report import Progress
from normswap.distillation.stream import held_of, stream_of
from normswap.errors import CheckpointError, DataError, Interrupted, OptionError, RevertError, TrainingError
from normswap.training.losses import distance, divergence


class Classifier(nn.Module):
    """`(N, 3, H, W)` to `(N, 5)`, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.block = Residual(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.block(self.stem(x)).mean((2, 3))))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(40, 3, 8, 8)


@pytest.fixture
def original() -> nn.Module:
    return randomized(Classifier())


@pytest.fixture
def model(original: nn.Module) -> nn.Module:
    return normswap.convert(original, "gn", groups=2)


SHORT: dict[str, Any] = {"steps": 6, "batch_size": 8}


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


class Stop:
    """Ctrl-C, or another end, after so many steps."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.after, self.error, self.seen = after, error, 0

    def __call__(self, progress: Progress) -> None:
        self.seen = progress.step
        if progress.step == self.after:
            raise self.error


def sources(images: Tensor) -> dict[str, Any]:
    return {
        "tensor": images,
        "dataset": TensorDataset(images),
        "loader": DataLoader(TensorDataset(images), batch_size=8, shuffle=True),
        "batches": list(images.split(8)),
    }


@pytest.mark.parametrize("kind", ["tensor", "dataset", "loader", "batches"])
@pytest.mark.parametrize("after", [3, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(
    original: nn.Module, model: nn.Module, images: Tensor, tmp_path: Path, kind: str, after: int
) -> None:
    data, whole, options = sources(images)[kind], copy.deepcopy(model), {**SHORT, "steps": 9}
    start = copy.deepcopy(model)
    expected = normswap.distil(whole, original, data, **options)
    state = tmp_path / "state.pt"
    with pytest.raises(Interrupted):
        normswap.distil(model, original, data, progress=Stop(after, KeyboardInterrupt()), checkpoint=state, **options)
    assert contents(model) != contents(whole)
    report = normswap.distil(start, original, data, resume=state, **options)
    assert contents(start) == contents(whole)
    assert (report.resumed_at, report.steps) == (after, 9)
    assert (report.loss_first, report.loss_last) == (expected.loss_first, expected.loss_last)


def test_a_resumed_run_keeps_the_same_state_wherever_it_was_stopped(
    original: nn.Module, model: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the nearest state comes before the stop, and the stop between a step and its measurement."""
    options: dict[str, Any] = {"steps": 9, "batch_size": 8, "lr": 0.15}
    nearer = Look.nearer
    monkeypatch.setattr(Look, "nearer", lambda self, *others: self.step < 6 and nearer(self, *others))
    whole, start, state = copy.deepcopy(model), copy.deepcopy(model), tmp_path / "state.pt"
    expected = normswap.distil(whole, original, images, **options)
    look = Judge.look

    def stopped(self: Judge, step: int) -> None:
        if step == 7:
            monkeypatch.setattr(Judge, "look", look)
            raise KeyboardInterrupt
        look(self, step)

    monkeypatch.setattr(Judge, "look", stopped)
    with pytest.raises(Interrupted):
        normswap.distil(model, original, images, checkpoint=state, **options)
    report = normswap.distil(start, original, images, resume=state, **options)
    assert contents(start) == contents(whole)
    assert 0 < report.kept < 6
    assert (report.kept, report.eval_loss_after) == (expected.kept, expected.eval_loss_after)


def test_a_folder_is_shuffled_and_resumes(tmp_path: Path, original: nn.Module, model: nn.Module) -> None:
    from PIL import Image

    for i in range(12):
        folder = tmp_path / "data" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
    whole, start, state = copy.deepcopy(model), copy.deepcopy(model), tmp_path / "state.pt"
    options = {"steps": 6, "batch_size": 5}
    normswap.distil(whole, original, tmp_path / "data", **options)
    with pytest.raises(KeyboardInterrupt):
        normswap.distil(
            model, original, tmp_path / "data", progress=Stop(3, KeyboardInterrupt()), checkpoint=state, **options
        )
    normswap.distil(start, original, tmp_path / "data", resume=state, **options)
    assert contents(start) == contents(whole)


def test_resuming_needs_the_same_settings_and_network(
    original: nn.Module, model: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    state = tmp_path / "state.pt"
    normswap.distil(copy.deepcopy(model), original, images, checkpoint=state, **SHORT)
    before = contents(model)
    with pytest.raises(OptionError, match=r"lr=\S+ \(now 0\.03\)"):
        normswap.distil(model, original, images, resume=state, lr=0.03, **SHORT)
    other = normswap.convert(original, "gn", groups=4)
    with pytest.raises(OptionError, match="another conversion"):
        normswap.distil(other, original, images, resume=state, **SHORT)
    with pytest.raises(CheckpointError, match="does not exist"):
        normswap.distil(model, original, images, resume=tmp_path / "none.pt", **SHORT)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a complete"):
        normswap.distil(model, original, images, resume=state, **SHORT)
    assert contents(model) == before
    assert model._normswap.history == []


def test_a_finished_run_is_not_resumed(original: nn.Module, model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    state, start = tmp_path / "state.pt", copy.deepcopy(model)
    normswap.distil(model, original, images, checkpoint=state, checkpoint_every=2, **SHORT)
    normswap.distil(start, original, images, resume=state, **SHORT)
    assert contents(start) == contents(model)


def test_norm_trains_gamma_and_beta_alone(original: nn.Module, model: nn.Module, images: Tensor) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    normswap.distil(model, original, images, train="norm", **SHORT)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"{layer}.{kind}" for layer in ("stem.1", "block.bn1", "block.bn2") for kind in ("weight", "bias")}
    assert all(p.requires_grad for p in model.parameters())


def test_a_loss_that_is_not_finite_stops_at_the_last_good_state(
    original: nn.Module, model: nn.Module, images: Tensor
) -> None:
    """The weights are ruined after the third step was measured, which the fourth loss shows."""
    good = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        normswap.distil(good, original, images, progress=Stop(3, KeyboardInterrupt()), **SHORT)

    def poison(progress: Progress) -> None:
        if progress.step == 3:
            with torch.no_grad():
                model.head.weight.fill_(math.nan)

    with pytest.raises(TrainingError, match="step 4") as caught:
        normswap.distil(model, original, images, progress=poison, **SHORT)
    assert isinstance(caught.value, normswap.NormswapError)
    assert contents(model) == contents(good)
    assert model._normswap.history[-1].steps == 2


def test_a_learning_rate_far_too_large_leaves_a_finite_network(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(TrainingError, match=r"finite|nan|inf|weights"):
        normswap.distil(model, data=images, steps=6, batch_size=8, lr=1e25)
    assert all(p.isfinite().all() for p in model.parameters())


def test_nan_in_the_data_is_named(model: nn.Module, images: Tensor) -> None:
    images[:] = math.nan
    with pytest.raises(DataError, match="data holds NaN"):
        normswap.distil(model, data=images, **SHORT)


def test_an_interrupt_keeps_what_was_reached(original: nn.Module, model: nn.Module, images: Tensor) -> None:
    before = contents(model)
    with pytest.raises(KeyboardInterrupt) as caught:
        normswap.distil(model, original, images, progress=Stop(4, KeyboardInterrupt()), **SHORT)
    assert caught.value.report.interrupted
    assert (caught.value.report.steps, caught.value.report.planned) == (4, 6)
    assert contents(model) != before
    entry = model._normswap.history[-1]
    assert (entry.action, entry.steps, entry.planned) == ("distil", 4, 6)
    assert model(images).isfinite().all()


def test_an_interrupt_in_the_middle_of_an_update_undoes_that_update(
    original: nn.Module, model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        normswap.distil(good, original, images, progress=Stop(2, KeyboardInterrupt()), **SHORT)
    step, calls = torch.optim.AdamW.step, []

    def interrupted(self: Any, *args: Any) -> Any:
        calls.append(step(self, *args))
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(Interrupted):
        normswap.distil(model, original, images, checkpoint=tmp_path / "state.pt", **SHORT)
    assert contents(model) == contents(good)
    assert not list(tmp_path.iterdir())  # optimizer and weights do not belong together any more


def test_history_survives_saving(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    normswap.distil(model, data=images, **SHORT)
    normswap.save(model, tmp_path / "a.safetensors")
    assert normswap.checkpoint.manifest.read_manifest(tmp_path / "a.safetensors")["history"][-1]["action"] == "distil"
    with pytest.raises(RevertError):
        normswap.revert(model)


class Outputs(nn.Module):
    """A network that gives several tensors."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body = kind, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.scores = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        maps = self.body(x)
        scores, count = self.scores(maps.mean((2, 3))), torch.tensor(len(x))
        if self.kind == "map":
            return maps
        return {"logits": scores, "maps": [maps], "count": count} if self.kind == "dict" else [maps, (scores, count)]


@pytest.mark.parametrize("kind", ["map", "dict", "list"])
def test_other_outputs_are_matched(kind: str, images: Tensor) -> None:
    original = randomized(Outputs(kind))
    model = normswap.convert(original, "gn", groups=4)
    seen: list[Progress] = []
    report = normswap.distil(model, original, images, steps=40, batch_size=8, lr=0.05, progress=seen.append)
    assert report.loss_last < 0.7 * report.loss_first
    assert report.drift_after < report.drift_before
    assert (seen[0].agreement is not None) == (kind == "dict")


def test_a_network_that_gives_nothing_to_learn_from_is_refused(images: Tensor) -> None:
    class Index(Outputs):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).argmax(1)

    model = normswap.convert(randomized(Index("map")), "gn", groups=2, check=False)
    with pytest.raises(DataError, match="no floating tensor"):
        normswap.distil(model, data=images, **SHORT)


def test_a_recurrent_network_is_distilled(images: Tensor) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.lstm = nn.LSTM(4, 6, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.body(x).mean(2).movedim(1, 2))[0]

    model = normswap.convert(randomized(Reader()), "gn", groups=2)
    report = normswap.distil(model, data=images, steps=30, batch_size=8)
    assert report.loss_last < report.loss_first
    assert (model.lstm.training, model.lstm.dropout) == (False, 0.5)


class Backbone(nn.Module):
    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.a(x)
        return OrderedDict([("0", first), ("1", self.b(first))])


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn"])
def test_a_detector_learns_from_its_feature_maps(kind: str) -> None:
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    anchors = AnchorGenerator(((16,), (32,)), ((1.0,), (1.0,)))
    sizes = {"min_size": 48, "max_size": 64}
    if kind == "retinanet":
        net: nn.Module = detection.RetinaNet(Backbone(), 3, anchor_generator=anchors, **sizes)
    else:
        pool = MultiScaleRoIAlign(["0", "1"], 3, 2)
        net = detection.FasterRCNN(Backbone(), 3, rpn_anchor_generator=anchors, box_roi_pool=pool, **sizes)
    original = randomized(net)
    model = normswap.convert(original, "gn", groups=2, check=False)
    data = [[torch.rand(3, 40 + 8 * i, 56), torch.rand(3, 48, 40)] for i in range(3)]
    before = fingerprint(original)
    report = normswap.distil(model, original, data, steps=12)
    assert fingerprint(original) == before
    assert report.loss_last < report.loss_first
    assert report.drift_before is None


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a positive integer"),
        ({"lr": -1.0}, "lr must be a positive number"),
        ({"train": "head"}, "train must be 'all' or 'norm'"),
        ({"precision": "int8"}, "precision must be"),
        ({"seed": -1}, "seed must be"),
        ({"checkpoint_every": 0}, "checkpoint_every must be"),
        ({"data": None}, "needs images"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    model: nn.Module, images: Tensor, options: dict[str, Any], message: str
) -> None:
    before = contents(model)
    with pytest.raises(OptionError, match=message):
        normswap.distil(model, **{"data": images, **options})
    assert contents(model) == before


def test_a_reference_that_shares_its_weights_is_refused(images: Tensor) -> None:
    net = randomized(Classifier())
    model = normswap.convert(copy.deepcopy(net), "gn", groups=2, inplace=True)
    shell = copy.deepcopy(net)
    shell.head = model.head
    for reference in (model, shell):
        with pytest.raises(OptionError, match="shares parameters"):
            normswap.distil(model, reference, images, **SHORT)


def test_half_precision_weights_are_refused(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(OptionError, match="bfloat16"):
        normswap.distil(model.bfloat16(), data=images, **SHORT)
