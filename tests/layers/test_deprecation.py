"""Old public names: they work for a release, and say what they are called now."""

import importlib
import sys

import pytest

import structattn.layers
import structattn.models
from structattn.models import mlr_conversion

RENAMED = [
    (structattn.layers, "CachePart", "CacheSlice"),
    (structattn.layers, "Reach", "Retention"),
    (structattn.models, "StoreCache", "GenerationCache"),
    (structattn.models, "StoreLayer", "GenerationCacheLayer"),
    (mlr_conversion, "DimensionOrder", "OrderSource"),
    (mlr_conversion, "Pairs", "TokenPairs"),
]


@pytest.mark.parametrize(("module", "old", "new"), RENAMED)
def test_an_old_name_is_the_new_one_and_warns(module, old, new):
    with pytest.warns(DeprecationWarning, match=rf"{module.__name__}\.{old} is now {module.__name__}\.{new}"):
        assert getattr(module, old) is getattr(module, new)
    assert old not in getattr(module, "__all__", dir(module))


@pytest.mark.parametrize("module", [structattn.layers, structattn.models])
def test_an_unknown_name_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match="has no attribute 'CachePrat'"):
        _ = module.CachePrat


MODULES = {
    "structattn.layers.basis": ("structattn.layers.head_basis", {"Basis": "HeadBasis", "balanced": "balancing_maps"}),
    "structattn.models.retrofit": ("structattn.models.mlr_conversion", {"retrofit": "convert_to_mlr"}),
}


@pytest.mark.parametrize("old", MODULES)
def test_an_old_module_has_the_functions_of_the_new_one(old, monkeypatch):
    new, names = MODULES[old]
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        module = importlib.import_module(old)
    for old_name, new_name in names.items():
        assert getattr(module, old_name) is getattr(importlib.import_module(new), new_name)
