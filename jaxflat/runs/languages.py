"""Make the language that a config names; one interface for every kind of language.

`make` and `sizes` read a config's `language` section. `prepare` first makes the files that a
language needs. `check` refuses a language that cannot be made. `check_uses` refuses a config that
needs tasks, labels or sentences that the language lacks.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxflat.config import Config, functions
from jaxflat.console import Display
from jaxflat.datasets.sources import file_digest
from jaxflat.languages import LANGUAGES
from jaxflat.languages.generated import text_language
from jaxflat.languages.generated.text_language import LabelledSentences


class LanguageKind(NamedTuple):
    """The interface of a kind of language; `section` is `config.language`.

    check(section) and check_uses(config) raise ValueError. is_prepared(section): whether `make`
    works without `prepare`. sizes(section): (number of words, longest sentence).
    file_digests(section): digests of the user's files. labelled_sentences(section): the tasks
    with human labels. has_tasks: whether sentences have hidden symbols, which define tasks.
    """

    check: Callable[[Config], object]
    check_uses: Callable[[Config], None]
    is_prepared: Callable[[Config], bool]
    prepare: Callable[[Config, Display], None]
    sizes: Callable[[Config], tuple[int, int]]
    make: Callable[[Config], Any]
    file_digests: Callable[[Config], list[str]]
    labelled_sentences: Callable[[Config], Mapping[str, LabelledSentences]]
    has_tasks: bool


def language_kind(section: Config) -> LanguageKind:
    """Return the kind of a config's language."""
    return GENERATED if section.name == "generated" else SAMPLED


@functools.cache
def make_language(section: Config) -> Any:
    """Return the language of a config's `language` section.

    Raises ValueError that names the fault if it cannot be made.
    """
    with jax.ensure_compile_time_eval():  # under a trace, too, its arrays have values
        return language_kind(section).make(section)


def _make_sampled(section: Config) -> Any:
    chosen = section[section.name]
    if functions.is_function(chosen):
        return functions.call(chosen, seed=section.seed)
    return LANGUAGES[section.name](section.seed, **chosen)


def _sampled_sizes(section: Config) -> tuple[int, int]:
    language = make_language(section)
    return language.num_words, language.max_length


def _sampled_file_digests(section: Config) -> list[str]:
    return [file_digest(section.grammar_file.path)] if section.name == "grammar_file" else []


def _check_uses_of_sampled(config: Config) -> None:
    """Raise ValueError if the language cannot be made, or lacks a requested task or labeling."""
    section = config.language
    tasks = make_language(section).tasks
    requested = {"probes.labelings": config.probes.labelings}
    for phase in config.phase_order:
        if (adversary := config.phases[phase].adversary).strength:
            requested[f"phases.{phase}.adversary.labeling"] = (adversary.labeling,)
            if not tasks:
                raise ValueError(
                    f"phases.{phase}.adversary.strength={adversary.strength} needs tasks, and "
                    f"language.name={section.name!r} has none"
                )
    for key, labelings in requested.items():
        for name, task in tasks.items():
            for labeling in labelings:
                if labeling not in task.labelings:
                    raise ValueError(
                        f"{key}: {labeling!r} is not a labeling of task {name} of language.name="
                        f"{section.name!r}; choose from {', '.join(task.labelings)}"
                    )


def _check_uses_of_generated(config: Config) -> None:
    """Raise ValueError if the language cannot be made, or has too few labelled sentences."""
    if config.model.name == "lookup_table":
        raise ValueError("model.name='lookup_table' cannot read real sentences: words unknown")
    for name in config.phase_order:
        if config.phases[name].adversary.strength:
            raise ValueError(
                f"phases.{name}.adversary.strength must be 0 for language.name='generated', "
                "whose sentences have no hidden labels"
            )
    probes = config.probes
    num_tuning = probes.finetune.num_draws * probes.finetune.shots
    num_training = max(probes.num_draws * max(probes.shots), num_tuning)
    num_labelled = probes.num_test + probes.num_validation + num_training
    text_language.check_language(config.language, num_labelled)


def padded_lengths(section: Config) -> tuple[int, ...]:
    """Return at most eight numbers of positions, ascending, that pad sentences without much waste.

    The last one holds the longest sentence. It is the only one if no sentence is shorter, or if a
    user's function makes the language.
    """
    _, longest = language_kind(section).sizes(section)
    chosen = section[section.name]
    shortest = longest if functions.is_function(chosen) else chosen.get("min_length", longest)
    gap = -(-longest // 8)
    return (*(n for n in range(gap, longest, gap) if n >= shortest), longest)


SAMPLED = LanguageKind(
    check=make_language,
    check_uses=_check_uses_of_sampled,
    is_prepared=lambda section: True,
    prepare=lambda section, display: None,
    sizes=_sampled_sizes,
    make=_make_sampled,
    file_digests=_sampled_file_digests,
    labelled_sentences=lambda section: {},
    has_tasks=True,
)
"""A language whose sentences are sampled from tables, which its seed or a file decides."""

GENERATED = LanguageKind(
    check=text_language.check_language,
    check_uses=_check_uses_of_generated,
    is_prepared=text_language.has_teacher,
    prepare=text_language.prepare_teacher,
    sizes=lambda section: (section.generated.num_words, section.generated.length),
    make=text_language.make_generated,
    file_digests=text_language.file_digests,
    labelled_sentences=text_language.labelled_sentences,
    has_tasks=False,
)
"""A language generated by a causal model of real text; its tasks are real labelled sentences."""
