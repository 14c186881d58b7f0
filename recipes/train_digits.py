"""Train the network of `normswap demo` on the handwritten digits that come with the package.

Goal:      a small BatchNorm network, as good as what people have lying around; the demo ships its weights
Command:   python recipes/train_digits.py digits.safetensors
Time:      about 25 s on one CPU core
Expected:  98.8 % of the 597 held-out digits; the same seed gives the same file, bit for bit, on the same machine and
           version of PyTorch, and the same accuracy within half a per cent elsewhere
"""

import argparse

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from normswap.demo.digits import split
from normswap.demo.network import DigitNet

SEED = 0
BATCH_SIZE = 64
LR = 0.01

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("output", nargs="?", default="digits.safetensors", help="the file to write")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--tiny", action="store_true", help="one epoch, to see that it runs")
options = parser.parse_args()
epochs = 1 if options.tiny else options.epochs
torch.manual_seed(SEED)
torch.set_num_threads(1)  # sums, and so the weights, depend on the number of threads

training, held_out = split()
# --- The part to copy begins here. ---
network = DigitNet()
per_epoch = len(training) // BATCH_SIZE
optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.05)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=epochs * per_epoch)

for epoch in range(1, epochs + 1):
    network.train()
    for chosen in torch.randperm(len(training)).split(BATCH_SIZE)[:per_epoch]:
        # Each image is turned, scaled, sheared and moved a little, and its ink gets darker or lighter.
        moves = torch.eye(2, 3) + torch.randn(BATCH_SIZE, 2, 3) * torch.tensor([0.12, 0.12, 0.08])
        grid = F.affine_grid(moves, [BATCH_SIZE, 1, 8, 8], align_corners=False)
        images = F.grid_sample(training.images[chosen], grid, align_corners=False)
        images = images * torch.empty(BATCH_SIZE, 1, 1, 1).uniform_(0.6, 1.2)
        loss = F.cross_entropy(network(images), training.labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if epoch % 5 == 0 or epoch == epochs:
        network.eval()
        with torch.no_grad():
            right = network(held_out.images).argmax(1) == held_out.labels
        print(f"epoch {epoch}: loss {loss.item():.3f}, held-out accuracy {right.float().mean().item():.4f}")

save_file(network.state_dict(), options.output)
# --- The part to copy ends here. ---
print(f"written: {options.output}")
