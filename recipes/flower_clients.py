"""Federated averaging with flower: its clients, FedAvg and FedProx, over clients that see different classes.

Goal:      average networks that were trained apart with flower's own classes; it averages every array of the state
           dict, running statistics of unlike clients too, and GroupNorm has none
Command:   python recipes/flower_clients.py [--rounds 10]; needs flower: pip install flwr
Time:      about 1 minute on one CPU core
Expected:  accuracy after 10 rounds, by FedAvg: BatchNorm 0.43, GroupNorm 0.54; by FedProx 0.43 and 0.51; five clients,
           two of the ten classes each; the last digits vary with the order in which clients answer
"""

import argparse
import copy
import functools
import logging
import random
import warnings

import torch
import torch.nn.functional as F

import normswap
from normswap.demo import digits
from normswap.demo.network import pretrained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    from flwr.client import NumPyClient
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server import Server, SimpleClientManager
    from flwr.server.client_proxy import ClientProxy
    from flwr.server.strategy import FedAvg, FedProx

CLIENTS = 5
LOCAL_STEPS = 20
BATCH_SIZE = 16
LR = 0.02
CLIP = 1.0
PROXIMAL = 1.0  # weight of the distance from the server's weights (FedProx, Li et al. 2020)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--rounds", type=int, default=10)
parser.add_argument("--tiny", action="store_true", help="one round of one step, to see that it runs")
options = parser.parse_args()
rounds, local_steps = (1, 1) if options.tiny else (options.rounds, LOCAL_STEPS)
torch.set_num_threads(1)  # images of 8x8 pixels are too small to share
logging.getLogger("flwr").setLevel(logging.ERROR)

# Digits turned by a quarter, which the network of the demo has never seen; each client has two of the ten classes.
training, held_out = digits.split()
x, y = training.images.rot90(1, (2, 3)), training.labels
bn = pretrained()
# --- The part to copy begins here. ---
gn = normswap.convert(bn, to="gn", groups=4)
normswap.calibrate(gn, reference=bn, data=training.images, progress=False)


def arrays(network):
    """Everything that is sent: the state dict, buffers too, as flower's examples do."""
    return [value.numpy(force=True) for value in network.state_dict().values()]


def load(network, values):
    """The way back."""
    state = {key: torch.as_tensor(value) for key, value in zip(network.state_dict(), values, strict=True)}
    network.load_state_dict(state)


class Digits(NumPyClient):
    """A client that has two of the ten classes."""

    def __init__(self, network, number):
        self.network = copy.deepcopy(network)
        self.share = torch.nonzero(y // 2 == number).flatten()
        self.random = torch.Generator().manual_seed(number)

    def fit(self, parameters, config):
        """The server's weights, some steps on its own images, the weights back."""
        load(self.network, parameters)
        self.network.train()
        start = [p.detach().clone() for p in self.network.parameters()]
        optimizer = torch.optim.SGD(self.network.parameters(), lr=LR)
        for _ in range(local_steps):
            chosen = self.share[torch.randint(len(self.share), (BATCH_SIZE,), generator=self.random)]
            loss = F.cross_entropy(self.network(x[chosen]), y[chosen])
            pairs = zip(self.network.parameters(), start, strict=True)
            loss = loss + config.get("proximal_mu", 0) / 2 * sum((p - q).square().sum() for p, q in pairs)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
            optimizer.step()
        return arrays(self.network), len(self.share), {}


class Here(ClientProxy):
    """A client in this very process, in the place of a ClientApp, which flower simulates on ray alone (`flwr run`)."""

    def __init__(self, number, client):
        super().__init__(str(number))
        self.client = client.to_client()

    def fit(self, ins, timeout, group_id):
        return self.client.fit(ins)

    def get_parameters(self, ins, timeout, group_id):
        return self.client.get_parameters(ins)

    def get_properties(self, ins, timeout, group_id):
        return self.client.get_properties(ins)

    def evaluate(self, ins, timeout, group_id):
        return self.client.evaluate(ins)

    def reconnect(self, ins, timeout, group_id):
        raise NotImplementedError("it never was away")


def accuracy(network):
    """On digits that no client has."""
    network.eval()
    with torch.no_grad():
        right = network(held_out.images.rot90(1, (2, 3))).argmax(1) == held_out.labels
    return right.float().mean().item()


strategies = {"FedAvg": FedAvg, "FedProx": functools.partial(FedProx, proximal_mu=PROXIMAL)}
for label, strategy in strategies.items():
    for name, network in (("BatchNorm", bn), ("GroupNorm", gn)):
        random.seed(0)  # of the order of the clients
        clients = SimpleClientManager()
        for number in range(CLIENTS):
            clients.register(Here(number, Digits(network, number)))
        start = ndarrays_to_parameters(arrays(network))
        server = Server(
            client_manager=clients,
            strategy=strategy(
                fraction_evaluate=0.0, min_available_clients=CLIENTS, min_evaluate_clients=0, initial_parameters=start
            ),
        )
        server.set_max_workers(1)
        server.fit(num_rounds=rounds, timeout=None)
        average = copy.deepcopy(network)
        load(average, parameters_to_ndarrays(server.parameters))
        if name == "GroupNorm":
            normswap.save(average, "flower_clients.safetensors", overwrite=True)
            average = normswap.load("flower_clients.safetensors", model=pretrained())
            # --- The part to copy ends here. ---
        print(f"{label}, {name}: accuracy {accuracy(average):.4f} after {rounds} rounds")
