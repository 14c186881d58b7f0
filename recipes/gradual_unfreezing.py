"""Fine-tune a BatchNorm network at batch size 2 by unfreezing it gradually: its head first, its first layer last.

Goal:      a new head learns first, so that it does not wreck what the layers before it know; statistics stay frozen
Command:   python recipes/gradual_unfreezing.py [--data FOLDER --network FILE.py:FUNCTION --weights FILE]
Time:      about 20 s on one CPU core for the digits, 2 minutes for 4,000 images of CIFAR-10
Expected:  no gain to count on. Five pairs of digits from 60 images: accuracy 0.938 all at once, 0.968 gradually (other
           seeds: 0.977 and 0.980, 0.948 and 0.943); ResNet-20 with a new head, 4,000 images: 0.779 and 0.777
"""

import argparse
import copy
import runpy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import normswap
from normswap.demo import digits
from normswap.demo.network import pretrained

BATCH_SIZE = 2
LR = 2e-4
CLIP = 1.0
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of the images that the network learned from

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, help="folder with train/CLASS/* and val/CLASS/* or test/CLASS/*")
parser.add_argument("--network", help="FILE.py:FUNCTION that builds the network, for --data")
parser.add_argument("--weights", type=Path, help="its state dict")
parser.add_argument("--size", type=int, default=224, help="of the images in --data, in pixels")
parser.add_argument("--steps", type=int, help="default: one pass over the images in --data, or 600")
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
options = parser.parse_args()
if len({bool(given) for given in (options.data, options.network, options.weights)}) > 1:
    parser.error("--data, --network and --weights go together")
if options.data:
    if not Path(options.network.rpartition(":")[0]).is_file():
        parser.error(f"--network {options.network} is not FILE.py:FUNCTION with a file that is there")
    if not options.weights.is_file():
        parser.error(f"--weights {options.weights} is not there")
    if not ((options.data / "train").is_dir() and any((options.data / part).is_dir() for part in ("val", "test"))):
        parser.error(f"--data {options.data} has no folder train, or neither val nor test beside it")
device = "cuda" if torch.cuda.is_available() else "cpu"

# The data, as two sets of (image, label), and a BatchNorm network that is trained on something like it.
if options.data:
    resize = [v2.Resize(options.size), v2.CenterCrop(options.size)]
    scale = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    held = next(part for part in (options.data / "val", options.data / "test") if part.is_dir())
    training = ImageFolder(options.data / "train", v2.Compose([*resize, v2.RandomHorizontalFlip(), *scale]))
    held_out = ImageFolder(held, v2.Compose([*resize, *scale]))
    file, function = options.network.rsplit(":", 1)
    network = runpy.run_path(file)[function]()
    state = torch.load(options.weights, map_location="cpu", weights_only=True)
    state = {name.removeprefix("module."): value for name, value in state.get("state_dict", state).items()}
    network.load_state_dict(state)
    classes, passes = len(training.classes), 1
else:  # handwritten digits in five pairs (0 and 1, 2 and 3, ...), learned from few
    torch.set_num_threads(1)  # images of 8x8 pixels are too small to share
    training, held_out = (TensorDataset(part.images, part.labels // 2) for part in digits.split())
    training = torch.utils.data.Subset(training, range(60))
    network = pretrained()
    classes, passes = 5, 20
if options.tiny:
    held_out = torch.utils.data.Subset(held_out, range(0, len(held_out), max(1, len(held_out) // 20)))
# From the head, which is new and has all to learn, to the first layer.
stages = [name for name, child in reversed(list(network.named_children())) if any(True for _ in child.parameters())]
head = network.get_submodule(stages[0])
torch.manual_seed(0)
setattr(network, stages[0], torch.nn.Linear(head.in_features, classes))
network = network.to(device)
steps = 3 if options.tiny else options.steps or passes * len(training) // BATCH_SIZE


@torch.no_grad()
def accuracy(network):
    network.eval()
    right = [(network(x.to(device)).argmax(1).cpu() == y).float() for x, y in DataLoader(held_out, 100)]
    return torch.cat(right).mean().item()


print(f"{len(training)} training images, {len(held_out)} held out; with the new head: accuracy {accuracy(network):.4f}")
with_norms = {layer.path.split(".")[0] for layer in normswap.inspect(network).layers}
for name in ("all at once", "gradually"):
    model = copy.deepcopy(network)
    # --- The part to copy begins here. ---
    normswap.freeze(model, affine=name == "gradually")  # the statistics in both; γ and β until their stage's turn
    if name == "gradually":
        model.requires_grad_(False)

    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)  # passes over what requires no gradient
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # As many images as there are steps to take, in one random order after another.
    loader = DataLoader(training, BATCH_SIZE, sampler=RandomSampler(training, num_samples=steps * BATCH_SIZE))
    waiting = list(stages) if name == "gradually" else []
    for step, (images, labels) in enumerate(loader):
        # The stages begin one after the other, evenly over the first half.
        while waiting and step >= (len(stages) - len(waiting)) * steps / 2 / len(stages):
            stage = waiting.pop(0)
            if stage in with_norms:
                normswap.unfreeze(model, stage, stats=False)
            model.get_submodule(stage).requires_grad_(True)
            print(f"  step {step}: {stage} trains")
        model.train()
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        # --- The part to copy ends here. ---

    print(f"{name}: accuracy {accuracy(model):.4f} after {steps} steps at batch {BATCH_SIZE}")

print(normswap.frozen_drift(model))
