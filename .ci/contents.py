"""Compares what an sdist and a wheel hold with what git tracks: nothing is missing, and nothing else got in.

Command:   .ci/contents.py dist
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

UNPACKED = (".github/", ".pre-commit-config.yaml")  # what only the repository itself needs
INFO = {"METADATA", "RECORD", "WHEEL", "entry_points.txt"}


def main() -> None:
    """Compare, and end with an exit status of 1 where a file too many or too few was found."""
    folder = Path(sys.argv[1])
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    tracked = set(subprocess.check_output(["git", "ls-files"], text=True).splitlines())
    sound = [
        compare(sdist, in_sdist(sdist), {file for file in tracked if not file.startswith(UNPACKED)} | {"PKG-INFO"}),
        compare(wheel, in_wheel(wheel), expected_in_wheel(wheel, tracked)),
    ]
    sys.exit(not all(sound))


def in_sdist(path: Path) -> set[str]:
    """The files of an sdist, without the folder that they all are in."""
    with tarfile.open(path) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def in_wheel(path: Path) -> set[str]:
    """The files of a wheel."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename for info in archive.infolist() if not info.is_dir()}


def expected_in_wheel(path: Path, tracked: set[str]) -> set[str]:
    """The package, the recipes within it, the metadata, and each licence and notice."""
    about = "-".join(path.name.split("-")[:2]) + ".dist-info/"
    package = {file for file in tracked if file.startswith("normswap/")}
    recipes = {"normswap/_recipes/" + file.removeprefix("recipes/") for file in tracked if file.startswith("recipes/")}
    licences = {"LICENSE", *(file for file in package if Path(file).name == "NOTICE.md")}
    return package | recipes | {about + name for name in INFO} | {f"{about}licenses/{file}" for file in licences}


def compare(path: Path, found: set[str], expected: set[str]) -> bool:
    """Whether an archive holds what it should; what differs is printed."""
    for file in sorted(expected - found):
        print(f"{path.name}: missing: {file}")
    for file in sorted(found - expected):
        print(f"{path.name}: not tracked by git, or not to be packed: {file}")
    print(f"{path.name}: {len(found)} files, {path.stat().st_size / 1e6:.1f} MB")
    return found == expected


if __name__ == "__main__":
    main()
