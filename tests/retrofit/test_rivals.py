"""Attention of smaller caches against its dense meaning in float64, and the rounding of caches."""

import pytest
import torch

from structattn import Hierarchy
from structattn.integrations.transformers.layer_levels import LayerLevels
from structattn.retrofit.cache_methods import CacheMethod, Levels, Rounded, Uniform, cache_share
from structattn.retrofit.quantisation import (
    RECENT,
    attend_rounded,
    key_bits,
    round_groups,
    round_keys,
    round_values,
    value_bits,
)
from structattn.retrofit.rivals import UniformCut
from tests.tolerance import assert_calibrated

HEADS, KEY_HEADS, WIDTH, LENGTH, SCALE = 6, 2, 8, 150, 0.3


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, LENGTH, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def softmax(score, visible):
    return score.masked_fill(~visible, -torch.inf).softmax(-1)


def wide(tensor):
    return tensor.repeat_interleave(HEADS // KEY_HEADS, dim=1)


AT = torch.arange(LENGTH)
DISTANCE = AT[:, None] - AT


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(
    "text", ["8", "4|4v@w20", "2|2|4v4|0|4@w70|9", "2|6v8|0@w30", "4|4v@w20/mean", "4|4v@w20+3", "8@w140+3", "8@w20+3"]
)
def test_rounded_caches_against_the_definition(text, bits):
    """Beyond the nearest window keys and values are rounded; near ones are exact."""
    hierarchy = Hierarchy.parse(text)
    recent = RECENT if hierarchy.levels == 1 else hierarchy.sizes[-1]
    far_rank = hierarchy.rank if hierarchy.levels == 1 else sum(hierarchy.ranks[:-1])
    widths = hierarchy.value_widths(WIDTH)
    far_width = WIDTH if hierarchy.levels == 1 else sum(widths[:-1])

    def definition(dtype):
        query, key, value = inputs(dtype)
        old_key = torch.cat([round_keys(key[..., :far_rank], bits), key[..., far_rank:]], 3)
        far_values = value[..., :far_width].split(list(widths[: max(hierarchy.levels - 1, 1)]), 3)
        rounded = [round_values(level, bits) for level in far_values if level.shape[3]]
        old_value = torch.cat([*rounded, value[..., far_width:]], 3)
        near = (recent > DISTANCE) | (hierarchy.sinks > AT)
        score, mixed = torch.zeros(2, HEADS, LENGTH, LENGTH, dtype=dtype), []
        starts = [sum(hierarchy.ranks[:level]) for level in range(hierarchy.levels)]
        for level, (start, rank) in enumerate(zip(starts, hierarchy.ranks, strict=True)):
            reached = hierarchy.reaches(level, AT[:, None], AT[None])
            dims = slice(start, start + rank)
            old, new = (query[..., dims] @ wide(each[..., dims]).mT for each in (old_key, key))
            score = score + torch.where(reached, torch.where(near, new, old), 0.0)
        gains = torch.tensor(hierarchy.gains, dtype=dtype)[hierarchy.depth(AT[:, None], AT[None]).clamp(min=1) - 1]
        p = softmax(score * gains * SCALE, (DISTANCE >= 0) & hierarchy.reaches(0, AT[:, None], AT[None]))
        start = 0
        for level, width in enumerate(widths):
            reached = hierarchy.reaches(level, AT[:, None], AT[None]) & (DISTANCE >= 0)
            dims = slice(start, start + width)
            new = (p * (reached & near)) @ wide(value[..., dims])
            mixed.append(new + (p * (reached & ~near)) @ wide(old_value[..., dims]))
            start += width
        return torch.cat(mixed, 3)

    query, key, value = inputs()
    actual = attend_rounded(query, key, value, hierarchy, bits, scale=SCALE)
    assert_calibrated(actual, definition(torch.float64), definition(torch.float64))


def test_a_uniform_cut_against_the_definition():
    query, key, value = inputs()
    order = [[2, 0, 3, 1], [1, 3, 0, 2]]
    levels = LayerLevels(Hierarchy.flat(WIDTH), "halves", order, width=WIDTH, key_heads=KEY_HEADS, name="layer")
    kept = torch.zeros(KEY_HEADS, WIDTH, dtype=torch.float64)
    for head, pairs in enumerate(order):
        kept[head, [pairs[0], pairs[0] + WIDTH // 2]] = 1.0
    score = query @ wide(key * kept[:, None]).mT * SCALE
    exact = softmax(score, DISTANCE >= 0) @ wide(value)
    exact[..., 3:] = 0
    assert_calibrated(UniformCut(levels, 2, 3)(query, key, value, SCALE), exact, exact)


@pytest.mark.parametrize("length", [1, 31, 32, 100])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_rounding(bits, length):
    """Numbers move by at most half a step, ends of a group stay, and there are 2**bits values at most."""
    x = torch.randn(3, length, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rounded = round_groups(x, bits, 1)
    assert rounded.shape == x.shape
    for start in range(0, length, 32):
        group, result = x[:, start : start + 32], rounded[:, start : start + 32]
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        precision = 2.0**-10 * (low.abs() + high.abs())  # scale and offset have 16 bits
        assert ((result - group).abs() <= step / 2 + precision).all()
        assert all(len(result[row, :, at].unique()) <= 2**bits for row in range(3) for at in range(2))
    assert_calibrated(
        round_groups(rounded[:, :1], bits, 1), rounded[:, :1].half().double(), rounded[:, :1].half().double()
    )


def test_one_number_of_a_group_stays():
    x = torch.tensor([[1.5, 1.5, 1.5]])
    assert torch.equal(round_groups(x, 4, 1), x)


def test_groups_of_keys_run_along_tokens_and_those_of_values_along_channels():
    key = torch.zeros(1, 1, 64, 2)
    key[0, 0, 40] = 1.0
    assert torch.equal(round_keys(key, 1), key)  # two values in each group
    value = torch.zeros(1, 2, 4, 20)
    value[0, 1, 2] = torch.arange(20.0)
    rounded = round_values(value, 1)
    assert torch.equal(rounded[0, :, :2], value[0, :, :2])  # other tokens are other groups
    # Channels 20 to 31 of the token share a group with the zeros of head 0, 32 to 39 are a group of their own.
    assert set(rounded[0, 1, 2, :12].tolist()) == {0.0, 11.0}
    assert set(rounded[0, 1, 2, 12:].tolist()) == {12.0, 19.0}


class Layer:
    width, key_heads = 64, 3


def test_shares_of_the_cache():
    """By hand, at 1,024 tokens and 16 bits a whole number."""
    hierarchy = Hierarchy.parse("8|24|32v@w512|128")
    shares = {
        CacheMethod(): 1.0,
        Levels((hierarchy,)): (8 * 1024 + 24 * 512 + 32 * 128) / (64 * 1024),
        Levels((Hierarchy.parse("64@w200+4"),)): 204 / 1024,
        Uniform(16, 32): 48 / 128,
        Rounded(Levels((Hierarchy.flat(64),)), 4): (128 * 16 + (1024 - 128) * 5) / (1024 * 16),
        Rounded(Levels((Hierarchy.parse("64@w200+4"),)), 4): (132 * 16 + 72 * 5) / (1024 * 16),
        Rounded(Levels((hierarchy,)), 8): (
            128 * 2 * 64 * 16
            + (1024 - 128) * 8 * (9 + 8 + 32 / 24)  # 24 channels of a token are a group
            + (512 - 128) * 24 * (9 + 8 + 32 * 3 / 72)  # 72 channels are three
        )
        / (1024 * 128 * 16),
    }
    for method, share in shares.items():
        assert cache_share(method, [Layer(), Layer()], 1024) == pytest.approx(share, rel=1e-12)
    assert (key_bits(4), value_bits(4, 96), value_bits(4, 24), value_bits(4, 0)) == (5, 5, 4 + 32 / 24, 0)
