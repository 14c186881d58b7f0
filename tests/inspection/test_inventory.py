"""What is found, what is suspected, and what is left alone."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch.nn.functional as anything
from helpers import Net, X, bn_eval, conv_bn, fingerprint, look, paths_of, randomized, relative
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import batch_norm as renamed
from torch.nn.utils import parametrize

import normswap
from normswap.errors import NormswapError
from normswap.inspection.inventory import inspect
from normswap.norms.registry import identify, why_suspicious


def names(net: nn.Module) -> dict[str, str]:
    return {layer.path: layer.spec.name for layer in inspect(net, feeds=False).layers}


def reasons(net: nn.Module, x: Tensor | None = None) -> dict[str, str]:
    return {suspect.path: suspect.reason for suspect in inspect(net, x).suspects}


# --- norms that are known ---------------------------------------------------------------------------------------

KNOWN = {
    "bn": [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), nn.BatchNorm2d(4, affine=False)],
    "sync": [nn.SyncBatchNorm(4)],
    "gn": [nn.GroupNorm(2, 4)],
    "ln": [nn.LayerNorm(4)],
    "in": [nn.InstanceNorm1d(4), nn.InstanceNorm2d(4, affine=True), nn.InstanceNorm3d(4, track_running_stats=True)],
}


@pytest.mark.parametrize("name", KNOWN)
def test_torchs_norms_are_known(name: str) -> None:
    for module in KNOWN[name]:
        assert identify(module).name == name
        assert identify(module).read(module).channels == 4


@pytest.mark.parametrize(
    ("layer", "name", "tail"),
    [
        ("BatchNormAct2d", "bn", ["act"]),
        ("SyncBatchNormAct", "sync", []),
        ("FrozenBatchNormAct2d", "frozen", ["act"]),
        ("GroupNormAct", "gn", ["act"]),
        ("GroupNorm1Act", "gn", ["act"]),
        ("GroupNorm", "gn", []),
        ("GroupNorm1", "gn", []),
        ("LayerNormAct", "ln", ["act"]),
        ("LayerNormAct2d", "ln-channel", ["act"]),
        ("LayerNorm", "ln", []),
        ("LayerNorm2d", "ln-channel", []),
    ],
)
def test_timms_norms_are_known_with_the_activation_fused_into_them(layer: str, name: str, tail: list[str]) -> None:
    import timm.layers
    from timm.layers import norm_act

    cls = getattr(timm.layers, layer, None) or getattr(norm_act, layer)
    module = cls(8, num_groups=4) if layer in ("GroupNormAct", "GroupNorm") else cls(8)
    spec = identify(module)
    assert spec is not None
    assert spec.name == name
    state = spec.read(module)
    assert state.channels == 8
    assert list(state.tail) == tail


def test_torchvisions_layer_norm_and_frozen_norm_are_known() -> None:
    from torchvision.models.convnext import LayerNorm2d
    from torchvision.ops import FrozenBatchNorm2d

    assert names(nn.Sequential(LayerNorm2d(4), FrozenBatchNorm2d(4))) == {"0": "ln-channel", "1": "frozen"}


def test_transformers_frozen_norm_is_known_with_the_eps_of_its_formula() -> None:
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")
    module = randomized(detr.DetrFrozenBatchNorm2d(4))
    spec = identify(module)
    assert spec.name == "frozen"
    state = spec.read(module)
    assert state.eps == 1e-5
    x = torch.randn(2, 4, 3, 3)
    module.eps = state.eps  # it has no such attribute; the formula here reads one
    assert relative(bn_eval(module, x), module(x)) < 1e-6


class Detectron2Frozen(nn.Module):
    """detectron2's layout: buffers only, the formula through F.batch_norm when no gradient is wanted."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0 - eps)):
            self.register_buffer(name, torch.full((num_features,), value))
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps)


class FrozenOfDeviation(Detectron2Frozen):
    """The same buffers, but running_var holds a standard deviation."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean.view(1, -1, 1, 1)) / self.running_var.view(1, -1, 1, 1)


def test_a_frozen_norm_of_any_library_is_known_by_its_buffers_and_its_formula() -> None:
    module = randomized(Detectron2Frozen(4))
    assert identify(module).name == "frozen"
    assert why_suspicious(module) is None
    assert reasons(nn.Sequential(module)) == {}


def test_a_look_alike_with_another_formula_is_suspected() -> None:
    module = randomized(FrozenOfDeviation(4))
    assert identify(module) is None
    assert reasons(nn.Sequential(module)) == {
        "0": "FrozenOfDeviation has running statistics, but normswap does not know its formula"
    }


def test_recognising_a_frozen_norm_runs_no_hook_and_changes_no_flag() -> None:
    timm = pytest.importorskip("timm.layers.norm_act")
    module = timm.FrozenBatchNormAct2d(4).train()
    module.act.eval()
    module.register_forward_hook(lambda *a: pytest.fail("a probe ran the hook"))
    before = fingerprint(module)
    assert identify(module).name == "frozen"
    assert fingerprint(module) == before


def test_a_subclass_that_keeps_the_forward_is_known() -> None:
    class Mine(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, eps=1e-3)

    (layer,) = inspect(nn.Sequential(Mine(4))).layers
    assert (layer.spec.name, layer.class_name, layer.state.eps) == ("bn", "Mine", 1e-3)


def test_a_parametrized_norm_is_known_by_the_class_it_had() -> None:
    bn = nn.BatchNorm2d(4)
    parametrize.register_parametrization(bn, "weight", nn.Softplus())
    (layer,) = inspect(nn.Sequential(bn)).layers
    assert (layer.spec.name, layer.class_name) == ("bn", "BatchNorm2d")


# --- suspects ---------------------------------------------------------------------------------------------------


class Centred(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 1)


class LookAlike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x / self.running_var.view(1, -1, 1, 1)


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stats = nn.Parameter(torch.ones(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.stats[0], self.stats[1])


class ByFullName(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(x, self.stats[0], self.stats[1])


class ByModuleAlias(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return anything.batch_norm(x, self.stats[0], self.stats[1])


class ByFunctionAlias(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return renamed(x, self.stats[0], self.stats[1])


class ByTorch(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(x, None, None, *self.stats, False, 0.1, 1e-5, False)


class ByLocalImport(Direct):
    def forward(self, x: Tensor) -> Tensor:
        from torch.nn import functional

        return functional.batch_norm(x, self.stats[0], self.stats[1])


class ByHelper(Direct):
    def normalized(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.stats[0], self.stats[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x)


class Inherited(Direct):
    pass


@pytest.mark.parametrize(
    "case", [Direct, ByFullName, ByModuleAlias, ByFunctionAlias, ByTorch, ByLocalImport, ByHelper, Inherited]
)
def test_a_functional_batch_norm_in_a_modules_code_is_suspected(case: type[nn.Module]) -> None:
    found = reasons(nn.Sequential(nn.BatchNorm2d(3), case()))
    assert found == {"1": "its code calls a functional batch norm, which no module swap can reach"}


def somewhere(x: Tensor) -> Tensor:
    return F.batch_norm(x, torch.zeros(3), torch.ones(3))


class ByFreeFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(somewhere(x))


@pytest.mark.parametrize("mode", ["symbolic", "recorded"])
def test_a_functional_batch_norm_that_a_free_function_runs_is_suspected(mode: str) -> None:
    (suspect,) = look(ByFreeFunction(), mode).suspects
    assert suspect.reason == "a functional batch norm runs in it, which no module swap can reach"


def test_subclasses_with_another_forward_and_unknown_statistics_are_suspected() -> None:
    net = nn.Sequential(Centred(4), LookAlike(), nn.BatchNorm2d(4))
    assert reasons(net) == {
        "0": "Centred overrides the forward of a norm class that normswap knows",
        "1": "LookAlike has running statistics, but normswap does not know its formula",
    }
    assert paths_of(inspect(net).layers) == ["2"]


@pytest.mark.parametrize(
    ("names_of", "shape", "found"),
    [
        (("ra_mean", "ra_var"), (4,), True),
        (("moving_mean", "moving_variance"), (4,), True),
        (("mean_ema", "var_ema"), (1, 4, 1, 1), True),
        (("running_mean", "running_std"), (4,), True),
        (("mean", "std"), (1, 3, 1, 1), False),
        (("mean", "var"), (4, 4), False),
        (("meaning", "varing"), (4,), False),
    ],
)
@pytest.mark.parametrize("as_parameters", [False, True])
def test_what_may_be_mean_and_variance_of_channels_is_suspected(
    names_of: tuple[str, str], shape: tuple[int, ...], found: bool, as_parameters: bool
) -> None:
    module = nn.Module()
    for name in names_of:
        if as_parameters:
            module.register_parameter(name, nn.Parameter(torch.ones(shape), requires_grad=False))
        else:
            module.register_buffer(name, torch.ones(shape))
    reason = f"Module holds {' and '.join(names_of)}, and normswap does not know its formula"
    assert reasons(nn.Sequential(module, nn.BatchNorm2d(4))) == ({"0": reason} if found else {})


def test_a_norm_in_a_closure_is_not_converted_behind_its_back() -> None:
    net = nn.Sequential(conv_bn(), nn.ReLU())
    norm = net[0][1]
    net[1].forward = lambda x: norm(x)
    assert inspect(net)["0.1"].held_by == ("1.forward",)
    with pytest.raises(NormswapError, match=r"1\.forward holds it too"):
        normswap.plan(net, "gn", groups=2)


def test_a_forward_put_on_the_instance_is_suspected() -> None:
    net = conv_bn()
    original = net[1].forward
    net[1].forward = lambda x: original(x) * 2
    assert reasons(net) == {"1": "its forward was replaced on the instance, so what it computes is not known"}
    assert inspect(net).layers == ()


@pytest.mark.parametrize("lazy", [nn.LazyBatchNorm2d(), nn.LazyConv2d(8, 1), nn.LazyBatchNorm1d(affine=False)])
def test_a_lazy_layer_has_to_run_first(lazy: nn.Module) -> None:
    net = nn.Sequential(lazy, nn.BatchNorm2d(8))
    assert reasons(net) == {"0": "it is not initialised: run one forward pass first, then convert"}
    assert reasons(net, X) == {"0": "it is not initialised: run one forward pass first, then convert"}
    assert type(net[0]) is type(lazy)  # still: looking did not initialise it
    assert type(net[0]).__name__.startswith("Lazy")


def test_a_lazy_norm_that_has_run_is_a_plain_one() -> None:
    net = nn.Sequential(nn.LazyBatchNorm2d())
    net(X)
    assert names(net) == {"0": "bn"}
    assert reasons(net) == {}


def test_every_suspect_is_listed_at_once() -> None:
    net = nn.Sequential(Centred(4), LookAlike(), Direct(), nn.LazyBatchNorm2d(), nn.BatchNorm2d(4))
    assert list(reasons(net)) == ["0", "1", "2", "3"]


# --- what is no suspect -----------------------------------------------------------------------------------------


class OwnBatchNormChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.batch_norm(x)


class BatchNormOfElements(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(OwnBatchNormChild() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.batch_norm(x)
        return x


class OtherNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class WeightStandardized(nn.Conv2d):
    """As timm's StdConv2d: the batch norm is of the weight, and no activation goes through it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


@pytest.mark.parametrize("mode", ["symbolic", "recorded"])
@pytest.mark.parametrize(
    "net",
    [
        OwnBatchNormChild(),
        BatchNormOfElements(),
        OtherNorm(1, 3),
        nn.Sequential(WeightStandardized(3, 4, 1), nn.BatchNorm2d(4)),
    ],
    ids=["child", "children", "other norm", "weight standardization"],
)
def test_this_is_no_suspect(net: nn.Module, mode: str) -> None:
    assert look(net, mode).suspects == ()


# --- the inventory ----------------------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.BatchNorm2d(3)
        self.b = nn.Sequential(self.a, nn.BatchNorm2d(3))
        self.c = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_a_shared_norm_is_one_layer_with_all_its_names() -> None:
    found = inspect(Shared())
    assert [(layer.path, layer.aliases) for layer in found.layers] == [("a", ("b.0", "c")), ("b.1", ())]
    assert found["c"] is found["b.0"] is found["a"]
    with pytest.raises(KeyError):
        found["d"]


def test_a_network_without_norms_has_an_empty_inventory() -> None:
    found = inspect(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    assert (found.layers, found.suspects, str(found)) == ((), (), "no norm layer")


def test_layers_come_in_traversal_order() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.GroupNorm(1, 3), nn.ModuleDict({"x": nn.LayerNorm(3)})))
    assert paths_of(inspect(net, feeds=False).layers) == ["0", "1.0", "1.1.x"]


@pytest.mark.parametrize(
    ("prepare", "mode"),
    [
        (lambda bn: bn.train(), "train"),
        (lambda bn: bn.eval(), "eval"),
        (lambda bn: bn.eval().requires_grad_(False), "frozen"),
        (lambda bn: bn.train().requires_grad_(False), "train"),
    ],
)
def test_the_mode_says_whether_anything_in_the_layer_moves(prepare: object, mode: str) -> None:
    net = nn.Sequential(nn.BatchNorm2d(3))
    prepare(net[0])
    assert inspect(net)["0"].mode == mode


def test_the_inventory_is_json_and_two_tables() -> None:
    net = nn.Sequential(conv_bn(), Centred(8))
    found = inspect(net)
    values = json.loads(json.dumps(found.to_dict()))
    assert [layer["path"] for layer in values["layers"]] == ["0.1"]
    assert values["layers"][0]["channels"] == 8
    assert values["layers"][0]["feed"]["producers"] == ["0.0"]
    assert [suspect["path"] for suspect in values["suspects"]] == ["1"]
    assert [line.split()[0] for line in str(found).split("\n") if line] == ["layer", "0.1", "module", "1"]


def test_looking_changes_nothing() -> None:
    net = nn.Sequential(conv_bn(), nn.Dropout(), Centred(8)).train()
    before = fingerprint(net)
    inspect(net)
    inspect(net, X)
    assert fingerprint(net) == before


def test_a_layer_held_in_a_plain_attribute_says_where() -> None:
    net = nn.Sequential(conv_bn(), nn.ReLU())
    net[1].listed, net.mine = [net[0][1]], {"a": net[0][1]}
    assert inspect(net)["0.1"].held_by == ("mine", "1.listed")
    assert inspect(conv_bn())["1"].held_by == ()


def test_a_scripted_network_is_one_clear_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(conv_bn())
    assert reasons(nn.Sequential(scripted, nn.BatchNorm2d(8))) == {
        "0.1": "a scripted module cannot be changed: convert the original, then script it"
    }


def test_what_is_no_module_is_named() -> None:
    with pytest.raises(NormswapError, match=r"expected a torch\.nn\.Module, got str"):
        inspect("resnet50")
