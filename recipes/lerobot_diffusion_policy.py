"""Train lerobot's DiffusionPolicy with a pretrained ResNet-18 and averaged weights (EMA): BatchNorm and GroupNorm.

Goal:      GroupNorm in the pretrained encoder of a diffusion policy; lerobot refuses it ("You can't replace
           BatchNorm in a pretrained model without ruining the weights!"), and EMA does other things to either norm
Command:   python recipes/lerobot_diffusion_policy.py [--weights resnet18.pth]; needs lerobot:
           pip install 'lerobot[diffusion]'
Time:      about 2 minutes on one CPU core
Expected:  success after 150 steps, one seed: BatchNorm, last weights 0.790, EMA weights 0.920 on averaged statistics
           and 0.440 on the first ones; GroupNorm, which has none, last weights 0.490, EMA weights 0.960
"""

import argparse
import copy
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import normswap
from normswap.demo import digits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

SIZE = 64  # pixels of the square world, which reaches from -1 to 1
HORIZON = 8  # actions that are planned at once
EPISODES = 4  # of a batch
LR = 1e-3
CLIP = 1.0
DECAY = 0.97
NEAR = 0.25  # of the goal, at the end

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--weights", type=Path, help="state dict of torchvision's resnet18; else it is trained on digits")
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--groups", type=int, default=4, help="of each GroupNorm layer")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
options = parser.parse_args()
pretraining, steps, episodes = (2, 2, 2) if options.tiny else (40, options.steps, 100)


def drawn(pictures, goals, cursors=None):
    """Images `(N, 3, SIZE, SIZE)` of digits at their places `(N, 2)`, and of cursors as small squares."""
    pixels = ((goals + 1) / 2 * (SIZE - 1)).round().long()
    images = torch.zeros(len(goals), 3, SIZE, SIZE)
    for image, picture, (i, j) in zip(images, F.interpolate(pictures, scale_factor=2), pixels, strict=True):
        image[:, i - 8 : i + 8, j - 8 : j + 8] = picture
    if cursors is not None:
        for image, (i, j) in zip(images, ((cursors + 1) / 2 * (SIZE - 1)).round().long(), strict=True):
            image[0, max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3] = 1
    return images


def worlds(count, part):
    """The pictures of digits, their places, and the places of cursors: `(N, 1, 8, 8)`, `(N, 2)`, `(N, 2)`."""
    chosen = torch.randint(len(part), (count,))
    return part.images[chosen], torch.rand(count, 2) * 1.4 - 0.7, torch.rand(count, 2) * 2 - 1


def demonstrations(count):
    """A batch as lerobot's data sets give it: the way to the digit, at most 0.3 an action, as absolute positions."""
    pictures, goals, cursors = worlds(count, training)
    far = (goals - cursors).norm(dim=1).clamp(min=1e-6)[:, None, None]
    part = (0.3 * torch.arange(1, HORIZON + 1)[None, :, None] / far).clamp(max=1)
    return {
        "observation.image": drawn(pictures, goals, cursors)[:, None],
        "observation.state": cursors[:, None],
        "action": cursors[:, None] + part * (goals - cursors)[:, None],
        "action_is_pad": torch.zeros(count, HORIZON, dtype=torch.bool),
    }


@torch.no_grad()
def success(policy):
    """The share of episodes, of digits that are new, at whose end the cursor is near the goal."""
    policy.eval()
    policy.reset()
    torch.manual_seed(1)
    pictures, goals, cursors = worlds(episodes, held_out)
    for _ in range(2 * config.n_action_steps):
        seen = {"observation.image": drawn(pictures, goals, cursors), "observation.state": cursors}
        cursors = policy.select_action(seen).clamp(-1, 1)
    return ((goals - cursors).norm(dim=1) < NEAR).float().mean().item()


training, held_out = digits.split()
torch.manual_seed(options.seed)
resnet = torchvision.models.resnet18(num_classes=1000 if options.weights else 10)
if options.weights:
    resnet.load_state_dict(torch.load(options.weights, weights_only=True))
else:  # in the place of ImageNet's
    optimizer = torch.optim.AdamW(resnet.parameters(), lr=1e-3)
    for _ in range(pretraining):
        chosen = training[torch.randint(len(training), (24,))]
        loss = F.cross_entropy(resnet(drawn(chosen.images, worlds(24, training)[1])), chosen.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
resnet.eval()

config = DiffusionConfig(
    input_features={
        "observation.image": PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)),
        "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
    },
    output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
    n_obs_steps=1, horizon=HORIZON, n_action_steps=4, down_dims=(64, 128), diffusion_step_embed_dim=32,
    use_group_norm=False, noise_scheduler_type="DDIM", num_inference_steps=10, prediction_type="sample", device="cpu",
)  # fmt: skip

bn = torch.nn.Sequential(*list(resnet.children())[:-2])  # as lerobot cuts it
images = drawn(*worlds(64, training)[:2])
# --- The part to copy begins here. ---
gn = normswap.convert(bn, to="gn", groups=options.groups)
if options.weights:  # else the running statistics are of 40 batches, and what they lead to is nothing to come back to
    normswap.calibrate(gn, reference=bn, data=images, progress=False)

for name, network in (("BatchNorm", bn), ("GroupNorm", gn)):
    torch.manual_seed(options.seed)
    policy = DiffusionPolicy(config)
    policy.diffusion.rgb_encoder.backbone = backbone = copy.deepcopy(network)
    with normswap.stabilized(backbone):  # the learning rates of the original network suit the converted one
        average = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=LR)
        policy.train()
        for _ in range(steps):
            loss, _ = policy(demonstrations(EPISODES))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
            optimizer.step()
            average.update_parameters(policy)
    if name == "GroupNorm":
        normswap.save(average.module, "lerobot_diffusion_policy.safetensors", overwrite=True)
        fresh = DiffusionPolicy(config)
        fresh.diffusion.rgb_encoder.backbone = copy.deepcopy(bn)
        average.module = normswap.load("lerobot_diffusion_policy.safetensors", model=fresh)
        # --- The part to copy ends here. ---
    print(f"{name}, last weights: success {success(policy):.3f}")
    print(f"{name}, EMA weights: success {success(average.module):.3f}")
    if before := dict(network.named_buffers(prefix="diffusion.rgb_encoder.backbone")):
        # A loop over `parameters()` leaves the statistics of the copy as they were: diffusion_policy's EMAModel.
        average.module.load_state_dict(before, strict=False)
        print(f"{name}, EMA weights, first statistics: success {success(average.module):.3f}")
