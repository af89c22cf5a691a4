"""The parts of the SB3 suite's harness that need neither a download nor an agent."""

import json
import pathlib
import runpy
import types

import pytest

SUITE = pathlib.Path(__file__).with_name("sb3_suite")
report = types.SimpleNamespace(**runpy.run_path(str(SUITE / "report.py")))

PASSED = report.Case("test_run.py::test_sac[auto]", "passed", 1, "", "", 0.1)
FAILED = report.Case("test_run.py::test_sac[0.01]", "failed", 1, "TypeError: a|b", "line 3", 0.1)
ALLOWANCE = report.Allowance("test_run.py::test_sac[*]", "gSDE", "because")


def test_star_is_the_only_wildcard():
    assert ALLOWANCE.covers(FAILED)
    assert not report.Allowance("test_run.py::test_sa?[*]", "gSDE", "because").covers(FAILED)
    assert not report.Allowance("test_run.py::test_sac", "gSDE", "because").covers(FAILED)


def test_category_outside_the_list_is_refused():
    with pytest.raises(ValueError, match="`category` must be one of"):
        report.Allowance("*", "too slow", "because")


def test_table_of_reasons_is_readable():
    assert report.read_allowances(SUITE / "allowed.toml")


# 17 of 20 are 85 %, 16 of 19 are 84.2 %
@pytest.mark.parametrize(("passed", "holds"), [(17, True), (16, False)])
def test_85_percent_must_pass(passed, holds):
    verdict = report.Verdict([PASSED] * passed + [FAILED] * 3, [ALLOWANCE], {})
    assert verdict.holds is holds


def test_unexplained_failure_breaks_the_verdict():
    verdict = report.Verdict([PASSED] * 99 + [FAILED], [], {})
    assert verdict.percent == 99.0
    assert verdict.unexplained == [FAILED]
    assert not verdict.holds
    assert "**unexplained**" in verdict.to_markdown("command")


def test_case_without_construction_counts_only_if_it_failed():
    returned = report.Case("a::b", "passed", 0, "", "", 0.1)
    skipped = report.Case("a::c", "skipped", 0, "Skipped: CUDA not available", "", 0.1)
    broken = report.Case("a::d", "failed", 0, "ValueError: no", "", 0.1)
    verdict = report.Verdict([returned, skipped, broken], [], {})
    assert verdict.counted == [broken]
    assert verdict.others == [returned, skipped]


def test_allowance_without_a_failure_is_reported():
    assert report.Verdict([PASSED], [ALLOWANCE], {}).unused == [ALLOWANCE]


def test_page_escapes_the_column_mark():
    page = report.Verdict([FAILED], [ALLOWANCE], {"class": "x"}).to_markdown("command")
    assert "| test_run.py | `test_sac[0.01]` | failed | gSDE: because | `TypeError: a\\|b`" in page


def test_cases_are_read_in_order_without_the_folder(tmp_path):
    record = {"outcome": "passed", "constructions": 1, "error": "", "where": "", "seconds": 0.1}
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({"tests/b.py::b": record, "tests/a.py::a": record}))
    assert [case.name for case in report.read_cases(path)] == ["a.py::a", "b.py::b"]
