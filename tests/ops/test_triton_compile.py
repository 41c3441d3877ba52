"""The Triton kernels compile for cards not at hand: the interpreter checks neither types nor memory."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch
from benchmarks import gpu_compile
from benchmarks.gpu_compile import HIERARCHIES, NEAR_AND_FAR, SHARED_LIMITS, calls, compiling
from benchmarks.report import compiled_markdown

from structattn import Hierarchy
from structattn.layers.kv_cache import KeyValueCache, mlr_cache_layout
from structattn.ops.call import Call, DecodeCall

LAUNCHES = {
    "forward": ["forward_kernel"],
    "backward": ["query_grad_kernel", "key_grad_kernel"],
    "decode": ["share_kernel", "join_kernel"],
}


@pytest.fixture(autouse=True)
def first_choice_of_blocks(monkeypatch):
    """Each kernel once: compiling takes seconds."""
    from structattn.ops.triton import launch

    monkeypatch.setattr(launch, "configs", lambda name, row, every=launch.configs: every(name, row)[:1])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("operation", LAUNCHES)
def test_two_levels(operation, capability):
    with compiling(capability) as made:
        calls(64, (32, 32))[operation]()
    assert [each.kernel for each in made] == LAUNCHES[operation]
    for each in made:
        assert each.fits, each
        assert each.spilled <= 64, each  # a few bytes cost nothing, hundreds do
    assert made[0].products == ("wgmma" if capability == 90 and operation != "decode" else "mma")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("operation", LAUNCHES)
@pytest.mark.parametrize("text", ["64@w512", "16|16|32v24|0|40@w1024|512|96/mean", "32|32v48|16@512"])
def test_windows_and_value_ranks(text, operation, capability):
    hierarchy = Hierarchy.parse(text)
    with compiling(capability) as made:
        calls(64, hierarchy.ranks, hierarchy=hierarchy)[operation]()
    assert [each.kernel for each in made] == LAUNCHES[operation]
    assert all(each.fits for each in made), made
    assert made[0].products == ("wgmma" if capability == 90 and operation != "decode" else "mma")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hierarchy", [Hierarchy.flat(64), NEAR_AND_FAR], ids=str)
def test_decode_copies_vectors(hierarchy, dtype):
    """Keys and values go to shared memory 16 bytes at a time, before they are used."""
    with compiling(90) as made:
        calls(hierarchy.rank, hierarchy.ranks, dtype, hierarchy)["decode"]()
    assert (made[0].kernel, made[0].copied, made[0].narrow_loads) == ("share_kernel", 16, 0)
    assert made[0].spilled == 0
    if dtype == torch.bfloat16:
        assert made[0].shared <= SHARED_LIMITS[90] // 4  # four programs on a multiprocessor


@pytest.mark.slow
def test_decode_compiles_once_for_all_tokens(monkeypatch):
    """Whatever the alignment of lengths and starts, which change from token to token."""
    from structattn.ops.triton.decode_kernels import decode

    hierarchy = Hierarchy((16, 16), windows=(None, 256), value_ranks=(16, 16))
    layout, hashes = mlr_cache_layout(hierarchy, 2, 32), set()
    monkeypatch.setattr(gpu_compile, "_read", lambda kernel, _, made, options: hashes.add((kernel.__name__, made.hash)))
    cache, query = KeyValueCache(layout), torch.zeros(1, 8, 1, 32).half()
    for count in [1000, *[1] * 70]:
        cache.append(*[[torch.zeros(1, 2, count, 16).half() for _ in range(2)]] * 2)
        cache.forget()
        keys, values = ([buffer.storage for buffer in side] for side in (cache.keys, cache.values))
        starts = [buffer.first for buffer in cache.keys]
        with compiling(90):
            decode(DecodeCall(query, keys, values, None, hierarchy, cache.length, starts, 0.2))
    assert sorted(name for name, _ in hashes) == ["join_kernel", "share_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["forward", "backward"])
@pytest.mark.parametrize("hierarchy", HIERARCHIES[:5], ids=str)
def test_first_choices_spill_little(hierarchy, operation):
    """On Hopper, at the widths of models."""
    with compiling(90) as made:
        calls(hierarchy.rank, hierarchy.ranks, hierarchy=hierarchy)[operation]()
    for each in made:
        assert each.spilled <= 96, each
        assert each.products == "wgmma"


@pytest.mark.slow
@pytest.mark.parametrize("operation", LAUNCHES)
def test_float32_spills_little(operation):
    """Products without tensor cores: a large tile would spill kilobytes and compile for half a minute."""
    with compiling(90) as made:
        calls(64, (64,), torch.float32)[operation]()
    assert all(each.spilled <= 64 for each in made), made


@pytest.mark.slow
@pytest.mark.parametrize("operation", LAUNCHES)
def test_the_widest_rows(operation):
    """Of bilinear attention: dimensions of q and k in pieces."""
    with compiling(90) as made:
        calls(512, (512,), torch.float16)[operation]()
    assert {each.kernel for each in made} == set(LAUNCHES[operation])
    assert all(each.fits for each in made)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["32|16|8|4|4@1000/mean", "32|32v24|40@w200|48/mean"])
def test_all_that_a_call_may_have(text):
    """Levels finer than a tile, gains, padding, bias with gradient, dropout, grouped queries, an odd length."""
    from structattn.ops.triton import backward_kernels, forward_kernel

    hierarchy = Hierarchy.parse(text)
    query, key = (torch.empty(2, heads, 1000, 64, dtype=torch.float16) for heads in (4, 2))
    bounds = torch.tensor([0, 31]), torch.tensor([990, 1000])
    bias, seed = torch.empty(2, 1, 1000, 1000, dtype=torch.float16), torch.tensor(5)
    call = Call(query, key, key, bias, *bounds, seed, hierarchy, False, 0.125, 0, 0.1)
    with compiling(90) as made:
        out, lse = forward_kernel.forward(call)
        backward_kernels.backward(call, out, out, lse, needs_bias_grad=True)
    assert [each.kernel for each in made] == ["forward_kernel", "query_grad_kernel", "key_grad_kernel"]
    assert all(each.fits for each in made), made


def test_nothing_runs_and_all_is_as_before(monkeypatch):
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from structattn.ops.triton import launch

    before = JITFunction.run, launch.tuned, driver._active
    with pytest.raises(RuntimeError, match="on purpose"), compiling(90):
        raise RuntimeError("on purpose")
    assert before == (JITFunction.run, launch.tuned, driver._active)


def test_page():
    row = {"kernel": "forward_kernel", "capability": 80, "rank": 64, "levels": 2, "blocks": "64 x 64, 4, 3"}
    row |= {"hierarchy": "32|32@2048", "registers": 255, "spilled": 8, "shared": 2048, "products": "mma"}
    result = {"triton": "3", "commit": "abc", "time": "now", "limits": {"80": 1024}, "rows": [row]}
    page = compiled_markdown(result)
    assert "| blocks | `32,32@2048` |" in page
    assert "| 64 x 64, 4, 3 | 255; 8 spilled; ~~2 KiB~~ |" in page
    assert "capability 8.0: 1 KiB, products by `mma`" in page
