"""Good lines give their documents; each bad one is named with file, line, kind and reason."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tokenformer.data import lines, problems
from megatron_tokenformer.data.lines import Fields, parse_lines

SPLIT = Fields("text", "meta.set")
BAD_LINES = [
    (b'{"text": "a"', problems.MALFORMED_JSON, "malformed JSON"),
    (b"\xef\xbb\xbf{}", problems.MALFORMED_JSON, "malformed JSON"),
    (b'{"text": "\xff"}', problems.INVALID_UTF8, "invalid UTF-8: byte 0xff at column 11"),
    (b'{"body": "a", "id": 1}', problems.NO_TEXT, "no key 'text'; the object has 'body', 'id'"),
    (b"{}", problems.NO_TEXT, "no keys"),
    (b'{"text": null}', problems.TEXT_NO_STRING, "NoneType, not a string"),
    (b'{"text": ["a"]}', problems.TEXT_NO_STRING, "list, not a string"),
    (b'["text"]', problems.NO_OBJECT, "expected a JSON object with the key 'text', found list"),
    (b'"text"', problems.NO_OBJECT, "found str"),
    (b"7", problems.NO_OBJECT, "found int"),
]


@pytest.mark.parametrize(("line", "kind", "reason"), BAD_LINES)
def test_a_bad_line_is_named_and_the_others_are_kept(line: bytes, kind: str, reason: str) -> None:
    data = b'{"text": "one"}\n{"text": "two"}\n' + line + b'\n{"text": "four"}'
    parsed = parse_lines(data, "a.jsonl", 11, Fields())
    assert parsed.texts == ["one", "two", "four"]
    assert [problem.kind for problem in parsed.problems] == [kind]
    assert parsed.problems[0].message.startswith("a.jsonl:13: ")
    assert reason in parsed.problems[0].message


@pytest.mark.parametrize("meta", [b"", b', "meta": null', b', "meta": {"set": 7}', b', "meta": {"set": ""}'])
def test_a_document_without_a_component_is_a_problem_only_when_split(meta: bytes) -> None:
    data = b'{"text": "one"%b}\n{"text": "two", "meta": {"set": "B"}}' % meta
    assert parse_lines(data, "a", 1, Fields()).texts == ["one", "two"]
    parsed = parse_lines(data, "a", 1, SPLIT)
    assert (parsed.texts, parsed.components) == (["two"], ["B"])
    assert [problem.kind for problem in parsed.problems] == [problems.NO_COMPONENT]


values = st.one_of(st.none(), st.integers(-9, 9), st.text(), st.lists(st.integers(0, 9), max_size=2))
rows = st.one_of(values, st.dictionaries(st.sampled_from(["text", "meta", "x"]), values))
good = st.builds(lambda text, name: {"meta": {"set": name}, "text": text}, st.text(), st.text(min_size=1))


@given(st.lists(st.one_of(good, rows), max_size=8), st.booleans(), st.sampled_from([Fields(), SPLIT]))
def test_the_quick_way_and_the_careful_way_agree(items: list[object], blank: bool, fields: Fields) -> None:
    data = (b"\n \n" if blank else b"\n").join(orjson.dumps(item) for item in items)
    careful = lines._parse_carefully(data, "a", 1, fields)
    assert parse_lines(data, "a", 1, fields) == careful
    assert len(careful.texts) + len(careful.problems) == len(items)
