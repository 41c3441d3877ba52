"""Define `TaskProfile`, all that comparing and reporting ask about a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from structattn.models import StructuredModel
    from structattn.tasks.task import Task

ABSENT_AT_DEFAULT = "absent_at_default"
"""Key in the metadata of a config's field that stored configs leave out at its default.

For fields of later versions: a stored config of an earlier one has the same meaning and the same digest.
"""

Metrics = dict[str, Any]
"""Metrics by name: numbers, or lists of numbers."""


class FinishedRun(Protocol):
    """A run that has a result."""

    @property
    def final(self) -> Metrics:
        """Last evaluation."""


class Findings(Protocol):
    """The part of a comparison's results that a task's figures read."""

    @property
    def structures(self) -> Sequence[str]:
        """Spellings of the structures, in the order of the command."""

    @property
    def ranking(self) -> Sequence[str]:
        """Structures with a result, best first."""

    @property
    def baselines(self) -> Mapping[str, Metrics]:
        """Metrics of the task's baselines, by their names."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes of the models by name."""

    @property
    def examples(self) -> Sequence[Mapping[str, Any]]:
        """Examples of the task."""

    def finished(self, structure: str) -> Sequence[FinishedRun]:
        """Return the runs of `structure` that have a result, by seed."""

    def estimate(self, structure: str, column: str) -> Any:
        """Return the mean over seeds of a metric, with its interval."""


@dataclass(frozen=True)
class TaskFigure:
    """A figure of one task, drawn where a run has finished."""

    name: str
    """File name, without ending."""

    title: str
    caption: str
    """Content, and how to read it."""

    draw: Callable[[Findings], Figure]


@dataclass(frozen=True)
class TaskCommand:
    """Options and defaults of a task for the commands `compare` and `train`.

    Fields of the task's config are options, with their names, types, defaults and docstrings.
    """

    summary: str
    """The task in one sentence, for `--help`."""

    compared: tuple[str, ...]
    """Structures that `compare` takes by default."""

    trained: str
    """Structure that `train` takes by default."""

    examples: str
    """Spellings of structures, for `--help`."""

    presets: Mapping[str, Mapping[str, Any]]
    """Defaults of each preset, the default preset first: fields of the config, of `ModelSizes` and of `TrainConfig`."""

    hidden: tuple[str, ...] = ()
    """Fields of the config without an option."""

    derived: Mapping[str, str] = field(default_factory=dict)
    """Default, in words, of each field that `complete` adds."""

    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: fields
    """Returns all fields of the config, from those that the options and the preset give."""


@dataclass(frozen=True)
class TaskProfile:
    """Description of a task for comparisons, reports and the command line."""

    name: str
    """Name of the task in configs, results and commands, the same as `Task.name`."""

    config: type[Any]
    """Class of its configs: a frozen dataclass of JSON-compatible values, with `context_length`."""

    build: Callable[[Any, int, int], Task]
    """Makes the task of a config, a seed and a number of training steps."""

    model: Callable[[], type[StructuredModel]]
    """Returns the class of its models. A function, so that `structattn.tasks` imports no models."""

    question: str
    """Question that a comparison on this task answers, in one sentence: the heading of the report."""

    setting: str
    """Work and measure of a model: a paragraph of the report."""

    quantity: str
    """The headline metric in a sentence, such as `validation loss`. Its name and unit are the first of `Task.units`."""

    columns: Mapping[str, str]
    """Heading of each metric in the table, by the metric's name. The first is shown with its standard error. Metrics
    that a comparison did not measure have no column."""

    model_fields: Callable[[Any], dict[str, Any]] = lambda config: {}
    """Returns the fields of the model's config that a task config determines, besides `context_length`."""

    keep: Callable[[Any, Path], None] = lambda config, folder: None
    """Writes what a task's config takes from its data, such as a vocabulary, into the folder of a run's model. Raises
    ValueError if the folder holds another."""

    restore: Callable[[Any, Path], Any] = lambda config, folder: config
    """Returns the config with what `keep` wrote into the folder, in place of its source."""

    short_quantity: str | None = None
    """Shorter quantity for use next to its unit; e.g. `error` where the unit is
    `squared error / d at the last point`."""

    wide_columns: tuple[str, ...] = ()
    """Further columns that a wide table shows with their standard errors."""

    baselines: Callable[[Any], Mapping[str, Metrics]] = lambda task: {}
    """Returns the metrics of predictors without attention, by their names, for a task."""

    baselines_compete: bool = False
    """True where a report should say first that a baseline beats every structure; False where baselines are bounds."""

    is_causal: bool = True
    """True if a token sees the past alone, so that a model has a key-value cache to generate from."""

    is_log_scale: bool = False
    """True to draw the metric on a logarithmic axis."""

    figures: tuple[TaskFigure, ...] = ()
    """Figures of this task alone."""

    unmeasured: tuple[str, ...] = ()
    """Limits of the results, listed in the report."""

    command: TaskCommand | None = None
    """Its subcommand of `compare` and `train`; None for none."""

    @property
    def quantity_with_unit(self) -> str:
        """Quantity to print before its unit."""
        return self.short_quantity or self.quantity
