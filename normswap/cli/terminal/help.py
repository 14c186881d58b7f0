"""What --help looks like: options in groups, as wide as the terminal, in colour where it is one.

By hand, since importing rich for it takes longer than all the rest of --help.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand

from ..arguments.options import UsageError
from .errors import Commands
from .streams import is_terminal

Row = tuple[str, str]
OTHER = "Other"
_ARGUMENTS = "Arguments"
_NARROW = 60  # columns, below which a help text stands under its option instead of beside it
_TERM = 30

PANELS = {
    "Images": "data task eval_data annotations eval_annotations images batch_size batch_sizes size mean std max_bad "
    "augment rand_augment mixup cutmix data_root download",
    "Norms": "to norms groups channels_per_group indivisible transfer eps zero_init_residual fold_affine rule sources "
    "approximate",
    "Calibration": "calibrate calibrate_images method budget",
    "Training": "epochs steps lr optimizer weight_decay warmup clip_grad no_stabilize accumulate train freeze_stats "
    "freeze_affine distil ema ema_decay label_smoothing num_classes patience monitor temperature features precision "
    "private federated inference",
    "Network": "reference weights arg input_shape source built_by trust_pickle trust_code allow_nonfinite",
    "Run": "config device devices channels_last compile workers seed resume checkpoint_every no_check no_undo dry_run",
    "Result": "kind output max_shard_size opset force report license evaluation tensorboard track show_all fail_below "
    "print_config json quiet verbose help",
    OTHER: "",
}
"""The options of each group, in all commands alike. Groups are shown in this order."""

_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names.split()}
_OLD_COMMANDS = {"distill": "distil"}


class Command(TyperCommand):
    """A command whose options are shown in groups. old_names: flags that are still understood, but not shown."""

    old_names: ClassVar[Mapping[str, str]] = {"--distill": "--distil"}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options, also under the names that they once had."""
        return super().parse_args(ctx, [self._today(arg) for arg in args])

    def _today(self, arg: str) -> str:
        flag, equals, value = arg.partition("=")
        return f"{self.old_names.get(flag, flag)}{equals}{value}"

    def invoke(self, ctx: Any) -> Any:
        """Run it. Each of several processes that torchrun has started would do the same and write one file."""
        together = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
        if together and ctx.info_name != "finetune":
            raise UsageError(f"{ctx.info_name} runs in one process: start it without torchrun", ctx)
        return super().invoke(ctx)

    def get_help(self, ctx: Any) -> str:
        """The help, as wide as the terminal."""
        return super().get_help(_widened(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """One list for each group of options."""
        _write(formatter, _records(self, ctx))


class Convert(Command):
    """`--images` was the number of images to calibrate on."""

    old_names: ClassVar[Mapping[str, str]] = {**Command.old_names, "--images": "--calibrate-images"}


class Root(Commands):
    """The commands, with their help in the same style."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command, also under the name that it once had."""
        return super().get_command(ctx, _OLD_COMMANDS.get(cmd_name, cmd_name))

    def get_help(self, ctx: Any) -> str:
        """The help, as wide as the terminal."""
        return super().get_help(_widened(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The commands, then the few options that go with none of them."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, command.short_help or "") for name, command in commands if not command.hidden]
        _write(formatter, {"Commands": rows, "Options": list(chain(*_records(self, ctx).values()))})


def _widened(ctx: Any) -> Any:
    ctx.terminal_width = shutil.get_terminal_size().columns - 1
    return ctx


def _records(command: Any, ctx: Any) -> dict[str, list[Row]]:
    panels: dict[str, list[Row]] = {name: [] for name in (_ARGUMENTS, *PANELS)}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None:
            argument = parameter.param_type_name == "argument"
            panels[_ARGUMENTS if argument else _PANEL_OF.get(parameter.name, OTHER)].append(record)
    return panels


def _write(formatter: Any, panels: Mapping[str, Sequence[Row]]) -> None:
    """Titled lists of terms and what they mean."""
    narrow = formatter.width < _NARROW
    wide = 4 if narrow else min(_TERM, max(len(term) for rows in panels.values() for term, _ in rows)) + 2
    for title, rows in panels.items():
        if rows:
            formatter.write(f"\n{_styled(title, bold=True)}\n")
        for term, meaning in rows:
            _write_row(formatter, term, meaning, wide, narrow=narrow)


def _write_row(formatter: Any, term: str, meaning: str, wide: int, *, narrow: bool) -> None:
    lines = textwrap.wrap(meaning, formatter.width - wide - 2, break_on_hyphens=False) or [""]
    head = f"  {_styled(term, fg='cyan')}"
    if narrow or len(term) > wide - 2:
        formatter.write(f"{head}\n")
    else:
        formatter.write(f"{head}{' ' * (wide - len(term))}{lines.pop(0)}".rstrip(" ") + "\n")
    for line in lines:
        formatter.write(f"{' ' * (wide + 2)}{line}".rstrip(" ") + "\n")


def _styled(text: str, **style: Any) -> str:
    return typer.style(text, **style) if is_terminal(sys.stdout) and not os.environ.get("NO_COLOR") else text
