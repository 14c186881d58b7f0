"""`ln` to `rms` by centring what writes to the stream, and gamma and beta taken in by what reads the norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import bits, contents, relative, run
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.conversion.record import record_of
from normswap.errors import PlanError, RevertError
from normswap.norms.rms import ShiftedRMSNorm
from normswap.planning.plan import Plan

C = 8


class Block(nn.Module):
    def __init__(self, scale: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(C), nn.MultiheadAttention(C, 2, batch_first=True)
        self.norm2, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 12, bias=False), nn.Linear(12, C)
        self.scale = nn.Parameter(torch.rand(C) + 0.5) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = self.down(F.gelu(self.up(self.norm2(x))))
        return x + (y if self.scale is None else y * self.scale)


class Transformer(nn.Module):
    """A small pre-norm vision transformer."""

    def __init__(self, scale: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.position = nn.Conv2d(3, C, 2, 2), nn.Parameter(torch.randn(1, 4, C))
        self.blocks = nn.Sequential(Block(scale), Block(scale))
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, 3)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.weight, 1, 0.4)
                nn.init.normal_(module.bias, 0, 0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


X = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(2))


def convert(model: nn.Module, to: str | None = "rms", **options: Any) -> nn.Module:
    return normswap.convert(model, to, example_inputs=X, **options)


@pytest.mark.parametrize("scale", [False, True], ids=["plain", "layer scale"])
@pytest.mark.parametrize("fold", [False, True], ids=["shifted", "folded"])
@pytest.mark.parametrize("to", ["rms", "ln"])
def test_the_outputs_stay_the_same(scale: bool, fold: bool, to: str) -> None:
    net = Transformer(scale).double()
    made = normswap.convert(net, to, example_inputs=X.double(), fold_affine=fold)
    assert relative(run(net, X.double()), run(made, X.double())) < 1e-12
    norms = [m for m in made.modules() if "Norm" in type(m).__name__]
    kind = nn.LayerNorm if to == "ln" else nn.RMSNorm if fold else ShiftedRMSNorm
    assert [type(norm) for norm in norms] == [kind] * 5
    assert all((norm.weight is None) == fold for norm in norms)
    check = record_of(made).check
    assert check.passed
    assert check.error < 1e-10
    assert check.error > 0 or (to == "ln" and not fold)
    assert (check.layers, check.total) == (5, 5)


def test_the_stream_has_no_mean_any_more() -> None:
    made = convert(Transformer())
    seen = []
    made.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run(made, X)
    assert float(seen[0].mean(-1).abs().max()) < 1e-6
    assert float(seen[0].abs().max()) > 0.5


def test_writers_are_the_originals_without_their_mean() -> None:
    net = Transformer(scale=True)
    made = convert(net)
    weight = net.blocks[0].attention.out_proj.weight.double()
    torch.testing.assert_close(
        made.blocks[0].attention.out_proj.weight, (weight - weight.mean(0)).float(), rtol=1e-6, atol=1e-7
    )
    scaled = net.blocks[0].scale.double()[:, None] * net.blocks[0].down.weight.double()
    expected = (scaled - scaled.mean(0)) / net.blocks[0].scale.double()[:, None]
    torch.testing.assert_close(made.blocks[0].down.weight, expected.float(), rtol=1e-6, atol=1e-7)
    assert torch.equal(made.blocks[0].up.weight, net.blocks[0].up.weight)


def test_readers_take_gamma_and_beta_and_get_a_bias_where_they_have_none() -> None:
    net = Transformer()
    made = convert(net, fold_affine=True)
    norm, up = net.blocks[0].norm2, net.blocks[0].up
    torch.testing.assert_close(made.blocks[0].up.weight, up.weight * norm.weight)
    torch.testing.assert_close(made.blocks[0].up.bias, up.weight @ norm.bias)


@pytest.mark.parametrize("fold", [False, True])
def test_the_file_loads_the_same_and_the_original_comes_back_to_the_bit(tmp_path: Path, fold: bool) -> None:
    net = Transformer(scale=True)
    made = convert(net, fold_affine=fold)
    normswap.save(made, tmp_path / "made.safetensors")
    loaded = normswap.load(tmp_path / "made.safetensors", model=Transformer(scale=True))
    assert bits(run(loaded, X)) == bits(run(made, X))
    assert contents(normswap.revert(loaded)) == contents(net)
    assert contents(normswap.revert(made)) == contents(net)


@pytest.mark.parametrize("fold", [False, True])
def test_one_that_was_trained_is_not_taken_for_the_original(fold: bool) -> None:
    made = convert(Transformer(), fold_affine=fold)
    step = 0.1 * torch.randn(C, 12)
    made.blocks[1].down.weight.data += step - step.mean(0)  # the stream stays without a mean
    before = run(made, X)
    with pytest.raises(RevertError, match=r"blocks\.1\.down\.weight"):
        normswap.revert(made)
    made = normswap.revert(made, strict=False)
    assert all(isinstance(m, nn.LayerNorm) for m in made.modules() if "Norm" in type(m).__name__)
    assert relative(before, run(made, X)) < 1e-5


def test_a_plan_says_all_of_it_and_survives_json() -> None:
    made = normswap.plan(Transformer(True), "rms", example_inputs=X, fold_affine=True)
    assert {step.transfer for step in made.steps} == {"centre"}
    assert "blocks.0.scale" in {name for each in made.centred for name in each.scales}
    assert Plan.from_json(made.to_json()) == made
    assert relative(run(convert(Transformer(True)), X), run(convert(Transformer(True), None, using=made), X)) < 1e-5


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Linear(3, C), nn.LayerNorm(C)
        self.second, self.norm2 = nn.Linear(C, C), nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x))
        return self.norm2(x + self.second(x))


def test_a_post_norm_network_is_refused_with_the_node_and_copied_on_request() -> None:
    net, x = PostNorm(), torch.randn(4, 5, 3)
    with pytest.raises(PlanError) as caught:
        normswap.convert(net, "rms", example_inputs=x)
    (problem,) = caught.value.problems
    assert problem.startswith("norm2 (LayerNorm): its input cannot be centred: ")
    assert "native_layer_norm in norm1" in problem
    assert "transfer" in str(caught.value.hint)
    copied = normswap.convert(net, "rms", example_inputs=x, transfer="copy")
    report = normswap.calibrate(copied, net, x, method="moments", progress=False)
    assert report.drift_after < report.drift_before


def test_the_way_out_is_told_though_the_last_layer_could_be_centred() -> None:
    class First(PostNorm):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.end = nn.Linear(C, C), nn.LayerNorm(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(self.last(super().forward(x)))

    with pytest.raises(PlanError) as caught:
        normswap.convert(First(), "rms", example_inputs=torch.randn(4, 5, 3))
    assert len(caught.value.problems) == 1
    assert "transfer" in str(caught.value.hint)


def test_another_layer_s_fast_path_stays_as_its_user_left_it() -> None:
    encoder = nn.TransformerEncoderLayer(C, 2, 16, batch_first=True)
    encoder.activation_relu_or_gelu = 0
    net = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), encoder)
    made = normswap.convert(net, "gn", groups=2, sources=["bn"], check=False)
    assert made[2].activation_relu_or_gelu == 0
    assert normswap.revert(made)[2].activation_relu_or_gelu == 0


def test_one_layer_may_stay_a_layer_norm_in_a_centred_stream() -> None:
    net = Transformer()
    made = convert(net, rules={"blocks.0.norm1": "keep"})
    assert type(made.blocks[0].norm1) is nn.LayerNorm
    assert relative(run(net, X), run(made, X)) < 1e-5


def test_a_layer_scale_with_a_zero_is_refused_by_name() -> None:
    net = Transformer(scale=True)
    net.blocks[1].scale.data[3] = 0
    with pytest.raises(PlanError, match=r"the layer scale blocks\.1\.scale holds 0"):
        convert(net)


def test_another_eps_is_refused() -> None:
    with pytest.raises(PlanError, match="with another eps than its 1e-05"):
        convert(Transformer(), eps=0.1)


def test_the_self_check_notices_a_mean_that_was_left_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from normswap.conversion import parameter_edits

    def lazy(tensor: Tensor, dim: int, scale: Tensor | None = None) -> Tensor:
        return tensor.detach()

    monkeypatch.setattr(parameter_edits, "centred", lazy)
    with pytest.raises(normswap.SelfCheckError):
        convert(Transformer())


def test_the_self_check_notices_a_beta_that_no_reader_took(monkeypatch: pytest.MonkeyPatch) -> None:
    from normswap.conversion import parameter_edits

    taken = parameter_edits._take_in

    def forgetful(model: nn.Module, reader: Any, state: Any) -> None:
        if reader.weight != "head.weight":
            taken(model, reader, state)

    monkeypatch.setattr(parameter_edits, "_take_in", forgetful)
    net = Transformer()
    with pytest.raises(normswap.SelfCheckError, match=r"at \(output\)|at head"):
        convert(net, fold_affine=True)


def test_without_inputs_they_are_guessed_and_where_that_fails_asked_for() -> None:
    class Odd(Transformer):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            assert mask.dtype is torch.bool
            return super().forward(x)

    net, x = Mlp().eval(), torch.randn(2, 4)
    assert relative(run(net, x), run(normswap.convert(net, "rms"), x)) < 1e-5
    with pytest.raises(PlanError, match="give example inputs"):
        normswap.convert(Odd(), "rms")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, C), nn.LayerNorm(C), nn.Linear(C, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_centred_in_float64_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    net = Transformer().to(dtype)
    made = normswap.convert(net, "rms", example_inputs=X.to(dtype), check=False)
    assert made.patch.weight.dtype is dtype
    expected = net.patch.weight.double()
    assert torch.equal(made.patch.weight, (expected - expected.mean(0)).to(dtype))


@pytest.mark.parametrize("fold", [False, True])
def test_verify_compares_no_layer_that_centring_changed_on_purpose(fold: bool) -> None:
    net = Transformer()
    report = normswap.verify(net, convert(net, fold_affine=fold), X)
    assert report.error < 1e-5
    assert report.first_jump is None
    assert "blocks.0.up" in {layer.path for layer in report.layers}
    assert max(layer.error for layer in report.layers) < 1e-5


def test_verify_says_that_outputs_of_nothing_but_0_tell_nothing() -> None:
    net = Transformer()
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    (note,) = normswap.verify(net, convert(net), X).notes
    assert "nothing but 0" in note
    nn.init.ones_(net.head.bias)
    assert normswap.verify(net, convert(net), X).notes == ()


def test_the_plan_tells_that_gamma_and_beta_go_into_readers() -> None:
    told = str(normswap.plan(Transformer(), "rms", example_inputs=X, fold_affine=True))
    assert "exact, centred, γ and β in readers" in told
    assert "in readers" not in str(normswap.plan(Transformer(), "rms", example_inputs=X))


def test_where_channels_come_last_or_second_the_norms_for_it_are_named() -> None:
    with pytest.raises(PlanError) as caught:
        normswap.convert(Transformer(), "gn", example_inputs=X)
    assert "those that come last rms" in str(caught.value.hint)
    with pytest.raises(PlanError) as caught:
        normswap.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "rms")
    assert "ln-channel" in str(caught.value.hint)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
def test_torch_s_fast_path_does_not_pass_the_new_norms_by(fold: bool, depth: int) -> None:
    layer = nn.TransformerEncoderLayer(C, 2, 16, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    net, x = nn.Sequential(nn.Linear(3, C), encoder, nn.LayerNorm(C), nn.Linear(C, 2)).eval(), torch.randn(2, 5, 3)
    made = normswap.convert(net, "rms", example_inputs=x, fold_affine=fold)
    for norm in (m for m in made.modules() if isinstance(m, nn.RMSNorm)):
        norm.weight = nn.Parameter(torch.rand(C) + 0.5)  # as training may leave it
    layers = [m for m in made.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    if not fold:
        layers[0].linear2.bias.data += 1  # and a mean that an RMSNorm sees
    with torch.no_grad():
        fast = made(x)
    torch.testing.assert_close(fast, made(x.requires_grad_()).detach(), atol=1e-5, rtol=1e-4)
    assert [m.activation_relu_or_gelu for m in layers] == [0] * depth
    back = normswap.revert(normswap.convert(net, "rms", example_inputs=x.detach(), fold_affine=fold))
    assert {m.activation_relu_or_gelu for m in back.modules() if isinstance(m, nn.TransformerEncoderLayer)} == {1}


def test_a_post_norm_encoder_with_copied_gammas_computes_the_same_with_and_without_gradients() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, 2, 16, batch_first=True), 2).eval()
    x, mask = torch.randn(2, 5, C), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    made = normswap.convert(net, "rms", transfer="copy", example_inputs=x)
    assert not made.use_nested_tensor
    with torch.no_grad():
        fast = made(x, src_key_padding_mask=mask)
    slow = made(x.requires_grad_(), src_key_padding_mask=mask).detach()
    torch.testing.assert_close(fast[~mask], slow[~mask], atol=1e-5, rtol=1e-4)
    assert normswap.revert(made).use_nested_tensor


class Masked(Transformer):
    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x if mask is None else torch.where(mask[..., None], self.mask_token, x)
        return self.head(self.norm(self.blocks(x + self.position)).mean(1))


def test_a_parameter_that_the_run_did_not_use_is_named() -> None:
    with pytest.warns(UserWarning, match="did not use mask_token"):
        convert(Masked())


def test_a_grouped_convolution_cannot_be_centred() -> None:
    net = Transformer()
    net.patch = nn.Conv2d(4, C, 2, 2, groups=2)
    with pytest.raises(PlanError, match=r"convolution in patch"):
        normswap.convert(net, "rms", example_inputs=torch.randn(2, 4, 4, 4), check=False)


def test_a_reader_s_bias_is_the_one_that_is_added() -> None:
    class Functional(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.norm(self.first(x)), self.last.weight)

    class Shared(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(C, 2)
            self.other.bias = self.last.bias

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.first(x))
            return self.last(x) * self.other(x)

    for net, reason in ((Functional(), "another module than its own"), (Shared(), "share a bias")):
        with pytest.raises(PlanError, match=reason):
            normswap.convert(net.eval(), "rms", example_inputs=torch.randn(2, 4), fold_affine=True, check=False)
