"""Gradients of each sample with torch.func's vmap, and with them DP-SGD in a loop of one's own.

Goal:      a gradient for each image, for private training, influence functions, weights of samples; vmap refuses
           BatchNorm that trains, since it mixes samples, and takes GroupNorm and frozen statistics
Command:   python recipes/per_sample_gradients.py [--epsilon 4]; needs opacus: pip install opacus
Time:      about 30 s on one CPU core
Expected:  torch.func refuses BatchNorm; with GroupNorm its gradients agree with opacus's to 7e-07; accuracy on digits
           turned by a quarter, after 10 epochs at epsilon 4: frozen statistics 0.482, GroupNorm 0.740
"""

import argparse
import copy
import warnings

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

import normswap
from normswap.demo import digits
from normswap.demo.network import pretrained

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    from opacus import GradSampleModule
    from opacus.accountants import RDPAccountant
    from opacus.accountants.utils import get_noise_multiplier

BATCH_SIZE = 120  # on average
DELTA = 1e-4  # below 1 / images
LR = 1e-3
CLIP = 1.0  # of each sample's gradient

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epsilon", type=float, default=4.0, help="the privacy budget")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--tiny", action="store_true", help="one epoch of one step, to see that it runs")
options = parser.parse_args()
torch.set_num_threads(1)  # images of 8x8 pixels are too small to share
warnings.filterwarnings("ignore", module="opacus")  # its advice on secure random numbers, which production wants
warnings.filterwarnings("ignore", message="Full backward hook is firing")

# Public: the network and the digits it was trained on. Private: the same digits turned by a quarter.
training, held_out = digits.split()
x, y = training.images.rot90(1, (2, 3)), training.labels
bn = pretrained()
# --- The part to copy begins here. ---
gn = normswap.convert(bn, to="gn", groups=4)
normswap.calibrate(gn, reference=bn, data=training.images, progress=False)  # public images only


def gradients(network, images, labels):
    """The gradient of each image's loss: for every parameter a tensor `(N, *shape)`."""
    parameters = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    rest = {name: t.detach() for name, t in network.state_dict().items() if name not in parameters}

    def loss(parameters, image, label):
        scores = functional_call(network, {**rest, **parameters}, (image[None],))
        return F.cross_entropy(scores, label[None])

    return vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)


def private_step(network, optimizer, noise):
    """DP-SGD (Abadi et al. 2016): a random batch, each gradient clipped, the sum noised."""
    chosen = torch.nonzero(torch.rand(len(x)) < BATCH_SIZE / len(x)).flatten()  # Poisson sampling
    each = gradients(network, x[chosen], y[chosen])
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
    scale = (CLIP / norms).clamp(max=1)
    for name, g in each.items():
        total = torch.einsum("n,n...->...", scale, g)
        network.get_parameter(name).grad = (total + noise * CLIP * torch.randn_like(total)) / BATCH_SIZE
    optimizer.step()
    # --- The part to copy ends here. ---


def accuracy(network):
    """On digits that were held out."""
    network.eval()
    with torch.no_grad():
        return float((network(held_out.images.rot90(1, (2, 3))).argmax(1) == held_out.labels).float().mean())


try:
    gradients(copy.deepcopy(bn).train(), x[:8], y[:8])
    print("BatchNorm: torch.func took it")
except RuntimeError as error:  # running statistics would be those of all samples together
    print(f"BatchNorm: torch.func refuses it: {str(error).partition(' (aten')[0]}")
opacus = GradSampleModule(copy.deepcopy(gn).train())
F.cross_entropy(opacus(x[:8]), y[:8], reduction="mean").backward()
ours, theirs = gradients(gn.train(), x[:8], y[:8]), dict(opacus.named_parameters())
error = max(float((g - theirs[f"_module.{name}"].grad_sample).abs().max() / g.abs().max()) for name, g in ours.items())
print(f"GroupNorm: opacus and vmap agree to {error:.1e} of the largest gradient")

rate = BATCH_SIZE / len(x)
noise = get_noise_multiplier(
    target_epsilon=options.epsilon, target_delta=DELTA, sample_rate=rate, epochs=options.epochs, accountant="rdp"
)
accountant = RDPAccountant()
networks = {
    "BatchNorm, statistics frozen": normswap.freeze(copy.deepcopy(bn), affine=False),
    "GroupNorm": gn,
}
steps = 1 if options.tiny else int(options.epochs / rate)
for name, network in networks.items():
    torch.manual_seed(0)
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
    accountant.history = [(noise, rate, steps)]
    for _ in range(steps):
        private_step(network, optimizer, noise)
    spent = accountant.get_epsilon(DELTA)
    print(f"{name}: accuracy {accuracy(network):.4f} at epsilon {spent:.2f}, delta {DELTA:g}")
