"""From a network to a detector's backbone: which of its feature maps to take, and a feature pyramid on top of them."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import Conv2dNormActivation
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork

from ..conversion.composite import extracted_record
from ..conversion.record import attach, record_of
from ..errors import NetworkError, first_line
from ..modules.restore import evaluating, undisturbed
from ..modules.tree import device_and_dtype

NormLayer = Callable[[int], nn.Module]
_SIZES = (128, 224, 256, 320)  # of a probing image; some networks take one size only, or none so small
_COARSEST = 32
_LAYER = re.compile(r"layer[1-4]")
_ACCEPTED = (
    "backbone takes a classifier with layer1 ... layer4 (ResNet and its kin) or with `features`, "
    "timm.create_model(NAME, features_only=True), or a module whose forward gives a dict, list or tuple of maps "
    "(N, C, H, W); one with a dict and `out_channels` is taken as it is."
)


@dataclass(frozen=True)
class Level:
    """One feature map: its name, channels, and how many pixels of the image a step in it is."""

    name: str
    channels: int
    stride: int


class ChosenMaps(nn.Module):
    """A network that gives several feature maps; its forward gives those at `places`, named "0", "1", ..."""

    def __init__(self, network: nn.Module, places: Sequence[int]) -> None:
        super().__init__()
        self.network, self.places = network, tuple(places)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = list((_maps_in(self.network(x)) or {}).values())
        return OrderedDict((str(i), maps[place]) for i, place in enumerate(self.places))


class PyramidBackbone(nn.Module):
    """`body` and `fpn`, under torchvision's names; images `(N, 3, H, W)` to a dict of maps of `out_channels`."""

    def __init__(
        self, body: nn.Module, levels: Sequence[Level], norm_layer: NormLayer | None, extra: ExtraFPNBlock,
        out_channels: int = 256,
    ) -> None:  # fmt: skip
        super().__init__()
        self.body, self.out_channels = body, out_channels
        channels = [level.channels for level in levels]
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks=extra, norm_layer=norm_layer)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(self.body(x))
        return maps


class ShrinkingBackbone(nn.Module):
    """`body`, and `extra` blocks that halve its last map again and again (Liu et al. 2016, "SSD", section 2.1).

    Images `(N, 3, H, W)` to a dict of maps of different channels: those of the body, then of `width` channels each,
    until a map of an image of side `size` is 2 wide.
    """

    def __init__(
        self, body: nn.Module, levels: Sequence[Level], norm_layer: NormLayer | None, width: int, size: int
    ) -> None:
        super().__init__()
        self.body = body
        channels, stride, narrow = levels[-1].channels, levels[-1].stride, max(1, width // 2)
        self.extra = nn.ModuleList()
        while -(-size // stride) > 2:
            self.extra.append(
                nn.Sequential(
                    Conv2dNormActivation(channels, narrow, kernel_size=1, norm_layer=norm_layer),
                    Conv2dNormActivation(narrow, width, kernel_size=3, stride=2, norm_layer=norm_layer),
                )
            )
            channels, stride = width, stride * 2

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.body(x)
        for block in self.extra:
            maps[str(len(maps))] = block(next(reversed(maps.values())))
        return maps


def is_complete(backbone: nn.Module) -> bool:
    """Whether it is what torchvision's detectors take: a dict of maps that all have `out_channels` channels."""
    if not isinstance(getattr(backbone, "out_channels", None), int):
        return False
    output = _run(backbone)[1]
    return isinstance(output, Mapping) and bool(_maps_in(output))


def levels_of(backbone: nn.Module) -> tuple[Level, ...]:
    """The feature maps that a module's forward gives. Raises OptionError, saying what is accepted, if it gives none."""
    size, output = _run(backbone)
    maps = _maps_in(output)
    if not maps:
        raise NetworkError(f"{type(backbone).__name__} gives no feature maps", hint=_ACCEPTED)
    levels = tuple(Level(name, m.shape[1], size // m.shape[2]) for name, m in maps.items() if min(m.shape[2:]))
    for name, found in maps.items():
        if found.shape[2] != found.shape[3]:
            raise NetworkError(
                f"map {name} of {type(backbone).__name__} is {tuple(found.shape)} for a square image",
                hint="Its channels may be last; maps must be (N, C, H, W).",
            )
    return levels


def body_of(backbone: nn.Module, finest: int) -> tuple[nn.Module, tuple[Level, ...]]:
    """A module that gives a dict of maps, and the maps: those of stride `finest` to 32, the deepest of each stride.

    The modules are the backbone's own, not copies. Raises OptionError for what gives no such maps.
    """
    output = _run(backbone)[1]
    if _maps_in(output):
        levels = levels_of(backbone)
        places = _deepest([level.stride for level in levels], finest)
        body: nn.Module = ChosenMaps(backbone, places)
    else:
        stages = _stages_of(backbone)
        names = list(stages)
        places = _deepest(list(stages.values()), finest)
        chosen = {names[place]: str(i) for i, place in enumerate(places)}
        body = _up_to(backbone, chosen) if places else backbone
    if not places:
        raise NetworkError(f"{type(backbone).__name__} gives no map of stride {finest} to {_COARSEST}", hint=_ACCEPTED)
    return body, levels_of(body)


def _up_to(backbone: nn.Module, chosen: dict[str, str]) -> nn.Module:
    """The children of its sequence that the chosen maps need, and what a conversion of them has on record."""
    sequence = _sequence_in(backbone)
    body = IntermediateLayerGetter(sequence, return_layers=chosen)
    record = record_of(backbone)
    if record is not None:
        prefix = next(f"{name}." if name else "" for name, m in backbone.named_modules() if m is sequence)
        attach(body, extracted_record(record, prefix, {name for name, _ in body.named_modules()}))
    return body


def stages_of(body: nn.Module) -> dict[nn.Module, int]:
    """The stage of each child of a backbone's body that gives a map; lists of children are opened.

    0 is the stem; 1 to 4 are layer1 to layer4, where they have these names (dilated ones do not differ in stride), else
    what ends at stride 4, 8, 16, and 32 or more.
    """
    network = body.network if isinstance(body, ChosenMaps) else body
    if "layer1" in network._modules:
        names = list(network._modules)
        stem = dict.fromkeys(names[: names.index("layer1")], 0)
        stages = stem | {name: int(name[5:]) for name in names if _LAYER.fullmatch(name)}
        return {network.get_submodule(name): stage for name, stage in stages.items()}
    strides = _strides(list(_opened(network)), lambda: _run(network))
    return {child: min(max(stride.bit_length() - 2, 0), 4) for child, stride in strides.items()}


def _opened(network: nn.Module) -> Iterator[nn.Module]:
    for child in network.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            yield from _opened(child)
        else:
            yield child


# --- looking ------------------------------------------------------------------------------------------------------


def _run(network: nn.Module) -> tuple[int, Any]:
    """The size of a square image that the network runs on, and what it gives for it."""
    device, dtype = device_and_dtype(network)
    failure = ""
    for size in _SIZES:
        try:
            with evaluating(network), undisturbed(network), torch.no_grad():
                return size, network(torch.zeros(1, 3, size, size, device=device, dtype=dtype))
        except Exception as error:  # a stranger's forward on a size it may not take
            failure = failure or f"{type(error).__name__}: {first_line(error)}"
    raise NetworkError(f"{type(network).__name__} does not run on an image (1, 3, H, W) ({failure})", hint=_ACCEPTED)


def _maps_in(output: Any) -> dict[str, Tensor] | None:
    """Feature maps by name, if an output consists of them: a dict, a list or tuple, or transformers' BackboneOutput."""
    output = getattr(output, "feature_maps", output)
    if isinstance(output, (list, tuple)):
        output = {str(i): item for i, item in enumerate(output)}
    if not isinstance(output, Mapping):
        return None
    return dict(output) if all(isinstance(m, Tensor) and m.dim() == 4 for m in output.values()) else None


def _sequence_in(network: nn.Module) -> nn.Module:
    """The module whose children run one after the other, from the image on."""
    if isinstance(network, nn.Sequential) or "layer1" in network._modules:
        return network
    features = network._modules.get("features")
    if isinstance(features, nn.Sequential):
        return features
    raise NetworkError(f"the stages of {type(network).__name__} are not known", hint=_ACCEPTED)


def _stages_of(network: nn.Module) -> dict[str, int]:
    """The stride behind each child of the network's sequence."""
    children = dict(_sequence_in(network).named_children())
    strides = _strides(list(children.values()), lambda: _run(network))
    return {name: strides[child] for name, child in children.items() if child in strides}


def _strides(modules: Iterable[nn.Module], run: Callable[[], tuple[int, Any]]) -> dict[nn.Module, int]:
    extents: dict[nn.Module, int] = {}

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor) and out.dim() == 4 and out.shape[2] > 1:  # 1 is a pooled map
            extents[module] = out.shape[2]

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        size = run()[0]
    finally:
        for handle in handles:
            handle.remove()
    return {module: size // extent for module, extent in extents.items()}


def _deepest(strides: Sequence[int], finest: int) -> list[int]:
    """The place of the last map of each stride from `finest` to 32."""
    last = {stride: place for place, stride in enumerate(strides) if finest <= stride <= _COARSEST}
    return [last[stride] for stride in sorted(last)]
