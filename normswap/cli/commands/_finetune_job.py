"""What `normswap finetune` was asked to do: its options read, and checked as far as that goes without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import typer

from ...arguments import one_of
from ...choices import MONITORS
from ..arguments import options
from ..arguments.config import Configured
from ..arguments.datasets import DataPlace
from ..arguments.networks import SourceRequest
from ..arguments.preprocessing import PreprocessOverrides
from ._finetune_network import ConversionRequest

LEARNING = ("label_smoothing", "distil", "mixup", "cutmix", "rand_augment")
_AS_GIVEN = (
    "task optimizer precision augment device batch_size epochs steps accumulate lr weight_decay warmup train "
    "freeze_stats freeze_affine num_classes channels_last compile workers seed max_bad "
    "patience monitor checkpoint_every tensorboard track resume"
).split()
EXCLUDE = ("epochs", "steps"), ("groups", "channels_per_group"), ("resume", "force")


class Finetune(Configured):
    """`finetune`, with options from a file, and with --rand-augment, whose number may be left out."""

    exclusive = EXCLUDE

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give --rand-augment its usual number where none follows: typer has no options of this kind."""
        following = [*args[1:], ""]
        bare = [arg == "--rand-augment" and not after.isdecimal() for arg, after in zip(args, following, strict=True)]
        return super().parse_args(ctx, [f"{arg}=2" if alone else arg for arg, alone in zip(args, bare, strict=True)])


@dataclass(frozen=True)
class FinetuneJob:
    """wanted: the network. swap: what it is converted to first. training: arguments of `normswap.finetune`."""

    wanted: SourceRequest
    swap: ConversionRequest
    data: DataPlace
    asked: PreprocessOverrides
    training: dict[str, Any]

    @classmethod
    def of(cls, ctx: typer.Context, data: DataPlace) -> FinetuneJob:
        """Raises the error of a wrong call for options that do not go together."""
        said = ctx.params
        swap, asked = _swap(ctx), PreprocessOverrides.of(ctx)
        data.check(ctx)
        for one, other in EXCLUDE:
            if said[one] not in (None, False) and said[other] not in (None, False):
                raise options.usage(ctx, f"--{_flag(one)} and --{_flag(other)} exclude each other")
        if not swap.wanted and (said["groups"] is not None or said["channels_per_group"] is not None):
            raise options.usage(ctx, "--groups and --channels-per-group go with --to or --rule")
        if said["ema_decay"] is not None and not said["ema"]:
            raise options.usage(ctx, "--ema-decay goes with --ema")
        decay = 0.999 if said["ema_decay"] is None else said["ema_decay"]
        training = {name: said[name] for name in (*_AS_GIVEN, *LEARNING)}
        training |= {"clip_grad": said["clip_grad"] or None, "ema": decay if said["ema"] else 0.0}
        training |= {"stabilize": not said["no_stabilize"]}
        return cls(SourceRequest.of(ctx, said["source"]), swap, data, asked, training)

    def check(self) -> None:
        """What would else be refused only when the network is converted and calibrated. Raises OptionError."""
        from ...finetuning.asked import check_settings
        from ...finetuning.finetune import task_of
        from ...machine.devices import device_of

        self.swap.check()
        said = self.training
        if said["monitor"] is not None:
            one_of("monitor", said["monitor"].removeprefix("val_"), MONITORS[self.data.task])
        device_of(said["device"])
        task_of(self.data.task, **{name: said[name] for name in LEARNING})
        check_settings(said)


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _swap(ctx: typer.Context) -> ConversionRequest:
    said = ctx.params
    planning = {
        "groups": options.groups(ctx, said["groups"]),
        "channels_per_group": said["channels_per_group"],
        "indivisible": said["indivisible"],
    }
    return ConversionRequest(
        said["to"],
        options.rules(ctx, said["rule"]),
        planning,
        said["calibrate_images"],
        256 if said["task"] == "classification" else 32,
        calibrate=said["calibrate"] != "none",
        place=options.calibration(ctx, said["calibrate"]),
    )
