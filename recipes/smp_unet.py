"""Convert, calibrate and fine-tune a U-Net of segmentation_models_pytorch at batch size 2: BatchNorm and GroupNorm.

Goal:      a trained U-Net with a ResNet encoder goes on with GroupNorm; on other images, two at a time
Command:   python recipes/smp_unet.py [--weights unet.pth]; needs pip install segmentation-models-pytorch
Time:      about 1 minute on one CPU core
Expected:  mean IoU before: BatchNorm 0.412, GroupNorm 0.392 as converted and 0.409 calibrated; on other images, after
           200 steps at batch size 2: BatchNorm 0.463, GroupNorm 0.499
"""

import argparse
import copy
import warnings
from pathlib import Path

import torch

import normswap
from normswap.data import shapes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    import segmentation_models_pytorch as smp

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--weights", type=Path, help="state dict of the network below; else it is trained first")
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--groups", type=int, default=4, help="of each GroupNorm layer")
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
options = parser.parse_args()
pretraining, steps, count = (2, 2, 8) if options.tiny else (150, options.steps, 400)
SIZE = 64  # pixels of an image's side
LR = 1e-3
CLASSES = 4  # background, circle, square, triangle
torch.manual_seed(0)


def drawn(count, seed):
    """Coloured shapes on textured noise: images `(N, 3, H, W)` and their labels `(N, H, W)`."""
    images, labels = torch.empty(count, 3, SIZE, SIZE), torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    for i, (image, target) in enumerate(shapes(count, SIZE, seed=seed)):
        images[i] = image
        for mask, label in zip(target["masks"], target["labels"], strict=True):
            labels[i, mask.bool()] = label
    return images, labels


def trained(network, images, labels, batch_size, steps):
    """The same network, trained with Dice and cross entropy."""
    dice = smp.losses.DiceLoss("multiclass")
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    network.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch_size,))
        scores = network(images[chosen])
        loss = dice(scores, labels[chosen]) + torch.nn.functional.cross_entropy(scores, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def mean_iou(network, images, labels):
    """Intersection over union, over all pixels of a class, and of the classes the mean."""
    found = torch.cat([network.eval()(part).argmax(1) for part in images.split(16)])
    counts = smp.metrics.get_stats(found, labels, mode="multiclass", num_classes=CLASSES)
    return smp.metrics.iou_score(*(count.sum(0, keepdim=True) for count in counts), reduction="macro").item()


images, labels = drawn(count, 0)
test_images, test_labels = drawn(count // 4, 1)
bn = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(64, 32, 16), classes=CLASSES)
if options.weights:
    bn.load_state_dict(torch.load(options.weights, weights_only=True))
else:
    trained(bn, images, labels, 8, pretraining)
bn.eval()
# --- The part to copy begins here. ---
gn = normswap.convert(bn, to="gn", groups=options.groups)
print(f"as converted: mean IoU {mean_iou(gn, test_images, test_labels):.4f}")
normswap.calibrate(gn, reference=bn, data=images[:64], progress=False)

# Other images: with their colours inverted and less contrast.
other, other_test = 0.9 - 0.6 * images, 0.9 - 0.6 * test_images
for name, network in (("BatchNorm", bn), ("GroupNorm", gn)):
    torch.manual_seed(0)
    before = mean_iou(network, test_images, test_labels)
    tuned = copy.deepcopy(network)
    with normswap.stabilized(tuned):  # the learning rates of the original network suit the converted one
        trained(tuned, other, labels, options.batch_size, steps)
        # --- The part to copy ends here. ---
    print(
        f"{name}: mean IoU {before:.4f} before, on other images {mean_iou(network, other_test, test_labels):.4f}, "
        f"and {mean_iou(tuned, other_test, test_labels):.4f} after {steps} steps at batch size {options.batch_size}"
    )
