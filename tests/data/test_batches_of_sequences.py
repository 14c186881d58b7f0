"""Batches of sequences: (x, lengths), (x, mask), and labels beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import randomized, relative, run
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.data.batches import as_batches

pytestmark = pytest.mark.filterwarnings("ignore:.* takes statistics over time")  # of how data is read, not of padding

X = torch.randn(12, 4, 10, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([10, 9, 7, 4, 3, 2, 10, 8, 6, 5, 3, 1])
LABELS = torch.arange(12) % 3
VALID = torch.arange(10) < LENGTHS[:, None]


class Sequences(nn.Module):
    """A classifier of sequences: the mean over their steps that count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        counts = torch.full((len(x),), x.shape[2]) if lengths is None else lengths
        valid = (torch.arange(x.shape[2]) < counts[:, None]).to(x)[:, None]
        x = torch.relu(self.norm(self.conv(x))) * valid
        return self.head(x.sum(2) / counts[:, None])


def taking(signature: str) -> nn.Module:
    """A network whose forward has these parameters after x."""
    scope: dict[str, Any] = {}
    exec(f"def forward(self, x, {signature}): return x", scope)
    return type("Net", (nn.Module,), {"forward": scope["forward"]})()


def read(signature: str, *parts: Any, inputs: int | None = None) -> tuple[tuple[Any, ...], Tensor | None]:
    ((args, labels),) = as_batches([parts], network=taking(signature), inputs=inputs)
    return args, labels


@pytest.mark.parametrize("name", ["lengths", "x_lens", "xlens", "input_lengths", "seq_len", "length"])
def test_whole_numbers_go_to_the_optional_argument_of_lengths(name: str) -> None:
    args, labels = read(f"{name}=None", X, LENGTHS)
    assert [a is b for a, b in zip(args, (X, LENGTHS), strict=True)] == [True, True]
    assert labels is None


@pytest.mark.parametrize("signature", ["lengths=None", "lengths=None, hidden=None"])
def test_what_follows_the_lengths_are_labels(signature: str) -> None:
    args, labels = read(signature, X, LENGTHS, LABELS)
    assert args[1] is LENGTHS
    assert torch.equal(labels, LABELS)
    args, labels = read(signature, X, LENGTHS, ["a", "text", "for", "each"])
    assert (len(args), labels) == (2, None)


def test_lengths_may_be_shares() -> None:
    args, _ = read("wav_lens=None", X, LENGTHS / 10)
    assert len(args) == 2


@pytest.mark.parametrize("name", ["mask", "padding_mask", "attention_mask", "src_key_padding_mask"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mask_of_steps_goes_to_the_optional_argument_of_masks(name: str, dtype: torch.dtype) -> None:
    args, labels = read(f"{name}=None", X, VALID.to(dtype), LABELS)
    assert len(args) == 2
    assert torch.equal(labels, LABELS)


def test_several_optional_arguments_that_go_with_x_are_filled_in_their_order() -> None:
    args, labels = read("lengths=None, mask=None", X, LENGTHS, VALID, LABELS)
    assert args[1:] == (LENGTHS, VALID)
    assert torch.equal(labels, LABELS)


@pytest.mark.parametrize(
    "signature",
    [
        "return_features=False",
        "*args",
        "labels=None",
        "target_lengths=None",
        "y=None",
        "max_length=None",
        "wavelengths=None",
        "mask=None",
        "attn_mask=None",
        "hidden=None, lengths=None",
    ],
)
def test_labels_stay_labels(signature: str) -> None:
    args, labels = read(signature, X, LABELS)
    assert len(args) == 1
    assert torch.equal(labels, LABELS)


def test_masks_of_pixels_are_no_masks_of_steps() -> None:
    images, masks = torch.randn(2, 3, 6, 6), torch.zeros(2, 6, 6, dtype=torch.long)
    args, _ = read("attn_mask=None", images, masks)
    assert len(args) == 1
    args, _ = read("attn_mask=None", images, masks, inputs=2)
    assert len(args) == 2


def test_detectors_targets_are_no_argument() -> None:
    images = [torch.rand(3, 8, 8), torch.rand(3, 9, 9)]
    args, labels = read("targets=None", images, [{"boxes": torch.rand(1, 4)}] * 2)
    assert len(args) == 1
    assert labels is None


def test_lists_of_images_stay_such_beside_an_optional_mask() -> None:
    images = [torch.rand(3, 8, 8), torch.rand(3, 8, 8)]
    for batch in (images, [images[0], torch.rand(3, 9, 9)]):
        ((args, _),) = as_batches([batch], network=taking("masks=None"))
        assert len(args) == 1
        assert len(args[0]) == 2
    ((args, _),) = as_batches([images], network=taking("masks=None"), inputs=2)
    assert len(args) == 2


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_arguments_that_look_like_lists_of_images_are_told_by_what_forward_needs(count: int) -> None:
    x, other = X[:count], X[count : 2 * count]
    assert len(read("other", x, other)[0]) == 2
    args, labels = read("other", x, other, LABELS[:count])
    assert (len(args), len(labels)) == (2, count)
    ((args, labels),) = as_batches([((x, other), LABELS[:count])], network=taking("other"))
    assert (len(args), len(labels)) == (2, count)
    assert len(read("mask=None", x, VALID[:count, None])[0]) == 2


def test_as_many_as_the_example_inputs_are_arguments_whatever_they_are_called() -> None:
    speakers = LABELS
    assert len(read("speaker=None", X, speakers)[0]) == 1
    args, labels = read("speaker=None", X, speakers, LABELS, inputs=2)
    assert args[1] is speakers
    assert torch.equal(labels, LABELS)
    assert len(read("labels=None", X, LABELS, inputs=2)[0]) == 1
    assert len(read("mask=None", X, LABELS, inputs=2)[0]) == 1


def test_labels_in_the_place_of_lengths_are_told() -> None:
    with pytest.raises(normswap.DataError, match=r"read as the lengths .* from 0 to 2, which are no lengths") as error:
        read("lengths=None", X, LABELS)
    assert "(x, lengths, y)" in error.value.hint
    with pytest.raises(normswap.DataError, match="from 11 to 22"):
        read("lengths=None", X, LABELS[:12] + torch.arange(11, 23) - LABELS)
    ((args, labels),) = as_batches([{"x": X, "labels": LABELS}], network=Sequences())
    assert len(args) == 1
    assert torch.equal(labels, LABELS)


def test_scripted_networks_are_read_alike() -> None:
    class Small(nn.Module):
        def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
            return x if lengths is None else x[: int(lengths.max())]

    Small.forward.__annotations__.update({"x": Tensor, "lengths": Tensor | None, "return": Tensor})
    with pytest.warns(FutureWarning, match="script"):
        scripted = torch.jit.script(Small())
    ((args, _),) = as_batches([(X, LENGTHS)], network=scripted)
    assert len(args) == 2


def test_calibrating_and_verifying_see_the_lengths() -> None:
    net = randomized(Sequences()).eval()
    made = normswap.convert(net, "gn", groups=2, example_inputs=(X, LENGTHS))
    loader = DataLoader(TensorDataset(X, LENGTHS, LABELS), batch_size=5)
    wanted = run(net, X, LENGTHS)
    before = relative(wanted, run(made, X, LENGTHS))
    assert normswap.verify(net, made, loader).outputs[0].error == pytest.approx(before, rel=1e-3)
    report = normswap.calibrate(made, net, loader, progress=False)
    assert report.accuracy_before is not None
    assert relative(wanted, run(made, X, LENGTHS)) < before


def test_distilling_takes_a_pair_of_tensors_for_both_arguments() -> None:
    class Longer(Sequences):
        def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
            assert lengths is not None, "the lengths were left out"
            return super().forward(x, lengths)

    net = randomized(Longer()).eval()
    made = normswap.convert(net, "gn", groups=2, example_inputs=(X, LENGTHS))
    assert normswap.distil(made, net, (X, LENGTHS), steps=2, batch_size=4, progress=False).steps == 2
    assert normswap.distil(made, net, [(X, LENGTHS)] * 3, steps=2, progress=False).steps == 2


def test_the_number_of_example_inputs_outlives_the_file(tmp_path: Any) -> None:
    class Speakers(Sequences):
        def forward(self, x: Tensor, speaker: Tensor | None = None) -> Tensor:
            assert speaker is not None, "the speaker was left out"
            return super().forward(x + speaker[:, None, None])

    net = randomized(Speakers()).eval()
    made = normswap.convert(net, "gn", groups=2, example_inputs=(X, LABELS))
    normswap.save(made, tmp_path / "made.safetensors")
    made = normswap.load(tmp_path / "made.safetensors", model=Speakers())
    for data in ((X, LABELS), [(X, LABELS, LABELS)]):
        normswap.calibrate(made, net, data, progress=False)
        assert normswap.verify(net, made, data).images == 12
        normswap.distil(made, net, data, steps=1, batch_size=4, progress=False)
