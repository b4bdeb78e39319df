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
from jaxflat.runs import real_text


class LanguageKind(NamedTuple):
    """The interface of a kind of language; `section` is `config.language`.

    check(section) and check_uses(config) raise ValueError. is_prepared(section): whether `make`
    works without `prepare`. sizes(section): (number of words, longest sentence).
    file_digests(section): digests of the user's files. labelled_sentences(section): the tasks
    with human labels. has_tasks: whether sentences have hidden symbols, which define tasks.
    has_optimum: whether the exact conditionals of words are known, and with them the least loss.
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
    has_optimum: bool


def language_kind(section: Config) -> LanguageKind:
    """Return the kind of a config's language."""
    return {"generated": GENERATED, "text": TEXT}.get(section.name, SAMPLED)


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
    _check_real_sentences(config)
    text_language.check_language(config.language, _num_labelled(config.probes))


def _check_uses_of_text(config: Config) -> None:
    """Raise ValueError if the language cannot be made, or a key needs its exact conditionals."""
    _check_real_sentences(config)
    name = f"language.name={config.language.name!r}: its exact conditionals are not known"
    for phase in config.phase_order:
        settings, key = config.phases[phase], f"phases.{phase}"
        if settings.targets == "exact":
            raise ValueError(f"{key}.targets='exact' must be 'sampled' for {name}")
        if settings.projection.checkpoint_steps:
            raise ValueError(f"{key}.projection.checkpoint_steps must be () for {name}")
    if config.phase_order and config.flatness.measures and config.flatness.labels == "exact":
        raise ValueError(f"flatness.labels='exact' must be 'data' or 'model' for {name}")
    real_text.check_text(config.language, _num_labelled(config.probes))


def _check_real_sentences(config: Config) -> None:
    """Raise ValueError if a key needs exact answers about sentences that people wrote."""
    if config.model.name == "lookup_table":
        raise ValueError("model.name='lookup_table' cannot read real sentences: words unknown")
    for name in config.phase_order:
        if config.phases[name].adversary.strength:
            raise ValueError(
                f"phases.{name}.adversary.strength must be 0 for language.name="
                f"{config.language.name!r}, whose sentences have no hidden labels"
            )


def _num_labelled(probes: Config) -> int:
    """Return the number of labelled sentences that the probes of a task need."""
    num_tuning = probes.finetune.num_draws * probes.finetune.shots
    num_training = max(probes.num_draws * max(probes.shots), num_tuning)
    return probes.num_test + probes.num_validation + num_training


def has_labels(section: Config) -> bool:
    """Return whether sentences of a language have labels, by hidden symbols or by people."""
    if language_kind(section).has_tasks:
        return bool(make_language(section).tasks)
    return bool(section[section.name].tasks)


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
    has_optimum=True,
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
    has_optimum=True,
)
"""A language generated by a causal model of real text; its tasks are real labelled sentences."""

TEXT = LanguageKind(
    check=real_text.check_text,
    check_uses=_check_uses_of_text,
    is_prepared=real_text.is_tokenized,
    prepare=real_text.prepare_text,
    sizes=real_text.text_sizes,
    make=real_text.make_text,
    file_digests=real_text.file_digests,
    labelled_sentences=real_text.labelled_sentences,
    has_tasks=False,
    has_optimum=False,
)
"""Windows of the user's own text; its tasks are real labelled sentences."""
