from __future__ import annotations

import pytest

from normswap.errors import OptionError
from normswap.modules.path_ranges import collapse, local_names, matches, spans


def names(paths: list[str], *keys: object, **options: bool) -> list[str]:
    chosen = keys or (lambda path: 0,)
    return [run.name for run in collapse(paths, lambda path: path, *chosen, **options)]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        (["0", "1", "2"], "{0..2}"),
        (["1", "4", "7", "10"], "{1..10..3}"),
        (["0", "5"], "{0,5}"),
        (["3", "1", "2", "7"], "{1..3,7}"),
        (["0", "2", "5", "9", "14", "20"], "{0,2,5,9,14,20}"),
    ],
)
def test_numbers_are_told_briefly(numbers: list[str], text: str) -> None:
    assert spans(numbers) == text


def test_blocks_collapse_along_the_block_number_in_order_of_their_first_layer() -> None:
    paths = ["bn1"] + [f"layer1.{i}.bn{j}" for i in range(3) for j in (1, 2)]
    assert names(paths) == ["bn1", "layer1.{0..2}.bn1", "layer1.{0..2}.bn2"]


def test_every_path_stays_in_exactly_one_run() -> None:
    paths = [f"a.{i}.b{j}.norm" for i in range(4) for j in range(3)] + ["a.9.norm", "norm", ""]
    runs = collapse(paths, lambda path: path, lambda path: 0)
    assert sorted(path for run in runs for path in run.items) == sorted(paths)


def test_layers_of_different_kinds_stay_apart() -> None:
    paths = ["layer.0.bn", "layer.1.bn", "layer.2.bn"]
    assert names(paths, lambda path: path == "layer.1.bn") == ["layer.{0,2}.bn", "layer.1.bn"]


def test_a_looser_key_joins_neighbours_only() -> None:
    paths = ["f.0.n", "f.1.n", "f.2.n", "g.0.n", "g.5.n"]
    assert names(paths, lambda path: path, lambda path: 0) == ["f.{0..2}.n", "g.0.n", "g.5.n"]


def test_a_row_for_each_layer_on_request() -> None:
    assert names(["a.0", "a.1"], together=False) == ["a.0", "a.1"]


def test_ten_thousand_layers_are_one_row() -> None:
    assert names([f"features.{i}" for i in range(1, 30_000, 3)]) == ["features.{1..29998..3}"]


def test_neighbours_are_called_by_their_local_names() -> None:
    assert local_names("the output of layer1.0.conv1 is used", "layer1.0.bn1") == "the output of conv1 is used"
    assert local_names("the output of conv1 is used", "bn1") == "the output of conv1 is used"


PATHS = [
    *(f"layer3.{i}.bn{j}" for i in range(36) for j in (1, 2)),
    *(f"features.{i}" for i in (0, 3, 7, 8, 14, 17, 20, 24)),
    *(f"[red].{i}.norm" for i in range(3)),
    *(f"denselayer{i}.{j}.norm" for i in range(1, 13) for j in (1, 4, 9)),
    *(f"a.{i:02}.x" for i in range(12)),
    "bn1",
    "",
]


@pytest.mark.parametrize("key", [len, lambda path: path[-1:], lambda path: hash(path) % 3, lambda path: 0])
def test_the_name_of_a_row_is_a_pattern_for_its_layers_and_no_other(key: object) -> None:
    for run in collapse(PATHS, lambda path: path, key):
        assert {path for path in PATHS if matches(run.name or "(root)", path)} == set(run.items), run.name


@pytest.mark.parametrize(
    ("pattern", "path", "covered"),
    [
        ("layer3.{0..35}.bn1", "layer3.35.bn1", True),
        ("layer3.{0..35}.bn1", "layer3.36.bn1", False),
        ("layer3.{0..35}", "layer3.7.bn1", True),
        ("layer{3,4}", "layer4", True),
        ("layer{3,4}", "layer34", False),
        ("x.{1..28..3}", "x.7", True),
        ("x.{1..28..3}", "x.8", False),
        ("*.{12}.*", "x.12.2.bn", True),
        ("*{2}.bn", "x12.bn", False),
        ("*.{2}.*", "a.2.7.bn", True),
        ("b[nx].{0..2}", "bx.2", True),
        ("{0..2}", "1", True),
        ("{a,b}.0", "{a,b}.0", True),
        ("{a,b}.0", "a.0", False),
    ],
)
def test_a_range_in_a_pattern_stands_for_whole_numbers(pattern: str, path: str, covered: bool) -> None:
    assert matches(pattern, path) is covered


@pytest.mark.parametrize("pattern", ["x.{5..2}", "x.{0..9..0}", "x.{0..100000000}"])
def test_a_range_without_numbers_or_without_end_is_an_error(pattern: str) -> None:
    with pytest.raises(OptionError, match="no range of numbers"):
        matches(pattern, "x.1")
