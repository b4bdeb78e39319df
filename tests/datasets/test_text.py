"""Text files: read as an independent reader does, or refused with one line and its place."""

import csv
import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxflat.datasets.text import read_sentences, read_table

HEADER = "index\tquestion\tsentence\tlabel"
ROWS = (
    '0\tWho "wrote it?\tA man did.\tno',
    "1\tWhere\u2028is it?\tIn the café. \tyes",
    "2\tWhen?\t“Now”, he said\x85.\tyes",
    "3\tWhy?\tIt\x0bis\x1cso.\tno",
)
COLUMNS, LABELS = ("question", "sentence"), ("yes", "no")


def read_pairs(path):
    return read_table(path, COLUMNS, "label", LABELS, ("positive", "negative"))


def independent_reading(raw: bytes):
    """Read the table with the csv module: (pairs, labels), or None if it is invalid."""
    try:
        rows = list(
            csv.reader(
                io.StringIO(raw.decode("utf-8-sig"), newline="\n"),
                delimiter="\t",
                quoting=csv.QUOTE_NONE,
            )
        )
    except (UnicodeDecodeError, csv.Error):
        return None
    if b"\0" in raw or len(rows) < 2 or any(len(row) != len(rows[0]) for row in rows):
        return None
    if b"\r" in raw.replace(b"\r\n", b""):
        return None
    if any(rows[0].count(name) != 1 for name in (*COLUMNS, "label")):
        return None
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    pairs = tuple(tuple(row[name] for name in COLUMNS) for row in table)
    if not all(text.strip() for pair in pairs for text in pair):
        return None
    if any(row["label"] not in LABELS for row in table):
        return None
    return pairs, [LABELS.index(row["label"]) for row in table]


def write(tmp_path, raw: bytes | str):
    path = tmp_path / "table.tsv"
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return path


def one_line(error) -> str:
    assert type(error.value) is ValueError
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_table_is_read_as_the_csv_module_reads_it(tmp_path, end, last, mark):
    raw = (mark + end.join((HEADER, *ROWS)) + end * last).encode()
    expected = independent_reading(raw)
    assert expected is not None
    examples = read_pairs(write(tmp_path, raw))
    assert examples.texts == expected[0]
    assert examples.labels_N is not None
    assert examples.labels_N.dtype == np.int32
    np.testing.assert_array_equal(examples.labels_N, expected[1])
    assert examples.label_names == ("positive", "negative")
    assert examples.name == "table"


def test_one_column_gives_sentences_and_labels_are_optional(tmp_path):
    path = write(tmp_path, "sentence\tlabel\na b \t1\nc\t0\n")
    examples = read_table(path, ["sentence"], "label", ("0", "1"))
    assert examples.texts == ("a b ", "c")
    assert examples.label_names == ("0", "1")
    bare = read_table(path, ["sentence"])
    assert bare.labels_N is None
    assert bare.label_names == ()


def lines(*changed: str, line: int = 2) -> str:
    return "\n".join((*ROWS[: line - 2], *changed, *ROWS[line - 1 :]))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("", "the file is empty"),
        ("\ufeff", "the file is empty"),
        (HEADER + "\n", "line 1 names the columns, and no line follows"),
        ("\n".join(ROWS), "line 1: there is no column 'question'; the columns are '0', 'Who"),
        ("label\tlabel\tquestion\tsentence\n", "line 1: there are two columns 'label'; the"),
        (f"{HEADER}\n{lines('0 a b c')}", "line 2: the number of fields is 1, not 4"),
        (f"{HEADER}\n{lines('', line=4)}", "line 4: the number of fields is 1, not 4"),
        (f"{HEADER}\n{lines(ROWS[0] + chr(9))}", "line 2: the number of fields is 5, not 4"),
        (
            f"{HEADER}\n{lines('0	a	 	no', line=3)}",
            "line 3, column 'sentence': the text is empty",
        ),
        (
            f"{HEADER}\n{lines('0	a	b	No')}",
            "line 2, column 'label': 'No' is not one of 'yes', 'no'",
        ),
        (
            f"{HEADER}\n{lines('0	a	b	')}",
            "line 2, column 'label': '' is not one of 'yes', 'no'",
        ),
        (f"{HEADER}\n{lines('0	a	b	' + 'x' * 99)}", f"'{'x' * 37}...' is not one of"),
        (
            f"{HEADER}\n{lines('0	a	b' + chr(0) + '	no')}",
            "line 2 has a NUL character within it",
        ),
        (
            f"{HEADER}\n{lines('0	a	b' + chr(13) + '	no')}",
            "line 2 has a carriage return within",
        ),
        (f"{HEADER}\n{ROWS[0]}\n".encode() + b"1\ta\t\xff\tno", "line 3 is not UTF-8 (invalid"),
        (f"\ufeff{HEADER}\n".encode() + b"1\ta\t\xe9\tno\n", "line 2 is not UTF-8 (invalid"),
        (f"{HEADER}\n{ROWS[0]}".encode("utf-16"), "line 1 is not UTF-8"),
    ],
)
def test_defects_name_the_file_and_the_place(tmp_path, raw, message):
    path = write(tmp_path, raw)
    with pytest.raises(ValueError, match=r".*") as error:
        read_pairs(path)
    assert one_line(error).startswith(f"{path}: {message}") or message in one_line(error)


def test_files_that_are_not_there(tmp_path):
    for path, message in ((tmp_path / "none.tsv", "no such file"), (tmp_path, "Is a directory")):
        for read in (read_pairs, read_sentences):
            with pytest.raises(ValueError, match=message) as error:
                read(path)
            assert one_line(error) == f"{path}: {message}"


def test_sentences_are_the_lines(tmp_path):
    path = write(tmp_path, 'One "two\u2028three\x85.\r\n four\tfive \nsix')
    assert read_sentences(path).texts == ('One "two\u2028three\x85.', " four\tfive ", "six")
    for raw, message in (
        ("", "the file is empty"),
        ("\n", "line 1: the text is empty"),
        ("a\n\nb\n", "line 2: the text is empty"),
        ("a\n\n", "line 2: the text is empty"),
        (b"a\n\xff\n", r"line 2 is not UTF-8 \(invalid start byte\)"),
        ("a\nb\0\n", "line 2 has a NUL character within it"),
    ):
        path = write(tmp_path, raw)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {message}$") as error:
            read_sentences(path)
        one_line(error)


PIECES = [*(b"\t", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b'"', b"\xc3", b"\xe2\x80\xa8", b" ")]
PIECES += [b"yes", b"no", b"label", b"\xef\xbb\xbf", b"maybe", b"\x85", b""]
edits = st.tuples(st.floats(0, 1), st.integers(0, 12), st.sampled_from(PIECES))


@settings(max_examples=400, deadline=None)
@given(
    edits=st.lists(edits, max_size=4),
    header=st.sampled_from([HEADER, "", "sentence\tlabel\tquestion\tx", HEADER.replace("l", "L")]),
    rows=st.lists(st.sampled_from([*ROWS, ROWS[0].replace("no", "No"), "\t\t\t", ""]), max_size=5),
    cut=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_mutilated_tables_are_refused_or_read_right(tmp_path_factory, edits, header, rows, cut):
    raw = "\n".join([header, *rows]).encode()
    for where, length, piece in edits:
        start = int(where * len(raw))
        raw = raw[:start] + piece + raw[start + length :]
    raw = raw[: int(cut * len(raw))]
    path = write(tmp_path_factory.getbasetemp(), raw)
    expected = independent_reading(raw)
    try:
        examples, refusal = read_pairs(path), None
    except ValueError as error:
        examples, refusal = None, error
    if examples is None:
        assert type(refusal) is ValueError
        assert len(str(refusal).splitlines()) == 1
        assert re.match(rf"{re.escape(str(path))}: (line \d+|the file is empty)", str(refusal))
        assert expected is None, refusal
    else:
        assert expected is not None
        assert examples.texts == expected[0]
        assert examples.labels_N is not None
        assert examples.labels_N.tolist() == expected[1]
