from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from ran import Cli, Ran
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import normswap


def by_hand(model: nn.Module, groups: int, eps: float = 1e-5) -> nn.Module:
    """The network of nets.py:tiny with GroupNorm, its statistics folded, from the formulas alone."""
    for i in (0, 3):
        conv, bn = model[i], model[i + 1]
        scale = 1 / torch.sqrt(bn.running_var + bn.eps)
        bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.detach()
        conv.weight = nn.Parameter(conv.weight.detach() * scale.view(-1, 1, 1, 1))
        conv.bias = nn.Parameter((bias - bn.running_mean) * scale)
        norm = nn.GroupNorm(groups, bn.num_features, eps=eps)
        norm.weight, norm.bias = nn.Parameter(bn.weight.detach() * (1 + eps) ** 0.5), bn.bias
        model[i + 1] = norm
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model.eval()(torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(5)))


def loaded(file: str | Path) -> nn.Module:
    return normswap.load(file, trust_code=True)


def files(folder: Path) -> list[str]:
    """What lies in the folder, hidden files too."""
    return sorted(p.name for p in folder.iterdir() if p.name not in ("nets.py", "__pycache__"))


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (("--budget", "0.1"), "--budget goes with --calibrate: add --calibrate FOLDER, photos or synthetic"),
        (("--size", "32", "--mean", "0"), "--size and --mean go with --calibrate: add --calibrate FOLDER"),
    ],
)
def test_the_flag_that_is_missing_is_named_with_those_that_were_given(cli: Cli, given: Any, what: str) -> None:
    ran = cli("convert", "nets.py:tiny", "--to", "gn", *given)
    assert (ran.code, ran.out) == (2, "")
    assert what in " ".join(ran.err.split())


def test_random_weights_and_stand_ins_are_one_contradiction_and_one_sentence(cli: Cli) -> None:
    ran = cli("convert", "nets.py:fresh", "--weights", "none", "--to", "gn", "--groups", "2", "--calibrate", "photos")
    assert ran.code == 1
    assert "nets.py:fresh has random weights and the statistics of a new network: no photos can keep" in ran.err
    assert "FOLDER estimates" not in ran.err
    assert cli("convert", "nets.py:fresh", "--weights", "none", "--to", "gn", "--groups", "2").code == 0


def test_the_file_holds_the_network_that_the_formulas_give(cli: Cli, nets: Any, folder: Path) -> None:
    ran = cli("convert", "nets.py:tiny", "--to", "gn", "--groups", 4, "--eps", "1e-5")
    assert ran.code == 0, ran.err
    assert files(folder) == ["tiny-gn.safetensors"]
    torch.testing.assert_close(outputs(loaded("tiny-gn.safetensors")), outputs(by_hand(nets.tiny(), 4)))


def test_what_changed_is_shown(cli: Cli) -> None:
    ran = cli("convert", "nets.py:residual", "--to", "gn", "--groups", 2)
    rows = {line.split()[0]: line for line in ran.out.splitlines() if line.startswith(("norm", "after"))}
    assert rows["norm"].endswith("folded")
    assert rows["after"].endswith("prescaled")
    assert "BatchNorm2d  gn (2 groups, eps 1)" in rows["norm"]
    assert "2 layers: 2 bn to gn" in ran.out
    assert "1 because its input is a sum" in ran.out
    assert "Self-check: passed, relative error" in ran.out
    assert "with 2 of 2 layers exercised" in ran.out
    assert "Written: residual-gn.safetensors, " in ran.out
    assert "Next: normswap verify residual-gn.safetensors --trust-code" in ran.out


def test_the_command_it_names_next_works(cli: Cli) -> None:
    ran = cli("convert", "nets.py:tiny", "--to", "ln", "-o", "with space.safetensors")
    line = next(line for line in ran.out.splitlines() if line.startswith("Next: "))
    assert cli(*shlex.split(line.removeprefix("Next: ").partition("   ")[0])[1:]).code == 0


def test_json_holds_the_plan_and_the_self_check(cli: Cli, nets: Any, folder: Path) -> None:
    ran = cli("convert", "nets.py:tiny", "--to", "gn", "--groups", 2, "--json")
    plan = normswap.plan(nets.tiny(), to="gn", groups=2, eps="auto")
    assert normswap.Plan.from_dict(ran.json["plan"]) == plan
    assert ran.json["self_check"]["passed"] is True
    assert ran.json["output"] == "tiny-gn.safetensors"
    assert ran.json["bytes"] == (folder / "tiny-gn.safetensors").stat().st_size


def test_a_dry_run_writes_nothing_and_needs_no_weights(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **kwargs: object) -> None:
        raise AssertionError("a dry run downloads nothing")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    ran = cli("convert", "resnet18", "--to", "gn", "--groups", 32, "--dry-run")
    assert ran.code == 0, ran.err
    assert "20 bn to gn" in ran.out
    assert "nothing was written; the result would be resnet18-gn.safetensors" in ran.out
    assert cli("convert", "nets.py:tiny", "--to", "ln", "--dry-run", "--json").json["dry_run"] is True
    assert files(folder) == []


def norms_of(file: str) -> dict[str, nn.Module]:
    kinds = (nn.GroupNorm, nn.BatchNorm2d)
    return {name: module for name, module in loaded(file).named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize(
    ("flags", "groups"),
    [
        (["--groups", "2"], [2, 2]),
        (["--groups", "auto"], [1, 1]),
        ([], [1, 1]),
        (["--channels-per-group", "4"], [2, 4]),
        (["--groups", "16", "--indivisible", "nearest"], [8, 16]),
        (["--channels-per-group", "16", "--indivisible", "nearest"], [1, 1]),
    ],
)
def test_group_options(cli: Cli, flags: list[str], groups: list[int]) -> None:
    assert cli("convert", "nets.py:tiny", "--to", "gn", *flags).code == 0
    assert [norm.num_groups for norm in norms_of("tiny-gn.safetensors").values()] == groups


def test_copy_carries_gamma_and_beta_over_and_leaves_the_weights(cli: Cli, nets: Any) -> None:
    ran = cli("convert", "nets.py:tiny", "--to", "gn", "--groups", 2, "--transfer", "copy")
    model, original = loaded("tiny-gn.safetensors"), nets.tiny()
    assert torch.equal(model[0].weight, original[0].weight)
    assert torch.equal(model[1].weight, original[1].weight)
    assert torch.equal(model[1].bias, original[1].bias)
    assert "Self-check: not run, gamma and beta alone were carried over" in ran.out


def test_reset_carries_nothing_over(cli: Cli, nets: Any) -> None:
    assert cli("convert", "nets.py:tiny", "--to", "gn", "--groups", 2, "--transfer", "reset").code == 0
    model = loaded("tiny-gn.safetensors")
    assert torch.equal(model[0].weight, nets.tiny()[0].weight)
    assert torch.all(model[1].weight == 1)
    assert torch.all(model[1].bias == 0)


@pytest.mark.parametrize(("text", "eps"), [("0.5", 0.5), ("auto", 1.0)])
def test_eps_scales_gamma(cli: Cli, nets: Any, text: str, eps: float) -> None:
    assert cli("convert", "nets.py:tiny", "--to", "gn", "--groups", 2, "--eps", text).code == 0
    torch.testing.assert_close(outputs(loaded("tiny-gn.safetensors")), outputs(by_hand(nets.tiny(), 2, eps=eps)))


def test_zero_init_residual_zeroes_the_last_norm_of_a_branch(cli: Cli) -> None:
    ran = cli("convert", "nets.py:residual", "--to", "gn", "--groups", 2, "--zero-init-residual")
    model = loaded("residual-gn.safetensors")
    assert torch.all(model.norm.weight == 0)
    assert torch.all(model.after.norm.weight != 0)
    assert "folded, γ = 0" in ran.out


def test_rules_decide_layer_by_layer(cli: Cli, folder: Path) -> None:
    ran = cli("convert", "nets.py:tiny", "--rule", "4=keep", "--rule", "*=gn", "--groups", 2)
    assert files(folder) == ["tiny-mixed.safetensors"]
    assert [type(norm) for norm in norms_of("tiny-mixed.safetensors").values()] == [nn.GroupNorm, nn.BatchNorm2d]
    kept = ran.out[ran.out.index("Kept") :]
    assert "4           1  bn    rule" in kept
    assert cli("convert", "nets.py:tiny", "--rule", "4=frozen", "--to", "ln").code == 0
    assert "FrozenBatchNorm" in type(loaded("tiny-ln.safetensors")[4]).__name__


def test_from_selects_the_norms_to_convert(cli: Cli) -> None:
    assert cli("convert", "nets.py:frozen", "--to", "ln", "--from", "frozen").code == 0
    assert [type(loaded("frozen-ln.safetensors")[i]) for i in (1, 3)] == [nn.GroupNorm, nn.BatchNorm2d]


def test_the_self_check_runs_on_the_input_given_or_not_at_all(cli: Cli, folder: Path) -> None:
    assert cli("convert", "nets.py:tiny", "--to", "ln", "--input", "1,3,20,20").code == 0
    ran = cli("convert", "nets.py:tiny", "--to", "ln", "--force", "--no-check")
    assert "Self-check: not run, not asked for" in ran.out
    wrong = cli("convert", "nets.py:tiny", "--to", "ln", "-o", "other.safetensors", "--input", "1,5,20,20")
    assert wrong.code == 1
    assert files(folder) == ["tiny-ln.safetensors"]


def test_weights_builder_arguments_and_seed_are_used(cli: Cli, nets: Any) -> None:
    torch.save({"state_dict": {f"module.{k}": v for k, v in nets.tiny(16, seed=9).state_dict().items()}}, "mine.pth")
    mine = ("convert", "nets.py:tiny", "--arg", "width=16", "--weights", "mine.pth")
    assert cli(*mine, "--to", "gn", "--groups", 4, "--eps", "1e-5").code == 0
    torch.testing.assert_close(outputs(loaded("tiny-gn.safetensors")), outputs(by_hand(nets.tiny(16, seed=9), 4)))
    common = ["convert", "nets.py:fresh", "--to", "ln"]
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        assert cli(*common, "--seed", seed, "-o", f"{name}.safetensors").code == 0
    a, b, c = (load_file(f"{name}.safetensors") for name in "abc")
    assert torch.equal(a["0.weight"], b["0.weight"])
    assert not torch.equal(a["0.weight"], c["0.weight"])


# --- undoing and converting again -------------------------------------------------------------------------------


def test_the_original_comes_back_bit_for_bit_as_a_plain_file(cli: Cli, nets: Any) -> None:
    assert cli("convert", "nets.py:tiny", "--to", "gn", "--groups", 4).code == 0
    ran = cli("convert", "tiny-gn.safetensors", "--to", "original", "--trust-code")
    assert ran.code == 0, ran.err
    assert "2 gn back to bn, bit for bit" in ran.out
    original, state = nets.tiny(), load_file("tiny-original.safetensors")
    assert state.keys() == original.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in original.state_dict().items())
    nets.tiny(seed=4).load_state_dict(state)
    with safe_open("tiny-original.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert cli("convert", "nets.py:tiny", "--weights", "tiny-original.safetensors", "--to", "ln").code == 0


def test_a_converted_file_converts_as_its_original_would(cli: Cli) -> None:
    assert cli("convert", "nets.py:tiny", "--to", "gn", "--groups", 4).code == 0
    again = cli("convert", "tiny-gn.safetensors", "--to", "ln", "--trust-code")
    assert again.code == 0, again.err
    assert cli("convert", "nets.py:tiny", "--to", "ln", "-o", "direct.safetensors").code == 0
    a, b = load_file("tiny-ln.safetensors"), load_file("direct.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    torch.testing.assert_close(outputs(loaded("tiny-ln.safetensors")), outputs(loaded("direct.safetensors")))
    assert cli("convert", "tiny-ln.safetensors", "--to", "original", "--trust-code").code == 0


def test_what_a_conversion_reads_is_never_written_over(cli: Cli, nets: Any, folder: Path) -> None:
    """By whatever name: the weights, a converted file, a link to one of them, a file among a factory's arguments."""
    save_file(nets.tiny().state_dict(), "w.safetensors")
    (folder / "link.safetensors").symlink_to("w.safetensors")
    os.link("w.safetensors", "same.safetensors")
    assert cli("convert", "nets.py:tiny", "--to", "gn", "-o", "net.safetensors").code == 0
    before = {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}
    given = ("convert", "nets.py:tiny", "--weights", "w.safetensors", "--to", "ln")
    for output in ("w.safetensors", "link.safetensors", "same.safetensors"):
        ran = cli(*given, "-o", output, "--force")
        assert ran.code == 1
        assert f"{output} is read by the same command" in ran.err
        assert "--force" not in ran.err
    for arguments in (["net.safetensors", "--to", "ln"], ["net.safetensors", "--to", "original"]):
        ran = cli("convert", *arguments, "--trust-code", "-o", "net.safetensors", "--force")
        assert (ran.code, "is read by the same command" in ran.err) == (1, True)
    ran = cli("convert", "nets.py:tiny", "--arg", "w=same.safetensors", "--to", "ln", "-o", "w.safetensors", "--force")
    assert "is read by the same command" in ran.err
    assert {p.name: p.read_bytes() for p in folder.glob("*.safetensors")} == before


def test_source_code_is_never_written_over(cli: Cli, folder: Path) -> None:
    before = (folder / "nets.py").read_text()
    ran = cli("convert", "nets.py:tiny", "--to", "gn", "-o", "nets.py", "--force")
    assert ran.code == 1
    assert "Name it nets.safetensors." in ran.err
    assert (folder / "nets.py").read_text() == before


@pytest.fixture
def trained(cli: Cli) -> str:
    """A converted file whose weights have moved since."""
    assert cli("convert", "nets.py:tiny", "--to", "gn", "--groups", 4).code == 0
    model = loaded("tiny-gn.safetensors")
    with torch.no_grad():
        model[0].weight += 0.5
    normswap.save(model, "trained.safetensors")
    return "trained.safetensors"


def test_a_trained_network_is_undone_approximately_and_only_on_request(cli: Cli, nets: Any, trained: str) -> None:
    refused = cli("convert", trained, "--to", "original", "--trust-code")
    assert refused.code == 1
    assert "changed since the conversion" in refused.err
    assert "--approximate" in refused.err
    ran = cli("convert", trained, "--to", "original", "--trust-code", "--approximate", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["approximate"] is True
    original = nets.tiny()
    std = torch.sqrt(original[1].running_var + original[1].eps).view(-1, 1, 1, 1)
    expected = original[0].weight.detach() + 0.5 * std
    torch.testing.assert_close(load_file("tiny-original.safetensors")["0.weight"], expected)


def test_a_trained_network_is_not_converted_again_behind_the_users_back(cli: Cli, trained: str) -> None:
    ran = cli("convert", trained, "--to", "ln", "--trust-code")
    assert ran.code == 1
    assert "Convert what it was made from in its place: normswap convert nets.py:tiny" in ran.err
    assert 'normswap.load("trained.safetensors")' in ran.err


def test_without_undo_the_source_is_the_way_back(cli: Cli) -> None:
    assert cli("convert", "nets.py:tiny", "--to", "gn", "--no-undo").code == 0
    ran = cli("convert", "tiny-gn.safetensors", "--to", "original", "--trust-code")
    assert ran.code == 1
    assert "Build the original again: nets.py:tiny" in ran.err


def test_only_a_converted_file_can_be_undone(cli: Cli) -> None:
    ran = cli("convert", "nets.py:tiny", "--to", "original")
    assert ran.code == 1
    assert "nets.py:tiny is not a file that normswap wrote" in ran.err


# --- errors -----------------------------------------------------------------------------------------------------


def pasted(cli: Cli, ran: Ran) -> list[Ran]:
    """Run each command that a message ends in."""
    commands = [line.strip() for line in ran.err.splitlines() if line.startswith("  normswap ")]
    return [cli(*shlex.split(command)[1:]) for command in commands]


def test_groups_that_do_not_divide_end_in_commands_that_work(cli: Cli) -> None:
    ran = cli("convert", "nets.py:odd", "--to", "gn", "--groups=8", "-o", "my [odd] one.safetensors", "--force")
    assert ran.code == 1
    assert "1 (BatchNorm2d): 12 channels do not divide into 8 groups; allowed groups: 1, 2, 3, 4, 6, 12" in ran.err
    assert "3 (BatchNorm2d): 20 channels do not divide into 8 groups; allowed groups: 1, 2, 4, 5, 10, 20" in ran.err
    assert "--groups=8 -o 'my [odd] one.safetensors' --force --indivisible nearest" in ran.err
    assert "--channels-per-group 4" in ran.err
    assert [again.code for again in pasted(cli, ran)] == [0, 0]


def test_where_no_size_fits_all_auto_is_offered(cli: Cli) -> None:
    ran = cli("convert", "nets.py:tiny", "--arg", "width=9", "--to", "gn", "--channels-per-group", "4", "--force")
    assert ran.code == 1
    assert "--groups auto" in ran.err
    assert "--channels-per-group 4 --groups" not in ran.err
    assert [again.code for again in pasted(cli, ran)] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--to NORM or --rule PATTERN=NORM"),
        (["--to", "gn", "--groups", "0"], "--groups"),
        (["--to", "gn", "--groups", "-4"], "--groups"),
        (["--to", "gn", "--groups", "many"], "--groups"),
        (["--to", "gn", "--channels-per-group", "0"], "--channels-per-group"),
        (["--to", "gn", "--groups", "2", "--channels-per-group", "2"], "exclude each other"),
        (["--to", "gn", "--indivisible", "round"], "--indivisible"),
        (["--to", "gn", "--transfer", "move"], "--transfer"),
        (["--to", "gn", "--eps", "-1"], "--eps"),
        (["--to", "gn", "--eps", "large"], "--eps"),
        (["--to", "gn", "--rule", "layer4"], "PATTERN=NORM"),
        (["--to", "gn", "--rule", "=gn"], "PATTERN=NORM"),
        (["--to", "gn", "--approximate"], "--approximate goes with --to original"),
        (["--to", "original", "--groups", "2"], "which --groups cannot change"),
        (["--to", "original", "--rule", "a=gn", "--eps", "1"], "which --eps and --rule cannot change"),
        (["--to", "gn", "--nonsense"], "No such option"),
    ],
)
def test_calls_that_make_no_sense_are_usage_errors(cli: Cli, folder: Path, arguments: list[str], said: str) -> None:
    ran = cli("convert", "nets.py:tiny", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert files(folder) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nets.py:tiny", "--to", "gm"], 2, "Did you mean gn?"),
        (["nets.py:tiny", "--rule", "*=groupnorm"], 2, "unknown norm 'groupnorm'"),
        (["nets.py:tiny", "--to", "gn", "--from", "batch"], 2, "unknown norm 'batch'"),
        (["nets.py:tiny", "--to", "gn", "--rule", "layer9.*=ln"], 2, "matches no layer to convert: 'layer9.*'"),
        (["nets.py:tiny", "--to", "ln", "--groups", "2"], 2, "groups apply to gn only"),
        (["nets.py:tiny", "--to", "gn", "--groups", "64"], 1, "fewer than 64 groups"),
        (["nets.py:tiny", "--to", "gn", "--arg", "width"], 2, "--arg needs KEY=VALUE"),
        (["nets.py:tiny", "--to", "gn", "--arg", "depth=3"], 1, "cannot be built"),
        (["nets.py:without_norm", "--to", "gn"], 1, "has no norm layer"),
        (["nets.py:suspicious", "--to", "gn"], 1, "overrides the forward"),
        (["resnet51", "--to", "gn"], 1, "Did you mean resnet50"),
        (["nets.py:tiny", "--to", "gn", "--weights", "missing.pth"], 1, "missing.pth does not exist"),
    ],
)
def test_input_that_cannot_be_used_gets_one_clear_message(
    cli: Cli, folder: Path, arguments: list[str], code: int, said: str
) -> None:
    ran = cli("convert", *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert said in ran.err
    assert ran.err.count("error: ") == 1
    assert "Traceback" not in ran.err
    assert files(folder) == []


def test_hints_speak_of_flags(cli: Cli) -> None:
    ran = cli("convert", "nets.py:suspicious", "--to", "gn")
    assert "--rule 'PATH=keep'" in ran.err
    assert cli("convert", "nets.py:suspicious", "--to", "gn", "--rule", "3=keep").code == 0


def test_an_unknown_norm_is_told_before_the_network_is_built(cli: Cli) -> None:
    assert "own words" not in cli("convert", "nets.py:chatty", "--to", "gm").err


def test_an_output_that_cannot_be_written_is_told_before_the_network_is_built(cli: Cli, folder: Path) -> None:
    (folder / "there.safetensors").write_text("mine")
    cases = {
        "there.safetensors": "--force replaces it",
        ".": "is a folder",
        "no/such/folder.safetensors": "the folder no/such does not exist",
        "nets.py/x.safetensors": "is not a folder",
        "net.pth": "Name it net.safetensors",
    }
    for output, said in cases.items():
        ran = cli("convert", "nets.py:chatty", "--to", "ln", "-o", output)
        assert ran.code == 1
        assert said in ran.err
        assert "own words" not in ran.err
    assert (folder / "there.safetensors").read_text() == "mine"
    assert cli("convert", "nets.py:chatty", "--to", "ln", "-o", "there.safetensors", "--force").code == 0


def test_a_failing_write_leaves_nothing_behind(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object = None) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    ran = cli("convert", "nets.py:tiny", "--to", "ln")
    assert ran.code == 1
    assert "tiny-ln.safetensors cannot be written: the disk is full" in ran.err
    assert files(folder) == []


def test_an_interrupted_write_leaves_nothing_behind(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(tensors: object, path: Path, metadata: object = None) -> None:
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    ran = cli("convert", "nets.py:tiny", "--to", "ln")
    assert (ran.code, ran.out) == (130, "")
    assert ran.err.endswith("interrupted; nothing was written\n")
    assert files(folder) == []


@pytest.mark.parametrize("place", ["normswap.planning.planner.plan", "normswap.planning.planner.inventory_of"])
def test_a_bug_is_called_one(cli: Cli, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(place, None)
    ran = cli("convert", "nets.py:tiny", "--to", "ln")
    assert ran.code == 1
    assert "error: this is a bug in normswap, please report it: TypeError: 'NoneType' object is not" in ran.err
    assert "Traceback" not in ran.err
    assert "Traceback" in cli("convert", "nets.py:tiny", "--to", "ln", "--verbose").err


class Runs:
    """Unpickled, it writes a file."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("was-run"),)


def test_code_in_a_pickle_runs_only_when_trusted(cli: Cli, nets: Any, folder: Path) -> None:
    torch.save({"state_dict": nets.tiny().state_dict(), "extra": Runs()}, "pickled.pth")
    common = ["convert", "nets.py:tiny", "--weights", "pickled.pth", "--to", "ln"]
    ran = cli(*common)
    assert ran.code == 1
    assert "--trust-pickle" in ran.err
    assert files(folder) == ["pickled.pth"]
    assert cli(*common, "--trust-pickle").code == 0
    assert files(folder) == ["pickled.pth", "tiny-ln.safetensors", "was-run"]


def test_weights_that_are_not_finite_pass_only_on_request(cli: Cli, nets: Any, folder: Path) -> None:
    state = nets.tiny().state_dict()
    state["7.bias"][0] = float("nan")
    torch.save(state, "nan.pth")
    common = ["convert", "nets.py:tiny", "--weights", "nan.pth", "--to", "ln", "--no-check"]
    ran = cli(*common)
    assert ran.code == 1
    assert "7.bias" in ran.err
    assert files(folder) == ["nan.pth"]
    assert cli(*common, "--allow-nonfinite").code == 0


def test_any_name_will_do(cli: Cli, folder: Path) -> None:
    (folder / "ün [red]folder").mkdir()
    name = "ün [red]folder/[bold] ñ.safetensors"
    ran = cli("convert", "nets.py:bracketed", "--to", "ln", "-o", name)
    assert ran.code == 0, ran.err
    assert f"Written: {name}, " in ran.out
    assert "[bold] norm" in ran.out
    assert cli("verify", name, "--trust-code").code == 0
    missing = cli("convert", "nets.py:bracketed", "--to", "ln", "-o", "[red]nowhere/x.safetensors")
    assert "the folder [red]nowhere does not exist" in missing.err
    assert "\x1b" not in cli("inspect", "no\x1b[31msuch").err


def test_quiet_prints_nothing_and_still_works(cli: Cli, folder: Path) -> None:
    ran = cli("convert", "nets.py:chatty", "--to", "ln", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert files(folder) == ["chatty-ln.safetensors"]
    assert cli("convert", "nets.py:chatty", "--to", "ln", "--quiet").err.startswith(
        "error: chatty-ln.safetensors exists"
    )


MASKED = """
import torch
from torch import nn


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.mask_token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x, mask=None):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x if mask is None else torch.where(mask[..., None], self.mask_token, x)
        return self.head(self.norm(x).mean(1))
"""


def test_what_no_run_showed_is_told_before_the_result(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "masked.py").write_text(MASKED, encoding="utf-8")
    ran = cli("convert", str(tmp_path / "masked.py") + ":Masked", "--to", "rms", "-o", "out.safetensors")
    assert ran.code == 0, ran.err
    assert "did not use mask_token" in ran.err
