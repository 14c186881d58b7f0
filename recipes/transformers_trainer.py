"""Fine-tune a converted network of transformers with its own Trainer, at batch size 2.

Goal:      a ResNet of transformers with GroupNorm in `transformers.Trainer`; against the same with BatchNorm
Command:   python recipes/transformers_trainer.py [--batch-size 2 --steps 600 --groups 4]
Time:      about 1 minute on one CPU core
Expected:  digits that lie down, after 600 steps at batch size 2: BatchNorm 0.936, GroupNorm 0.948
"""

import argparse
import copy
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import normswap
from normswap.demo import digits

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--batch-size", type=int, default=2)
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--groups", type=int, default=4, help="of each GroupNorm layer")
parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
options = parser.parse_args()
torch.set_num_threads(1)  # images of 8x8 pixels are too small to share
STEPS = 3 if options.tiny else options.steps


class Digits(Dataset):
    """What the Trainer takes: a dict for each image, here of 32x32 pixels and, if turned, of digits lying down."""

    def __init__(self, part: digits.Digits, *, turned: bool) -> None:
        self.images = part.images.repeat_interleave(4, 2).repeat_interleave(4, 3)
        self.images = self.images.rot90(1, (2, 3)) if turned else self.images
        self.labels = part.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


def trained(network: torch.nn.Module, data: Digits, batch_size: int, steps: int, lr: float) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        Trainer(network, arguments, train_dataset=data).train()
    return network.eval()


@torch.no_grad()
def accuracy(network: torch.nn.Module, data: Digits) -> float:
    return float((network.eval()(data.images).logits.argmax(1) == data.labels).float().mean())


# A network with BatchNorm, trained on digits that stand upright: the place of pretrained weights.
torch.manual_seed(0)
config = ResNetConfig(
    num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", num_labels=10
)
training, held_out = digits.split()
upright = Digits(training, turned=False)
bn = trained(ResNetForImageClassification(config), upright, 32, 3 if options.tiny else 150, 3e-3)

# --- The part to copy begins here. ---
gn = normswap.convert(bn, to="gn", groups=options.groups, example_inputs=upright.images[:2])
normswap.calibrate(gn, reference=bn, data=upright.images[:256], progress=False)

turned, test = Digits(training, turned=True), Digits(held_out, turned=True)
print(f"upright digits, before: BatchNorm {accuracy(bn, Digits(held_out, turned=False)):.4f}")
for name, network in (("BatchNorm", bn), ("GroupNorm", gn)):
    before = accuracy(network, test)
    with normswap.stabilized(network):  # the learning rates of the original network suit the converted one
        network = trained(
            copy.deepcopy(network) if name == "BatchNorm" else network, turned, options.batch_size, STEPS, 1e-3
        )
    if name == "GroupNorm":
        normswap.save(network, "transformers_trainer.safetensors", overwrite=True)
        network = normswap.load("transformers_trainer.safetensors", model=ResNetForImageClassification(config))
        # --- The part to copy ends here. ---
    print(f"{name}: accuracy {before:.4f} before, {accuracy(network, test):.4f} after {STEPS} steps")
