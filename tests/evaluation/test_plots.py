"""Curves of runs and schedules: what is read, what is drawn of it, and the files that come out."""

from __future__ import annotations

import html
import json
import re
import struct
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tokenformer.commands import plot_run, plot_scaling
from megatron_tokenformer.errors import UserError
from megatron_tokenformer.evaluation.charts import run_chart, running_mean, scaling_chart, thinned
from megatron_tokenformer.evaluation.curves import read_curves, read_stage
from megatron_tokenformer.evaluation.page import figures

Row = dict[str, Any]


def write_run(folder: Path, steps: int, start: float = 0.0, rate: float = 10.0, **config: Any) -> Path:
    """A run that logs every second step, of so many tokens each, evaluated at 0, halfway and at the end."""
    rows: list[Row] = []
    for step in range(steps + 1):
        tokens = start + rate * step
        costs = {"step": step, "tokens": tokens, "flops": 1e6 * tokens}
        loss = 4.0 / (1.0 + tokens / 100.0)
        if step and step % 2 == 0:
            figures = {"lr": 1e-3, "grad_norm": 1.0, "step_time_s": 0.5, "tokens_per_s": rate / 0.5}
            rows.append({**costs, "loss": loss, **figures})
        if step in (0, steps // 2, steps):
            rows.append({**costs, "val_loss": loss + 0.1, "val_ppl": float(np.exp(loss + 0.1))})
    folder.mkdir(parents=True)
    append(folder, *rows)
    if config:
        (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def append(folder: Path, *rows: Row) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def model(qkv: int) -> Row:
    tokens = {"qkv": qkv, "output": qkv, "ffn": 4 * qkv}
    return {
        "model": {"layers": 1, "hidden_size": 8, "attention_heads": 2, "vocab_size": 64, "tokens": tokens}
    }


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    """A schedule of two stages whose names sort the other way round."""
    write_run(tmp_path / "ladder/z-small", 10, **model(4))
    write_run(tmp_path / "ladder/a-large", 20, start=100.0, **model(8))
    return tmp_path / "ladder"


def test_a_schedule_is_one_curve_its_stages_in_the_order_of_training(ladder: Path) -> None:
    (curve,) = read_curves([ladder])
    assert curve.label == "ladder" and [stage.name for stage in curve.stages] == ["z-small", "a-large"]
    chart = run_chart([curve], smooth=1)
    loss = chart.panels[0].lines[0]
    assert loss.x.tolist() == [*range(2, 11, 2), *range(12, 31, 2)], "steps go on over the stages"
    seconds = run_chart([curve], x="seconds", smooth=1).panels[0].lines[0]
    assert seconds.x.tolist() == [step * 0.5 for step in loss.x], "as do seconds: steps times their time"
    tokens = run_chart([curve], x="tokens", smooth=1).panels[0].lines[0]
    assert tokens.x.tolist() == [10.0 * step for step in loss.x], "tokens are counted over all stages anyway"
    (growth,) = chart.marks
    assert growth.kind == "growth" and growth.x == 10 and "→" in growth.text


def test_scaling_has_the_costs_of_all_stages_and_no_point_at_zero(ladder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "scratch", 30, **model(8))
    chart = scaling_chart(read_curves([ladder, tmp_path / "scratch"]), y="val_loss")
    assert chart.log_x and chart.panels[0].log_y
    small, large, scratch = chart.panels[0].lines
    assert (small.label, large.label, scratch.label) == ("ladder", "", "scratch"), "one name for a schedule"
    assert small.colour == large.colour != scratch.colour
    assert small.x.tolist() == [5e7, 1e8] and large.x.tolist() == [1e8, 2e8, 3e8]
    assert large.y[0] == pytest.approx(small.y[-1]), "what growth leaves as it is"
    assert [(mark.x, mark.kind) for mark in chart.marks] == [(1e8, "growth")]
    alone = scaling_chart(read_curves([ladder]))
    assert [line.label for line in alone.panels[0].lines] == ["z-small", "a-large"]
    assert len({line.colour for line in alone.panels[0].lines}) == 2, "alone, each stage has a colour"


def test_growths_and_setbacks_are_marked_where_they_were(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 6)
    growth = {"step": 0, "event": "growth", "parameters_before": 1_000, "parameters_after": 2_500_000}
    append(
        run,
        growth | {"val_loss_before": 3.0, "val_loss_after": 3.0},
        {"step": 3, "event": "loss", "action": "skip", "ranks": [0], "samples": [[1, 2]]},
        {"step": 4, "event": "spike", "action": "log"},
        {"step": 4, "event": "spike", "action": "rollback", "spike_step": 6},
    )
    marks = run_chart(read_curves([run])).marks
    assert [(mark.kind, mark.x) for mark in marks] == [
        *(("growth", 0.0), ("skipped", 3.0), ("spike", 4.0), ("rollback", 4.0)),
    ]
    assert marks[0].text == "1k → 2.5M, loss 3.0000 → 3.0000"
    assert marks[3].text == "step 6: loss spiked, back to step 4"
    on_tokens = run_chart(read_curves([run]), x="tokens").marks
    assert [mark.x for mark in on_tokens[2:]] == [40.0, 40.0]


def test_a_null_is_a_gap_and_a_row_that_is_cut_short_is_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 4)
    append(run, {"step": 5, "loss": None, "grad_norm": None}, {"step": 6, "loss": 1.5, "grad_norm": 2.0})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 9')
    loss = run_chart(read_curves([run]), smooth=1).panels[0].lines[0]
    assert loss.x.tolist() == [2, 4, 5, 6]
    assert np.isnan(loss.y).tolist() == [False, False, True, False]


def test_damaged_lines_are_left_out_and_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", 4)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo\n')
    odd = [
        {"event": {}},
        {"event": "loss", "action": ["skip"]},
        {"event": "loss", "step": "5"},
        {"loss": 2.0, "step": None},
    ]
    append(run, *({"step": 5} | row for row in odd), {"step": 6, "loss": 1.5})
    (curve,) = read_curves([run])
    assert run_chart([curve], smooth=1).panels[0].lines[0].x.tolist() == [2, 4, 6]
    assert curve.stages[0].events == []
    assert capsys.readouterr().out == f"warning: 5 damaged lines of {run}/metrics.jsonl left out\n"


def test_the_running_mean_is_of_the_known_values_before() -> None:
    y = np.array([1.0, np.nan, 3.0, 5.0, 7.0, np.nan, np.nan, np.nan, 2.0])
    expected = []
    for place, value in enumerate(y):
        window = [v for v in y[max(place - 2, 0) : place + 1] if not np.isnan(v)]
        expected.append(np.nan if np.isnan(value) else sum(window) / len(window))
    np.testing.assert_allclose(running_mean(y, 3), expected)


def test_of_a_million_points_the_spikes_and_gaps_are_kept() -> None:
    x = np.arange(1_000_000.0)
    y = np.sin(x / 1e5)
    y[123_456], y[654_321], y[777_777] = 50.0, -50.0, np.nan
    thin_x, thin_y = thinned(x, y)
    assert len(thin_x) <= 4_002 and thin_x[0] == 0 and thin_x[-1] == 999_999
    assert np.nanmax(thin_y) == 50.0 and np.nanmin(thin_y) == -50.0 and np.isnan(thin_y).sum() == 1
    assert np.abs(np.diff(thin_x)).max() < 3_000, "points everywhere"
    np.testing.assert_array_equal(y[thin_x.astype(int)], thin_y)


def test_many_rows_are_read_with_all_their_values(tmp_path: Path) -> None:
    run = tmp_path / "long"
    run.mkdir()
    append(run, *({"step": s, "tokens": s, "loss": s / 7, "step_time_s": 0.5} for s in range(1, 50_001)))
    stage = read_stage(run)
    np.testing.assert_array_equal(stage.training["loss"], np.arange(1, 50_001) / 7)
    assert stage.training["seconds"][-1] == 25_000.0
    assert all(len(line.x) < 4_100 for panel in run_chart(read_curves([run])).panels for line in panel.lines)


def test_the_steep_start_of_a_long_run_does_not_press_the_rest_flat(tmp_path: Path) -> None:
    run = tmp_path / "long"
    run.mkdir()
    losses = [12.0 / (1 + s) + 2.0 + (30.0 if s == 2_500 else 0.0) for s in range(5_000)]
    append(run, *({"step": s, "tokens": s, "loss": loss} for s, loss in enumerate(losses)))
    (panel,) = run_chart(read_curves([run])).panels
    assert panel.top is not None and 2.5 < panel.top < 6.0, "the mean of a spike is in the picture"
    short = run_chart(read_curves([write_run(tmp_path / "short", 20)])).panels[0]
    assert short.top is None


def png_size(path: Path) -> tuple[int, int, int]:
    """Width and height of a PNG, and how many bytes of colour it holds: it really is one."""
    data, place, pixels = path.read_bytes(), 8, b""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        pixels += data[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += length + 12
    width, height = struct.unpack_from(">II", data, 16)
    return width, height, len(set(zlib.decompress(pixels)))


def test_pictures_are_written(ladder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot_run.main([str(ladder)]) == 0
    assert f"written to {ladder}/plot.png" in capsys.readouterr().out
    out = [tmp_path / "new folder/s.png", tmp_path / "s.svg"]
    plot_scaling.main([str(ladder), *(word for path in out for word in ("--output", str(path)))])
    for path in (ladder / "plot.png", out[0]):
        width, height, colours = png_size(path)
        assert width > 1000 and height > 600 and colours > 20
    assert "cumulative training FLOPs" in re.sub(r"<!--|-->", "", out[1].read_text())


class Page(HTMLParser):
    """Tables, scripts and everything that would be loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.cells: list[str] = []
        self.scripts: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = tag
        self.loads += [f"{tag} {value}" for key, value in attrs if key in ("src", "href")]
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in in ("td", "th"):
            self.cells[-1] += data
        if self._in == "script":
            self.scripts[-1] += data


def test_the_page_needs_nothing_else_and_has_figures_and_settings(ladder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    evil = "<!--<script></script><img src=x onerror=alert(1)>"
    plot_run.main([str(ladder), "--label", evil, "--output", str(out)])
    text = out.read_text()
    page = Page(text)
    assert page.loads == [] and "@import" not in text and "url(http" not in text
    assert "<img" not in re.sub(r"<script.*?</script>", "", text, flags=re.S), "labels are text"
    data = json.loads(page.scripts[0])
    assert data["panels"][0]["lines"][0]["label"] == evil
    assert "<" not in page.scripts[0], "nothing that a browser could take for a tag or comment"
    stage = read_curves([ladder])[0].stages[1]
    assert [kind["label"] for kind in data["kinds"]] == ["growth"], "for the legend"
    assert figures(stage)["val_loss"] in page.cells and "qkv 8, output 8, ffn 32" in page.cells


def test_whatever_a_run_is_called_and_has_in_its_files_it_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 6, model=3, data=[], training=None)
    growth = {"step": 0, "event": "growth", "parameters_before": "few", "val_loss_before": "low"}
    append(run, growth | {"val_loss_after": 3.0}, {"step": 3, "event": "loss", "spike_step": []})
    out = [str(tmp_path / f"plot.{kind}") for kind in ("svg", "html")]
    odd = ["$\\frac{$", "_$a^$", "a $5 run, or $6"]
    named = [word for label in odd for word in ("--label", label)]
    written = [word for path in out for word in ("--output", path)]
    for tool in (plot_run, plot_scaling):
        tool.main([str(run)] * 3 + named + written + ["--title", "$a^$"])
        drawn = {html.unescape(text) for text in re.findall("<!-- (.*?) -->", Path(out[0]).read_text())}
        assert {*odd, "$a^$"} <= drawn, "as they were given"


def test_without_matplotlib_a_picture_names_the_extra_and_a_page_is_written(
    ladder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"pip install 'megatron-tokenformer\[plots\]'"):
        plot_run.main([str(ladder)])
    plot_run.main([str(ladder), "--output", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").exists()


def test_mistakes_are_told_in_words(ladder: Path, tmp_path: Path) -> None:
    def words(*arguments: str) -> str:
        with pytest.raises(UserError) as told:
            plot_run.main(list(arguments))
        return str(told.value)

    (tmp_path / "empty").mkdir()
    assert words(str(tmp_path / "nowhere")).endswith("is no folder of a run")
    assert "has no metrics.jsonl, nor stages that have one" in words(str(tmp_path / "empty"))
    assert "--label is given 1 times for 2 folders" in words(str(ladder), str(ladder), "--label", "a")
    assert "does not end in one of .png" in words(str(ladder), "--output", "plot.gif")
    assert "--smooth 0 is no number of rows" in words(str(ladder), "--smooth", "0")
    write_run(tmp_path / "study/one", 4)
    write_run(tmp_path / "study/two", 4)
    assert "are no stages of one schedule; name the runs themselves" in words(str(tmp_path / "study"))
    (tmp_path / "empty/metrics.jsonl").write_text("")
    assert "there is nothing to draw of empty" in words(str(tmp_path / "empty"))


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / seed / "run", 4) for seed in ("one", "two")]
    assert [curve.label for curve in read_curves(folders)] == ["one/run", "two/run"]
