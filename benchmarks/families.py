"""The norm classes of other libraries, as what each is read, and what it converts to; print a table.

    python benchmarks/families.py [--write docs/coverage.md]

A class of a library that is installed here is taken from it, and its version named. The others stand here with the
attributes and the formula that the library's source gives them. `tests/norms/test_families.py` converts every one.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.norms.registry import identify
from normswap.planning.matrix import conversions_of

CHANNELS = 8


@dataclass(frozen=True)
class Family:
    """path: dotted, of the class. read: the norm it is read as, None for none. args: what makes one of 8 channels.
    package: its distribution. stand_in: a class as the library's source has it, where it cannot be installed. note: of
    the table."""

    path: str
    read: str | None
    args: tuple[Any, ...] = (CHANNELS,)
    kwargs: dict[str, Any] = field(default_factory=dict)
    package: str = ""
    stand_in: type[nn.Module] | None = None
    note: str = ""

    @property
    def distribution(self) -> str:
        """What pip calls the library."""
        return self.package or self.path.partition(".")[0]

    def made(self) -> nn.Module:
        """One of it, in eval mode. Raises ImportError where the library is not here and nothing stands for it."""
        module, _, name = self.path.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), name)
        except ImportError:
            if self.stand_in is None:
                raise
            cls = self.stand_in
        made = cls(*self.args, **self.kwargs)
        return made.eval() if isinstance(made, nn.Module) else made

    @property
    def version(self) -> str:
        """Of the library, or that its source was followed."""
        try:
            importlib.import_module(self.path.rpartition(".")[0])
            return metadata.version(self.distribution)
        except (ImportError, metadata.PackageNotFoundError):
            return "its source" if self.stand_in is not None else "not here"


class Vectors(nn.Module):
    """What most layer and RMS norms are: a gamma, mostly a beta, and an eps."""

    def __init__(self, channels: int, eps: float = 1e-5, *, bias: bool = True) -> None:
        super().__init__()
        self.normalized_shape, self.eps = (channels,), eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels)) if bias else None)


class FusedLayerNorm(Vectors):
    """apex, on a CPU."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.elementwise_affine, self.memory_efficient = True, False

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class FusedRMSNorm(Vectors):
    """apex, on a CPU."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, bias=False)
        self.elementwise_affine, self.memory_efficient = True, False

    def forward(self, input: Tensor) -> Tensor:
        return self.weight * input * torch.rsqrt(input.float().pow(2).mean(-1, keepdim=True) + self.eps)


class LayerNorm(Vectors):
    """detectron2 and the reference code of ConvNeXt: over the channels of `(N, C, H, W)`."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        scaled = (x - mean) / torch.sqrt(var + self.eps)
        return self.weight[:, None, None] * scaled + self.bias[:, None, None]


class Fixed(nn.Module):
    """detectron2's FrozenBatchNorm2d."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1 - eps)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Synchronised(nn.BatchNorm2d):
    """detectron2's and pytorchvideo's NaiveSyncBatchNorm on one process."""

    _stats_mode = ""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Splits(nn.BatchNorm2d):
    """lightly's SplitBatchNorm: statistics of each part of a batch, in eval mode those of the first."""

    def __init__(self, num_features: int, num_splits: int) -> None:
        super().__init__(num_features)
        self.num_splits = num_splits
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, getattr(self, name).repeat(num_splits))

    def forward(self, input: Tensor) -> Tensor:
        count, first = self.num_splits, slice(self.num_features)
        if self.training:
            parts, weight, bias = input.view(-1, count * input.shape[1], *input.shape[2:]), self.weight, self.bias
            found = F.batch_norm(
                parts, self.running_mean, self.running_var, weight.repeat(count), bias.repeat(count), True,
                self.momentum, self.eps,
            )  # fmt: skip
            return found.view(input.shape)
        mean, var = self.running_mean[first], self.running_var[first]
        return F.batch_norm(input, mean, var, self.weight, self.bias, False, self.momentum, self.eps)


class OfMmcv(nn.Module):
    """mmcv's SyncBatchNorm, which derives from no norm of torch."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        plain = nn.BatchNorm2d(num_features)
        self.num_features, self.eps, self.momentum = num_features, plain.eps, plain.momentum
        self.affine = self.track_running_stats = True
        self.group, self.group_size = None, 1
        self._parameters.update(plain._parameters)
        self._buffers.update(plain._buffers)

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


def stand_in(like: type[nn.Module], path: str) -> type[nn.Module]:
    """A class of one's own that is called as another library's."""
    module, _, name = path.rpartition(".")
    return type(name, (like,), {"__module__": module, "forward": like.forward})


def _named(path: str, read: str, like: type[nn.Module], args: tuple[Any, ...] = (CHANNELS,)) -> Family:
    return Family(path, read, args, stand_in=stand_in(like, path))


_HF = "transformers.models"
_APEX = "apex.normalization.fused_layer_norm"
_D2 = "detectron2.layers.batch_norm"
FAMILIES = [
    Family("torch.nn.BatchNorm2d", "bn"),
    Family("torch.nn.SyncBatchNorm", "sync"),
    Family("torch.nn.GroupNorm", "gn", (2, CHANNELS)),
    Family("torch.nn.LayerNorm", "ln"),
    Family("torch.nn.RMSNorm", "rms", kwargs={"eps": 1e-5}),
    Family("torch.nn.InstanceNorm2d", "in", kwargs={"affine": True}, note="also MONAI's and nnU-Net's"),
    Family("torchvision.ops.FrozenBatchNorm2d", "frozen"),
    Family("torchvision.models.convnext.LayerNorm2d", "ln-channel"),
    *(
        Family(f"timm.layers.{name}", read, (CHANNELS,))
        for name, read in {
            "BatchNormAct2d": "bn", "SyncBatchNormAct": "sync", "FrozenBatchNormAct2d": "frozen",
            "GroupNorm1": "gn", "LayerNorm": "ln", "LayerNormFp32": "ln",
            "LayerNormAct": "ln", "LayerNorm2d": "ln-channel", "LayerNorm2dFp32": "ln-channel",
            "LayerNormAct2d": "ln-channel", "RmsNorm": "rms", "RmsNormFp32": "rms", "RmsNorm2d": "rms-channel",
            "RmsNorm2dFp32": "rms-channel",
        }.items()
    ),
    Family("timm.layers.norm.LayerNormExp2d", "ln-channel"),
    Family("timm.layers.GroupNorm", "gn", (CHANNELS,), {"num_groups": 2}),
    Family("timm.layers.GroupNormAct", "gn", (CHANNELS,), {"num_groups": 2}),
    Family(f"{_HF}.llama.modeling_llama.LlamaRMSNorm", "rms", note="and some 180 classes like it"),
    Family(f"{_HF}.mistral.modeling_mistral.MistralRMSNorm", "rms"),
    Family(f"{_HF}.qwen2.modeling_qwen2.Qwen2RMSNorm", "rms"),
    Family(f"{_HF}.t5.modeling_t5.T5LayerNorm", "rms"),
    Family(f"{_HF}.cohere.modeling_cohere.CohereLayerNorm", "ln", (), {"hidden_size": CHANNELS}),
    Family(f"{_HF}.convnext.modeling_convnext.ConvNextLayerNorm", "ln-channel",
           kwargs={"data_format": "channels_first"}),
    Family(f"{_HF}.convnext.modeling_convnext.ConvNextLayerNorm", "ln"),
    Family(f"{_HF}.vitdet.modeling_vitdet.VitDetLayerNorm", "ln-channel"),
    Family(f"{_HF}.detr.modeling_detr.DetrFrozenBatchNorm2d", "frozen"),
    Family(f"{_HF}.gemma.modeling_gemma.GemmaRMSNorm", None, note="multiplies by 1 + weight; left as it is"),
    Family(f"{_HF}.qwen3_next.modeling_qwen3_next.Qwen3NextRMSNormGated", None, note="gated; left as it is"),
    Family("inplace_abn.ABN", "bn", package="inplace-abn", note="its activation stays"),
    Family("inplace_abn.InPlaceABN", "bn", package="inplace-abn", note="γ is what it computes with, abs(weight) + eps"),
    Family("inplace_abn.InPlaceABNSync", "sync", package="inplace-abn", note="the same"),
    _named(f"{_APEX}.FusedLayerNorm", "ln", FusedLayerNorm),
    _named(f"{_APEX}.MixedFusedLayerNorm", "ln", FusedLayerNorm),
    _named(f"{_APEX}.FusedRMSNorm", "rms", FusedRMSNorm),
    _named(f"{_APEX}.MixedFusedRMSNorm", "rms", FusedRMSNorm),
    _named(f"{_D2}.FrozenBatchNorm2d", "frozen", Fixed),
    _named(f"{_D2}.NaiveSyncBatchNorm", "sync", Synchronised),
    _named(f"{_D2}.LayerNorm", "ln-channel", LayerNorm),
    _named("pytorchvideo.layers.batch_norm.NaiveSyncBatchNorm2d", "sync", Synchronised),
    _named("mmcv.ops.sync_bn.SyncBatchNorm", "sync", OfMmcv),
    _named("lightly.models.batchnorm.SplitBatchNorm", "bn", Splits, (CHANNELS, 2)),
]  # fmt: skip


def layout_of(family: Family) -> str:
    """Whether it takes images or tokens."""
    module = family.made()
    spec = identify(module)
    return "tokens" if spec is None or spec.read(module).channel_dim == -1 else "images"


def table() -> str:
    """In Markdown."""
    rows = ["| class | read as | exact | close | with images | tested with |", "|---|---|---|---|---|---|"]
    for family in FAMILIES:
        name = f"`{family.path}`" + ("" if "data_format" not in family.kwargs else ", channels first")
        name += f": {family.note}" if family.note else ""
        norm = family.made()
        found, cells = identify(norm), conversions_of(norm)
        told = "not read" if found is None else found.name
        kinds = [", ".join(c.target for c in cells if c.outcome == kind) for kind in ("exact", "close", "needs images")]
        rows.append(f"| {name} | {told} | {' | '.join(kinds)} | {family.distribution} {family.version} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="file whose part between families marks is replaced")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    text = table()
    print(text)
    if options.write:
        begin, end = "<!-- families:begin -->", "<!-- families:end -->"
        page = options.write.read_text("utf-8")
        head, tail = page.partition(begin)[0], page.partition(end)[2]
        options.write.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}", "utf-8")


if __name__ == "__main__":
    main()
