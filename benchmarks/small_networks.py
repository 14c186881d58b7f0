"""Small networks, trained on the spot: inverted residuals with depthwise convolutions, and deep bottlenecks.

They exist to see whether a method that helps the public ResNet-20 helps others. Trained for seven epochs on the
images of `cifar10/train` with flips and crops, with the ResNet-20 as teacher; about three minutes of a core each.
Some have never had a BatchNorm: with GroupNorm (`-gn`, eight groups) or InstanceNorm (`-in`) from the first step.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InvertedResidual(nn.Module):
    """Sandler et al. 2018, "MobileNetV2"."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * inputs
        self.expand, self.norm1 = nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.project, self.norm3 = nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norm1(self.expand(x)))
        y = self.norm3(self.project(F.relu6(self.norm2(self.depthwise(y)))))
        return x + y if self.residual else y


class Bottleneck(nn.Module):
    """He et al. 2015, "Deep Residual Learning"."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = outputs // 4
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        shortcut = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*([] if same else shortcut))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class Classifier(nn.Module):
    """A strided stem, blocks `(inputs, outputs, stride)`, the mean over positions, a linear layer."""

    def __init__(self, block: type[nn.Module], stem: int, blocks: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        self.body = nn.Sequential(*[block(*sizes) for sizes in blocks])
        self.head = nn.Linear(blocks[-1][1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def depthwise() -> nn.Module:
    """25 norms of 24 to 256 channels."""
    sizes = [(24, 24, 1), (24, 24, 1), (24, 32, 2), (32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1)]
    return Classifier(InvertedResidual, 24, sizes)


def bottleneck() -> nn.Module:
    """46 norms of 16 to 256 channels."""
    sizes = [(32, 64, 1)] + [(64, 64, 1)] * 3 + [(64, 128, 2)] + [(128, 128, 1)] * 4
    return Classifier(Bottleneck, 32, [*sizes, (128, 256, 2)] + [(256, 256, 1)] * 4)


def never_batch(model: nn.Module, norm: str) -> nn.Module:
    """A network that is yet to be trained, with GroupNorm ("gn", eight groups) or InstanceNorm ("in") for BatchNorm."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                groups = 8 if norm == "gn" else child.num_features
                setattr(parent, name, nn.GroupNorm(groups, child.num_features))
    return model


def built(name: str) -> nn.Module:
    """An untrained network: `depthwise`, `bottleneck` or `resnet20`, as it is or with `-gn` or `-in` behind it."""
    from resnet20 import resnet20

    kind, _, norm = name.partition("-")
    model = {"depthwise": depthwise, "bottleneck": bottleneck, "resnet20": resnet20}[kind]()
    return never_batch(model, norm) if norm else model


def trained(build: str, teacher: nn.Module, x: Tensor, y: Tensor, file: Path, epochs: int = 7) -> nn.Module:
    """The network `build`, from `file` if it is there, else trained and kept there."""
    torch.manual_seed(0)
    model = built(build)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    optimizer: torch.optim.Optimizer
    optimizer = torch.optim.SGD(model.parameters(), lr=0.08, momentum=0.9, weight_decay=5e-4, nesterov=True)
    if "-" in build:  # without BN, plain SGD goes nowhere in so few epochs
        epochs, optimizer = 5 * epochs, torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], steps, pct_start=0.1)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            batch = x[part].flip(3) if torch.rand(()) < 0.5 else x[part]
            top, left = torch.randint(0, 9, (2,)).tolist()
            batch = F.pad(batch, (4, 4, 4, 4))[:, :, top : top + 32, left : left + 32]
            with torch.no_grad():
                wanted = (teacher(batch) / 2).softmax(1)
            scores = model(batch)
            soft = F.kl_div((scores / 2).log_softmax(1), wanted, reduction="batchmean")
            loss = 0.3 * F.cross_entropy(scores, y[part]) + 2.8 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model.eval()
