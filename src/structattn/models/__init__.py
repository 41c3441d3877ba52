"""Provide models of Hugging Face whose config names the attention.

There is one backbone, with heads for tasks. Importing this package registers the models with `AutoConfig`,
`AutoModelForCausalLM` and `AutoModel`.
"""

from __future__ import annotations

from structattn import checks

checks.require("transformers", "hf")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

from structattn.layers.deprecation import serve_old_names  # noqa: E402
from structattn.models.configuration import (  # noqa: E402
    BackboneConfig,
    ForecastModelConfig,
    LanguageModelConfig,
    RegressionModelConfig,
)
from structattn.models.forecast_model import ForecastModel, ForecastOutput  # noqa: E402
from structattn.models.generation_cache import GenerationCache, GenerationCacheLayer, ModelCache  # noqa: E402
from structattn.models.language_model import LanguageModel  # noqa: E402
from structattn.models.pretrained import StructuredModel  # noqa: E402
from structattn.models.regression_model import RegressionModel, RegressionOutput  # noqa: E402

__all__ = [
    "BackboneConfig",
    "ForecastModel",
    "ForecastModelConfig",
    "ForecastOutput",
    "GenerationCache",
    "GenerationCacheLayer",
    "LanguageModel",
    "LanguageModelConfig",
    "ModelCache",
    "RegressionModel",
    "RegressionModelConfig",
    "RegressionOutput",
    "StructuredModel",
]

__getattr__ = serve_old_names(__name__, {"StoreCache": "GenerationCache", "StoreLayer": "GenerationCacheLayer"})

AutoConfig.register(LanguageModelConfig.model_type, LanguageModelConfig)
AutoConfig.register(RegressionModelConfig.model_type, RegressionModelConfig)
AutoConfig.register(ForecastModelConfig.model_type, ForecastModelConfig)
AutoModelForCausalLM.register(LanguageModelConfig, LanguageModel)
AutoModel.register(RegressionModelConfig, RegressionModel)
AutoModel.register(ForecastModelConfig, ForecastModel)
