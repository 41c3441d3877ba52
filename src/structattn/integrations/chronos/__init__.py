"""Provide MLR attention in Chronos, which forecasts time series by T5.

`make_chronos` builds a Chronos-T5 of a published size with random weights, `load_chronos` reads one from a folder. Both
return Chronos's own `ChronosPipeline`, with the given self-attention in encoder and decoder and T5's relative position
bias::

    pipeline = make_chronos("tiny", "mlr:16|16|32+level_weight=1+qk_norm=false")
    samples = pipeline.predict(torch.randn(512), prediction_length=64)

`ChronosLearner` adapts its model to the training loop; `sample_metrics` gives WQL and MASE of sampled forecasts.

Source: Ansari et al., *Chronos: Learning the Language of Time Series*, 2024, arXiv 2403.07815.
"""

from __future__ import annotations

from structattn import checks

checks.require("transformers", "hf")
checks.require("chronos", "chronos")

from structattn.integrations.chronos.cost import t5_flops  # noqa: E402
from structattn.integrations.chronos.learner import ChronosLearner  # noqa: E402
from structattn.integrations.chronos.metrics import forecast, sample_metrics, seasonal_naive_samples  # noqa: E402
from structattn.integrations.chronos.pipeline import chronos_settings, load_chronos, make_chronos, set_attention  # noqa: E402
from structattn.integrations.chronos.sizes import SIZES, ChronosSize  # noqa: E402
from structattn.layers.deprecation import serve_old_names  # noqa: E402

__all__ = [
    "SIZES",
    "ChronosLearner",
    "ChronosSize",
    "chronos_settings",
    "forecast",
    "load_chronos",
    "make_chronos",
    "sample_metrics",
    "seasonal_naive_samples",
    "set_attention",
    "t5_flops",
]

__getattr__ = serve_old_names(
    __name__, {"forecast_metrics": "sample_metrics", "seasonal_naive": "seasonal_naive_samples"}
)
