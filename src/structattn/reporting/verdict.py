"""Say in sentences what a comparison measured, and no more."""

from __future__ import annotations

from dataclasses import dataclass

from structattn.comparison.estimate import Estimate
from structattn.comparison.numbers import format_estimate, number
from structattn.comparison.results import Results
from structattn.drawing.style import REFERENCE

ONE_SEED = (
    "One seed was trained, so how much a repeat would differ is not known: "
    "a small difference means nothing until --seeds 3 or more confirms it."
)
"""Sentence for every comparison with one seed."""


@dataclass(frozen=True)
class Verdict:
    """The conclusion of a comparison, in three sentences."""

    answer: str
    """The best structure and its lead; before that, baselines that are better and compete."""

    trust: str
    """Comparison of the difference with the spread between seeds."""

    savings: str
    """Costs of the best structure beside the other; empty if there is no other."""


def verdict(results: Results) -> Verdict:
    """Compare the best structure with standard attention or the runner-up."""
    ranking = results.ranking
    if not ranking:
        return Verdict("No run finished, so there is nothing to compare.", "", "")
    best = ranking[0]
    reached = f"{format_estimate(results.estimate(best))} {results.unit}"
    baselines = _beside_baselines(results, best)
    if len(ranking) == 1:
        trust = ONE_SEED if len(results.finished(best)) < 2 else "± is the standard error over seeds."
        only = "only" if baselines else "Only"
        return Verdict(f"{baselines}{only} {best} has a result: {reached}.", trust, "")
    other = REFERENCE if REFERENCE in ranking[1:] else ranking[1]
    gap = results.estimate(other).mean - results.estimate(best).mean
    share = gap / max(results.estimate(other).mean, 1e-12)
    lowest = results.profile.quantity_with_unit
    answer = f"{baselines}{best} has the lowest {lowest}: {reached}, {number(gap)} ({share:.1%}) below {other}."
    cheaper, dearer = (other, best) if best == REFERENCE else (best, other)
    return Verdict(answer, _trust(results, ranking), _savings(results, cheaper, dearer))


def paired_difference(results: Results, first: str, second: str) -> Estimate:
    """Return the mean of `first` minus `second`, paired by seed.

    Runs of one seed saw the same data in the same order.
    """
    ours = {run.seed: run.final[results.metric] for run in results.finished(first)}
    theirs = {run.seed: run.final[results.metric] for run in results.finished(second)}
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return Estimate(results.estimate(first).mean - results.estimate(second).mean, None, 0)
    return Estimate.of([ours[seed] - theirs[seed] for seed in shared])


def _beside_baselines(results: Results, best: str) -> str:
    """Return the words that name baselines better than every structure, if any."""
    if not results.profile.baselines_compete:
        return ""
    mean, errors = results.estimate(best).mean, {name: row[results.metric] for name, row in results.baselines.items()}
    ahead = sorted((name for name, error in errors.items() if error < mean), key=errors.__getitem__)
    if not ahead:
        return ""
    names = " and ".join(f"{name} ({number(errors[name])})" for name in ahead)
    verb = "have" if len(ahead) > 1 else "has"
    quantity = results.profile.quantity
    return f"Attention loses: {names} {verb} a lower {quantity} than every attention structure. Among those, "


def _trust(results: Results, ranking: list[str]) -> str:
    """Say whether the best structure stands out from the seeds' spread."""
    best, others = ranking[0], ranking[1:]
    gaps = {other: paired_difference(results, other, best) for other in others}
    seeds = min(gap.count for gap in gaps.values())
    if seeds < 2:
        return ONE_SEED
    low = {other: gap.mean - (gap.margin or 0.0) for other, gap in gaps.items()}
    close = [other for other in others if low[other] <= 0]
    interval = "the 95% interval of the difference, paired by seed,"
    if close:
        return f"Over {seeds} seeds it does not stand out from {' or '.join(close)}: {interval} holds zero."
    nearest = min(others, key=low.__getitem__)
    high = gaps[nearest].mean + (gaps[nearest].margin or 0.0)
    span = f"{number(low[nearest])} to {number(high)}"
    return f"Over {seeds} seeds it stands out from every other structure: {interval} is {span} for {nearest}."


def _savings(results: Results, structure: str, other: str) -> str:
    """Say the costs of `structure` as shares of those of `other`."""
    ours, theirs = results.costs[structure], results.costs[other]
    scores = ours.score_flops_per_token / theirs.score_flops_per_token
    kind = "cache" if results.counts_values else "key"
    cached = results.cached_per_token(structure) / results.cached_per_token(other)
    whole = ours.training_flops_per_token / theirs.training_flops_per_token
    kept = f", keeps {cached:.0%} of the {kind} numbers when generating," if results.is_causal else ""
    return (
        f"Beside {other}, {structure} spends {scores:.0%} of the score FLOPs{kept} "
        f"and takes {whole:.0%} of the training FLOPs per token."
    )
