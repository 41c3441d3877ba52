"""Compare means over seeds, and describe the comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from paper.study import Label, Outcome
from structattn.comparison.estimate import Estimate, t_quantile


def estimates(outcomes: Iterable[Outcome], *names: str) -> dict[tuple[Label, ...], Estimate]:
    """Return the mean final loss over seeds by the named labels.

    Combinations of labels stand in order of appearance.
    """
    losses: dict[tuple[Label, ...], list[float]] = {}
    for outcome in outcomes:
        if outcome.rows:
            losses.setdefault(tuple(outcome.labels[name] for name in names), []).append(outcome.loss)
    return {key: Estimate.of(values) for key, values in losses.items()}


def paired_difference(first: Iterable[Outcome], second: Iterable[Outcome]) -> Estimate | None:
    """Return the mean of `first` minus `second` in final loss, over the seeds that both have.

    Two runs of one seed read the same data in the same order. None if no seed is in both.
    """
    losses, others = ({each.labels["seed"]: each.loss for each in runs if each.rows} for runs in (first, second))
    shared = [losses[seed] - others[seed] for seed in losses if seed in others]
    return Estimate.of(shared) if shared else None


def label_values(outcomes: Iterable[Outcome], name: str) -> list[Label]:
    """Return the values of a label, in order of appearance."""
    return list(dict.fromkeys(outcome.labels[name] for outcome in outcomes))


def estimates_by(outcomes: Iterable[Outcome], name: str, **labels: Label) -> list[tuple[float, Estimate]]:
    """Return `(value, mean final loss)` for each value of a label.

    Only outcomes whose other labels are as given count. Values ascend.
    """
    table = estimates(with_label(outcomes, **labels), name)
    return sorted((float(value), each) for (value,), each in table.items())


def with_label(outcomes: Iterable[Outcome], **labels: Label) -> list[Outcome]:
    """Return the outcomes whose labels have the given values."""
    return [each for each in outcomes if all(each.labels[name] == value for name, value in labels.items())]


def pooled_margin(groups: Iterable[Estimate], first: Estimate, second: Estimate) -> float:
    """Return half the 95% interval of a difference, from a pooled deviation.

    The difference is `first.mean - second.mean`. All groups share one deviation,
    `s² = Σ (n_i - 1) s_i² / Σ (n_i - 1)`. Infinite if no group has two numbers.
    """
    known = [each for each in groups if each.standard_error is not None]
    degrees = sum(each.count - 1 for each in known)
    if degrees == 0:
        return math.inf
    variance = sum((each.count - 1) * each.count * (each.standard_error or 0.0) ** 2 for each in known) / degrees
    return t_quantile(degrees) * math.sqrt(variance * (1 / first.count + 1 / second.count))


def is_lower(first: Estimate, second: Estimate, groups: Iterable[Estimate]) -> bool | None:
    """True if `first` has the lower mean; None if too close.

    Too close are means that differ by less than the 95% interval of the difference. The deviation of a single run is
    pooled over `groups`.
    """
    gap = second.mean - first.mean
    return None if abs(gap) <= pooled_margin(groups, first, second) else gap > 0


def all_true(answers: Sequence[bool | None]) -> bool | None:
    """True if all answers are True, False if any is False.

    None otherwise, also without any answer.
    """
    if False in answers:
        return False
    return None if None in answers or not answers else True


def describe_resolution(groups: Iterable[Estimate]) -> str:
    """Say how large a difference of two means must be."""
    groups = list(groups)
    margin = pooled_margin(groups, groups[0], groups[0])
    if math.isinf(margin):
        return "One seed shows no spread, so no difference tells anything."
    return f"± is the standard error over seeds. Differences below {margin:.3f} tell nothing, at 95%."


def format_estimate(estimate: Estimate) -> str:
    """Return `0.236 ± 0.004`, or the mean alone for one seed.

    The second number is the standard error over seeds.
    """
    if estimate.standard_error is None:
        return f"{estimate.mean:.3f}"
    return f"{estimate.mean:.3f} ± {estimate.standard_error:.3f}"


def ranked(means: Mapping[str, Estimate]) -> str:
    """List names and means, lowest mean first."""
    ordered = sorted(means.items(), key=lambda pair: pair[1].mean)
    return ", ".join(f"{name} {format_estimate(each)}" for name, each in ordered)
