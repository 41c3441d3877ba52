"""Each layer against its formula, written out densely in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from structattn import Hierarchy
from structattn.layers import (
    BilinearAttention,
    GlobalSlidingWindowAttention,
    MLRAttention,
    RotaryEmbedding,
    SlidingWindowAttention,
    StandardAttention,
    interface,
)
from structattn.layers.options import LayerKeywords, LayerOptions
from structattn.ops.key_span import KeySpan
from structattn.ops.standard import standard_attention
from structattn.structures import MLR, LowRank
from tests.layers.cases import CLOSE, CONTEXT, DIM, HEADS, build, tokens

F64 = torch.float64


def heads_of(x: Tensor, heads: int = HEADS) -> Tensor:
    """`(B, T, H·w)` as `(B, H, T, w)`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def projected(layer: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (heads_of(x @ getattr(layer, f"{name}_proj").weight.T) for name in "qkv")
    if layer.q_norm is not None:
        query = F.layer_norm(query, query.shape[-1:]) * layer.q_norm.weight
        key = F.layer_norm(key, key.shape[-1:]) * layer.k_norm.weight
    return query, key, value


def softmax_mix(score: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    return torch.softmax(score.masked_fill(~visible, -math.inf), -1) @ value


def joined(layer: torch.nn.Module, mixed: Tensor) -> Tensor:
    return mixed.transpose(1, 2).flatten(2) @ layer.out_proj.weight.T


def causal(length: int, window: int = 10**9) -> Tensor:
    i, j = torch.arange(length)[:, None], torch.arange(length)
    return (j <= i) & (i - j < window)


@pytest.mark.parametrize(
    ("scale", "factor"), [("1/sqrt(r)", 0.5), ("8/r", 2.0), ("1/r", 0.25), ("1", 1.0)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("qk_norm", ["true", "false"])
def test_standard(scale: str, factor: float, qk_norm: str) -> None:
    layer, x = build(f"standard+scale={scale}+qk_norm={qk_norm}"), tokens(2, 11)
    assert isinstance(layer, StandardAttention)
    query, key, value = projected(layer, x)
    expected = joined(layer, softmax_mix(factor * query @ key.mT, value, causal(11)))
    torch.testing.assert_close(layer(x), expected, **CLOSE)


def test_one_head_has_full_rank() -> None:
    layer = build("standard:1")
    assert (layer.heads, layer.head_dim) == (1, DIM)


def test_sliding_window() -> None:
    layer, x = build("swa:3"), tokens(2, 11)
    assert isinstance(layer, SlidingWindowAttention)
    query, key, value = projected(layer, x)
    expected = joined(layer, softmax_mix(query @ key.mT / 2, value, causal(11, 3)))
    torch.testing.assert_close(layer(x), expected, **CLOSE)


def test_global_and_sliding_window_is_a_sum_of_two_softmaxes() -> None:
    layer, x = build("gswa:5|3"), tokens(2, 11)
    assert isinstance(layer, GlobalSlidingWindowAttention)
    query, key, value = projected(layer, x)
    far = softmax_mix(query[..., :3] @ key[..., :3].mT / math.sqrt(3), value, causal(11))
    near = softmax_mix(query[..., 3:] @ key[..., 3:].mT, value, causal(11, 5))
    torch.testing.assert_close(layer(x), joined(layer, far + near), **CLOSE)


WEIGHTS: dict[str, Callable[[int, int], float]] = {
    "1/r_l": lambda rank, level: 1 / level,
    "1/sqrt(r_l)": lambda rank, level: level**-0.5,
    "1/r": lambda rank, level: 1 / rank,
    "1/sqrt(r)": lambda rank, level: rank**-0.5,
    "1": lambda rank, level: 1.0,
}


@pytest.mark.parametrize("gains", ["mean", "none"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_mlr_is_the_paper_s_sum_of_levels(weight: str, gains: str) -> None:
    """Block-diagonal products of each level, weighted, over the number of levels that a pair shares."""
    layer, x = build(f"mlr:2|1|1+paper+level_weight={weight}+gains={gains}"), tokens(2, 19)
    assert isinstance(layer, MLRAttention)
    query, key, value = projected(layer, x)
    score, shared = torch.zeros(2, HEADS, 19, 19, dtype=F64), torch.zeros(19, 19, dtype=F64)
    position = torch.arange(19)
    parts = zip(query.split((2, 1, 1), -1), key.split((2, 1, 1), -1), (2, 1, 1), (10**9, 8, 4), strict=True)
    for q, k, rank, block in parts:
        same = (position[:, None] // block == position // block).to(F64)
        score += WEIGHTS[weight](4, rank) * same * (q @ k.mT)
        shared += same
    if gains == "mean":
        score = score / shared
    expected = joined(layer, softmax_mix(score, value, causal(19)))
    torch.testing.assert_close(layer(x), expected, **CLOSE)


def test_mlr_by_window_with_levels_in_values() -> None:
    layer, x = build("mlr:1|2|1+windows=7|3+gains=mean+level_weight=1/sqrt(r)"), tokens(2, 19)
    query, key, value = projected(layer, x)
    position = torch.arange(19)
    near = [(position[:, None] - position).abs() < window for window in (10**9, 7, 3)]
    levels = list(zip(query.split((1, 2, 1), -1), key.split((1, 2, 1), -1), near, strict=True))
    score = sum(pairs.to(F64) * (q @ k.mT) for q, k, pairs in levels) / sum(pairs.to(F64) for pairs in near) / 2
    probability = torch.softmax(score.masked_fill(~causal(19), -math.inf), -1)
    mixed = [(probability * pairs) @ v for v, pairs in zip(value.split((1, 2, 1), -1), near, strict=True)]
    torch.testing.assert_close(layer(x), joined(layer, torch.cat(mixed, -1)), **CLOSE)


def test_the_value_head_is_as_wide_as_the_value_ranks() -> None:
    layer = MLRAttention(16, 4, Hierarchy((4, 4), windows=(None, 3), value_ranks=(3, 2)), dtype=F64)
    assert (layer.value_dim, layer.head_dim, layer.v_proj.out_features) == (5, 8, 20)
    assert layer.cache_numbers(10) == 4 * (10 * 7 + 3 * 6)
    assert layer.value_numbers(10) == 4 * (10 * 3 + 3 * 2)
    assert layer(tokens(1, 6)).shape == (1, 6, 16)
    with pytest.raises(ValueError, match=r"value_ranks must sum to the values' width 4, got 3\|2 = 5"):
        MLRAttention(16, 4, layer.hierarchy, head_dim=4)


def test_mlr_with_one_level_is_standard_attention() -> None:
    flat, standard = build("mlr:4+level_weight=1/sqrt(r)"), build("standard")
    flat.load_state_dict(standard.state_dict())
    x = tokens(2, 23)
    torch.testing.assert_close(flat(x), standard(x), **CLOSE)


def test_mlr_takes_values_of_another_width() -> None:
    layer = MLRAttention(DIM, HEADS, Hierarchy.dyadic((4, 2), CONTEXT), dtype=F64)
    assert (layer.head_dim, layer.value_dim) == (6, 4)
    assert layer(tokens(1, 9)).shape == (1, 9, DIM)


# --- bilinear ---------------------------------------------------------------------------------------------------------

BILINEAR = ["lowrank:3", "bmlr:2|1|1", "btt", "btt:2", "monarch", "kronecker", "butterfly"]


@pytest.mark.parametrize("side", ["auto", "key", "split", "query"])
@pytest.mark.parametrize("norm", ["key", "none"])
@pytest.mark.parametrize("spelling", BILINEAR)
@pytest.mark.parametrize(("scale", "factor"), [("1/sqrt(D)", DIM**-0.5), ("1/D", 1 / DIM)])
def test_bilinear_on_every_side(spelling: str, norm: str, side: str, scale: str, factor: float) -> None:
    layer, x = build(f"{spelling}+norm={norm}+side={side}+scale={scale}"), tokens(2, 11)
    assert isinstance(layer, BilinearAttention)
    key = torch.einsum("hij,btj->bhti", layer.structure.dense(), x)
    if norm == "key":
        key = F.layer_norm(key, (DIM,)) * layer.k_norm.weight
    value = heads_of(x @ layer.v_proj.weight.T)
    expected = joined(layer, softmax_mix(factor * x.unsqueeze(1) @ key.mT, value, causal(11)))
    torch.testing.assert_close(layer(x), expected, **CLOSE)


@pytest.mark.parametrize("norm", ["features", "none"])
@pytest.mark.parametrize(("scale", "power"), [("1/sqrt(f_l)", -0.5), ("1/f_l", -1.0)])
@pytest.mark.parametrize("spelling", ["lowrank:3", "bmlr:3|2|1", "btt"])
def test_bilinear_scales_and_norms_by_level(spelling: str, scale: str, power: float, norm: str) -> None:
    layer, x = build(f"{spelling}+scale={scale}+norm={norm}"), tokens(2, 11)
    widths = layer.structure.level_features
    score, start = torch.zeros(2, HEADS, 11, 11, dtype=F64), 0
    for width in widths:
        part = slice(start, start + width)
        query, key = (f(x).transpose(1, 2)[..., part] for f in (layer.structure.left, layer.structure.right))
        if norm == "features":
            query = F.layer_norm(query, (width,)) * layer.q_norm.weight[part]
            key = F.layer_norm(key, (width,)) * layer.k_norm.weight[part]
        score, start = score + width**power * query @ key.mT, start + width
    value = heads_of(x @ layer.v_proj.weight.T)
    torch.testing.assert_close(layer(x), joined(layer, softmax_mix(score, value, causal(11))), **CLOSE)


@pytest.mark.parametrize("rotary", [None, RotaryEmbedding()], ids=["plain", "rotary"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_bilinear_low_rank_is_standard_attention(is_causal: bool, rotary: RotaryEmbedding | None) -> None:
    standard = build("standard", is_causal=is_causal, rotary=rotary)
    matrix = LowRank(DIM, DIM, 4, heads=HEADS, normalize=False, dtype=F64)
    with torch.no_grad():
        matrix.left_1.copy_(standard.q_proj.weight.unflatten(0, (HEADS, 1, 4)).transpose(-1, -2))
        matrix.right_1.copy_(standard.k_proj.weight.unflatten(0, (HEADS, 1, 4)).transpose(-1, -2))
    bilinear = BilinearAttention(matrix, is_causal=is_causal, rotary=rotary)
    own = bilinear.state_dict()
    shared = {name: value for name, value in standard.state_dict().items() if name in own}
    bilinear.load_state_dict(own | shared)
    x = tokens(2, 23)
    torch.testing.assert_close(bilinear(x), standard(x), **CLOSE)


def test_the_layer_keeps_the_structure_it_is_given() -> None:
    matrix = LowRank(DIM, DIM, 4, heads=HEADS)
    before = matrix.dense()
    assert BilinearAttention(matrix).structure is matrix
    torch.testing.assert_close(matrix.dense(), before, rtol=0, atol=0)


@pytest.mark.parametrize("spelling", ["lowrank:3", "lowrank:9", "btt", "btt:3", "kronecker", "bmlr:2|1|1"])
@pytest.mark.parametrize("norm", ["key", "none"])
@pytest.mark.parametrize("length", [1, 8, 300])
def test_auto_takes_the_side_of_fewest_flops(spelling: str, norm: str, length: int) -> None:
    def forward(side: str) -> int:
        return build(f"{spelling}+norm={norm}+scale=1/D+side={side}").flops(length).forward

    assert forward("auto") == min(forward(side) for side in ("key", "split", "query"))


def test_auto_depends_on_the_length() -> None:
    """Features of rank 4 cost more per token than they save, until there are enough pairs."""
    layer = build("lowrank:4+norm=key+scale=1/D")
    assert layer.side_for(1) == "key"
    assert layer.side_for(300) == "split"


def test_the_query_side_keeps_one_key_for_all_heads() -> None:
    layer, x = build("btt+norm=none+side=query"), tokens(2, 7)
    query, key, value = layer.project(x, torch.arange(7))
    assert (query.shape, key.shape, value.shape) == ((2, HEADS, 7, DIM), (2, 1, 7, DIM), (2, HEADS, 7, 4))
    torch.testing.assert_close(key[:, 0], x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "features", "side": "key"}, "side must be 'auto' or 'split', got 'key'"),
        ({"norm": "none", "scale": "1/f_l", "side": "query"}, "a scale for each level"),
        ({"norm": "key", "scale": "1/f_l"}, "norm='key' needs one scale for all levels"),
        ({"norm": "key", "scale": "1/D", "side": "split", "rotary": RotaryEmbedding()}, "rotary embedding turns"),
        ({"norm": "feature"}, "norm must be one of .* did you mean 'features'"),
        ({"side": "splt"}, "side must be one of .* did you mean 'split'"),
        ({"scale": "1/sqrt(d)"}, "did you mean '1/sqrt\\(D\\)'"),
        ({"kv_heads": 3}, "kv_heads must divide heads = 4, got 3"),
        ({"rotary": RotaryEmbedding()}, "even level ranks.* rank 3 at level 1 of 3\\|2"),
    ],
)
def test_bilinear_refuses_what_cannot_be(options: dict, message: str) -> None:
    matrix = MLR(DIM, DIM, (3, 1), heads=HEADS)
    with pytest.raises(ValueError, match=message):
        BilinearAttention(matrix, **options)


def test_bilinear_needs_a_square_stack() -> None:
    with pytest.raises(TypeError, match=r"structure must be a structattn\.structures\.Structure, got Linear"):
        BilinearAttention(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="structure must be square, dim x dim, got 16 x 8"):
        BilinearAttention(LowRank(16, 8, 2, heads=2))
    with pytest.raises(ValueError, match="got heads=None; give heads=1"):
        BilinearAttention(LowRank(16, 16, 2))


# --- rotary embedding -------------------------------------------------------------------------------------------------


def test_rotary_turns_neighbouring_pairs() -> None:
    rotary = RotaryEmbedding(base=100.0)
    x = torch.randn(2, 3, 5, 6, dtype=F64)
    positions = torch.tensor([0, 1, 2, 10, 1000])
    turned = torch.view_as_complex(rotary(x, positions, (6,)).unflatten(-1, (3, 2)))
    rates = torch.tensor([1.0, 100 ** (-1 / 3), 100 ** (-2 / 3)], dtype=F64)
    expected = torch.view_as_complex(x.unflatten(-1, (3, 2))) * torch.exp(1j * positions[:, None] * rates)
    torch.testing.assert_close(turned, expected, **CLOSE)


@pytest.mark.parametrize("frequencies", ["whole", "per_level"])
def test_the_score_of_a_level_depends_on_distance_alone(frequencies: str) -> None:
    layer = build("mlr:2|2", rotary=RotaryEmbedding(frequencies=frequencies))
    x = tokens(1, 9)
    scores = []
    for shift in (0, 1000):
        query, key, _ = layer.project(x, torch.arange(9) + shift)
        scores.append([q @ k.mT for q, k in zip(query.split((2, 2), -1), key.split((2, 2), -1), strict=True)])
    for here, there in zip(*scores, strict=True):
        torch.testing.assert_close(here, there, **CLOSE)
    still = build("mlr:2|2").project(x, torch.arange(9))[0]
    assert not torch.allclose(query, still)


def test_frequencies_per_level_start_anew() -> None:
    x, positions = torch.randn(1, 1, 4, 8, dtype=F64), torch.arange(4)
    per_level = RotaryEmbedding(frequencies="per_level")(x, positions, (4, 4))
    for part in (slice(0, 4), slice(4, 8)):
        alone = RotaryEmbedding()(x[..., part], positions, (4,))
        torch.testing.assert_close(per_level[..., part], alone, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("mlr:2|1|1", r"even level ranks.* got rank 1 at level 2 of 2\|1\|1"),
        ("gswa:4|3", r"got rank 3 at level 1 of 3\|1"),
        ("lowrank:3", "got rank 3 at level 1 of 3"),
    ],
)
def test_rotary_needs_even_level_ranks(spelling: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(spelling, rotary=RotaryEmbedding())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base": 1.0}, ValueError, "base must be above 1"),
        ({"base": "big"}, TypeError, "base must be a number"),
        ({"frequencies": "per-level"}, ValueError, "did you mean 'per_level'"),
    ],
)
def test_rotary_checks_its_choices(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RotaryEmbedding(**options)


# --- what constructors refuse -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StandardAttention(16, 3), ValueError, "heads must divide dim = 16 unless head_dim is given, got 3"),
        (lambda: StandardAttention(16, 4, kv_heads=3), ValueError, "kv_heads must divide heads = 4, got 3"),
        (lambda: StandardAttention(16, 4, dropout=1.0), ValueError, "dropout must be at least 0 and below 1"),
        (lambda: StandardAttention(16, 4, scale="1/sqrt"), ValueError, r"did you mean '1/sqrt\(r\)'"),
        (lambda: StandardAttention(16.0, 4), TypeError, "dim must be a positive integer"),
        (
            lambda: StandardAttention(16, 4, rotary=True),
            TypeError,
            "rotary must be a RotaryEmbedding or None, got bool",
        ),
        (lambda: StandardAttention(16, 4, drop=0.1), TypeError, "drop"),
        (lambda: SlidingWindowAttention(16, 4, 0), ValueError, "window must be a positive integer"),
        (lambda: GlobalSlidingWindowAttention(16, 4, 8, 4), ValueError, "global_rank must be below the head width 4"),
        (lambda: MLRAttention(16, 4, "2|2@8"), TypeError, r"hierarchy must be a structattn\.Hierarchy, got str"),
        (
            lambda: MLRAttention(16, 4, Hierarchy.flat(4), level_weight="1/rl"),
            ValueError,
            "level_weight must be one of .* did you mean '1/r_l'",
        ),
    ],
)
def test_constructors_refuse(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("option", ["drop", "qk_norm"])
def test_bilinear_refuses_options_it_does_not_have(option: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        BilinearAttention(LowRank(DIM, DIM, 4, heads=HEADS), **{option: True})


def test_keywords_of_layers_are_the_fields_of_their_options() -> None:
    assert get_type_hints(LayerKeywords) == get_type_hints(LayerOptions)


def test_a_span_counts_from_a_later_key() -> None:
    span = KeySpan(torch.tensor([0, 7]), torch.tensor([9, 12]), 8).from_key(5)
    assert span.key_start is not None
    assert span.key_end is not None
    assert (span.key_start.tolist(), span.key_end.tolist(), span.query_offset) == ([0, 2], [4, 7], 3)
    assert KeySpan(query_offset=8).from_key(5).query_offset == 3


@pytest.mark.parametrize("spelling", ["standard", "standard:1", "gswa:5|3", "btt", "lowrank"])
def test_the_kernel_of_standard_attention_can_be_chosen(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []

    def record(*args: Any, kernel: str, **options: Any) -> Tensor:
        served.append(kernel)
        return standard_attention(*args, kernel="torch", **options)

    monkeypatch.setattr(interface, "standard_attention", record)
    x = tokens(1, 9)
    build(spelling)(x)
    for kernel in ("torch", "compiled"):
        build(spelling, standard_kernel=kernel)(x)
    assert served == ["auto", "torch", "compiled"]


def test_an_unknown_kernel_is_refused_when_a_layer_is_made() -> None:
    with pytest.raises(ValueError, match="standard_kernel must be one of auto, torch, compiled, got 'flash'"):
        build("mlr", standard_kernel="flash")
