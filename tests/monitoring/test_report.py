"""The report is one safe, self-contained page, whatever the run folder holds."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from monitoring import drawing, words
from monitoring.figures import save_figures
from monitoring.report import render_report, write_report
from monitoring.run import load_run
from pipeline.errors import RunFolderError
from pipeline.records import RunFolder, append_jsonl, write_json, write_text

SECTIONS = (
    "verdict", "training", "quality", "classes", "calibration", "uncertainty", "ood", "samples",
    "plan", "system", "reproduce",
)  # fmt: skip
VOID = {"meta", "br", "hr", "img", "link", "input"}
ATTACK = (
    "--></title></style></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'$\\x_$"
)


class Page(HTMLParser):
    """Elements of a page, with a check that they are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    @property
    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    @property
    def tags(self):
        return {tag for tag, _ in self.elements}


@pytest.fixture(scope="module")
def html(whole_run) -> str:
    """The page of a whole run of classification."""
    return render_report(whole_run)


def change(path, function) -> None:
    content = json.loads(path.read_text())
    function(content)
    write_json(path, content)


def change_samples(folder, function) -> None:
    rows = pyarrow.parquet.read_table(folder.samples).to_pylist()
    for row in rows:
        function(row)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder.samples)


def test_every_section_is_there_and_in_the_table_of_contents(html):
    page = Page(html)
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == [f"#{name}" for name in SECTIONS]


def test_numbers_of_the_run_are_in_the_page(html):
    for text in (
        "84.0 %",
        "79.2 % – 88.4 %",
        "T = 1.31",
        "0.851",
        "Mahalanobis distance",
        "2.13.0",
    ):
        assert text in html
    assert html.count('<pre class="text">') == 20
    assert "26 of 27 sites are in force" in html
    assert "rate 0: the model&#39;s own configuration switches it off" in html


def test_the_page_requests_nothing_and_runs_nothing(html):
    page = Page(html)

    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form", "img"}
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith("#")
        assert "url(" not in attributes.get("style", "").replace("url(#", "")
    policy = [a["content"] for _, a in page.elements if a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_hostile_text_of_every_origin_is_escaped(run_folder, html):
    folder = run_folder()

    def spoil_report(report):
        report["run"] = report["task"] = report["created"] = ATTACK
        report["verdict"] = [ATTACK]
        report["versions"] = {ATTACK: ATTACK}
        report["ood"] = {ATTACK: report["ood"]["prose"] | {"verdict": ATTACK}}
        report["ood"][ATTACK]["scores"][ATTACK] = {"auroc": 0.5}
        report["uncertainty"]["error_auroc"][ATTACK] = 0.99

    def spoil_plan(plan):
        plan["notes"] = [ATTACK]
        plan["digest"] = ATTACK
        plan["sites"].append(dict.fromkeys(plan["sites"][0], ATTACK))

    def spoil_sample(row):
        row |= {"text": ATTACK, "label": ATTACK, "prediction": ATTACK}
        row["split"] = row["split"].replace("ood:prose", f"ood:{ATTACK}")

    change(folder.report_json, spoil_report)
    change(folder.plan, spoil_plan)
    change_samples(folder, spoil_sample)
    write_text(folder.config, f"name: x\nmodel: {{task: 'x{ATTACK.replace(chr(39), '')}'}}\n")
    append_jsonl(folder.metrics, {"step": 1, f"eval/{ATTACK}": 1.0, f"system/{ATTACK}": 1.0})
    spoiled = render_report(folder)

    assert "&lt;script&gt;alert(1)" in spoiled
    assert Page(spoiled).tags == Page(html).tags
    assert not re.search(r"<(script|img)", spoiled)
    assert not any(name.startswith("on") for _, a in Page(spoiled).elements for name in a)


def test_a_run_that_is_only_trained_says_so(run_folder):
    page = render_report(run_folder(evaluated=False))

    assert "not evaluated yet" in page
    assert [i for i in Page(page).ids if i in SECTIONS] == [
        "verdict", "training", "plan", "system", "reproduce",
    ]  # fmt: skip
    assert "Training loss" in page


def test_a_language_model_is_reported_by_perplexity(run_folder):
    html = render_report(run_folder(task="text-generation"))

    assert "Perplexity" in html
    assert "21.1" in html
    assert "how many tokens fall in each bin" in html
    assert "Prediction" not in html


def test_an_empty_run_folder_gives_a_page(tmp_path):
    html = render_report(RunFolder(tmp_path))

    assert "Nothing has been recorded" in html
    assert [i for i in Page(html).ids if i in SECTIONS] == ["verdict"]


@pytest.mark.parametrize(
    "section",
    ["mc", "quality", "intervals", "chance", "calibration", "uncertainty", "ood", "verdict",
     "versions", "num_samples", "seed", "created", "run", "task"],
)  # fmt: skip
@pytest.mark.parametrize("replacement", ["absent", {}, None])
def test_any_section_of_the_numbers_may_be_missing(run_folder, monkeypatch, section, replacement):
    monkeypatch.setattr(drawing, "svg", lambda *_: "<svg></svg>")
    folder = run_folder()
    change(folder.report_json, lambda report: report.pop(section))
    if replacement != "absent":
        change(folder.report_json, lambda report: report.update({section: replacement}))

    Page(render_report(folder))


def test_numbers_that_are_null_are_shown_as_a_dash(run_folder):
    folder = run_folder()

    def without_numbers(value):
        if isinstance(value, dict):
            return {key: without_numbers(item) for key, item in value.items()}
        if isinstance(value, list):
            return [without_numbers(item) for item in value]
        return None if isinstance(value, float) else value

    write_json(folder.report_json, without_numbers(json.loads(folder.report_json.read_text())))
    change_samples(folder, lambda row: row.update(mutual_information=float("nan"), confidence=None))
    append_jsonl(folder.metrics, {"time": 1.0, "step": 61, "train/loss": float("nan")})
    html = render_report(folder)

    assert "–" in html
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL).lower().split()


@pytest.mark.parametrize("missing", ["config", "plan", "metrics", "samples", "report_json"])
def test_any_file_may_be_missing(run_folder, monkeypatch, missing):
    monkeypatch.setattr(drawing, "svg", lambda *_: "<svg></svg>")
    folder = run_folder()
    getattr(folder, missing).unlink()

    Page(render_report(folder))


def test_names_that_matplotlib_would_read_as_markup_are_drawn_as_they_are():
    groups = {"_hidden": np.arange(9.0), "$\\bad_": np.arange(9.0), "文字": np.arange(9.0)}
    picture = drawing.svg(lambda axes: drawing.draw_histograms(axes, groups), "<b>")

    assert "$\\bad_" in picture
    assert "<title>&lt;b&gt;</title>" in picture


def test_the_same_folder_gives_the_same_small_page(run_folder):
    folder = run_folder()

    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert len(first) < 500_000


def test_small_images_are_shown_inside_the_page_and_other_bytes_are_not(run_folder):
    folder, png = run_folder(), b"\x89PNG\r\n\x1a\n a small image"

    def with_thumbnail(row):
        row["text"], row["thumbnail"] = "", png if row["sample_id"] % 2 else b"<svg onload=1>"

    change_samples(folder, with_thumbnail)
    sources = [a["src"] for tag, a in Page(render_report(folder)).elements if tag == "img"]
    expected = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    assert set(sources) == {expected}
    assert 0 < len(sources) < 20


def test_long_histories_are_thinned_to_means():
    points = [(float(step), float(step % 2)) for step in range(100_000)]
    thinned = drawing._thinned(points)

    assert len(thinned) == 400
    assert all(value == 0.5 for _, value in thinned)


def test_figures_are_saved_as_png_files(run_folder):
    paths = save_figures(run_folder())

    drawn = {"curves", "confusion", "reliability", "uncertainty", "ood-http-and-xml", "ood-prose"}
    assert set(paths) == drawn
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths.values())


def test_a_missing_folder_and_broken_json_are_explained(tmp_path):
    with pytest.raises(RunFolderError, match="No run folder"):
        load_run(RunFolder(tmp_path / "nowhere"))
    write_text(RunFolder(tmp_path).plan, "{")
    with pytest.raises(RunFolderError, match="Run its stage again"):
        load_run(RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (words.percent, 0.8403, "84.0 %"),
        (words.quantity, 3712.4, "3,712"),
        (words.quantity, 53.0, "53.0"),
        (words.quantity, 4e-5, "4e-05"),
        (words.decimal, None, "–"),
        (words.duration, 3.21, "3.2 s"),
        (words.duration, 200, "3 min 20 s"),
        (words.duration, 7500, "2 h 5 min"),
        (words.title_of, "mc_predictive_entropy", "MC predictive entropy"),
        (words.title_of, "some_new_score", "Some new score"),
    ],
)
def test_numbers_and_names_are_said_for_people(function, value, expected):
    assert function(value) == expected
