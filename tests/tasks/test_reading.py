"""Files become texts and rows, or an error that says where and what was expected."""

import hashlib
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tersor.core.errors import DataError
from tersor.tasks.table import read_rows, read_texts, to_number
from tersor.tasks.text import fingerprint, passages, read_text, standard_library_docstrings

COLUMNS = {"sentence1": ("sentence1",), "sentence2": ("sentence2",), "score": ("score",)}
PIECES = ['"', ",", "\n", "\r", "\t", "\0", "a", "1.5", "\ufeff", "\ud800", "sentence1", "score", "{", "}", ":", " "]


def write(folder, content, name="data.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.csv", 'one,"two, three",4\n'),
        ("header.csv", 'sentence1,sentence2,score\none,"two, three",4\n'),
        ("order.csv", '\ufeffscore,id,Sentence2,sentence1\r\n4,9,"two, three",one\r\n'),
        ("tabs.tsv", "one\ttwo, three\t4\n"),
        ("tabs.csv", "sentence1\tsentence2\tscore\none\ttwo, three\t4\n"),
        ("objects.jsonl", '{"sentence1": "one", "sentence2": "two, three", "score": 4}\n\n'),
    ],
)
def test_every_layout_gives_the_same_rows(tmp_path, name, content):
    path = write(tmp_path, content, name)
    (row,) = read_rows(path, COLUMNS)
    assert row.cells == {"sentence1": "one", "sentence2": "two, three", "score": "4"}
    assert to_number(path, row, "score") == 4.0


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"", "empty"),
        ("a.csv", b" \n\n", "white space"),
        ("a.csv", b"a,b,1\nc,\xe9,2\n", "line 2: byte 0xe9 is not UTF-8"),
        ("a.csv", b"a,b,1\nc, d,e,2\n", "line 2: 4 comma-separated fields, expected 3"),
        ("a.csv", b'a,b,1\n"c"d,e,2\n', "line 2: malformed row"),
        ("a.csv", b"a,b,1\nc,,2\n", "line 2: column 'sentence2' is empty"),
        ("a.csv", b"a,b,1\nc,d,good\n", "line 2: column 'score' holds 'good'; expected a number"),
        ("a.csv", b"a,b,nan\n", "expected a number"),
        ("a.csv", b"sentence1,sentence2,score\n", "no rows"),
        ("a.jsonl", b'{"sentence1": "a"}\n', "no text or number under 'sentence2'"),
        ("a.jsonl", b"[1]\n", "a JSON list; expected an object"),
        ("a.jsonl", b"{\n", "line 1: not JSON"),
        ("a.jsonl", b'{"sentence1": "\\ud800", "sentence2": "b", "score": 1}', "surrogate"),
    ],
)
def test_a_bad_file_is_told_by_line(tmp_path, name, content, says):
    path = write(tmp_path, content, name)
    with pytest.raises(DataError, match=says.replace("(", r"\(")) as caught:
        [to_number(path, row, "score") for row in read_rows(path, COLUMNS)]
    assert str(path) in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="expected a file"):
        read_text(tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=80), st.lists(st.sampled_from(PIECES), max_size=40).map("".join)), st.booleans())
@example("[" * 100_000, True)
@example('{"sentence1": ' + "9" * 5000 + "}", True)
@example("a,b," + "c" * 200_000, False)
def test_any_bytes_give_rows_or_a_data_error(tmp_path_factory, content, json_lines):
    path = tmp_path_factory.getbasetemp() / ("fuzz.jsonl" if json_lines else "fuzz.csv")
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    try:
        rows = read_rows(path, COLUMNS)
        numbers = [to_number(path, row, "score") for row in rows]
    except DataError:
        return
    assert len(numbers) == len(rows) > 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"))] * 2)))
def test_json_lines_round_trip(tmp_path_factory, pairs):
    pairs = [pair for pair in pairs if all(side.strip() for side in pair)] + [("a", "b")]
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    records = [{"sentence1": a, "sentence2": b, "score": 1} for a, b in pairs]
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    assert [(row.cells["sentence1"], row.cells["sentence2"]) for row in read_rows(path, COLUMNS)] == pairs


def test_passages_are_paragraphs_or_lines(tmp_path):
    assert passages("a\nb\n\t\n\nc\n") == ["a\nb", "c"]
    assert read_texts(write(tmp_path, "a\r\nb\r\n", "lines.txt")) == ["a", "b"]
    assert read_texts(write(tmp_path, "label,sentence\n1,good\n")) == ["good"]


def test_fingerprint_is_sha256_of_the_bytes_and_sees_names_in_folders(tmp_path):
    path = write(tmp_path, b"abc", "a.txt")
    assert fingerprint(path) == hashlib.sha256(b"abc").hexdigest()
    before = fingerprint(tmp_path)
    path.rename(tmp_path / "b.txt")
    assert fingerprint(tmp_path) != before == before


def test_standard_library_text_is_plenty_and_always_the_same():
    first = standard_library_docstrings()
    assert standard_library_docstrings.__wrapped__(200) == first[:200]  # read anew
    assert len(set(first)) == len(first) == 2000
    assert all(len(text) <= 2000 for text in first)
    assert first[:7] == standard_library_docstrings(7)
