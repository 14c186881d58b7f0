"""Networks of foreign packages: is every norm found, converted rightly, saved and reverted? Print a table by package.

    python benchmarks/zoo.py [--only PATTERN ...] [--keep build/zoo.jsonl] [--write docs/coverage.md]
    python benchmarks/zoo.py --install  # prints the command that installs the packages

The packages and their networks stand in zoo_networks.txt. What is not installed is left out, and named. Some packages
pin versions that they do not need, so that they are best installed without what they depend on (`--install` names what
they import of it), into an environment of its own.

Each network runs in a process of its own and gets random weights and randomised running statistics. Of each: the norms
with batch statistics that its modules hold, counted without normswap; those that `inspect` lists or names as not to be
converted; how many `plan` folds without and with inputs; the largest relative error of `fused`, and the batch norms
that still run in it; whether a converted network gives after `save` and `load` what it gave before, and after `revert`
holds the original's tensors to the bit; whether it is finite after `calibrate`.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import multiprocessing
import re
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn
from zoo_checks import Row, examined, known_after, told

import normswap


@dataclass(frozen=True)
class Package:
    """install: what pip is told to install, the package first. setup: Python that its networks need. networks: pairs of
    expressions, of the network and of the positional arguments of its forward."""

    install: str
    setup: str
    networks: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return self.install.split()[0]


def packages() -> list[Package]:
    text = Path(__file__).with_name("zoo_networks.txt").read_text("utf-8")
    return [package_of(*part.partition("]\n")[::2]) for part in re.split(r"^\[", text, flags=re.MULTILINE)[1:]]


def package_of(install: str, text: str) -> Package:
    lines = [line for line in text.splitlines() if line]
    setup = [line.removeprefix(">>> ") for line in lines if line.startswith(">>> ")]
    inputs, networks = "image(64)", []
    for line in lines[len(setup) :]:
        network, _, given = line.partition(" | ")
        inputs = given or inputs
        networks.append((network, inputs))
    return Package(install, "\n".join(setup), tuple(networks))


def apart(work: Callable[[], Row], limit: float, otherwise: Row) -> Row:
    """Run in a process of its own, which may crash or hang."""
    here, there = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        try:
            row = work()
        except BaseException as error:  # a stranger's code may do anything, such as to exit
            row = otherwise
            row.problems.append(told(error))
        there.send(asdict(row))

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    there.close()
    try:
        if here.poll(limit):
            return Row(**here.recv())
        otherwise.problems.append(f"not done after {limit:.0f} s")
    except EOFError:
        process.join()
        otherwise.problems.append(f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()
    return otherwise


def all_of(package: Package, done: Collection[tuple[str, str]], keep: Path, limit: float, most: int | None) -> None:
    """Examine the networks of a package that are not in `done`, and append a line for each to the file `keep`."""
    lines = [line for line in package.networks[:most] if (package.name, line[0]) not in done]
    try:
        known, broken = known_after(package.setup) if lines else {}, ""
    except Exception as error:
        known, broken = {}, told(error)
    for line in lines:
        row = Row(package.name, line[0], problems=[broken] if broken else [])
        row = row if broken else apart(lambda r=row, x=line: examined(r, x, known), limit, row)
        with keep.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(json.dumps(asdict(row)), file=sys.stderr, flush=True)


def rows_in(file: Path) -> list[Row]:
    rows = [Row(**json.loads(line)) for line in file.read_text("utf-8").splitlines()]
    return list({(row.package, row.network): row for row in rows}.values())


def version(package: Package) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package.name)
    return None


def table(rows: list[Row], versions: Mapping[str, str]) -> str:
    lines = [
        "| package | networks | norms | found | folded without inputs | with | prescaled | not convertible, named "
        "| largest error of `fused` | loaded equal | reverted exactly | calibrated, finite |",
        "|---|" + "---:|" * 11,
    ]
    names = sorted({row.package for row in rows}, key=str.lower)
    parts = [(f"{name} {versions.get(name, '')}", [r for r in rows if r.package == name]) for name in names]
    for name, part in [*parts, ("**all**", rows)]:
        count = {k: sum(getattr(r, k) for r in part) for k in ("held", "found", "named", "folded", "folded_with")}
        yes = {k: sum(getattr(r, k) for r in part) for k in ("loaded", "reverted", "calibrated")}
        worst = max((r.error for r in part), default=0.0)
        lines.append(
            f"| {name} | {len(part)} | {count['held']} | {count['found']} | {count['folded']} | {count['folded_with']} "
            f"| {count['found'] - count['folded_with']} | {count['named']} | {worst:.1e} "
            f"| {yes['loaded']} | {yes['reverted']} | {yes['calibrated']} |"
        )
    return "\n".join(lines)


def summary(rows: list[Row], absent: list[str]) -> str:
    total = {k: sum(getattr(r, k) for r in rows) for k in ("held", "found", "named")}
    missed, running = sum(len(r.missed) for r in rows), sum(r.left_running for r in rows)
    problems = [f"- {r.package}, `{r.network}`: {'; '.join(r.problems)}" for r in rows if r.problems]
    text = (
        f"{len(rows)} networks with BN of {len({r.package for r in rows})} packages; of {total['held']} norms "
        f"{total['found']} were found, {total['named']} named as not convertible, {missed} passed over; in the fused "
        f"networks {running} batch norms ran. {sum(r.random for r in rows)} networks draw random numbers, so that "
        "their outputs were not compared."
    )
    text += f"\n\nNot installed, and left out: {', '.join(absent)}." if absent else ""
    return text + ("\n\nWith problems:\n\n" + "\n".join(problems) if problems else "\n\nNone with problems.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["*"], help="shell patterns over packages, such as 'tor*'")
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path("build/zoo.jsonl"),
        help="results; what is in it without a problem is not run again",
    )
    parser.add_argument("--limit", type=float, default=180, help="seconds for a network")
    parser.add_argument("--most", type=int, help="networks of each package")
    parser.add_argument("--install", action="store_true", help="print the command that installs the packages")
    parser.add_argument("--write", type=Path, help="file whose part between zoo marks is replaced")
    options = parser.parse_args()
    if options.install:
        print("pip install --no-deps", *dict.fromkeys(word for p in packages() for word in p.install.split()))
        return
    chosen = [p for p in packages() if any(fnmatch.fnmatch(p.name, x) for x in options.only)]
    versions = {p.name: found for p in chosen if (found := version(p))}
    sys.path.remove(str(Path(__file__).parent))  # numba asks for a package that is called as a script here
    sys.modules.pop("coverage")
    options.keep.parent.mkdir(parents=True, exist_ok=True)
    options.keep.touch()
    warm = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    normswap.convert(warm, "gn", groups=2)  # imports what the processes would each import anew
    for package in (p for p in chosen if p.name in versions):
        done = {(row.package, row.network) for row in rows_in(options.keep) if not row.problems}
        process = multiprocessing.get_context("fork").Process(
            target=all_of, args=(package, done, options.keep, options.limit, options.most)
        )
        process.start()
        process.join()
    lines = {(p.name, line[0]) for p in chosen for line in p.networks}
    rows = [r for r in rows_in(options.keep) if (r.package, r.network) in lines and (r.held or r.problems)]
    text = f"{summary(rows, [p.name for p in chosen if p.name not in versions])}\n\n{table(rows, versions)}"
    print(text)
    if options.write:
        begin, end = "<!-- zoo:begin -->", "<!-- zoo:end -->"
        page = options.write.read_text("utf-8")
        head, tail = page.partition(begin)[0], page.partition(end)[2]
        options.write.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}", "utf-8")


if __name__ == "__main__":
    main()
