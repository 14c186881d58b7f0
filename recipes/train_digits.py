"""Train the network of `normswap demo` on the handwritten digits that come with the package.

Goal:      a small BatchNorm network, as good as what people have lying around; the demo ships its weights
Command:   python recipes/train_digits.py digits.safetensors
Time:      about 25 s on one CPU core
Expected:  98.8 % of the 597 held-out digits; the same seed gives the same file, bit for bit, on the same machine and
           version of PyTorch, and the same accuracy within half a per cent elsewhere
"""

import sys

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from normswap.demo.digits import split
from normswap.demo.network import DigitNet
from normswap.demo.story import accuracy

SEED = 0
EPOCHS = 30
BATCH_SIZE = 64
LR = 0.01

output = sys.argv[1] if len(sys.argv) > 1 else "digits.safetensors"
torch.manual_seed(SEED)
torch.set_num_threads(1)  # sums, and so the weights, depend on the number of threads

training, held_out = split()
network = DigitNet()
per_epoch = len(training) // BATCH_SIZE
optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.05)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=EPOCHS * per_epoch)

for epoch in range(1, EPOCHS + 1):
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
    if epoch % 5 == 0:
        print(f"epoch {epoch}: loss {loss.item():.3f}, held-out accuracy {accuracy(network, held_out):.4f}")

save_file(network.state_dict(), output)
print(f"written: {output}")
