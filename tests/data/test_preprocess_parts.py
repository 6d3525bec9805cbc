"""A dataset for each component, and shards that together are one pass."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
import pytest

from megatron_tokenformer.data.merging import merge_datasets
from megatron_tokenformer.data.preprocess import Options, preprocess
from megatron_tokenformer.errors import UserError
from tests.data.runs import BYTES, json_lines, names, output_bytes, run_tool

SETS = ["Wikipedia (en)", "Pile-CC", "Gutenberg (PG-19)"]


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Seven files in which the components take turns as in the Pile."""
    paths = []
    for number in range(7):
        lines = (
            {"text": f"{number} {i} " * (i % 7), "meta": {"pile_set_name": SETS[i * (number + 1) % 3]}}
            for i in range(40)
        )
        paths.append(tmp_path / f"in-{number}.jsonl")
        paths[-1].write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return [str(path) for path in paths]


def only(paths: list[str], name: str, folder: Path) -> list[str]:
    """Copies of the files with the documents of one component."""
    kept = []
    for path in map(Path, paths):
        lines = [line for line in path.read_bytes().splitlines(True) if name.encode() in line]
        (folder / path.name).write_bytes(b"".join(lines))
        kept.append(str(folder / path.name))
    return kept


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_each_component_is_what_preprocessing_it_alone_gives(
    tmp_path: Path, inputs: list[str], workers: int
) -> None:
    job = BYTES._replace(split_by="meta.pile_set_name")
    result = preprocess(inputs, str(tmp_path / "out/pile"), job, Options(workers=workers))
    assert sorted(dataset["component"] for dataset in result.datasets) == sorted(SETS)
    slugs = {"Wikipedia (en)": "wikipedia-en", "Pile-CC": "pile-cc", "Gutenberg (PG-19)": "gutenberg-pg-19"}
    for name, slug in slugs.items():
        (tmp_path / slug).mkdir()
        alone = preprocess(only(inputs, name, tmp_path / slug), str(tmp_path / slug / "x"), BYTES).datasets[0]
        assert output_bytes(tmp_path / f"out/pile_{slug}") == output_bytes(tmp_path / slug / "x")
        (here,) = [dataset for dataset in result.datasets if dataset["component"] == name]
        assert here == json.loads((tmp_path / f"out/pile_{slug}_text_document.json").read_text())
        for key in ("documents", "tokens", "text_bytes", "empty_texts"):
            assert here[key] == alone[key]
        assert here["empty_texts"] > 0
    assert len(names(tmp_path / "out")) == 3 * len(SETS)


def test_a_document_without_component_fails_or_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["x"], set="A") + json_lines(["y"]))
    job = BYTES._replace(split_by="set")
    with pytest.raises(UserError, match=r"a\.jsonl:2: no name at 'set'"):
        preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), job)
    result = preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), job, Options(on_error="skip"))
    assert [dataset["documents"] for dataset in result.datasets] == [1]
    assert list(result.datasets[0]["problems"]) == ["no component"]


def test_components_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    job = BYTES._replace(split_by="set")
    path.write_bytes(json_lines(["x"], set="A b") + json_lines(["y"], set="a-B"))
    with pytest.raises(UserError, match="'A b' and 'a-B' have the same file name 'a-b'"):
        preprocess([str(path)], str(tmp_path / "out"), job)
    path.write_bytes(b"".join(json_lines(["x"], set=f"address {number}") for number in range(300)))
    with pytest.raises(UserError, match="more than 256 components"):
        preprocess([str(path)], str(tmp_path / "out"), job)
    path.write_bytes(json_lines(["x"], set="A"))
    (tmp_path / "out_a_text_document.idx").touch()
    with pytest.raises(UserError, match=r"out_a_text_document\.idx already exists"):
        preprocess([str(path)], str(tmp_path / "out"), job)
    assert names(tmp_path) == ["a.jsonl", "out_a_text_document.idx"]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_merged_shards_are_one_pass(tmp_path: Path, inputs: list[str], count: int) -> None:
    preprocess(inputs, str(tmp_path / "whole"), BYTES)
    parts = []
    for index in range(count):
        done = run_tool(
            *("--input", str(tmp_path / "in-*.jsonl"), "--shard", f"{index}/{count}", "--append-eod"),
            *("--output-prefix", str(tmp_path / f"part-{index}"), "--tokenizer-type", "ByteTokenizer"),
        )
        assert done.returncode == 0, done.stderr
        parts.append(str(tmp_path / f"part-{index}_text_document"))
    merge_datasets(parts, str(tmp_path / "merged_text_document"))
    assert output_bytes(tmp_path / "merged") == output_bytes(tmp_path / "whole")
    merged, whole = (
        json.loads((tmp_path / f"{name}_text_document.json").read_text()) for name in ("merged", "whole")
    )
    merged.pop("shard", None)
    assert {**merged, "prefix": ""} == {**whole, "prefix": ""}


def test_shards_of_components_merge_too(tmp_path: Path, inputs: list[str]) -> None:
    job = BYTES._replace(split_by="meta.pile_set_name")
    preprocess(inputs, str(tmp_path / "whole"), job)
    for index in range(2):
        preprocess(inputs, str(tmp_path / f"part-{index}"), job, Options(shard=(index, 2)))
    for slug in ("wikipedia-en", "pile-cc", "gutenberg-pg-19"):
        parts = [str(tmp_path / f"part-{index}_{slug}_text_document") for index in range(2)]
        merge_datasets(parts, str(tmp_path / f"merged_{slug}_text_document"))
        assert output_bytes(tmp_path / f"merged_{slug}") == output_bytes(tmp_path / f"whole_{slug}")


def test_shards_out_of_order_or_given_twice_are_refused_and_missing_ones_told(
    tmp_path: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(3):
        preprocess(inputs, str(tmp_path / f"part-{index}"), BYTES, Options(shard=(index, 3)))
    parts = [str(tmp_path / f"part-{index}_text_document") for index in range(3)]
    for ending in (".bin", ".idx", ".json"):
        Path(f"{tmp_path}/copy{ending}").write_bytes(Path(f"{parts[1]}{ending}").read_bytes())
    for given in ([parts[0], parts[2], parts[1]], [*parts, str(tmp_path / "copy")]):
        with pytest.raises(UserError, match="are not in order; give each once, 0 to 2"):
            merge_datasets(given, str(tmp_path / "merged"))
    assert "missing" not in capsys.readouterr().err
    merge_datasets(parts[1:], str(tmp_path / "merged"))
    assert "note: shards 0 of 3 are missing" in capsys.readouterr().err
