"""Fine-tune a network that is shared out over many GPUs: GroupNorm, FSDP2 and checkpoints in pieces.

Goal:      train a network too large for one GPU; convert once, shard parameters, gradients and optimizer over all
           processes, train stabilized, stop, go on with another number of processes, and save it whole
Command:   torchrun --nproc-per-node=2 recipes/large_model_fsdp.py
           [--data FOLDER --network FILE.py:FUNCTION --weights FILE --wrap CLASS] [--stop-after STEP] [--resume]
Time:      about 1 min on two CPU cores for the digits
Expected:  digits turned by a quarter, two processes, each with half of 75,722 parameters: accuracy 0.121 before, 0.956
           after 300 steps of 4 images at the best of three rates for these digits; the same from the file
"""

import argparse
import math
import os
import runpy
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import normswap
from normswap.demo import digits
from normswap.demo.network import pretrained

LR = 1e-3  # AdamW's default
CLIP = 1.0
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of the images that the network learned from

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, help="folder with train/CLASS/* and val/CLASS/* or test/CLASS/*")
parser.add_argument("--network", help="FILE.py:FUNCTION that builds the network, for --data")
parser.add_argument("--weights", type=Path, help="its state dict")
parser.add_argument("--wrap", default="Block", help="class of the blocks that are gathered one at a time")
parser.add_argument("--size", type=int, default=224, help="of the images in --data, in pixels")
parser.add_argument("--groups", type=int, default=2, help="of each GroupNorm layer")
parser.add_argument("--batch", type=int, default=4, help="images of a step, of all processes together")
parser.add_argument("--steps", type=int, help="default: one pass over the training images")
parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
parser.add_argument("--stop-after", type=int, metavar="STEP", help="end there, as the time limit of a cluster would")
parser.add_argument("--resume", action="store_true", help="from the checkpoint in --output, of any number of processes")
parser.add_argument("--output", type=Path, default=Path("runs/large_model_fsdp"), help="a folder that all nodes see")
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

cuda = torch.cuda.is_available()
if cuda:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group()
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
if options.batch % world:
    parser.error(f"a batch of {options.batch} images cannot be shared out evenly over {world} processes")
if options.resume and not list(options.output.glob("checkpoints/step-*/.metadata")):
    parser.error(f"there is no checkpoint in {options.output} to go on from")


def tell(text):
    if rank == 0:
        print(text, flush=True)


# The data, as two sets of (image, label), and what builds a BatchNorm network trained on something like it.
if options.data:
    resize = [v2.Resize(options.size), v2.CenterCrop(options.size)]
    scale = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    held = next(part for part in (options.data / "val", options.data / "test") if part.is_dir())
    training = ImageFolder(options.data / "train", v2.Compose([*resize, *scale]))
    held_out = ImageFolder(held, v2.Compose([*resize, *scale]))
    file, function = options.network.rsplit(":", 1)
    build = runpy.run_path(file)[function]
else:  # handwritten digits, turned by a quarter, which the network of the demo has never seen
    torch.set_num_threads(1)  # images of 8x8 pixels are too small to share
    training, held_out = (TensorDataset(part.images.rot90(1, (2, 3)), part.labels) for part in digits.split())
    build = pretrained
if options.tiny:
    held_out = Subset(held_out, range(0, len(held_out), max(1, len(held_out) // 20)))
steps = options.steps or (6 if options.tiny else len(training) // options.batch)
every, print_every = (3, 1) if options.tiny else (options.checkpoint_every, max(1, steps // 10))

# --- The part to copy begins here. ---
# One process converts and calibrates; the others read what it wrote, so that all shards are of the same network.
start, end = options.output / "start.safetensors", options.output / "trained.safetensors"
pieces = options.output / "checkpoints"
if rank == 0 and not options.resume:
    pieces.mkdir(parents=True, exist_ok=True)
    for old in pieces.glob("step-*"):
        shutil.rmtree(old)
    bn = build()
    if options.data:
        state = torch.load(options.weights, map_location="cpu", weights_only=True)
        bn.load_state_dict({k.removeprefix("module."): v for k, v in state.get("state_dict", state).items()})
    bn.eval().to(device)
    gn = normswap.convert(bn, to="gn", groups=options.groups)
    normswap.calibrate(gn, reference=bn, data=DataLoader(Subset(training, range(0, len(training), 5)), 32))
    normswap.save(gn, start, overwrite=True)
dist.barrier()
network = normswap.load(start, model=build())
count = sum(p.numel() for p in network.parameters())

# Each block is gathered when it runs and let go of afterwards; what is left over belongs to the network as a whole.
mesh = init_device_mesh(device.type, (world,))
for block in [m for m in network.modules() if type(m).__name__ == options.wrap]:
    fully_shard(block, mesh=mesh)
fully_shard(network, mesh=mesh)
optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
here = sum(p.to_local().numel() for p in network.parameters())
tell(f"{count} parameters, {here} of them in this process of {world}")


@torch.no_grad()
def accuracy(network):
    """Of all images, each counted once; all processes run equally many batches, since they gather blocks together."""
    network.eval()
    share = range(rank, len(held_out) + -len(held_out) % world, world)
    batches = DataLoader(Subset(held_out, [i % len(held_out) for i in share]), 100)
    found = torch.cat([network(x.to(device)).argmax(1) == y.to(device) for x, y in batches])
    right = found[: len(range(rank, len(held_out), world))].sum()
    dist.all_reduce(right)
    return right.item() / len(held_out)


def checkpoint(step):
    """Each process writes its own shards; the file that says what is where comes last, and makes it a checkpoint."""
    parameters, moments = get_state_dict(network, optimizer)
    dcp.save({"network": parameters, "optimizer": moments}, checkpoint_id=pieces / f"step-{step:07}")
    dist.barrier()
    for old in sorted(pieces.glob("step-*"))[:-1] if rank == 0 else []:
        shutil.rmtree(old)


def resumed():
    """The step of the last checkpoint, whose values are in the network and the optimizer then."""
    last = max(pieces.glob("step-*/.metadata")).parent
    parameters, moments = get_state_dict(network, optimizer)
    dcp.load({"network": parameters, "optimizer": moments}, checkpoint_id=last)
    set_state_dict(network, optimizer, model_state_dict=parameters, optim_state_dict=moments)
    return int(last.name.removeprefix("step-"))


tell(f"calibrated: accuracy {accuracy(network):.4f}")
# Order and rate are functions of the step alone, so that a run that goes on does what it would have done.
order = list(RandomSampler(training, num_samples=steps * options.batch, generator=torch.Generator().manual_seed(0)))
last = min(steps, options.stop_after or steps)
with normswap.stabilized(network):  # the weights of a checkpoint are those within it: enter first, then load
    done = resumed() if options.resume else 0
    mine = [i for k in range(done, last) for i in order[k * options.batch + rank : (k + 1) * options.batch : world]]
    network.train()
    for step, (images, labels) in enumerate(DataLoader(Subset(training, mine), options.batch // world), done + 1):
        loss = F.cross_entropy(network(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        optimizer.step()
        if step % print_every == 0:
            of_all = loss.detach() / world
            dist.all_reduce(of_all)
            tell(f"step {step}: loss {of_all.item():.6f}")
        if step % every == 0 or step == last:
            checkpoint(step)

if last < steps:
    tell(f"stopped after step {last} of {steps}; --resume goes on")
else:
    tell(f"trained: accuracy {accuracy(network):.4f} after {steps} steps of {options.batch} images")
    # All processes take part in gathering; the first has the whole network then, and writes it as one file.
    state = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        gathered = normswap.load(start, model=build())
        gathered.load_state_dict(state)
        normswap.save(gathered, end, overwrite=True)
        # --- The part to copy ends here. ---
    dist.barrier()
    read = normswap.load(end, model=build()).to(device)
    tell(f"{end}: accuracy {accuracy(read):.4f}")
dist.destroy_process_group()
