"""Reports: statistics that agree with rliable on the CSVs, and a page that holds everything it shows."""

from __future__ import annotations

import csv
import functools
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from pwm_gym.benchmark import Cell, Results, Study, published, report, statistics
from pwm_gym.benchmark.study import write_csv

LEVELS = {
    ("pwm", "cartpole-swingup"): 800.0,
    ("pwm", "walker-walk"): 900.0,
    ("sac", "cartpole-swingup"): 600.0,
    ("sac", "walker-walk"): 950.0,
}


@pytest.fixture(autouse=True)
def few_bootstrap_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pwm_gym.benchmark.reporting.statistics", functools.partial(statistics, reps=50))


def test_statistics_agree_with_rliable_on_the_csv(written: Callable[..., Study]):
    from rliable import library, metrics

    study = written(LEVELS)
    found = statistics(Results.read(study).scores(), reps=2_000)
    report(study.folder)
    with (study.folder / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["evaluation"] == "4"]
    scores = {
        algorithm: np.array(
            [
                [
                    float(row["mean_return"]) / 1_000
                    for task in ("cartpole-swingup", "walker-walk")
                    for row in rows
                    if (row["algorithm"], row["task"], row["seed"]) == (algorithm, task, str(seed))
                ]
                for seed in range(3)
            ]
        )
        for algorithm in ("pwm", "sac")
    }
    values, bounds = library.get_interval_estimates(scores, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=2_000)
    for name in scores:
        assert found.iqm[name].value == pytest.approx(values[name].item(), abs=1e-12)
        np.testing.assert_allclose([found.iqm[name].low, found.iqm[name].high], bounds[name].ravel(), atol=0.01)
        profile = library.score_distributions(scores[name], found.taus)
        np.testing.assert_array_equal(found.profile[name].value, profile)
    better = metrics.probability_of_improvement(scores["pwm"], scores["sac"])
    assert found.improvement["pwm", "sac"].value == pytest.approx(better)
    np.testing.assert_allclose(found.iqm_curve["pwm"].value[-1], values["pwm"].item())
    assert found.iqm_curve["pwm"].value.shape == (4,)


def test_statistics_are_the_same_again_and_leave_the_callers_randomness_alone():
    scores = {"a": np.random.default_rng(0).random((3, 2, 2)), "b": np.random.default_rng(1).random((4, 2, 2))}
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, again = statistics(scores, reps=50), statistics(scores, reps=50)
    assert (first.iqm, first.improvement) == (again.iqm, again.improvement)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    with pytest.raises(ValueError, match="expected scores of at least one algorithm"):
        statistics({})


def test_algorithms_are_compared_after_as_many_frames(written: Callable[..., Study]):
    study = written(LEVELS)
    cells = (*study.cells, *(Cell("ppo", task, 0) for task in ("cartpole-swingup", "walker-walk")))
    study = Study(study.folder, cells, {**study.frames, "ppo": 10_000}, 5_000, 2)
    study.save()
    for cell in cells[-2:]:
        write_csv(study.csv_path(cell), study.rows(Cell("sac", cell.task, 0))[:2])
    scores = Results.read(study).scores()
    assert {name: values.shape for name, values in scores.items()} == {
        "pwm": (3, 2, 4),
        "sac": (3, 2, 4),
        "ppo": (1, 2, 2),
    }
    found = statistics(scores, reps=50)
    assert found.evaluations == 2
    assert found.iqm["pwm"].value == pytest.approx(found.iqm_curve["pwm"].value[1])
    assert found.iqm_last["pwm"].value == pytest.approx(found.iqm_curve["pwm"].value[3])
    assert len(found.iqm_curve["ppo"].value) == 2
    np.testing.assert_allclose(scores["pwm"][:, 0].mean(0), [0.2, 0.4, 0.6, 0.8], atol=0.05)  # 800 / 1,000 at last


def test_an_algorithm_that_is_not_done_is_left_out_and_named(written: Callable[..., Study]):
    study = written(LEVELS)
    for seed in range(3):
        path = study.csv_path(Cell("sac", "walker-walk", seed))
        write_csv(path, study.rows(Cell("sac", "walker-walk", seed))[:3])
    results = Results.read(study)
    assert list(results.scores()) == ["pwm"] and results.left_out() == ["sac"]
    text = report(study.folder).with_name("report.md").read_text()
    assert "Left out, because not done on all tasks: SAC." in text
    assert "| SAC | walker-walk | 2 | unfinished | 15,000 |" in text


def test_unknown_scales_go_from_the_lowest_to_the_highest(written: Callable[..., Study]):
    scores = Results.read(written({("pwm", "Pendulum-v1"): -200.0, ("sac", "Pendulum-v1"): -900.0})).scores()
    both = np.concatenate([values.ravel() for values in scores.values()])
    assert both.min() == 0.0 and both.max() == 1.0


def test_success_is_what_counts_on_meta_world(written: Callable[..., Study]):
    study = written({("sac", "mw-door-open"): 4_000.0})
    for cell in study.cells:
        write_csv(study.csv_path(cell), [row | {"success_rate": 0.5} for row in study.rows(cell)])
    np.testing.assert_array_equal(Results.read(study).scores()["sac"], np.full((3, 1, 4), 0.5))
    assert "50 % (50 % to 50 %)" in report(study.folder).with_name("report.md").read_text()


def test_published_scores_stand_beside_ours(written: Callable[..., Study]):
    assert {name: curve.values[0] for name, curve in published("walker-walk").items()} == {
        "TD-MPC2": pytest.approx(962, abs=1),
        "SAC": pytest.approx(708, abs=1),
        "DreamerV3": pytest.approx(630, abs=1),
    }
    assert published("Pendulum-v1") == {}
    text = report(written(LEVELS).folder).with_name("report.md").read_text()
    assert "| 839 at 100k | 835 at 100k | 677 at 100k |" in text  # ours have 20,000 frames


class _Page(HTMLParser):
    """What a page loads, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.images: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        found = dict(attrs)
        self.sources += [found[name] for name in ("src", "href") if name in found]
        self.images += [found["alt"]] if tag == "img" else []
        if tag in ("main", "div", "figure", "table", "tr", "th", "td", "details", "video", "style"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and tag == self.open[-1]:
            self.open.pop()


def test_the_page_holds_everything_it_shows(written: Callable[..., Study]):
    study = written(LEVELS)
    film = study.film_path(Cell("pwm", "walker-walk", 0))
    film.parent.mkdir(parents=True)
    film.write_bytes(b"film")
    other = study.film_path(Cell("sac", "walker-walk", 0))
    other.parent.mkdir(parents=True)
    other.with_suffix(".txt").write_text("RuntimeError: no <OpenGL>")
    text = report(study.folder).read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    assert "http://" not in re.sub(r"data:[^\"]*", "", text) and "https://" not in re.sub(r"data:[^\"]*", "", text)
    for name in ("walker-walk against frames", "walker-walk against time", "performance profiles", "gradient_norm"):
        assert name in page.images
    assert "data:video/mp4;base64,ZmlsbQ==" in text and "no &lt;OpenGL&gt;" in text
    assert '<meta name="viewport"' in text


def test_reports_of_equal_runs_are_equal(written: Callable[..., Study]):
    study = written(LEVELS)
    assert report(study.folder).read_bytes() == report(study.folder).read_bytes()


def test_what_is_missing_is_said(written: Callable[..., Study], tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileNotFoundError, match=r"expected benchmark\.json in"):
        report(tmp_path)
    study = written(LEVELS, done=1)
    text = report(study.folder).with_name("report.md").read_text()
    assert "No algorithm is done on all tasks yet" in text
    for cell in study.cells:
        study.csv_path(cell).unlink()
    with pytest.raises(ValueError, match="expected runs with an evaluation"):
        report(study.folder)
    monkeypatch.setitem(sys.modules, "rliable", None)
    with pytest.raises(ImportError, match=r'pip install "pwm-gym\[benchmark\]"'):
        statistics({"a": np.zeros((1, 1, 1))})


def test_reports_name_the_reason_of_a_death(written: Callable[..., Study]):
    study = written(LEVELS, done=2)
    state = study.state_path(study.cells[0])
    state.mkdir(parents=True)
    (state / "failure.txt").write_text("killed by SIGKILL")
    assert "died: killed by SIGKILL" in report(study.folder).with_name("report.md").read_text()
    assert json.loads((study.folder / "benchmark.json").read_text())["every"] == 5_000
