"""Grammars as text: read, repaired, written, and 400 mutilated files against a second reader."""

import math
import warnings
from collections import Counter
from fractions import Fraction

import jax
import nltk
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxflat.languages import LANGUAGES
from jaxflat.languages.grammars.grammar import Grammar, random_levelled_grammar
from jaxflat.languages.grammars.grammar_file import (
    GrammarWarning,
    read_grammar,
    write_grammar,
)
from tests.languages.test_grammar import by_name

LEVELLED = """
S S1 0.5
S S2 0.5

S1 A B 0.25
S1 B B 0.75
S2 B A 1
A a 0.3333333
A b 0.3333333
A c 0.3333333
B b 0.5
B d 0.5
""".lstrip()
RECURSIVE = """
S A 0.125
S A B 0.5
S a 0.375
A B A 0.25
A a 0.75
B b 0.5
B c 0.5
""".lstrip()


def read(tmp_path, content: str | bytes) -> Grammar:
    path = tmp_path / "grammar.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_grammar(path)


def test_a_start_of_units_only_becomes_the_choice_of_the_root(tmp_path):
    grammar = read(tmp_path, LEVELLED)
    assert grammar.nonterminals == ("S1", "S2", "A", "B")
    assert grammar.words == ("a", "b", "c", "d")
    assert grammar.levels == (2, 2)
    np.testing.assert_array_equal(grammar.start_N, [0.5, 0.5, 0, 0])
    np.testing.assert_allclose(grammar.emissions_NxV[2], [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-15)
    assert by_name(grammar)["S1", "B", "B"] == 0.75
    for table in (grammar.start_N, grammar.rules_NxNxN, grammar.emissions_NxV):
        assert table.dtype == np.float64


def test_a_start_with_other_rules_is_a_root_itself(tmp_path):
    grammar = read(tmp_path, RECURSIVE)
    rules = by_name(grammar)
    assert (grammar.nonterminals, grammar.levels) == (("S", "A", "B"), (3,))
    assert (rules["", "S"], rules["", "A"]) == (0.875, 0.125)
    assert (rules["S", "A", "B"], rules["S", "a"]) == (0.5 / 0.875, 0.375 / 0.875)
    only_itself = read(tmp_path, "ROOT ROOT ROOT 0.25\nROOT word 0.25\nROOT word 0.5")
    assert by_name(only_itself) == {
        ("", "ROOT"): 1,
        ("ROOT", "ROOT", "ROOT"): 0.25,
        ("ROOT", "word"): 0.75,
    }


@pytest.mark.parametrize(
    "content",
    [
        LEVELLED,
        RECURSIVE,
        RECURSIVE.replace("S ", "S' ").replace("a", "S"),
        "\ufeff" + LEVELLED.replace("\n", "\r\n\r\n").replace(" ", " \t "),
        LEVELLED.replace("a", "\0").replace("b", "é").replace("c", "0.5").replace("d", "#"),
        # The start is below its own unit child, and so not in the first group.
        "S A 0.1\nS B B 0.9\nB x 1\nA C C 1\nC D D 1\nD B B 1",
    ],
)
def test_writing_and_reading_changes_no_bit(tmp_path, content):
    grammar = read(tmp_path, content)
    write_grammar(tmp_path / "written.txt", grammar)
    again = read_grammar(tmp_path / "written.txt")
    for name, value in vars(grammar).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    for A in range(len(grammar.nonterminals)):
        assert math.fsum([*grammar.rules_NxNxN[A].flat, *grammar.emissions_NxV[A]]) == 1


@pytest.mark.slow
def test_random_grammars_can_be_written(tmp_path):
    grammar = random_levelled_grammar(
        0,
        level_sizes=(9, 8, 8, 8, 8, 8),
        num_words=200,
        emission_probability=0.2,
        rule_concentration=0.1,
        emission_concentration=0.1,
    )
    write_grammar(tmp_path / "written.txt", grammar)
    again = read_grammar(tmp_path / "written.txt")
    for name, value in vars(grammar).items():
        np.testing.assert_array_equal(getattr(again, name), value)


def test_a_grammar_that_a_file_cannot_hold_is_not_written(tmp_path):
    grammar = read(tmp_path, LEVELLED)
    unused = np.pad(grammar.emissions_NxV, ((0, 0), (0, 1)))
    tables = vars(grammar) | {"words": (*grammar.words, "e"), "emissions_NxV": unused}
    with pytest.raises(ValueError, match=r"written\.txt: .* hold this grammar: words would change"):
        write_grammar(tmp_path / "written.txt", Grammar(**tables))
    with pytest.raises(ValueError, match=r"written\.txt:6: .a. is in a pair but has no"):
        write_grammar(
            tmp_path / "written.txt", Grammar(**vars(grammar) | {"words": ("a b", "c", "d", "e")})
        )
    assert not (tmp_path / "written.txt").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "1: no rules"),
        ("\n \n", "1: no rules"),
        ("S a", "1: a rule has 3 or 4 fields; this line has 2"),
        ("S a 1\n\nS A B C 1", "3: a rule has 3 or 4 fields; this line has 5"),
        ("S a 0", "1: a probability is above 0 and at most 1; got '0'"),
        ("S a 1.5", "1: a probability is above 0 and at most 1; got '1.5'"),
        ("S a nan", "1: a probability is above 0 and at most 1; got 'nan'"),
        ("S S a", "1: a probability is above 0 and at most 1; got 'a'"),
        ("S A 1\nA B 1\nB b 1", "2: only the start symbol 'S' may become one non-terminal"),
        ("S A a 1\nA a 1", "1: 'a' is in a pair but has no rules"),
        ("S A 1\nA S S 0.5\nA a 0.5", "2: the start symbol 'S' cannot be on the right"),
        ("S S 0.5\nS a 0.5", "1: the start symbol 'S' cannot be on the right"),
        ("S A A 1\nA a 0.5\nA b 0.48", "2: the rules of 'A' sum to 0.98, not to 1"),
        ("S A A 1\nA a 0.5\nA b 0.5\nA b 0.02", "2: the rules of 'A' sum to 1.02, not to 1"),
        ("S A 0.5\nS a 0.48\nA a 1", "1: the rules of 'S' sum to 0.98, not to 1"),
        ("S a 1\nX a 0.5", "2: the rules of 'X' sum to 0.5, not to 1"),
        (
            "S A A 1\nA a 1\nA B B 0.000\nB b 1",
            "3: a probability is above 0 and at most 1; got '0.000'",
        ),
        ("S A 0.5\nS a 0.5\nA A A 1", "3: 'A' never ends in words"),
        ("S S S 1\nA a 1", "1: 'S' never ends in words"),
        (b"S a 1\n\xff a 1", "2: not UTF-8 text"),
    ],
)
def test_errors_are_one_line_with_file_and_line(tmp_path, content, message):
    with pytest.raises(ValueError, match="grammar") as caught:
        read(tmp_path, content)
    assert str(caught.value) == f"{tmp_path / 'grammar.txt'}:{message}"


ROUNDED_LEVELLED = """
S S1 0.5
S S2 0.5001
S1 A B 0.2501
S1 B B 0.7502
S2 B A 1
X Y Y 0.5
X A B 0.5
A a 0.3333
A b 0.3333
A c 0.3333
B b 0.5
B d 0.2
B d 0.2999
Y X X 1
Z z 0.9999
""".lstrip()
ROUNDED_RECURSIVE = """
S A 0.125
S A B 0.5003
S a 0.375
X Y Y 1
Y X X 1
A B A 0.25
A a 0.7501
B b 0.5
B c 0.5
""".lstrip()


def cleaned(content: str) -> str:
    """Return the file without X, Y and Z, and with each sum divided out in exact arithmetic."""
    lines = [line.split() for line in content.splitlines()]
    totals: Counter[str] = Counter()
    for left, *_, last in lines:
        totals[left] += Fraction(last)
    return "".join(
        f"{' '.join(line[:-1])} {float(Fraction(line[-1]) / totals[line[0]])!r}\n"
        for line in lines
        if line[0] not in "XYZ"
    )


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (
            ROUNDED_LEVELLED,
            [
                "6: no rules lead from 'S' to 'X', 'Y', 'Z': dropped",
                "3: the rules of 'S1' sum to 1.0003, not to 1: normalised; "
                "it is the worst of 4 symbols",
            ],
        ),
        (
            ROUNDED_RECURSIVE,
            [
                "4: no rules lead from 'S' to 'X', 'Y': dropped",
                "1: the rules of 'S' sum to 1.0003, not to 1: normalised; "
                "it is the worst of 2 symbols",
            ],
        ),
        ("S a 1\nA a 1", ["2: no rules lead from 'S' to 'A': dropped"]),
        ("S a 1\nA A A 1", ["2: no rules lead from 'S' to 'A': dropped"]),
        ("S a 0.5\nS b 0.49", ["1: the rules of 'S' sum to 0.99, not to 1: normalised"]),
        (
            "S A A 1\nA a 0.5\nA b 0.499",
            ["2: the rules of 'A' sum to 0.999, not to 1: normalised"],
        ),
        # A rule that is written twice adds up before its sum is judged.
        (
            "S a 0.25\nS a 0.25\nS b 0.5\nS b 0.001",
            ["1: the rules of 'S' sum to 1.001, not to 1: normalised"],
        ),
        ("S a 0.25\nS a 0.25\nS b 0.25\nS b 0.25", []),
        (LEVELLED, []),
    ],
)
def test_repairs_are_one_line_each_with_file_and_line(tmp_path, content, messages):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(tmp_path, content)
    assert {warning.category for warning in caught} <= {GrammarWarning}
    path = tmp_path / "grammar.txt"
    assert [str(warning.message) for warning in caught] == [f"{path}:{m}" for m in messages]


@pytest.mark.parametrize("content", [ROUNDED_LEVELLED, ROUNDED_RECURSIVE])
def test_a_repaired_file_is_the_language_of_the_cleaned_one(tmp_path, content):
    """Names, levels, sentences, exact conditionals, entropy, and labels of every kind."""
    rounded, clean = tmp_path / "rounded.txt", tmp_path / "clean.txt"
    rounded.write_text(content)
    clean.write_text(cleaned(content))
    with pytest.warns(GrammarWarning):
        grammar = read_grammar(rounded)
    expected = read_grammar(clean)
    for name in ("nonterminals", "words", "levels"):
        assert getattr(grammar, name) == getattr(expected, name)
    assert grammar.levels == ((2, 2) if content == ROUNDED_LEVELLED else (3,))
    for name in ("start_N", "rules_NxNxN", "emissions_NxV"):
        np.testing.assert_allclose(getattr(grammar, name), getattr(expected, name), rtol=1e-14)

    length = 2 if content == ROUNDED_LEVELLED else 6
    bounds = {"length": length, "min_length": 1, "tasks": ((), (0, 1), (0, 2))}
    with pytest.warns(GrammarWarning):
        language = LANGUAGES["grammar_file"](0, path=str(rounded), **bounds)
    other = LANGUAGES["grammar_file"](0, path=str(clean), **bounds)
    sentences = language.sample(jax.random.key(0), 64)
    same = other.sample(jax.random.key(0), 64)
    jax.tree.map(np.testing.assert_array_equal, sentences, same)
    logp_BxTxV, other_BxTxV = (
        made.conditional_log_probs(sentences.tokens_BxT, sentences.lengths_B)
        for made in (language, other)
    )
    np.testing.assert_array_equal(logp_BxTxV, other_BxTxV)
    entropy, other_entropy = (
        -np.sum(np.exp(logp) * np.maximum(logp, -100)) for logp in (logp_BxTxV, other_BxTxV)
    )
    assert entropy == other_entropy > 0
    assert language.tasks.keys() == other.tasks.keys()
    for name, task in language.tasks.items():
        assert task.num_classes == other.tasks[name].num_classes
        for labeling in task.labelings:
            labels, valid = task.labels(sentences, labeling)
            other_labels, other_valid = other.tasks[name].labels(sentences, labeling)
            np.testing.assert_array_equal(valid, other_valid)
            np.testing.assert_array_equal(labels, other_labels)
        np.testing.assert_array_equal(
            task.posterior(sentences), other.tasks[name].posterior(sentences)
        )


@pytest.mark.slow
def test_a_grammar_of_the_papers_shape_rounded_to_five_digits_loads(tmp_path):
    grammar = random_levelled_grammar(
        0,
        level_sizes=(9, 8, 8, 8, 8, 8),
        num_words=200,
        emission_probability=0.2,
        rule_concentration=0.1,
        emission_concentration=0.1,
    )
    names, words = grammar.nonterminals, grammar.words
    rules = [("ROOT", names[A], grammar.start_N[A]) for A in np.flatnonzero(grammar.start_N)]
    for A, B, C in np.argwhere(grammar.rules_NxNxN):
        rules.append((names[A], names[B], names[C], grammar.rules_NxNxN[A, B, C]))
    for A, v in np.argwhere(grammar.emissions_NxV):
        rules.append((names[A], words[v], grammar.emissions_NxV[A, v]))
    lines = [" ".join((*symbols, f"{p:.5f}")) for *symbols, p in rules if p > 5e-6]
    with pytest.warns(GrammarWarning) as caught:
        read(tmp_path, "\n".join([*lines, "A2_8 A3_0 A3_1 1"]))
    assert "no rules lead from 'ROOT' to 'A2_8': dropped" in str(caught[0].message)
    worst = float(str(caught[1].message).split("sum to ")[1].split(",")[0])
    assert 1e-5 < abs(worst - 1) < 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GrammarWarning)
        again = read_grammar(tmp_path / "grammar.txt")
    assert again.levels == grammar.levels
    assert again.nonterminals == grammar.nonterminals
    for name in ("start_N", "rules_NxNxN"):
        np.testing.assert_allclose(getattr(again, name), getattr(grammar, name), atol=5e-4)


@pytest.mark.parametrize(
    ("content", "accepted"),
    [
        (LEVELLED, True),
        (RECURSIVE, True),
        (ROUNDED_LEVELLED, True),
        (ROUNDED_RECURSIVE, True),
        ("S a 0.5\nS b 0.491", True),
        ("S a 0.5\nS b 0.509", True),
        ("S a 0.5\nS b 0.48", False),
        ("S a 0.5\nS b 0.52", False),
        ("S a 1\nX a 0.5", False),
    ],
)
def test_nltk_accepts_the_same_sums(tmp_path, content, accepted):
    lines = [line.split() for line in content.splitlines() if line.split()]
    symbols = {name: nltk.Nonterminal(name) for name, *_ in lines}
    productions = [
        nltk.ProbabilisticProduction(
            symbols[left], [symbols.get(name, name) for name in right], prob=float(last)
        )
        for left, *right, last in lines
    ]
    if accepted:
        nltk.PCFG(symbols["S"], productions)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GrammarWarning)
            read(tmp_path, content)
    else:
        with pytest.raises(ValueError, match="do not sum to 1"):
            nltk.PCFG(symbols["S"], productions)
        with pytest.raises(ValueError, match=r"grammar\.txt:\d: .* sum to .*, not to 1"):
            read(tmp_path, content)


def test_a_grammar_with_a_symbol_that_only_a_rule_of_probability_0_reaches_is_not_written(tmp_path):
    grammar = read(tmp_path, "S A A 1\nA a 0.75\nA B B 0.25\nB b 1")
    A, B = (grammar.nonterminals.index(name) for name in "AB")
    rules_NxNxN, emissions_NxV = grammar.rules_NxNxN.copy(), grammar.emissions_NxV.copy()
    rules_NxNxN[A, B, B], emissions_NxV[A, 0] = 0, 1
    tables = {"rules_NxNxN": rules_NxNxN, "emissions_NxV": emissions_NxV}
    with pytest.raises(ValueError, match=r"hold this grammar: nonterminals would change"):
        write_grammar(tmp_path / "written.txt", Grammar(**vars(grammar) | tables))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.txt: No such file or directory"):
        read_grammar(tmp_path / "none.txt")


def expected_rules(content: bytes) -> tuple[dict[tuple[str, ...], float], int] | None:
    """Return what `by_name` should give, and how many warnings; None if the file is wrong."""
    try:
        lines = [line.split() for line in content.decode().split("\n") if line.split()]
        weights: Counter[tuple[str, ...]] = Counter()
        for line in lines:
            assert len(line) in (3, 4)
            assert 0 < float(line[-1]) <= 1
            weights[tuple(line[:-1])] += float(line[-1])
        start, lefts = lines[0][0], {line[0] for line in lines}
        units = {rule for rule in weights if len(rule) == 2 and rule[1] in lefts}
        assert all(rule[0] == start for rule in units)
        assert not units or not any(start in rule[1:] for rule in weights)
        assert all(set(rule[1:]) <= lefts for rule in weights if len(rule) == 3)
        off = set()
        for left in lefts:
            own = [float(line[-1]) for line in lines if line[0] == left]
            assert abs(sum(own) - 1) <= 0.01
            if abs(sum(own) - 1) > 1e-6 * len(own):
                off.add(left)
        # Symbols within as many steps as there are symbols: up from the words, down from the start.
        ending, reached = set(), {start}
        for _ in lefts:
            ending |= {r[0] for r in weights if all(s in ending or s not in lefts for s in r[1:])}
            reached |= {s for rule in weights if rule[0] in reached for s in rule[1:]} & lefts
        assert reached <= ending
    except (AssertionError, ValueError, IndexError):
        return None
    weights = Counter({rule: weight for rule, weight in weights.items() if rule[0] in reached})
    units &= weights.keys()
    rules, sums = {}, Counter()
    for rule, weight in weights.items():
        sums[rule[0]] += 0 if rule in units else weight
    for rule, weight in weights.items():
        if rule in units:
            rules["", rule[1]] = weight / (sum(weights[unit] for unit in units) + sums[start])
        else:
            rules[rule] = weight / sums[rule[0]]
    if sums[start]:
        rules["", start] = 1 - sum(p for rule, p in rules.items() if rule[0] == "")
    return rules, bool(off & reached) + (reached < lefts)


REPAIRED = [ROUNDED_LEVELLED, LEVELLED + "Z z 1\n", RECURSIVE.replace("0.25", "0.2503")]


@st.composite
def mutilated(draw) -> bytes:
    """One of the files above after one or two accidents."""
    content = draw(st.sampled_from([LEVELLED, RECURSIVE, *REPAIRED]))
    lines = [line.split() for line in content.splitlines() if line]
    symbols = sorted({symbol for line in lines for symbol in line[:-1]})
    for _ in range(draw(st.integers(1, 2))):
        i, j = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        line, field = lines[i], draw(st.integers(0, 3)) % len(lines[i])
        accident = draw(st.integers(0, 7))
        if accident == 0 and len(line) > 1:
            del line[field]
        elif accident == 1:
            line[-1] = draw(st.sampled_from(["0", "-0.5", "inf", "x", "0.5", "0.33333331", "1e-7"]))
        elif accident == 2:
            line[field] = draw(st.sampled_from([*symbols, "new", "\0", "é"]))
        elif accident == 3:  # the same symbol everywhere
            old, new = (draw(st.sampled_from([*symbols, "S9"])) for _ in range(2))
            lines = [[new if symbol == old else symbol for symbol in line] for line in lines]
        elif accident == 4:
            lines.insert(j, list(line))
        elif accident == 5 and len(lines) > 1:
            del lines[i]
        elif accident == 6:
            lines[i], lines[j] = lines[j], lines[i]
        elif accident == 7:  # a rule in two halves
            try:
                line[-1] = str(float(line[-1]) / 2)
            except ValueError:
                continue
            lines.insert(j, list(line))
    content = "\n".join(map(" ".join, lines)).encode()
    damage = draw(st.integers(0, 9))
    if damage == 0:
        return content[: draw(st.integers(0, len(content)))]
    place = draw(st.integers(0, len(content)))
    garbage = draw(st.binary(max_size=3)) if damage == 1 else b""
    return content[:place] + garbage + content[place:]


def test_mutilated_files_are_refused_or_read_right(tmp_path_factory):
    path, outcomes = tmp_path_factory.mktemp("mutilated") / "grammar.txt", Counter()
    repaired = Counter()

    @settings(deadline=None, derandomize=True, database=None, max_examples=400)
    @given(mutilated())
    def check(content: bytes):
        path.write_bytes(content)
        expected = expected_rules(content)
        outcomes[expected is None] += 1
        if expected is None:
            with pytest.raises(ValueError, match=r"grammar\.txt:\d+: ") as caught:
                read_grammar(path)
            assert len(str(caught.value).splitlines()) == 1
        else:
            rules, num_warnings = expected
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = by_name(read_grammar(path))
            assert [w.category for w in caught] == [GrammarWarning] * num_warnings
            repaired[num_warnings] += 1
            assert found.keys() == rules.keys()
            for rule, probability in rules.items():
                assert found[rule] == pytest.approx(probability, rel=1e-12)

    check()
    assert min(outcomes[True], outcomes[False]) > 20
    assert min(repaired[0], repaired[1], repaired[2]) > 5, repaired
