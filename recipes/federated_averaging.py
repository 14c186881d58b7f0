"""Federated averaging over clients that see different classes: BatchNorm, frozen statistics, GroupNorm.

Goal:      average networks that were trained apart; running statistics of unlike clients do not average, GroupNorm
           has none
Command:   python recipes/federated_averaging.py
Time:      about 1 minute on one CPU core
Expected:  accuracy 0.437 with BatchNorm and averaged buffers, 0.295 where the buffers are left out,
           0.405 with frozen statistics, 0.533 with GroupNorm; five clients, two of the ten classes each, ten rounds
"""

import argparse
import copy

import torch
import torch.nn.functional as F

import normswap
from normswap.demo import digits
from normswap.demo.network import pretrained

CLIENTS = 5
ROUNDS = 10
LOCAL_STEPS = 20
BATCH_SIZE = 16
LR = 0.02
CLIP = 1.0

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--rounds", type=int, default=ROUNDS)
parser.add_argument("--tiny", action="store_true", help="one round of one step, to see that it runs")
options = parser.parse_args()
rounds, local_steps = (1, 1) if options.tiny else (options.rounds, LOCAL_STEPS)
torch.set_num_threads(1)  # images of 8x8 pixels are too small to share

# Digits turned by a quarter, which the network of the demo has never seen; each client has two of the ten classes.
training, held_out = digits.split()
x, y = training.images.rot90(1, (2, 3)), training.labels
shares = [torch.nonzero((y == 2 * i) | (y == 2 * i + 1)).flatten() for i in range(CLIENTS)]

bn = pretrained()
# --- The part to copy begins here. ---
gn = normswap.convert(bn, to="gn", groups=4)
normswap.calibrate(gn, reference=bn, data=training.images)
networks = {
    "BatchNorm, buffers averaged": (bn, True),
    "BatchNorm, buffers left out": (bn, False),
    "BatchNorm, statistics frozen": (normswap.freeze(copy.deepcopy(bn), affine=False), False),
    "GroupNorm": (gn, False),
}

for name, (network, average_buffers) in networks.items():
    torch.manual_seed(0)
    server = copy.deepcopy(network)
    for _ in range(rounds):
        clients = []
        for share in shares:
            client = copy.deepcopy(server).train()
            optimizer = torch.optim.SGD(client.parameters(), lr=LR)
            for _ in range(local_steps):
                chosen = share[torch.randint(len(share), (BATCH_SIZE,))]
                loss = F.cross_entropy(client(x[chosen]), y[chosen])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(client.parameters(), CLIP)
                optimizer.step()
            clients.append(client)
        # The server takes the mean of all parameters (McMahan et al. 2017), and of buffers if it is asked to.
        with torch.no_grad():
            for key, value in server.named_parameters():
                value.copy_(torch.stack([client.get_parameter(key) for client in clients]).mean(0))
            for key, value in server.named_buffers():
                if average_buffers and value.is_floating_point():
                    value.copy_(torch.stack([client.get_buffer(key) for client in clients]).mean(0))
                    # --- The part to copy ends here. ---

    server.eval()
    with torch.no_grad():
        right = server(held_out.images.rot90(1, (2, 3))).argmax(1) == held_out.labels
    print(f"{name}: accuracy {right.float().mean().item():.4f} after {rounds} rounds")
