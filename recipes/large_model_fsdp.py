"""Fine-tune a network that is shared out over many GPUs: GroupNorm, accelerate and FSDP.

Goal:      a network too large for one GPU: convert once, shard parameters, gradients and optimizer over all processes,
           train, gather the whole network and save it with its manifest
Command:   torchrun --nproc-per-node=2 recipes/large_model_fsdp.py
           [--data FOLDER --network FILE.py:FUNCTION --weights FILE --wrap CLASS]
Time:      about 30 s on two CPU cores for the digits
Expected:  digits turned by a quarter, two processes, each with half of 75,722 parameters: accuracy 0.124 before, 0.866
           after 300 steps of 4 images, and the same from the file that was written
"""

import argparse
import runpy
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import normswap
from normswap.demo import digits
from normswap.demo.network import pretrained

BATCH_SIZE = 2  # of each process
LR = 2e-4
CLIP = 1.0
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of the images that the network learned from

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, help="folder with train/CLASS/* and val/CLASS/* or test/CLASS/*")
parser.add_argument("--network", help="FILE.py:FUNCTION that builds the network, for --data")
parser.add_argument("--weights", type=Path, help="its state dict")
parser.add_argument("--wrap", default="Block", help="class of the blocks that are gathered one at a time")
parser.add_argument("--size", type=int, default=224, help="of the images in --data, in pixels")
parser.add_argument("--groups", type=int, default=2, help="of each GroupNorm layer")
parser.add_argument("--steps", type=int, help="default: one pass over the training images")
parser.add_argument("--output", type=Path, default=Path("runs/large_model_fsdp"))
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
options = parser.parse_args()

plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[options.wrap]
)
accelerator = Accelerator(cpu=not torch.cuda.is_available(), fsdp_plugin=plugin)
if accelerator.num_processes > 1:  # accelerate shards on GPUs; this makes it do the same on CPUs
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin

# The data, as two sets of (image, label), and what builds a BatchNorm network trained on something like it.
if options.data:
    resize = [v2.Resize(options.size), v2.CenterCrop(options.size)]
    scale = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    held = next(part for part in (options.data / "val", options.data / "test") if part.is_dir())
    training = ImageFolder(options.data / "train", v2.Compose([*resize, v2.RandomHorizontalFlip(), *scale]))
    held_out = ImageFolder(held, v2.Compose([*resize, *scale]))
    file, function = options.network.rsplit(":", 1)
    build = runpy.run_path(file)[function]
else:  # handwritten digits, turned by a quarter, which the network of the demo has never seen
    torch.set_num_threads(1)  # images of 8x8 pixels are too small to share
    training, held_out = (TensorDataset(part.images.rot90(1, (2, 3)), part.labels) for part in digits.split())
    build = pretrained
if options.tiny:
    held_out = Subset(held_out, range(0, len(held_out), max(1, len(held_out) // 20)))
together = BATCH_SIZE * accelerator.num_processes
steps = 3 if options.tiny else options.steps or len(training) // together

# One process converts and calibrates; the others read what it wrote, so that all shards are of the same network.
start, end = options.output / "start.safetensors", options.output / "trained.safetensors"
if accelerator.is_main_process:
    options.output.mkdir(parents=True, exist_ok=True)
    bn = build()
    if options.data:
        state = torch.load(options.weights, map_location="cpu", weights_only=True)
        bn.load_state_dict({k.removeprefix("module."): v for k, v in state.get("state_dict", state).items()})
    bn.eval().to(accelerator.device)
    gn = normswap.convert(bn, to="gn", groups=options.groups)
    normswap.calibrate(gn, reference=bn, data=DataLoader(Subset(training, range(0, len(training), 5)), 32))
    normswap.save(gn, start, overwrite=True)
accelerator.wait_for_everyone()
network = normswap.load(start, model=build())
count = sum(p.numel() for p in network.parameters())

# Not within `normswap.stabilized`, which looks at whole weights; clipping and a small rate do without it.
torch.manual_seed(0)
sampler = RandomSampler(training, num_samples=steps * together)
network, optimizer, loader, validation = accelerator.prepare(
    network, torch.optim.AdamW(network.parameters(), lr=LR), DataLoader(training, BATCH_SIZE, sampler=sampler),
    DataLoader(held_out, 100),
)  # fmt: skip
here = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in network.parameters())
accelerator.print(f"{count} parameters, {here} of them in this process of {accelerator.num_processes}")


@torch.no_grad()
def accuracy(network):
    network.eval()
    right = [accelerator.gather_for_metrics((network(x).argmax(1) == y).float()) for x, y in validation]
    return torch.cat(right).mean().item()


accelerator.print(f"calibrated: accuracy {accuracy(network):.4f}")
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
network.train()
for images, labels in loader:
    loss = F.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(network.parameters(), CLIP)
    optimizer.step()
    schedule.step()
accelerator.print(f"trained: accuracy {accuracy(network):.4f} after {steps} steps of {together} images")

# All processes take part in gathering; the first has the whole network then, and writes it as one file.
state = accelerator.get_state_dict(network)
if accelerator.is_main_process:
    whole = normswap.load(start, model=build())
    whole.load_state_dict(state)
    normswap.save(whole, end, overwrite=True)
accelerator.wait_for_everyone()
read = normswap.load(end, model=build()).to(accelerator.device)
accelerator.print(f"{end}: accuracy {accuracy(read):.4f}")
accelerator.end_training()
