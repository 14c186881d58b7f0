"""Small BN networks of many kinds, trained on the spot: what helps one network is to help networks never seen.

    python benchmarks/trained_kinds.py --data ../shared/data [--kinds spectrogram denoiser ...]

Trains what is not in build/trained_kinds yet, a minute or two of a core each, and prints each network's own
figure: accuracy, mean IoU, or for the denoiser the gain in PSNR over the noisy image as a share of 10 dB. All data but
the photographs of the denoiser is drawn by this script, from fixed seeds.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.data.synthetic_shapes import semantic_mask, shapes

Data = tuple[Tensor, Tensor]
Figure = Callable[[nn.Module, Tensor, Tensor], float]


# --- networks -------------------------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dims: int = 2, act: bool = True) -> nn.Sequential:
    layers, norms = {1: nn.Conv1d, 2: nn.Conv2d}, {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
    layer = layers[dims](inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, norms[dims](outputs), *([nn.ReLU()] if act else []))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1, dims: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(inputs, outputs, 3, stride, dims), conv(outputs, outputs, 3, 1, dims, act=False))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride, dims, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Classifier(nn.Module):
    """A stem, residual blocks, the mean over positions, a linear layer; `heads` answers of `classes` each."""

    def __init__(self, inputs: int, widths: tuple[int, ...], classes: int, heads: int = 1, dims: int = 2) -> None:
        super().__init__()
        self.stem = conv(inputs, widths[0], 3 if dims == 2 else 15, 2 if dims == 2 else 4, dims)
        blocks = [Residual(a, b, 1 if a == b else 2, dims) for a, b in itertools.pairwise(widths)]
        self.blocks = nn.Sequential(*blocks)
        self.heads, self.dims = heads, dims
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        if self.heads == 1:
            return self.head(x.flatten(2).mean(2))
        columns = F.adaptive_avg_pool2d(x, (1, self.heads)).squeeze(2)
        return self.head(columns.movedim(1, 2)).movedim(1, 2)  # (N, classes, heads)


class Text(nn.Module):
    """Kim 2014, deeper: tokens, an embedding, convolutions along the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.body = nn.Sequential(
            conv(16, 48, 5, dims=1), Residual(48, 48, dims=1), Residual(48, 96, 2, dims=1), Residual(96, 96, dims=1)
        )
        self.head = nn.Linear(96, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x).movedim(1, 2)).amax(2))


class Denoiser(nn.Module):
    """Zhang et al. 2017, "Beyond a Gaussian Denoiser" (DnCNN), with 7 layers of 24 channels."""

    def __init__(self) -> None:
        super().__init__()
        first = [nn.Conv2d(1, 24, 3, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*first, *[conv(24, 24) for _ in range(5)], nn.Conv2d(24, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.body(x)


class Segmenter(nn.Module):
    """Ronneberger et al. 2015 (U-Net), two levels deep."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Sequential(conv(3, 16), conv(16, 16)), nn.Sequential(conv(16, 32), conv(32, 32))
        self.three = nn.Sequential(conv(32, 64), conv(64, 64), conv(64, 64))
        self.up2, self.up1 = conv(96, 32), conv(48, 16)
        self.out = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool2d(one, 2))
        deep = self.three(F.max_pool2d(two, 2))
        two = self.up2(torch.cat([F.interpolate(deep, scale_factor=2.0), two], 1))
        return self.out(self.up1(torch.cat([F.interpolate(two, scale_factor=2.0), one], 1)))


# --- data -----------------------------------------------------------------------------------------------------------


def waves(count: int, seed: int, length: int = 4096) -> Data:
    """Eight kinds of sound in noise: tones, chords, chirps up and down, vibrato, tremolo, clicks, band noise."""
    g = torch.Generator().manual_seed(seed)
    t = torch.arange(length) / length
    y = torch.randint(0, 8, (count,), generator=g)
    u = torch.rand(count, 6, generator=g)
    out = torch.empty(count, length)
    for i, kind in enumerate(y.tolist()):
        a, b, c, d, e, _ = u[i].tolist()
        pitch, phase = 40 + 400 * a, 6.283 * (t * (40 + 400 * a) + b)
        sweep = t * (1 - 2 * (kind == 3)) * (100 + 300 * c) * t / 2
        wobble = (6.283 * t * (4 + 8 * d)).sin()
        phase = phase + 6.283 * [0, 0, sweep, sweep + t * 300, (0.3 + 0.5 * c) * wobble, 0, 0, 0][kind]
        out[i] = phase.sin()
        if kind == 1:
            out[i] += (phase * 1.25).sin() + (phase * 1.5).sin()
        elif kind == 5:
            out[i] *= 1 + (6.283 * t * (4 + 12 * d)).sin()
        elif kind == 6:
            out[i] = 4 * (torch.rand(length, generator=g) < 0.004).float() * (0.5 + c)
        elif kind == 7:
            out[i] = 2 * torch.randn(length, generator=g) * (6.283 * t * pitch).sin()
        out[i] = out[i] * (0.3 + e) + 0.4 * torch.randn(length, generator=g)
    return out.unsqueeze(1), y


def spectrograms(count: int, seed: int) -> Data:
    """Log power, 64 bands x 64 frames, standardised over the set as audio pipelines do."""
    x, y = waves(count, seed)
    power = torch.stft(x.squeeze(1), 128, 64, window=torch.hann_window(128), return_complex=True).abs().square()
    return (power[:, :64, :64].add(1e-4).log().unsqueeze(1) - 1.5) / 2.5, y


def tokens(count: int, seed: int) -> Data:
    """Texts of 128 letters from eight sources that differ in which letter follows which."""
    sources = torch.randn(8, 32, 32, generator=torch.Generator().manual_seed(7)).softmax(2)
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 8, (count,), generator=g)
    x = torch.randint(0, 32, (count, 128), generator=g)
    for i in range(1, 128):
        x[:, i] = torch.multinomial(sources[y, x[:, i - 1]], 1, generator=g).squeeze(1)
    return x, y


def plates(count: int, seed: int) -> Data:
    """Four digits on a light plate, tilted, blurred and noisy: `(N, 1, 24, 64)` in [0, 1], labels `(N, 4)`."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 10, (count, 4), generator=g)
    u = torch.rand(count, 5, generator=g).tolist()
    out = torch.empty(count, 1, 24, 64)
    fonts = [ImageFont.load_default(size=15 + i) for i in range(4)]
    for i, (a, b, c, d, e) in enumerate(u):
        image = Image.new("L", (64, 24), int(150 + 100 * a))
        draw = ImageDraw.Draw(image)
        for j, digit in enumerate(y[i].tolist()):
            draw.text((4 + 15 * j + 2 * c, 1 + 3 * d), str(digit), fill=int(90 * e), font=fonts[int(4 * b)])
        image = image.rotate(10 * (c - 0.5), fillcolor=int(200 * a))
        out[i, 0] = torch.tensor(list(image.tobytes())).view(24, 64) / 255
    return (out + 0.1 * torch.randn(out.shape, generator=g)).clamp(0, 1), y


def slices(count: int, seed: int) -> Data:
    """Like CT: a body of ellipses `(N, 1, 64, 64)`, air at -1, with no, a bright, a dark or a ring lesion."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (count,), generator=g)
    r, q = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    out = torch.full((count, 64, 64), -1.0)

    def ellipse(x0: float, y0: float, a: float, b: float) -> Tensor:
        return ((q - x0) / a) ** 2 + ((r - y0) / b) ** 2

    for i, kind in enumerate(y.tolist()):
        u = torch.rand(20, generator=g).tolist()
        body = ellipse(0, 0, 0.75 + 0.2 * u[0], 0.6 + 0.2 * u[1])
        out[i][body < 1] = 0.0
        out[i][(body > 0.85) & (body < 1)] = -0.3  # fat
        for j in range(3):
            organ = ellipse(u[2 + 3 * j] - 0.5, 0.8 * u[3 + 3 * j] - 0.4, 0.1 + 0.2 * u[4 + 3 * j], 0.15)
            out[i][organ < 1] = 0.15 + 0.2 * u[11 + j]
        out[i][ellipse(0, 0.45, 0.1, 0.1) < 1] = 1.0  # bone
        lesion = ellipse(0.8 * u[14] - 0.4, 0.6 * u[15] - 0.3, 0.09 + 0.05 * u[16], 0.09 + 0.05 * u[16])
        if kind == 3:
            out[i][(lesion < 1) & (lesion > 0.3)] = 0.6
        elif kind:
            out[i][lesion < 1] = 0.65 if kind == 1 else -0.5
    return (out + 0.12 * torch.randn(out.shape, generator=g)).unsqueeze(1), y


def coloured(count: int, seed: int) -> Data:
    """Shapes and their masks; values (x - 0.5) / 0.25."""
    drawn = shapes(count, 64, seed=seed)
    pairs = [drawn[i] for i in range(count)]
    x = torch.stack([image for image, _ in pairs])
    return (x - 0.5) / 0.25, torch.stack([semantic_mask(target, 64).long() for _, target in pairs])


def noisy(count: int, seed: int, folder: Path) -> Data:
    """Grey crops `(N, 1, 32, 32)` of photographs with noise of deviation 25 / 255, and the clean ones."""
    files = sorted(folder.glob("*/*.jpg"))
    g = torch.Generator().manual_seed(seed)
    pictures = [Image.open(f).convert("L").resize((160, 160)) for f in files]
    whole = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).view(160, 160) for p in pictures])
    at = torch.randint(0, 128, (count, 2), generator=g).tolist()
    clean = torch.stack([whole[i % len(whole), a : a + 32, b : b + 32] for i, (a, b) in enumerate(at)])
    clean = clean.unsqueeze(1) / 255
    return clean + 25 / 255 * torch.randn(clean.shape, generator=g), clean


# --- kinds ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(100)])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((outputs(model, x).argmax(1) == y).float().mean())


def mean_iou(model: nn.Module, x: Tensor, y: Tensor) -> float:
    found = outputs(model, x).argmax(1)
    ious = [((found == c) & (y == c)).sum() / ((found == c) | (y == c)).sum() for c in range(1, 4)]
    return float(sum(ious)) / 3


def psnr_gain(model: nn.Module, x: Tensor, y: Tensor) -> float:
    errors = [(other - y).square().mean((1, 2, 3)) for other in (x, outputs(model, x))]
    return float((errors[0] / errors[1]).log10().mean())


@dataclass(frozen=True)
class Kind:
    """data: `(count, seed) -> (inputs, wanted)`; loss and figure of outputs."""

    build: Callable[[], nn.Module]
    data: Callable[[int, int], Data]
    figure: Figure = accuracy
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    train: int = 2000
    epochs: int = 6


def kinds(folder: Path) -> dict[str, Kind]:
    wide = (16, 32, 32, 64, 64)
    return {
        "spectrogram": Kind(lambda: Classifier(1, wide, 8), spectrograms),
        "audio": Kind(lambda: Classifier(1, (32, 32, 64, 64), 8, dims=1), waves),
        "text": Kind(Text, tokens, epochs=6),
        "plates": Kind(lambda: Classifier(1, wide, 10, heads=4), plates, epochs=10),
        "slices": Kind(lambda: Classifier(1, (16, 16, 32, 32, 64), 4), slices, epochs=8),
        "segmenter": Kind(Segmenter, coloured, mean_iou, train=600, epochs=10),
        "denoiser": Kind(
            Denoiser,
            lambda n, s: noisy(n, s, folder / "imagenet" / ("test" if s else "calibrate")),
            psnr_gain,
            F.mse_loss,
        ),
    }


def trained(name: str, kind: Kind, file: Path) -> nn.Module:
    """From `file` if it is there, else trained and kept there."""
    torch.manual_seed(0)
    model = kind.build()
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    x, y = kind.data(kind.train, 0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    steps = kind.epochs * math.ceil(len(x) / 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps, pct_start=0.2)
    for _ in range(kind.epochs):
        for part in torch.randperm(len(x)).split(32):
            loss = kind.loss(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+")
    options = parser.parse_args()
    known = kinds(options.data)
    for name in options.kinds or known:
        model = trained(name, known[name], Path(f"build/trained_kinds/{name}.pt"))
        print(f"{name}: {known[name].figure(model, *known[name].data(400, 1)):.3f}", flush=True)


if __name__ == "__main__":
    main()
