"""Behaviour cloning with a pretrained image encoder and an average of the weights (EMA): BatchNorm and GroupNorm.

Goal:      act with averaged weights, the usual way in robotics; BatchNorm's running statistics belong to other weights
           than the averaged ones, and few implementations average them; GroupNorm has none
Command:   python recipes/ema_policy.py
Time:      about 1 minute on one CPU core
Expected:  success after 400 steps, BatchNorm: last weights 0.988; EMA weights on the statistics from before 0.020, on
           the last ones 0.770, on averaged ones 0.988, on ones estimated anew 0.990; GroupNorm: last weights 0.984,
           EMA weights 0.994
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import normswap
from normswap.demo import digits
from normswap.demo.network import pretrained

SIZE = 20  # pixels of the square world
BATCH = (2, 4)  # episodes, and consecutive frames of each
LR = 1e-3
CLIP = 1.0
DECAY = 0.99

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
options = parser.parse_args()
steps, episodes = (3, 4) if options.tiny else (options.steps, 500)
torch.set_num_threads(1)  # images of 20x20 pixels are too small to share


class Policy(nn.Module):
    """`(N, 1, H, W)` images to `(N, 2)` actions: the encoder's feature maps, where each is bright, a small network."""

    def __init__(self, network):
        super().__init__()
        self.encoder = nn.Sequential(network.conv, network.bn, nn.ReLU(), network.blocks)  # all but the classifier
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, images):
        maps = self.encoder(images)
        weights = maps.flatten(2).softmax(2).view_as(maps)  # spatial softmax (Levine et al. 2016)
        rows, columns = (torch.linspace(-1, 1, side) for side in maps.shape[2:])
        return self.head(torch.cat([(weights.sum(3) * rows).sum(2), (weights.sum(2) * columns).sum(2)], 1))


def worlds(count, part):
    """A digit somewhere, a cursor somewhere: their centres `(count, 2)` in pixels, and the digits' images."""
    goals = torch.randint(4, SIZE - 3, (count, 2))
    cursors = torch.randint(1, SIZE - 1, (count, 2)).float()
    return goals, cursors, part.images[torch.randint(len(part), (count,)), 0]


def drawn(goals, cursors, pictures):
    """What the policy sees, `(N, 1, SIZE, SIZE)`: the digit, and the cursor as a bright cross."""
    images = torch.zeros(len(goals), SIZE, SIZE)
    for image, (i, j), (k, m), picture in zip(images, goals, cursors.round().long(), pictures, strict=True):
        image[i - 4 : i + 4, j - 4 : j + 4] = picture
        image[k - 1 : k + 2, m] = image[k, m - 1 : m + 2] = 2
    return images[:, None]


def expert(goals, cursors):
    """The action to copy: towards the goal, at most two pixels along each axis, in units of two pixels."""
    return ((goals - cursors) / 2).clamp(-1, 1)


def demonstrations(count, frames):
    """Images and actions of the first frames of as many episodes."""
    goals, cursors, pictures = worlds(count, training)
    images, actions = [], []
    for _ in range(frames):
        images.append(drawn(goals, cursors, pictures))
        actions.append(expert(goals, cursors))
        cursors = cursors + 2 * actions[-1]
    return torch.cat(images), torch.cat(actions)


@torch.no_grad()
def success(policy):
    """The share of episodes at whose end the cursor is within 1.5 pixels of the goal, a digit that is new."""
    policy.eval()
    torch.manual_seed(1)
    goals, cursors, pictures = worlds(episodes, held_out)
    for _ in range(15):
        cursors = (cursors + 2 * policy(drawn(goals, cursors, pictures)).clamp(-1, 1)).clamp(1, SIZE - 2)
    return ((goals - cursors).norm(dim=1) < 1.5).float().mean().item()


training, held_out = digits.split()
bn = pretrained()
# --- The part to copy begins here. ---
gn = normswap.convert(bn, to="gn", groups=4)
normswap.calibrate(gn, reference=bn, data=training.images)

for name, network in (("BatchNorm", bn), ("GroupNorm", gn)):
    torch.manual_seed(options.seed)
    policy = Policy(copy.deepcopy(network))
    before = copy.deepcopy(dict(policy.named_buffers()))
    average = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR)
    policy.train()
    for _ in range(steps):
        images, actions = demonstrations(*BATCH)
        loss = F.mse_loss(policy(images), actions)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        average.update_parameters(policy)
        # --- The part to copy ends here. ---

    averaged = average.module
    print(f"{name}, last weights: success {success(policy):.3f}")
    print(f"{name}, EMA weights{', EMA statistics' if before else ''}: success {success(averaged):.3f}")
    if not before:
        continue  # GroupNorm has no buffers, so that there is one average and no choice
    # A loop over `parameters()` leaves the statistics of the copy as they were: diffusion_policy's EMAModel.
    averaged.load_state_dict(before, strict=False)
    print(f"{name}, EMA weights, first statistics: success {success(averaged):.3f}")
    # `AveragedModel` copies the last ones, unless it is told otherwise.
    averaged.load_state_dict(dict(policy.named_buffers()), strict=False)
    print(f"{name}, EMA weights, last statistics: success {success(averaged):.3f}")
    torch.manual_seed(2)
    update_bn([demonstrations(16, 4)[0] for _ in range(2 if options.tiny else 25)], averaged)
    print(f"{name}, EMA weights, statistics estimated anew: success {success(averaged):.3f}")
