"""Paint photographs in the style of others: InstanceNorm becomes AdaIN, and the network learns to take styles.

Goal:      arbitrary style transfer (Huang and Belongie 2017); convert `in` to `adain`, train, write a PNG
Command:   python recipes/style_transfer.py [--steps 400 --pictures FOLDER]
Time:      about 60 s on one CPU core
Expected:  distance of a painted picture's statistics from its style's, the photograph's own being 1: 0.264; correlation
           of its edges with the photograph's: 0.916; style_transfer.png, three photographs with the colour, light and
           contrast of four styles (brush strokes would take a larger network)
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import normswap

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--pictures", type=Path, default=Path(normswap.data.__file__).parent / "photographs")
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--output", type=Path, default=Path("style_transfer.png"))
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
options = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(0)
STEPS, SIDE = (4, 48) if options.tiny else (options.steps, 160)


def opened(file: Path) -> Tensor:
    """`(3, H, W)` in [0, 1], the shorter side `SIDE`."""
    picture = Image.open(file).convert("RGB")
    scale = SIDE / min(picture.size)
    picture = picture.resize([max(SIDE, round(side * scale)) for side in picture.size], Image.Resampling.BILINEAR)
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, 3).permute(2, 0, 1) / 255


def crops(count: int, side: int) -> Tensor:
    """Random ones `(count, 3, side, side)`."""
    found = []
    for i in torch.randint(len(pictures), (count,)).tolist():
        top, left = (int(torch.randint(n - side + 1, ())) for n in pictures[i].shape[1:])
        found.append(pictures[i][:, top : top + side, left : left + side])
    return torch.stack(found)


pictures = [opened(file) for file in sorted(options.pictures.glob("*.jpg"))]


class Painter(nn.Sequential):
    """`(N, 3, H, W)` -> the same, through a quarter of the resolution; InstanceNorm within."""

    def __init__(self, width: int = 24) -> None:
        def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, 3, stride, 1, padding_mode="reflect")
            return [conv, nn.InstanceNorm2d(outputs, affine=True), nn.LeakyReLU(0.1)]

        up = nn.Upsample(scale_factor=2)
        super().__init__(
            *block(3, width), *block(width, 2 * width, 2), *block(2 * width, 2 * width, 2),
            *block(2 * width, 2 * width), up, *block(2 * width, width), up, *block(width, width),
            nn.Conv2d(width, 3, 3, padding=1), nn.Sigmoid(),
        )  # fmt: skip


class Statistics(nn.Module):
    """Fixed random filters at three scales: their Gram matrices tell styles apart (Ustyuzhaninov et al. 2016)."""

    def __init__(self, seed: int, channels: int = 24) -> None:
        super().__init__()
        weight = torch.randn(channels, 3 * 49, generator=torch.Generator().manual_seed(seed))
        weight = nn.functional.normalize(weight, dim=1).view(channels, 3, 7, 7)
        self.register_buffer("weight", weight)

    def features(self, x: Tensor) -> list[Tensor]:
        scales = [F.avg_pool2d(x, 2**i) if i else x for i in range(3)]
        return [F.conv2d(scale - 0.5, self.weight, stride=2).relu() for scale in scales]

    def forward(self, x: Tensor) -> Tensor:
        """`(N, 3, H, W)` -> `(N, K)`."""
        parts = [x.mean((2, 3)), x.std((2, 3))]
        for f in self.features(x):
            f = f.flatten(2)
            parts.append((f @ f.mT / f.shape[2] + 1e-4).flatten(1).sqrt())
        return torch.cat(parts, 1)


def edges(x: Tensor) -> Tensor:
    """What is where, whatever its colour and contrast: luminance in its surroundings, normalised."""
    grey = F.avg_pool2d(x.mean(1, keepdim=True), 2)
    return F.instance_norm(grey - F.avg_pool2d(grey, 9, 1, 4))


def train(model: nn.Module, steps: int, loss_of) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


# A network of InstanceNorm that copies what it sees, as far as it can: the norm takes contrast and colour out.
def copying(model: nn.Module) -> Tensor:
    x = crops(6, 48)
    return F.mse_loss(model(x), x)


model = Painter()
train(model, max(STEPS // 10, 2), copying)
model.eval()
# --- The part to copy begins here. ---
adain = normswap.convert(model, to="adain", example_inputs=crops(1, 48))
with torch.no_grad():
    x = crops(4, 48)
    print(f"without a style it does what it did: {float((adain(x) - model(x)).abs().max()):.0e} apart")

judge = Statistics(seed=1)


# It learns to copy what is in its own style, and to give the style of another: the two runs of `styled`.
def painting(model: nn.Module) -> Tensor:
    content, style = crops(4, 48), crops(4, 48)
    with normswap.styled(model, content):
        copied = model(content)
    with normswap.styled(model, style):
        painted = model(content)
    likeness = F.mse_loss(judge(painted), judge(style))
    return 5 * F.mse_loss(copied, content) + 10 * likeness + 0.07 * F.mse_loss(edges(painted), edges(content))


train(adain, STEPS, painting)
# --- The part to copy ends here. ---

# Photographs down, styles across; the statistics that judge are others than those that it was trained on.
names = [file.stem for file in sorted(options.pictures.glob("*.jpg"))]
shown, painters = ("astronaut", "chelsea", "rocket"), ("retina", "coffee", "grass", "hubble")
chosen = [pictures[names.index(name) if name in names else i] for i, name in enumerate(shown)]
styles = [pictures[names.index(name) if name in names else -i] for i, name in enumerate(painters)]
other = Statistics(seed=2)
rows, far, before, alike = [], [], [], []
with torch.no_grad():
    square = [x[None, :, :SIDE, :SIDE] for x in (*chosen, *styles)]
    contents, styles = square[: len(chosen)], square[len(chosen) :]
    rows.append(torch.cat([torch.ones(1, 3, SIDE, SIDE), *styles], 3))
    for content in contents:
        row = [content]
        for style in styles:
            with normswap.styled(adain, style):
                row.append(adain(content).clamp(0, 1))
            far.append(float(F.mse_loss(other(row[-1]), other(style)).sqrt()))
            before.append(float(F.mse_loss(other(content), other(style)).sqrt()))
            alike.append(float((edges(row[-1]) * edges(content)).mean()))
        rows.append(torch.cat(row, 3))
print(f"distance of the statistics from the style's, the photograph's own being 1: {sum(far) / sum(before):.4f}")
print(f"correlation of its edges with the photograph's: {sum(alike) / len(alike):.4f}")
sheet = (torch.cat(rows, 2)[0].permute(1, 2, 0) * 255).round().byte()
Image.fromarray(sheet.numpy()).save(options.output)
print(f"painted: {options.output}")
