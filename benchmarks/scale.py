"""What a training step costs on 8 to 1,024 GPUs, by arithmetic from networks that are built without values; two tables.

    python benchmarks/scale.py [--write docs/scale.md]

Counted are parameters, norms and channels of networks on the meta device; nothing is run. docs/scale.md has the
formulas and where they come from.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import normswap
from normswap.planning.plan import Transfer

GPUS = (8, 64, 256, 1024)
FLOAT = 4  # bytes
GIB, MIB = 2**30, 2**20
MARKS = ("<!-- scale:begin -->", "<!-- scale:end -->")


class Pair(nn.Sequential):
    """Two 3x3x3 convolutions with batch norms."""

    def __init__(self, inputs: int, middle: int, outputs: int) -> None:
        layers: list[nn.Module] = []
        for i, o in ((inputs, middle), (middle, outputs)):
            layers += [nn.Conv3d(i, o, 3), nn.BatchNorm3d(o), nn.ReLU()]
        super().__init__(*layers)


class UNet3d(nn.Module):
    """3D U-Net (Çiçek et al. 2016, figure 2): 19,069,955 parameters, as the paper counts, and the batch norms'."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([Pair(3, 32, 64), Pair(64, 64, 128), Pair(128, 128, 256), Pair(256, 256, 512)])
        self.up = nn.ModuleList(nn.ConvTranspose3d(c, c, 2, 2, bias=False) for c in (512, 256, 128))
        self.join = nn.ModuleList([Pair(768, 256, 256), Pair(384, 128, 128), Pair(192, 64, 64)])
        self.last = nn.Conv3d(64, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 3, D, H, W)` to `(N, 3, D - 88, H - 88, W - 88)`."""
        kept = []
        for pair in self.down[:-1]:
            x = pair(x)
            kept.append(x)
            x = nn.functional.max_pool3d(x, 2)
        x = self.down[-1](x)
        for up, join, beside in zip(self.up, self.join, reversed(kept), strict=True):
            x = up(x)
            cut = [slice((a - b) // 2, (a - b) // 2 + b) for a, b in zip(beside.shape[2:], x.shape[2:], strict=True)]
            x = join(torch.cat((beside[(..., *cut)], x), 1))
        return self.last(x)


@dataclass(frozen=True)
class Counted:
    """One network: its parameters, those of the largest group that FSDP gathers at once, its batch norms and their
    channels, and the weights that a conversion folds into."""

    name: str
    parameters: int
    group: int
    norms: int
    channels: int
    folded: int

    def undo(self) -> int:
        """Bytes of the undo record, on the host of each process: two bits a folded weight, six vectors a norm."""
        return self.folded // 4 + 6 * FLOAT * self.channels

    def replicated(self) -> int:
        """Bytes on each GPU under DDP: parameters, gradients, DDP's buckets, and AdamW's two moments."""
        return 5 * FLOAT * self.parameters

    def sharded(self, gpus: int) -> float:
        """Bytes on each under FSDP2: shares of parameters, gradients and moments; two groups, one's gradients."""
        return 4 * FLOAT * self.parameters / gpus + 3 * FLOAT * self.group

    def all_reduce(self, gpus: int) -> float:
        """Bytes that each sends in a step under DDP: the gradients, once around a ring and back."""
        return 2 * (gpus - 1) / gpus * FLOAT * self.parameters

    def gathers(self, gpus: int) -> float:
        """The same under FSDP2: parameters gathered twice, gradients scattered once."""
        return 3 * (gpus - 1) / gpus * FLOAT * self.parameters

    def synced(self, gpus: int) -> float:
        """Bytes that each receives for SyncBatchNorm in a step: 2C + 1 numbers of each other GPU, and an all-reduce."""
        forward = (gpus - 1) * FLOAT * (2 * self.channels + self.norms)
        return forward + 2 * (gpus - 1) / gpus * FLOAT * 2 * self.channels


def networks() -> Iterator[tuple[str, Callable[[], nn.Module], str]]:
    """Name, how it is built, and the class of the blocks that FSDP gathers."""
    import timm
    import torchvision

    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn_v2
    yield "ResNet-50", lambda: torchvision.models.resnet50(weights=None), "Bottleneck"
    yield "Faster R-CNN R50-FPN v2", lambda: detector(weights=None, weights_backbone=None), "Bottleneck"
    yield "3D U-Net", UNet3d, "Pair"
    yield "RegNetY-256GF", lambda: timm.create_model("regnety_2560"), "Bottleneck"


def counted(name: str, build: Callable[[], nn.Module], block: str) -> Counted:
    """A network's numbers, of one that has no values."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = build()
    size = {m: sum(p.numel() for p in m.parameters()) for m in network.modules() if type(m).__name__ == block}
    total = sum(p.numel() for p in network.parameters())
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    steps = normswap.plan(network, to="gn", groups=1).steps
    producers = {path for step in steps if step.transfer is Transfer.FOLD for path in step.producers}
    return Counted(
        name, total, max([total - sum(size.values()), *size.values()]), len(norms),
        sum(norm.num_features for norm in norms), sum(network.get_submodule(p).weight.numel() for p in producers),
    )  # fmt: skip


def tables(found: list[Counted]) -> str:
    """Both as Markdown."""
    lines = ["| network | parameters | BatchNorms | their channels | largest group | undo record, host |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for c in found:
        sizes = f"{c.parameters / 1e6:,.1f} M | {c.norms} | {c.channels:,} | {c.group / 1e6:,.1f} M"
        lines.append(f"| {c.name} | {sizes} | {c.undo() / MIB:,.1f} MiB |")
    head = "| network | GPUs | memory, DDP | memory, FSDP2 | sent a step, DDP | sent a step, FSDP2 "
    lines += ["", head + "| SyncBN: collectives | SyncBN: received a step | GN |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for c in found:
        for gpus in GPUS:
            memory = f"{c.replicated() / GIB:,.2f} GiB | {c.sharded(gpus) / GIB:,.2f} GiB"
            wire = f"{c.all_reduce(gpus) / MIB:,.0f} MiB | {c.gathers(gpus) / MIB:,.0f} MiB"
            norms = f"{2 * c.norms} | {c.synced(gpus) / MIB:,.1f} MiB | 0"
            lines.append(f"| {c.name} | {gpus:,} | {memory} | {wire} | {norms} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="file whose part between scale marks is replaced")
    options = parser.parse_args()
    made = tables([counted(*each) for each in networks()])
    print(made)
    if options.write:
        text = options.write.read_text("utf-8")
        before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
        options.write.write_text(f"{before}{MARKS[0]}\n\n{made}\n\n{MARKS[1]}{after}", "utf-8")


if __name__ == "__main__":
    main()
