from __future__ import annotations

import pytest

from normswap.cli.terminal.problem_lines import collapse, local_names, spans


def names(paths: list[str], *keys: object, **options: bool) -> list[str]:
    chosen = keys or (lambda path: 0,)
    return [run.name for run in collapse(paths, lambda path: path, *chosen, **options)]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        (["0", "1", "2"], "0-2"),
        (["1", "4", "7", "10"], "1,4..10"),
        (["0", "5"], "0,5"),
        (["3", "1", "2", "7"], "1-3,7"),
        (["0", "2", "5", "9", "14", "20"], "0,2,…,20"),
    ],
)
def test_numbers_are_told_briefly(numbers: list[str], text: str) -> None:
    assert spans(numbers) == text


def test_blocks_collapse_along_the_block_number_in_order_of_their_first_layer() -> None:
    paths = ["bn1"] + [f"layer1.{i}.bn{j}" for i in range(3) for j in (1, 2)]
    assert names(paths) == ["bn1", "layer1.[0-2].bn1", "layer1.[0-2].bn2"]


def test_every_path_stays_in_exactly_one_run() -> None:
    paths = [f"a.{i}.b{j}.norm" for i in range(4) for j in range(3)] + ["a.9.norm", "norm", ""]
    runs = collapse(paths, lambda path: path, lambda path: 0)
    assert sorted(path for run in runs for path in run.items) == sorted(paths)


def test_layers_of_different_kinds_stay_apart() -> None:
    paths = ["layer.0.bn", "layer.1.bn", "layer.2.bn"]
    assert names(paths, lambda path: path == "layer.1.bn") == ["layer.[0,2].bn", "layer.1.bn"]


def test_a_looser_key_joins_neighbours_only() -> None:
    paths = ["f.0.n", "f.1.n", "f.2.n", "g.0.n", "g.5.n"]
    assert names(paths, lambda path: path, lambda path: 0) == ["f.[0-2].n", "g.0.n", "g.5.n"]


def test_a_row_for_each_layer_on_request() -> None:
    assert names(["a.0", "a.1"], together=False) == ["a.0", "a.1"]


def test_ten_thousand_layers_are_one_row() -> None:
    assert names([f"features.{i}" for i in range(1, 30_000, 3)]) == ["features.[1,4..29998]"]


def test_neighbours_are_called_by_their_local_names() -> None:
    assert local_names("the output of layer1.0.conv1 is used", "layer1.0.bn1") == "the output of conv1 is used"
    assert local_names("the output of conv1 is used", "bn1") == "the output of conv1 is used"
