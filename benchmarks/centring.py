"""LayerNorm to RMSNorm, exactly: which families of transformers can be centred, and how near the outputs stay.

    python benchmarks/centring.py [--fold-affine] [--models vit_tiny_patch16_224 ...] [--write docs/coverage.md]

Every network is built with random weights, and with gamma and beta of its norms drawn at random, so that each matters:
torchvision's `vit_*`, one small model of every family of timm that is a vision transformer, and language models of
transformers from a configuration of two blocks. Prints how many layer norms became RMSNorm, the relative difference of
the outputs in float32 and in float64, or the first reason why not. `--write` puts the table into a page.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normswap

BEGIN, END = "<!-- centring:begin -->", "<!-- centring:end -->"
TIMM = """
vit_tiny_patch16_224 vit_small_patch16_dinov3 vit_base_patch16_clip_224 vit_tiny_r_s16_p8_224
deit_tiny_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 beitv2_base_patch16_224 cait_xxs24_224
eva02_tiny_patch14_224 flexivit_small xcit_nano_12_p8_224 tnt_s_legacy_patch16_224 crossvit_tiny_240
volo_d1_224 pit_ti_224 convit_tiny twins_svt_small pvt_v2_b0 mixer_s32_224 gmixer_12_224 resmlp_12_224
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 hiera_tiny_224 mvitv2_tiny nest_tiny convnext_atto
visformer_tiny coat_tiny davit_tiny vit_so150m_patch16_reg4_gap_256 vit_relpos_small_patch16_224
vit_srelpos_small_patch16_224 vit_small_plus_patch16_dinov3 vit_wee_patch16_reg1_gap_256
naflexvit_base_patch16_gap samvit_base_patch16_224 aimv2_large_patch14_224 vit_5_base_patch16
""".split()
LANGUAGE: dict[str, dict[str, Any]] = {
    "GPT2Model": {"n_layer": 2, "n_embd": 48, "n_head": 4},
    "GPT2LMHeadModel": {"n_layer": 2, "n_embd": 48, "n_head": 4},
    "GPTNeoXModel": {},
    "GPTJModel": {"n_layer": 2, "n_embd": 48, "n_head": 4, "rotary_dim": 8},
    "OPTModel": {"word_embed_proj_dim": 48, "ffn_dim": 96},
    "PhiModel": {},
    "StableLmModel": {},
    "FalconModel": {},
    "Starcoder2Model": {"num_key_value_heads": 2},
    "BloomModel": {"n_layer": 2, "n_head": 4},
    "LlamaModel": {"num_key_value_heads": 2},
    "BertModel": {},
    "DistilBertModel": {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
    "ViTModel": {"image_size": 32, "patch_size": 8},
    "Dinov2Model": {"image_size": 28, "patch_size": 14, "mlp_ratio": 2},
}


def language(name: str) -> tuple[nn.Module, Any]:
    import transformers

    cls = getattr(transformers, name)
    usual = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1)
    config = cls.config_class(**{**usual, "vocab_size": 99, "use_cache": False, **special, **LANGUAGE[name]})
    words = torch.randint(2, 99, (2, 12))
    return cls(config), torch.randn(2, 3, *2 * (config.image_size,)) if hasattr(config, "image_size") else words


def networks(wanted: list[str] | None) -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    import timm
    import torchvision

    def of_timm(name: str) -> tuple[nn.Module, Any]:
        model = timm.create_model(name)
        return model, torch.randn(1, *model.pretrained_cfg["input_size"])

    vit = torchvision.models.VisionTransformer
    if wanted is None:
        yield "torchvision vit_*", lambda: (vit(32, 8, 3, 4, 48, 96), torch.randn(2, 3, 32, 32))
    for name in TIMM if wanted is None else wanted:
        if name not in LANGUAGE:
            yield f"timm {name}", lambda name=name: of_timm(name)
    for name in LANGUAGE if wanted is None else [name for name in wanted if name in LANGUAGE]:
        yield f"transformers {name}", lambda name=name: language(name)


def drawn(model: nn.Module) -> nn.Module:
    """With gammas, betas and whatever is 0 at the start drawn at random."""
    for module in model.modules():
        for own, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(parameter, float(own == "weight"), 0.3)
            elif not parameter.any():
                nn.init.normal_(parameter, 0, 0.1)
    return model.eval()


@torch.no_grad()
def output(model: nn.Module, x: Any) -> Tensor:
    found = model(x)
    found = found if isinstance(found, Tensor) else found[0]
    return found[0] if isinstance(found, (tuple, list)) else found


def difference(model: nn.Module, x: Any, fold: bool) -> float:
    made = normswap.convert(model, "rms", sources=["ln"], fold_affine=fold, example_inputs=x)
    a, b = output(model, x).double(), output(made, x).double()
    return float((a - b).norm() / a.norm())


def rows(wanted: list[str] | None, fold: bool) -> Iterator[str]:
    for name, build in networks(wanted):
        try:
            model, x = build()
        except Exception as error:  # a model that this version of the library has not
            yield f"| {name} | cannot be built: {type(error).__name__} | | |"
            continue
        model = drawn(model)
        count = sum(layer.spec.name == "ln" for layer in normswap.inspect(model, feeds=False).layers)
        try:
            error = difference(model, x, fold) if count else 0.0
            wide = copy.deepcopy(model).double()
            same = difference(wide, x.double() if x.is_floating_point() else x, fold) if count else 0.0
            yield f"| {name} | {count} | {error:.1g} | {same:.1g} |" if count else f"| {name} | none | | |"
        except normswap.PlanError as error:
            reason = error.problems[0].replace(": its input cannot be centred", "")
            yield f"| {name} | {len(error.problems)} of {count} refused, the first: {reason} | | |"
        except normswap.NormswapError as error:
            yield f"| {name} | {type(error).__name__}: {error.message} | | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fold-affine", action="store_true")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    lines = ["| network | layer norms | float32 | float64 |", "|---|---:|---:|---:|"]
    print("\n".join(lines))
    for line in rows(args.models, args.fold_affine):
        print(line, flush=True)
        lines.append(line)
    if args.write:
        before, _, rest = args.write.read_text("utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        args.write.write_text(before + BEGIN + "\n\n" + "\n".join(lines) + "\n\n" + END + after, "utf-8")


if __name__ == "__main__":
    main()
