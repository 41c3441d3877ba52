"""Title, question and the paper's answer of each study.

Used by the help of the command and by the study's page. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StudyText:
    """The question of a study, and the answer to compare with."""

    title: str
    """Title of the study's page."""

    figure: str
    """Figure or section of the paper."""

    question: str
    """The question, and why it is asked."""

    reported: str
    """The paper's answer."""


TEXTS = {
    "bottleneck": StudyText(
        title="The low-rank bottleneck",
        figure="figure 2",
        question=(
            "How large must a head of standard attention be to compare inputs of d dimensions? With 8 heads its score "
            "has rank D/8. In-context regression needs inner products of whole inputs."
        ),
        reported="Standard attention with 8 heads fails until the head rank reaches the input dimension, D/8 ≈ d.",
    ),
    "width": StudyText(
        title="Which width does a structure need?",
        figure="figure 3a",
        question=(
            "At which model width does each structure solve in-context regression? The structures are 8 heads of rank "
            "D/8, one head of rank D, and 8 heads of full rank by a Block Tensor Train (BTT)."
        ),
        reported=(
            "BTT with 8 heads solves the task at the width at which standard attention with one head does. Standard "
            "attention with 8 heads needs a larger width."
        ),
    ),
    "compute": StudyText(
        title="Error against training compute at one width",
        figure="figure 3b",
        question="Which structure has the lowest error of in-context regression at equal training compute and width?",
        reported=(
            "With 8 heads, BTT and MLR reach a lower error for the same FLOPs than standard attention with 8 heads."
        ),
    ),
    "scaling": StudyText(
        title="Loss against training compute over widths",
        figure="figure 4",
        question="Which attention structure predicts text best at equal compute, over a range of widths?",
        reported=(
            "MLR attention has the lowest validation loss at equal compute at every width. It is below standard "
            "attention, a sliding window, and a global part plus a sliding window."
        ),
    ),
    "recipe": StudyText(
        title="Language by the recipe and the tokens per parameter of the authors",
        figure="figure 4",
        question=(
            "Does MLR attention have the lowest loss at equal compute where it is trained by the recipe of the "
            "authors' code, and for as many tokens per parameter?"
        ),
        reported=(
            "MLR attention has the lowest validation loss at equal compute at every width. It is below standard "
            "attention, a sliding window, and a global part plus a sliding window."
        ),
    ),
    "reasons": StudyText(
        title="What holds MLR attention back after a short training?",
        figure="figure 4",
        question=(
            "MLR attention in the paper's form is far behind standard attention after a short training. Is it the "
            "temperature of its scores, the gains, the level weights, the rate of the norms or the positions?"
        ),
        reported=(
            "The paper trains with level weights 1/r_l and gains 1/m, and reports the lowest loss of all for them."
        ),
    ),
    "mup": StudyText(
        title="The best learning rate over widths, with and without muP",
        figure="figure 5",
        question="Does the best learning rate stay the same as the width grows? Then a small model can find it.",
        reported="With muP the best learning rate is the same at every width. Without muP it falls as the width grows.",
    ),
    "ranks": StudyText(
        title="How should the ranks be split over the levels?",
        figure="section 5",
        question="How much of a head's rank should far pairs see in MLR attention, on text and at equal compute?",
        reported=(
            "At equal compute levels are better than none. The paper's ranks for language are 32|8|6|4|4|4|4|2 of 64: "
            "level 1 has half of the rank, and the ranks of the other levels fall."
        ),
    ),
    "levels": StudyText(
        title="Which form of MLR attention predicts text best?",
        figure="after section 5",
        question=(
            "Blocks or windows, how many levels, levels in values or not, which rotary frequencies, level weights, "
            "gains and biases: which form has the lowest loss at equal compute, and how much of the cache does it keep?"
        ),
        reported=(
            "The paper's form has blocks that halve, values mixed whole, level weights 1/r_l and gains 1/m. It has the "
            "lowest loss at equal compute."
        ),
    ),
    "contexts": StudyText(
        title="Do levels gain with the length of the context?",
        figure="after section 5",
        question=(
            "How far is plain `mlr` below standard attention after equal tokens, and does this gain grow with the "
            "context? Heads that are thin for all pairs, with as many cache numbers, stand beside it."
        ),
        reported=(
            "The gain of MLR attention over standard attention grows with the length of a time series. For text the "
            "paper has one length, 1,024."
        ),
    ),
    "forecast": StudyText(
        title="Does the gain of levels grow with the length of a series?",
        figure="figure 15",
        question=(
            "How much lower is the error of the target under MLR attention than under standard attention, and does "
            "this gain grow with the context? Does Chronos, trained from scratch with equal tokens, need less compute "
            "with MLR attention?"
        ),
        reported=(
            "On ETTh1 the gain of MLR attention over standard attention in the error of the oil temperature grows with "
            "the length of the context. Chronos with MLR attention reaches the same validation loss with fewer FLOPs."
        ),
    ),
}
"""Texts of all studies by name."""
