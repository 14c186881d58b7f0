"""What `normswap.advise` says of a network."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap import Advice
from normswap.advice.risks import Risk


def network(width: int = 16) -> nn.Sequential:
    """Two convolutions and their norms, with the statistics of noise."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))
    normswap.estimate_statistics(model, torch.randn(64, 3, 16, 16))
    return model.eval()


def risk(advice: Advice, kind: str) -> Risk | None:
    return next((risk for risk in advice.risks if risk.kind == kind), None)


def test_the_call_that_it_gives_works_when_pasted() -> None:
    model = network()
    scope: dict[str, Any] = {"model": model, "normswap": normswap, "data": torch.randn(32, 3, 16, 16) * 3}
    alone, given = normswap.advise(model), normswap.advise(model, ema=True, data=scope["data"])
    assert "'photos'" in alone.command
    assert "'photos'" not in given.command
    for advice in (alone, given):
        exec(advice.command, scope)
        assert isinstance(scope["converted"][1], nn.GroupNorm)


def test_images_like_those_of_the_training_lead_to_frozen_and_others_to_gn() -> None:
    model = network()
    assert normswap.advise(model, data=torch.randn(64, 3, 16, 16)).norm == "frozen"
    advice = normswap.advise(model, data=5 + 5 * torch.randn(64, 3, 16, 16))
    assert (advice.norm, advice.fit is not None and advice.fit.suits) == ("gn", False)


def test_nothing_of_the_network_changes() -> None:
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    normswap.advise(model, data=torch.randn(8, 3, 16, 16))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_quiet_and_dead_channels_are_counted() -> None:
    model = network()
    norm: Any = model[1]
    norm.running_var[:3] = 1e-5
    norm.running_var[3] = 0.0
    norm.weight.data[4] = 0.0
    advice = normswap.advise(model)
    quiet, dead = risk(advice, "quiet"), risk(advice, "dead")
    assert quiet is not None
    assert dead is not None
    assert quiet.text.startswith("3 of 32 channels")
    assert dead.text.startswith("2 of 32 channels")
    assert quiet.layers == dead.layers == ("1",)


def test_a_sound_network_has_no_risk() -> None:
    assert normswap.advise(network(), example_inputs=torch.randn(1, 3, 16, 16)).risks == ()


def test_statistics_that_were_never_updated_are_told_and_not_folded() -> None:
    model = network()
    for norm in (model[1], model[4]):
        assert isinstance(norm, nn.BatchNorm2d)
        norm.reset_running_stats()
    advice = normswap.advise(model)
    assert risk(advice, "never updated") is not None
    assert advice.transfer == "copy"
    assert advice.drift is None


class MeanOverTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


def test_a_module_that_mixes_the_samples_of_a_batch_is_named() -> None:
    model = network()
    model.insert(3, MeanOverTheBatch())
    assert risk(normswap.advise(model), "coupled") == Risk(
        "coupled", "the samples of a batch influence one another, whatever the norms are", ("3",)
    )
    assert risk(normswap.advise(network()), "coupled") is None


class Preactivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + F.relu(self.norm(x))


def test_layers_that_can_only_be_prescaled_are_named() -> None:
    model = Preactivation()
    normswap.estimate_statistics(model, torch.randn(8, 3, 8, 8))
    found = risk(normswap.advise(model), "prescaled")
    assert found is not None
    assert found.layers == ("norm",)


def test_groups_of_a_single_value_are_frozen_instead_and_the_call_works() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1))
    model.append(nn.BatchNorm2d(8))
    normswap.estimate_statistics(model, torch.randn(8, 3, 8, 8))
    advice = normswap.advise(model, task="style")
    assert advice.options["rules"] == {"4": "frozen"}
    scope: dict[str, Any] = {"model": model, "normswap": normswap}
    exec(advice.command, scope)
    assert isinstance(scope["converted"][1], nn.InstanceNorm2d)


def test_few_values_of_a_group_are_told() -> None:
    found = risk(normswap.advise(network(), example_inputs=torch.randn(1, 3, 6, 6)), "few values")
    assert found is None
    small = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
    normswap.estimate_statistics(small, torch.randn(8, 3, 3, 3))
    found = risk(normswap.advise(small, example_inputs=torch.randn(1, 3, 3, 3)), "few values")
    assert found is not None
    assert "groups of 16 values" in found.text


def test_more_groups_are_expected_to_move_the_outputs_further() -> None:
    advice = normswap.advise(network(32), example_inputs=torch.randn(1, 3, 16, 16))
    drift = list(advice.drift_by_groups.values())
    assert list(advice.drift_by_groups) == [1, 2, 4, 8, 16, 32]
    assert drift[0] < drift[3] < drift[5]


def test_the_expected_drift_of_data_that_is_noise_is_the_drift_that_it_shows() -> None:
    from normswap.calibration.stand_ins import noise

    model = network(32)
    x = noise(64, torch.randn(2, 3, 16, 16), 1)
    normswap.estimate_statistics(model, x)
    expected = normswap.advise(model, example_inputs=x[:1]).drift_by_groups[4]
    with torch.no_grad():
        out, moved = model(x), normswap.convert(model, "gn", groups=4, eps=1.0)(x)
    sizes = [float((each - out.mean(0)).square().sum()) for each in (out, moved)]
    drift = float((moved - out).norm()) / (sum(sizes) / 2) ** 0.5
    assert expected == pytest.approx(drift, rel=0.25)


def test_a_swap_that_computes_the_same_is_expected_to_move_nothing() -> None:
    advice = normswap.advise(network(), inference=True)
    assert (advice.norm, advice.transfer, advice.drift) == ("fused", "exact", 0.0)


def test_where_the_norm_is_there_already_there_is_nothing_to_convert() -> None:
    advice = normswap.advise(network(), batch_size=32)
    assert (advice.norm, advice.transfer, advice.command) == ("bn", "keep", "")
    assert "nothing to convert" in str(advice)


def test_unknown_norms_are_kept() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = network()
    model.insert(5, Odd(16))
    advice = normswap.advise(model)
    assert advice.options["rules"] == {"5": "keep"}
    assert risk(advice, "unknown") is not None


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1)), "no norm layer at all"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "its norms are ln"),
    ],
)
def test_a_network_without_batchnorm_is_told(model: nn.Module, what: str) -> None:
    with pytest.raises(normswap.NetworkError, match=what):
        normswap.advise(model)


def test_a_network_of_words_has_an_expected_drift_too() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv, self.norm = nn.Embedding(16, 8), nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(self.embed(x).movedim(1, 2))).amax(2)

    model = Words()
    normswap.estimate_statistics(model, torch.randint(0, 16, (8, 12)))
    drift = normswap.advise(model).drift
    assert drift is not None
    assert 0 < drift < 2


class Masked(nn.Module):
    """Convolutions along time, masked, and the mean of the steps: `(N, 8, T)` and lengths -> `(N, 3)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.arange(x.shape[2]) < lengths[:, None]
        x = torch.relu(self.norm(self.conv(x))) * mask[:, None]
        return self.head(x.sum(2) / lengths[:, None])


@pytest.mark.parametrize("given", [True, False])
def test_the_norm_advised_for_sequences_leaves_padding_out(given: bool) -> None:
    torch.manual_seed(0)
    model, x, lengths = Masked().eval(), torch.randn(2, 8, 6), torch.tensor([4, 6])
    normswap.estimate_statistics(model, [(torch.randn(4, 8, 6), torch.full((4,), 6))])
    advice = normswap.advise(model, task="sequence", example_inputs=(x, lengths) if given else None)
    assert advice.norm == "ln-channel"
    new = normswap.convert(model, **advice.options, example_inputs=(x, lengths))
    with torch.no_grad():
        assert torch.allclose(new(x, lengths)[:1], new(x[:1, :, :4], lengths[:1]), atol=1e-6)


def test_for_sequences_of_vectors_layernorm_is_advised() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    normswap.estimate_statistics(model, torch.randn(16, 8))
    assert normswap.advise(model, task="sequence").norm == "ln"


def test_the_advice_goes_to_json() -> None:
    advice = normswap.advise(network(), federated=True)
    values = json.loads(json.dumps(advice.to_dict()))
    assert values["norm"] == "gn"
    assert values["drift_by_groups"]["1"] == pytest.approx(advice.drift_by_groups[1])
