"""Grammars as text: read, written, and 200 mutilated files against a reader of its own."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxflat.languages.grammars.grammar import Grammar, random_levelled_grammar
from jaxflat.languages.grammars.grammar_file import read_grammar, write_grammar
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
        ("S A A 1\nA a 0.5\nA b 0.499", "2: the rules of 'A' sum to 0.999, not to 1"),
        ("S A 0.5\nS a 0.5\nA A A 1", "3: 'A' never ends in words"),
        ("S S S 1\nA a 1", "1: 'S' never ends in words"),
        ("S a 1\nA a 1", "2: 'A' cannot come from the start symbol"),
        (b"S a 1\n\xff a 1", "2: not UTF-8 text"),
    ],
)
def test_errors_are_one_line_with_file_and_line(tmp_path, content, message):
    with pytest.raises(ValueError, match="grammar") as caught:
        read(tmp_path, content)
    assert str(caught.value) == f"{tmp_path / 'grammar.txt'}:{message}"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.txt: No such file or directory"):
        read_grammar(tmp_path / "none.txt")


def expected_rules(content: bytes) -> dict[tuple[str, ...], float] | None:
    """What `by_name` should give, or None where the file is wrong."""
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
        for left in lefts:
            own = [float(line[-1]) for line in lines if line[0] == left]
            assert abs(sum(own) - 1) <= 1e-6 * len(own)
        # Symbols within as many steps as there are symbols: up from the words, down from the start.
        ending, reached = set(), {start}
        for _ in lefts:
            ending |= {r[0] for r in weights if all(s in ending or s not in lefts for s in r[1:])}
            reached |= {s for rule in weights if rule[0] in reached for s in rule[1:]} & lefts
        assert ending == reached == lefts
    except (AssertionError, ValueError, IndexError):
        return None
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
    return rules


@st.composite
def mutilated(draw) -> bytes:
    """One of the files above after one or two accidents."""
    lines = [line.split() for line in draw(st.sampled_from([LEVELLED, RECURSIVE])).splitlines()]
    lines = [line for line in lines if line]
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

    @settings(deadline=None, derandomize=True, database=None, max_examples=200)
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
            found = by_name(read_grammar(path))
            assert found.keys() == expected.keys()
            for rule, probability in expected.items():
                assert found[rule] == pytest.approx(probability, rel=1e-12)

    check()
    assert min(outcomes[True], outcomes[False]) > 20
