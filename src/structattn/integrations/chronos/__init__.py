"""MLR attention in Chronos, the forecaster that reads a time series as a text of quantised values.

`make_chronos` builds a Chronos-T5 of a published size with random weights, `load_chronos` reads one from a folder; both
give Chronos's own `ChronosPipeline`, whose encoder and decoder have the self-attention asked for, with T5's relative
position bias as it was::

    pipeline = make_chronos("tiny", "mlr:32|16|16+gains=none+level_weight=1+qk_norm=false")
    samples = pipeline.predict(torch.randn(512), prediction_length=64)

`ChronosLearner` is its model as the training loop takes it, `forecast_metrics` judges forecasts by WQL and MASE.

Source: Ansari et al., *Chronos: Learning the Language of Time Series*, 2024, arXiv 2403.07815.
"""

from __future__ import annotations

from structattn import checks

checks.require("transformers", "hf")
checks.require("chronos", "chronos")

from structattn.integrations.chronos.cost import t5_flops  # noqa: E402
from structattn.integrations.chronos.learner import ChronosLearner  # noqa: E402
from structattn.integrations.chronos.metrics import forecast, forecast_metrics, seasonal_naive  # noqa: E402
from structattn.integrations.chronos.pipeline import chronos_settings, load_chronos, make_chronos, set_attention  # noqa: E402
from structattn.integrations.chronos.sizes import SIZES, ChronosSize  # noqa: E402

__all__ = [
    "SIZES",
    "ChronosLearner",
    "ChronosSize",
    "chronos_settings",
    "forecast",
    "forecast_metrics",
    "load_chronos",
    "make_chronos",
    "seasonal_naive",
    "set_attention",
    "t5_flops",
]
