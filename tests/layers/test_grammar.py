"""Configs: the grammar that spells them, their dict form, their defaults, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structattn.layers import (
    KINDS,
    AttentionConfig,
    BilinearAttention,
    BilinearMLRConfig,
    BTTConfig,
    ButterflyConfig,
    GlobalSlidingWindowAttention,
    GlobalSlidingWindowConfig,
    KroneckerConfig,
    LowRankConfig,
    MLRAttention,
    MLRConfig,
    MonarchConfig,
    SlidingWindowAttention,
    SlidingWindowConfig,
    StandardAttention,
    StandardConfig,
    as_config,
    build_attention,
    config_from_dict,
    parse_attention,
)
from structattn.layers.grammar import parse_saved_attention
from structattn.ops.hierarchy import Hierarchy, parse_ranks
from structattn.structures import BTT, MLR, Butterfly, Kronecker, LowRank, Monarch
from tests.layers.cases import SPELLINGS

EXAMPLES = {
    "standard": StandardConfig(),
    "standard:1": StandardConfig(heads=1),
    "standard+qk_norm=false+scale=8/r": StandardConfig(scale="8/r", qk_norm=False),
    "swa:128": SlidingWindowConfig(128),
    "gswa:128|32": GlobalSlidingWindowConfig(128, 32),
    "mlr": MLRConfig(),
    "mlr:32|8|6|4|4|4|4|2": MLRConfig((32, 8, 6, 4, 4, 4, 4, 2)),
    "mlr:8x8": MLRConfig((8,) * 8),
    "mlr:64": MLRConfig((64,)),
    "mlr+levels=4": MLRConfig(levels=4),
    "mlr:8|8|16+block_sizes=*|96|48+gains=mean": MLRConfig((8, 8, 16), block_sizes=(None, 96, 48), gains="mean"),
    "mlr+paper": MLRConfig(paper=True),
    "mlr:16|8|8+paper": MLRConfig((16, 8, 8), paper=True),
    "mlr:16|16+gains=none+level_weight=1+paper": MLRConfig((16, 16), gains="none", level_weight="1", paper=True),
    "mlr:12+value_ranks=16": MLRConfig((12,), value_ranks=(16,)),
    "mlr+frequencies=slow_far": MLRConfig(frequencies="slow_far"),
    "standard+kv_heads=2": StandardConfig(kv_heads=2),
    "mlr:16|16|32+windows=*|512|128": MLRConfig((16, 16, 32), windows=(512, 128)),
    "mlr:64+windows=128": MLRConfig((64,), windows=(128,)),
    "mlr:16|48+windows=512|64+value_ranks=0|64": MLRConfig((16, 48), windows=(512, 64), value_ranks=(0, 64)),
    "mlr:8|8|16+block_sizes=*|96|48+value_ranks=16|16|0": MLRConfig(
        (8, 8, 16), block_sizes=(None, 96, 48), value_ranks=(16, 16, 0)
    ),
    "mlr:16|48+windows=512|64+sinks=4": MLRConfig((16, 48), windows=(512, 64), sinks=4),
    "mlr+sinks=4": MLRConfig(sinks=4),
    "mlr:16x4+value_ranks=16x4": MLRConfig((16,) * 4, value_ranks=(16,) * 4),
    "lowrank": LowRankConfig(),
    "lowrank:64": LowRankConfig(64),
    "bmlr:16|8|4|4": BilinearMLRConfig((16, 8, 4, 4)),
    "btt": BTTConfig(),
    "btt+paper": BTTConfig(paper=True),
    "btt:2+side=query": BTTConfig(2, side="query"),
    "btt+factors=16x32|8x64": BTTConfig(factors=((16, 32), (8, 64))),
    "monarch:16+normalize=false": MonarchConfig(16, normalize=False),
    "kronecker:16x16|2x2": KroneckerConfig(((16, 16), (2, 2))),
    "butterfly+norm=none": ButterflyConfig(norm="none"),
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_spelling_and_config_are_each_other(text: str) -> None:
    assert parse_attention(text) == EXAMPLES[text]
    assert str(EXAMPLES[text]) == text


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("mlr:8|8|8|8|8|8|8|8", "mlr:8x8"),
        ("mlr:8x2", "mlr:8|8"),
        ("mlr:32,8,6,4,4,4,4,2", "mlr:32|8|6|4|4|4|4|2"),
        ("gswa:128,32", "gswa:128|32"),
        ("mlr:8,8+block_sizes=*,4", "mlr:8|8+block_sizes=*|4"),
        ("mlr:16,16,32+windows=512,128", "mlr:16|16|32+windows=*|512|128"),
        ("mlr:16,16,32+windows=1024,512,128", "mlr:16|16|32+windows=1024|512|128"),
        ("mlr:8,8+value_ranks=8x2+windows=4", "mlr:8|8+windows=*|4+value_ranks=8|8"),
        ("btt:1", "btt"),
        (" swa:8 ", "swa:8"),
        ("swa+window=8", "swa:8"),
        ("mlr+gains=mean+levels=2", "mlr+levels=2+gains=mean"),
        ("mlr+gains=none+level_weight=1/sqrt(r_l)+frequencies=per_level", "mlr"),
        ("mlr+gains=mean+level_weight=1/r_l+frequencies=whole+paper", "mlr+paper"),
        ("mlr+paper=true+basis=true", "mlr+basis+paper"),
        ("mlr+paper=false", "mlr"),
        ("mlr:16,16,32v@w512,128", "mlr:16|16|32+windows=*|512|128+value_ranks=16|16|32"),
        ("mlr:16,16,32v32,32,0@w1024,512,128", "mlr:16|16|32+windows=1024|512|128+value_ranks=32|32|0"),
        ("mlr:16,16v32,0@64", "mlr:16|16+block_sizes=*|32+value_ranks=32|0"),
        ("mlr:12v16", "mlr:12+block_sizes=*+value_ranks=16"),
        ("mlr:64v@w192+4", "mlr:64+windows=192+value_ranks=64+sinks=4"),
        ("mlr:8,8v@w192+4+basis", "mlr:8|8+basis+windows=*|192+value_ranks=8|8+sinks=4"),
    ],
)
def test_other_spellings(text: str, same: str) -> None:
    assert str(parse_attention(text)) == same


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Anything that a field of this type may hold."""
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    number = st.integers(1, 300)
    pair = st.tuples(number, number)
    known = {
        int: number,
        bool: st.booleans(),
        tuple[int, ...]: st.lists(number, min_size=1, max_size=5).map(tuple),
        tuple[tuple[int, int], ...]: st.lists(pair, min_size=1, max_size=3).map(tuple),
        tuple[tuple[int, int], tuple[int, int]]: st.tuples(pair, pair),
    }
    if hint in known:
        return known[hint]
    (inner,) = (arg for arg in get_args(hint) if arg is not type(None))
    return st.none() | values(inner)


@st.composite
def configs(draw: st.DrawFn) -> AttentionConfig:
    config = draw(st.sampled_from(list(KINDS.values())))
    if config is MLRConfig:  # its fields depend on one another
        ranks = draw(values(tuple[int, ...] | None))
        levels = None if ranks else draw(st.none() | st.integers(1, 8))
        reach = draw(st.sampled_from(("block_sizes", "windows", None))) if ranks else None
        fixed = {"ranks": ranks, "levels": levels, "block_sizes": None, "windows": None, "value_ranks": None}
        can_have_sinks = not ranks or (reach == "windows" and len(ranks) > 1)
        fixed["sinks"] = draw(st.none() | st.integers(1, 2)) if can_have_sinks else None
        if reach:
            fixed[reach] = (None, *(3 * 2**power for power in reversed(range(len(ranks) - 1))))
        if ranks and draw(st.booleans()):
            entry = st.integers(0, 90)
            fixed["value_ranks"] = draw(
                st.lists(entry, min_size=len(ranks), max_size=len(ranks)).map(tuple).filter(any)
            )
    else:
        fixed = {}
    others = {name: draw(values(hint)) for name, hint in config.field_types().items() if name not in fixed}
    return config(**fixed, **others)


@given(configs())
def test_every_config_survives_text_json_and_pickle(config: AttentionConfig) -> None:
    assert parse_attention(str(config)) == config
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert as_config(config) is config
    assert as_config(str(config)) == as_config(config.to_dict()) == config
    assert hash(config) == hash(parse_attention(str(config)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("standart", "attention must be one of standard, .* got 'standart'; did you mean 'standard'"),
        ("mrl:8x8", "did you mean 'mlr'"),
        ("", "attention must be one of"),
        ("swa", "swa needs window, as in 'swa:128'"),
        ("swa:", "swa takes window after the colon, as in 'swa:128'; got ''"),
        ("swa:wide", "window must be a positive integer, got 'wide'"),
        ("swa:0", "window must be a positive integer, got 0"),
        ("swa:-3", "window must be a positive integer, got '-3'"),
        ("gswa:128", r"gswa takes window\|global_rank after the colon"),
        ("gswa:128|32|4", r"gswa takes window\|global_rank after the colon"),
        ("butterfly:8", "butterfly takes no argument after the colon"),
        ("mlr:8|y", "expected a positive integer, got 'y'"),
        ("mlr:8|0", r"ranks\[1\] must be a positive integer, got 0"),
        ("mlr:0x8", r"ranks\[0\] must be a positive integer, got 0"),
        ("mlr:8x0", "ranks must not be empty"),
        ("mlr:8|8+levels=2", "levels must not be given with ranks"),
        ("mlr+block_sizes=*|8", "block_sizes need ranks"),
        ("mlr:8|8|8+block_sizes=*|8|3", "block_sizes must shrink and nest"),
        ("mlr+windows=8", "windows need ranks"),
        ("mlr+value_ranks=8|8", "value_ranks need ranks"),
        ("mlr:8|8+block_sizes=*|8+windows=8", "block_sizes or windows, not both"),
        ("mlr:8|8|8+windows=8|8", r"windows must shrink: windows\[2\] = 8 must be below windows\[1\] = 8"),
        ("mlr:8|8|8+windows=8", "windows must have one entry per level \\(3\\), got 1"),
        ("mlr:8|8+windows=0", r"windows\[0\] must be a positive integer, got 0"),
        ("mlr:8|8+value_ranks=8", "value_ranks must have one entry per level"),
        ("mlr:8|8+value_ranks=0|0", "value_ranks must sum to the width of the values"),
        ("mlr:8|8+value_ranks=8|-8", "expected a positive integer, got '-8'"),
        ("mlr+gain=none", "a field of mlr must be one of .* did you mean 'gains'"),
        ("mlr+gains=men", "gains must be one of mean, none, got 'men'; did you mean 'mean'"),
        ("mlr+gains", r"expected '\+field=value'"),
        ("mlr:8|8@64", "a hierarchy must say how it divides values"),
        ("mlr:8|8v@64/mean", r"gains of an attention follow as '\+gains=mean'"),
        ("mlr:8|8v8@w4", "value_ranks must have one entry per level"),
        ("mlr+gains=none+gains=mean", "gains is given twice"),
        ("mlr:8|8v@w16+4+sinks=4", "sinks is given twice"),
        ("mlr:8|8v@w4+4", "sinks must be below the smallest window 4, got 4"),
        ("mlr:8|8+block_sizes=*|8+sinks=4", "sinks need levels by window"),
        ("swa:8+4", "a field of swa must be one of"),
        ("swa:8+window=8", "window is given twice"),
        ("standard+qk_norm=yes", "qk_norm must be one of true, false, got 'yes'"),
        ("btt+side=left", "side must be one of auto, split, key, query"),
        ("btt+factors=16x32", "factors must hold 2"),
        ("kronecker:16", r"factors\[0\] must hold 2"),
    ],
)
def test_bad_spellings(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_attention(text)


def test_a_spelling_is_a_string() -> None:
    with pytest.raises(TypeError, match="must be spelt as a string, got 8"):
        parse_attention(8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 8}, "must name its kind"),
        ({"kind": "swaa", "window": 8}, "did you mean 'swa'"),
        ({"kind": "swa", "windw": 8}, "a field of swa must be one of window, .* did you mean 'window'"),
        ({"kind": "swa"}, "swa needs window"),
        ({"kind": "mlr", "ranks": []}, "ranks must not be empty"),
    ],
)
def test_bad_dicts(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "swa", "window": "8"}, "window must be a positive integer, got '8'"),
        ({"kind": "swa", "window": True}, "window must be a positive integer, got True"),
        ({"kind": "mlr", "ranks": "8|8"}, "ranks must be a sequence"),
        ({"kind": "mlr", "ranks": [8.0]}, r"ranks\[0\] must be a positive integer"),
        ({"kind": "mlr", "ranks": [8], "value_ranks": [8.0]}, r"value_ranks\[0\] must be a positive integer"),
        ({"kind": "mlr", "ranks": [8], "value_ranks": [False]}, r"value_ranks\[0\] must be a positive integer"),
        ({"kind": "standard", "qk_norm": 1}, "qk_norm must be True or False, got 1"),
    ],
)
def test_bad_types(values: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        config_from_dict(values)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        StandardConfig().heads = 2  # type: ignore[misc]
    assert dataclasses.replace(BTTConfig(), rank=2) == BTTConfig(2)


# --- what was saved before --------------------------------------------------------------------------------------------

_MLR = {"level_weight": "1/r_l", "qk_norm": True, "basis": False, "ranks": None, "levels": None, "block_sizes": None}
_MLR |= {"gains": "mean"}
MEANINGS = {
    "standard": {"kind": "standard", "heads": None, "qk_norm": True, "scale": "1/sqrt(r)"},
    "standard:1+scale=8/r": {"kind": "standard", "heads": 1, "qk_norm": True, "scale": "8/r"},
    "swa:128": {"kind": "swa", "window": 128, "qk_norm": True, "scale": "1/sqrt(r)"},
    "gswa:128|32": {"kind": "gswa", "window": 128, "global_rank": 32, "qk_norm": True, "scale": "1/sqrt(r)"},
    "mlr": {"kind": "mlr"} | _MLR,
    "mlr+levels=4": {"kind": "mlr"} | _MLR | {"levels": 4},
    "mlr:8x8": {"kind": "mlr"} | _MLR | {"ranks": [8] * 8},
    "mlr:8|8|16+block_sizes=*|96|48+gains=none": {"kind": "mlr"}
    | _MLR
    | {"ranks": [8, 8, 16], "block_sizes": [None, 96, 48], "gains": "none"},
    "mlr:4|2|2+gains=none+level_weight=1/sqrt(r)+basis=true": {"kind": "mlr"}
    | _MLR
    | {"ranks": [4, 2, 2], "gains": "none", "level_weight": "1/sqrt(r)", "basis": True},
}
"""Dict forms of spellings in version 0.1.0, whose files hold both."""


@pytest.mark.parametrize("text", MEANINGS)
def test_saved_spellings_and_dicts_keep_their_meaning(text: str) -> None:
    saved = parse_saved_attention(text)
    assert config_from_dict(MEANINGS[text]) == saved
    assert saved.to_dict().items() >= MEANINGS[text].items()
    if isinstance(saved, MLRConfig):
        assert saved.paper
        assert saved.windows is saved.value_ranks is None
    else:
        assert saved == parse_attention(text)


def test_saved_spellings_build_the_same_levels() -> None:
    levels = {
        "mlr:32|16|16": ((32, 16, 16), (None, 512, 256), (1.0, 0.5, 1 / 3)),
        "mlr:8|24|32+block_sizes=*|96|48+gains=none": ((8, 24, 32), (None, 96, 48), (1.0, 1.0, 1.0)),
    }
    for text, (ranks, sizes, gains) in levels.items():
        hierarchy = parse_saved_attention(text).hierarchy(64, 1024)  # type: ignore[attr-defined]
        assert hierarchy == Hierarchy(ranks, sizes, gains)


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("mlr:16|16|32+windows=512|128+value_ranks=32|16|16", "16|16|32v32|16|16@w*|512|128"),
        ("mlr:16|16|32+windows=512|128", "16|16|32v@w*|512|128"),
        ("mlr:16|16|32v64|0|0@w512|128", "16|16|32v64|0|0@w*|512|128"),
        ("mlr:16|16|32v@w512|128", "16|16|32v@w*|512|128"),
        ("mlr:32|16|16+block_sizes=*|64|32+gains=mean", "32|16|16v@128/mean"),
        ("mlr:32|16|16+paper", "32|16|16@1024/mean"),
        ("mlr:32|16|16+windows=64|16+paper", "32|16|16@w*|64|16/mean"),
        ("mlr:8|8+windows=32+value_ranks=16|48", "8|8v16|48@w*|32"),
    ],
)
def test_spellings_build_their_levels(text: str, levels: str) -> None:
    config = parse_attention(text)
    assert isinstance(config, MLRConfig)
    assert str(config.hierarchy(64, 1024)) == levels


def test_queries_and_keys_may_be_narrower_than_values() -> None:
    layer = build_attention("mlr:4|8+windows=16+value_ranks=8|24", 64, 2, 128)
    assert isinstance(layer, MLRAttention)
    assert (layer.head_dim, layer.value_dim) == (12, 32)
    x = torch.randn(2, 20, 64)
    assert layer(x).shape == x.shape


def test_key_value_heads_of_an_attention_replace_those_of_the_model() -> None:
    assert build_attention("standard+kv_heads=2", 64, 4, 128, kv_heads=4).kv_heads == 2
    with pytest.raises(ValueError, match="kv_heads must divide heads = 4, got 3"):
        build_attention("standard+kv_heads=3", 64, 4, 128)


# --- from config to layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "layer", "structure"),
    [
        ("standard", StandardAttention, None),
        ("standard:1", StandardAttention, None),
        ("swa:128", SlidingWindowAttention, None),
        ("gswa:128|32", GlobalSlidingWindowAttention, None),
        ("mlr", MLRAttention, None),
        ("mlr:8x8", MLRAttention, None),
        ("mlr+levels=2", MLRAttention, None),
        ("mlr:16|48+windows=8+value_ranks=48|16", MLRAttention, None),
        ("lowrank:64", BilinearAttention, LowRank),
        ("bmlr", BilinearAttention, MLR),
        ("bmlr:16|8|4|4", BilinearAttention, MLR),
        ("btt:2", BilinearAttention, BTT),
        ("monarch", BilinearAttention, Monarch),
        ("kronecker", BilinearAttention, Kronecker),
        ("butterfly", BilinearAttention, Butterfly),
    ],
)
def test_every_form_builds(spelling: str, layer: type, structure: type | None) -> None:
    built = build_attention(spelling, 128, 2, 64)
    assert type(built) is layer
    if structure is not None:
        assert isinstance(built, BilinearAttention)
        assert type(built.structure) is structure
        assert built.structure.heads == 2
        assert built.structure.normalize
    assert built(torch.randn(1, 5, 128)).shape == (1, 5, 128)
    assert repr(built)


@pytest.mark.parametrize(
    ("dim", "ours", "papers"),
    [(16, (4, 4), (2, 8)), (32, (4, 8), (4, 8)), (48, (6, 8), (6, 8)), (64, (8, 8), (4, 16)), (256, (16, 16), (8, 32))],
)
def test_the_factors_of_btt_by_default_and_in_the_paper(dim: int, ours: Any, papers: Any) -> None:
    """The paper's code takes the smallest divisor strictly above the root; they differ at square widths."""
    for spelling, factors in {"btt": ours, "btt+paper": papers}.items():
        layer = build_attention(spelling, dim, 4, 16)
        assert layer.structure.factors == (factors, factors)
    given = build_attention(f"btt+paper+factors=2x{dim // 2}|4x{dim // 4}", dim, 4, 16)
    assert given.structure.factors == ((2, dim // 2), (4, dim // 4))


def test_btt_saved_before_the_papers_factors_keeps_its_own() -> None:
    saved = {name: value for name, value in BTTConfig().to_dict().items() if name != "paper"}
    assert config_from_dict(saved) == BTTConfig()
    assert parse_saved_attention("btt") == BTTConfig()


def test_every_kind_is_built_in_these_tests() -> None:
    assert {parse_attention(spelling).kind for spelling in SPELLINGS} == set(KINDS)


def test_bilinear_defaults_are_those_of_the_structure() -> None:
    """A layer made by hand and one made from a config agree on norm and scale."""
    for spelling, matrix in {
        "lowrank": LowRank(16, 16, 4, heads=4),
        "bmlr:3|2|1": MLR(16, 16, (3, 2, 1), heads=4),
        "btt": BTT(16, 16, heads=4),
    }.items():
        by_hand, built = BilinearAttention(matrix), build_attention(spelling, 16, 4, 16)
        assert isinstance(built, BilinearAttention)
        assert (by_hand.norm, by_hand.scales, by_hand.side) == (built.norm, built.scales, built.side)


@pytest.mark.parametrize(
    ("spelling", "shape", "message"),
    [
        ("mlr:2|2+windows=3+value_ranks=2|3", {}, r"value_ranks must sum to the values' width 4, got 2\|3 = 5"),
        ("standard", {"heads": 3}, "heads must divide dim = 16 unless head_dim is given, got 3"),
        ("standard:3", {}, "heads must divide .*16.* got 3"),
        ("mlr:8", {}, "ranks must sum to the head width 4, got 8 = 8; 8 levels are spelt mlr[+]levels=8"),
        ("mlr:4x4", {}, r"ranks must sum to the head width 4, got 4\|4\|4\|4 = 16"),
        ("gswa:8|4", {}, "global_rank must be below the head width 4, got 4"),
        ("btt+factors=4x4|4x8", {}, "factors"),
        ("kronecker:4x4|2x2", {}, r"factors must multiply to 16 x 16, got 4x4\|2x2 = 8 x 8"),
        ("monarch:3", {}, "blocks must divide dim_out=16, got 3"),
        ("butterfly", {"dim": 12}, "dim must be a power of two"),
        ("standard", {"context_length": 0}, "context_length must be a positive integer"),
        ("standard", {"head_dim": 0}, "head_dim must be a positive integer"),
        ("lowrank", {"kv_heads": 3}, "kv_heads must divide heads = 4, got 3"),
    ],
)
def test_shapes_that_do_not_fit(spelling: str, shape: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_attention(spelling, **({"dim": 16, "heads": 4, "context_length": 16} | shape))


def test_a_head_width_of_its_own() -> None:
    for spelling in ("standard", "mlr", "swa:4", "gswa:4|2", "btt", "lowrank"):
        layer = build_attention(spelling, 16, 4, 16, head_dim=6)
        assert layer.value_dim == 6
        assert layer(torch.randn(1, 5, 16)).shape == (1, 5, 16)
    one_head = build_attention("standard:1", 16, 4, 16, head_dim=6)
    assert (one_head.heads, one_head.value_dim) == (1, 24)


# --- one reader of ranks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["8", "8|8", "8,8", "8x4", "16|8|4|4", "16,8|4,4", " 8 | 4", "1x1"])
def test_ranks_mean_the_same_everywhere(text: str) -> None:
    ranks = parse_ranks(text)
    for kind in ("mlr", "bmlr"):
        assert parse_attention(f"{kind}:{text}").ranks == ranks  # type: ignore[attr-defined]
    assert Hierarchy.parse(f"{text}@1024").ranks == ranks


@pytest.mark.parametrize("text", ["8|y", "8x", "x8", "8||8", "8x4|2", "8.5", "-8", "8x2x2", "8 8"])
def test_bad_ranks_are_refused_everywhere(text: str) -> None:
    readers = [parse_ranks, Hierarchy.parse, lambda ranks: parse_attention(f"mlr:{ranks}")]
    for read in readers:
        with pytest.raises(ValueError, match="expected a positive integer, got"):
            read(text)


@pytest.mark.parametrize("text", ["*|96|48", "*,96,48"])
def test_block_sizes_mean_the_same_everywhere(text: str) -> None:
    config = parse_attention(f"mlr:8|4|4+block_sizes={text}")
    assert isinstance(config, MLRConfig)
    assert config.block_sizes == Hierarchy.parse(f"8|4|4@{text}").block_sizes == (None, 96, 48)
    with pytest.raises(ValueError, match="expected a positive integer, got 'wide'"):
        parse_attention("mlr:8|4+block_sizes=*|wide")
