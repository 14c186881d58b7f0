"""How many of its boxes a detector keeps when its norms are swapped: calibrated on 8 images, and then distilled.

    python benchmarks/kept_boxes.py [--depthwise] [--to gn] [--groups 8] [--calibrate 8] [--method refit] [--steps 300]

A small Faster R-CNN with BatchNorm (small_detector.py) is trained on coloured shapes at batch size 8, then converted.
Prints the F1 of the converted detector's boxes against the original's on 200 held-out images: boxes with a score above
0.7, of the same label, at IoU 0.5, each matched once, the surest first; and the mAP of each. Calibration and
distillation see images without labels.
"""

from __future__ import annotations

import argparse

import torch
from small_detector import SIZE, small_detector
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

import normswap
from normswap.data import shapes

SURE = 0.7
Found = list[dict[str, Tensor]]


@torch.no_grad()
def boxes(model: nn.Module, data: object) -> Found:
    """What the network finds in each image."""
    model.eval()
    return [model([data[i][0]])[0] for i in range(len(data))]  # type: ignore[arg-type, index]


def f1(ours: Found, theirs: Found) -> float:
    """Of the sure boxes of `ours`, found again among those of `theirs`."""
    matched = total = 0
    for a, b in zip(ours, theirs, strict=True):
        kept = [{k: v[one["scores"] > SURE] for k, v in one.items()} for one in (a, b)]
        overlap = box_iou(kept[1]["boxes"], kept[0]["boxes"])
        overlap[kept[1]["labels"][:, None] != kept[0]["labels"][None]] = 0
        for row in overlap:  # scores fall
            if len(row) and row.max() >= 0.5:
                matched += 1
                overlap[:, row.argmax()] = 0
        total += sum(len(one["scores"]) for one in kept)
    return 2 * matched / max(total, 1)


def mean_precision(found: Found, data: object) -> float:
    metric = MeanAveragePrecision()
    metric.update(found, [{k: data[i][1][k] for k in ("boxes", "labels")} for i in range(len(found))])  # type: ignore[index]
    return float(metric.compute()["map"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depthwise", action="store_true", help="a backbone of depthwise convolutions")
    parser.add_argument("--to", default="gn")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--training", type=int, default=300, help="steps of the original, 8 images each")
    parser.add_argument("--calibrate", type=int, default=8)
    parser.add_argument("--method", default="balance", help="of calibrate")
    parser.add_argument("--steps", type=int, default=300, help="of distillation")
    parser.add_argument("--batch-size", type=int, default=4, help="of distillation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    original = small_detector("bn", depthwise=options.depthwise)
    training, held_out = shapes(1000, SIZE, seed=0), shapes(200, SIZE, seed=1)
    normswap.finetune(
        original, training, task="detection", steps=options.training, batch_size=8, lr=1e-3, device="cpu"
    )  # fmt: skip
    original.eval()
    reference = boxes(original, held_out)
    print(f"original: mAP {mean_precision(reference, held_out):.3f}", flush=True)
    converted = normswap.convert(original, to=options.to, **({"groups": options.groups} if options.to == "gn" else {}))
    report(converted, "converted", reference, held_out)
    unlabelled = [[training[i][0]] for i in range(len(training))]
    normswap.calibrate(converted, original, unlabelled[: options.calibrate], method=options.method)
    report(converted, f"calibrated on {options.calibrate} images", reference, held_out)
    starts = range(0, len(training), options.batch_size)
    batches = [[image for [image] in unlabelled[i : i + options.batch_size]] for i in starts]
    normswap.distil(converted, original, batches, steps=options.steps)
    report(converted, f"distilled for {options.steps} steps", reference, held_out)


def report(model: nn.Module, what: str, reference: Found, held_out: object) -> None:
    found = boxes(model, held_out)
    print(f"{what}: F1 {f1(reference, found):.3f}, mAP {mean_precision(found, held_out):.3f}", flush=True)


if __name__ == "__main__":
    main()
