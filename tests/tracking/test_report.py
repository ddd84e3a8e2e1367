"""Reports: what they contain, that they are strict, and that nothing a user named becomes markup."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from model_checkpoint import EnhancedCheckpointManager, ExperimentTracker
from model_checkpoint.database.metrics import MetricTable
from model_checkpoint.errors import ConfigurationError

VOID = {"meta", "line", "polyline", "br", "link", "circle", "path", "rect"}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</text></svg><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "&lt;script&gt; &amp; <b>bold</b>",
    "<!--",
    "javascript:alert(1)",
]


class Page(HTMLParser):
    """Every element with its attributes, every text, and whether the elements are nested as they should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.balanced = True
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.balanced = False

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.elements.append(("!comment", {}))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[ExperimentTracker]:
    tracker = ExperimentTracker(
        "resnet",
        project_name="images",
        tags=["baseline", 50],
        config={"lr": 0.001, "layers": [1, 2], "limit": math.inf},
        database_url=f"sqlite:///{tmp_path}/runs.db",
        metadata={"note": math.nan},
    )
    yield tracker
    tracker.close()


def html_of(run: ExperimentTracker, folder: Path) -> Page:
    page = Page(Path(run.generate_report("html", str(folder))).read_text(encoding="utf-8"))
    assert page.balanced
    assert page.open == []
    return page


def json_of(run: ExperimentTracker, folder: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    text = Path(run.generate_report("json", str(folder))).read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return content


@pytest.mark.parametrize("format_type", ["html", "json"])
def test_the_report_is_a_file_named_after_the_run_in_a_folder_made_for_it(
    run: ExperimentTracker, tmp_path: Path, format_type: str
) -> None:
    folder = tmp_path / "deep" / "er"
    path = Path(run.generate_report(format_type, str(folder)))
    assert path.parent == folder
    assert run.experiment_id in path.name
    assert path.suffix == f".{format_type}"
    assert path.stat().st_size > 0


def test_without_arguments_it_is_html_in_the_working_directory(
    run: ExperimentTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(run.generate_report())
    assert path.suffix == ".html"
    assert path.resolve().parent == tmp_path.resolve()


def test_a_second_report_replaces_the_first(run: ExperimentTracker, tmp_path: Path) -> None:
    first = run.generate_report("json", str(tmp_path))
    run.log_metric("m", 1.0)
    assert run.generate_report("json", str(tmp_path)) == first
    assert len(json.loads(Path(first).read_text())["metrics"]) == 1


@pytest.mark.parametrize("format_type", ["pdf", "HTML", "", None])
def test_an_unknown_format_names_those_that_there_are_and_writes_nothing(
    run: ExperimentTracker, tmp_path: Path, format_type: Any
) -> None:
    with pytest.raises(ValueError, match="html, json"):
        run.generate_report(format_type, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_page_shows_name_project_tags_config_and_status(run: ExperimentTracker, tmp_path: Path) -> None:
    page = html_of(run, tmp_path)
    for shown in ("resnet", "images", "baseline", "50", "lr", "0.001", "[1, 2]", "running", run.experiment_id):
        assert shown in page.text


def test_the_page_has_no_script_and_loads_nothing(run: ExperimentTracker, tmp_path: Path) -> None:
    run.log_metric("loss", 1.0)
    page = html_of(run, tmp_path)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not {"src", "href", "action", "srcset"} & set(attributes)
    assert "@import" not in page.text
    assert "url(" not in page.text


def test_every_metric_has_a_chart_with_its_name_and_last_value(run: ExperimentTracker, tmp_path: Path) -> None:
    for step in range(10):
        run.log_metrics({"loss": 1 / (step + 1), "accuracy": step / 10}, step=step)
    page = html_of(run, tmp_path)
    assert [chart["aria-label"] for chart in page.of("svg")] == ["loss", "accuracy"]
    assert any("last 0.1, 10 points, from 0.1 to 1" in text for text in page.texts)
    for line in page.of("polyline"):
        assert len((line["points"] or "").split()) == 10


def coordinates(page: Page) -> list[float]:
    return [
        float(n) for line in page.of("polyline") for pair in (line["points"] or "").split() for n in pair.split(",")
    ]


def test_a_chart_lies_within_its_box_and_rises_with_its_values(run: ExperimentTracker, tmp_path: Path) -> None:
    for step, value in enumerate([0.0, 5.0, 10.0]):
        run.log_metric("m", value, step=step * 100)
    page = html_of(run, tmp_path)
    xs, ys = coordinates(page)[::2], coordinates(page)[1::2]
    assert xs == sorted(xs)
    assert ys == sorted(ys, reverse=True)  # SVG counts from the top
    assert (min(xs), max(ys) - min(ys)) == (0.0, max(ys))


@pytest.mark.parametrize(
    "values",
    [
        [math.nan, math.nan],
        [math.inf, -math.inf, math.nan],
        [1.0],
        [2.0, 2.0, 2.0],
        [1.0, math.nan, 3.0, math.inf],
        [1e308, -1e308],
        [5e-324, 0.0],
        [1e16, 1e16 + 2],
    ],
    ids=repr,
)
def test_no_chart_has_coordinates_that_are_not_finite(
    run: ExperimentTracker, tmp_path: Path, values: list[float]
) -> None:
    for value in values:
        run.log_metric("m", value)
    page = html_of(run, tmp_path)
    assert all(math.isfinite(number) for number in coordinates(page))
    assert len(page.of("figure")) == 1
    assert len(page.of("svg")) == int(any(map(math.isfinite, values)))


def test_a_series_without_a_finite_value_says_so(run: ExperimentTracker, tmp_path: Path) -> None:
    run.log_metrics({"m": math.nan})
    page = html_of(run, tmp_path)
    assert page.of("svg") == []
    assert "No finite value: last nan, 1 points." in page.text


def test_a_single_point_can_be_seen(run: ExperimentTracker, tmp_path: Path) -> None:
    run.log_metric("m", 1.5)
    page = html_of(run, tmp_path)
    assert len(page.of("svg")) == 1
    line = page.of("polyline")
    # A polyline of one point paints nothing: it takes a circle, or a line of some length.
    assert page.of("circle") or any(len(set((each["points"] or "").split())) > 1 for each in line)


def test_a_long_series_is_thinned_but_shows_its_last_point(run: ExperimentTracker, tmp_path: Path) -> None:
    for i in range(5001):
        run.log_metric("m", float(i), step=i)
    page = html_of(run, tmp_path)
    (line,) = page.of("polyline")
    pairs = (line["points"] or "").split()
    assert len(pairs) <= 2500
    assert pairs[0].startswith("0.0,")
    assert pairs[-1].endswith(",0.0")


def test_thinning_does_not_hide_the_finite_values(run: ExperimentTracker, tmp_path: Path) -> None:
    for i in range(4000):  # thinning to every other point sees NaN only
        run.log_metric("m", float(i) if i % 2 else math.nan, step=i)
    page = html_of(run, tmp_path)
    assert "No finite value" not in page.text
    (line,) = page.of("polyline")
    assert len((line["points"] or "").split()) > 1000


def test_the_extremes_of_a_long_series_are_told_and_drawn(run: ExperimentTracker, tmp_path: Path) -> None:
    values = [0.0] * 100_000
    values[51_111], values[51_113] = 1000.0, -1000.0
    run.log_arrays("spikes", values)
    page = html_of(run, tmp_path)
    assert "last 0, 100,000 points, from -1000 to 1000" in page.text
    ys = coordinates(page)[1::2]
    assert (min(ys), max(ys)) == (0.0, 200.0)
    assert len(ys) <= 2000


def test_a_page_is_drawn_from_curves_and_not_from_all_points(
    run: ExperimentTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking for each metric among all points took quadratic time."""
    run.log_metrics({"loss": 1.0, "acc": 0.5})
    monkeypatch.delattr(MetricTable, "points")
    assert len(html_of(run, tmp_path).of("svg")) == 2


@pytest.mark.parametrize("format_type", ["html", "json"])
def test_a_report_that_cannot_be_written_leaves_the_one_before(
    run: ExperimentTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_type: str
) -> None:
    path = Path(run.generate_report(format_type, str(tmp_path / "reports")))
    before = path.read_bytes()
    real = Path.write_text

    def fill_the_disk(self: Path, data: str, **options: Any) -> int:
        real(self, data[:10], **options)
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        run.generate_report(format_type, str(tmp_path / "reports"))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_too_few_points_are_refused_before_anything_is_read(run: ExperimentTracker) -> None:
    with pytest.raises(ConfigurationError, match="max_points must be at least 4"):
        run.metric_history("missing", 3)


def test_a_run_without_anything_gives_a_page(tmp_path: Path) -> None:
    with ExperimentTracker("bare", database_url=f"sqlite:///{tmp_path}/runs.db") as bare:
        page = html_of(bare, tmp_path)
        content = json_of(bare, tmp_path)
    assert page.text.count("None.") == 3  # config, metrics, checkpoints
    assert (content["metrics"], content["checkpoints"]) == ([], [])


def test_checkpoints_are_listed_with_flags_and_notes(run: ExperimentTracker, tmp_path: Path) -> None:
    manager = EnhancedCheckpointManager(run, str(tmp_path / "checkpoints"))
    first = manager.save_checkpoint({"w": b"abc"}, epoch=3, loss=0.5, val_loss=math.nan, notes="first one")
    page = html_of(run, tmp_path)
    for shown in (first, "0.5", "nan", "first one"):
        assert shown in page.text
    (checkpoint,) = json_of(run, tmp_path)["checkpoints"]
    assert (checkpoint["id"], checkpoint["epoch"], checkpoint["best"]) == (first, 3, ["loss"])
    assert checkpoint["val_loss"] == {"$float": "nan"}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_anywhere_is_shown_and_never_becomes_markup(tmp_path: Path, text: str) -> None:
    url = f"sqlite:///{tmp_path}/runs.db"
    config = {text: text, "nested": {text: [text]}}
    with ExperimentTracker(text, text, [text, {text: text}], config, url, metadata={text: text}) as run:
        for step in range(3):
            run.log_metric(text, step, step=step)
        run.log_metric(f"{text} nan", math.nan)
        manager = EnhancedCheckpointManager(run, str(tmp_path / "checkpoints"))
        manager.save_checkpoint({"w": b"abc"}, notes=text, model_name=text, metrics={text: 1.0}, config={text: text})
        page = html_of(run, tmp_path)
        content = json_of(run, tmp_path)
    harmless = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "span", "table", "tr", "th", "td"}
    harmless |= {"figure", "figcaption", "svg", "line", "polyline", "text", "circle", "small", "g", "path"}
    assert {tag for tag, _ in page.elements} <= harmless
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert "style" not in attributes
    assert page.of("svg")[0]["aria-label"] == text
    assert page.text.count(text) >= 8  # title, heading, tag, project, config name and value, caption, notes
    assert content["experiment"]["name"] == text
    assert content["checkpoints"][0]["notes"] == text


def test_the_json_report_holds_the_run_and_every_point_as_strict_json(run: ExperimentTracker, tmp_path: Path) -> None:
    values = [0.1, math.nan, math.inf, -math.inf, 1e-300]
    for step, value in enumerate(values):
        run.log_metric("m", value, step=step)
    content = json_of(run, tmp_path)
    assert set(content) == {"experiment", "metrics", "checkpoints"}
    assert content["experiment"]["id"] == run.experiment_id
    assert content["experiment"]["tags"] == ["baseline", 50]
    assert content["experiment"]["config"] == {"lr": 0.001, "layers": [1, 2], "limit": {"$float": "inf"}}
    assert content["experiment"]["metadata"] == {"note": {"$float": "nan"}}
    assert [point["step"] for point in content["metrics"]] == list(range(5))
    assert [point["metric_value"] for point in content["metrics"]] == [
        0.1,
        {"$float": "nan"},
        {"$float": "inf"},
        {"$float": "-inf"},
        1e-300,
    ]
