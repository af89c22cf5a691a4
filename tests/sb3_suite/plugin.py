"""Pytest plugin: put another class in the place of SAC and record what every case did with it.

Loaded with `-p plugin` by run.py. It passes no argument of its own to the class under test.
"""

import functools
import importlib
import json
import pathlib
import signal
import types
from collections.abc import Generator

import pytest
import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that run.py passes."""
    group = parser.getgroup("sb3_suite")
    group.addoption("--drop-in", required=True, help="module:Class put in the place of SAC")
    group.addoption("--cases", type=pathlib.Path, required=True, help="JSON file for the outcomes")
    group.addoption("--case-timeout", type=float, required=True, help="limit per case, in seconds")


def pytest_configure(config: pytest.Config) -> None:
    """Replace SAC before any test module is imported.

    The tests import `stable_baselines3.SAC`; `stable_baselines3.sac.SAC` is the other public name.
    The defining module, `stable_baselines3.sac.sac`, stays as it is.
    """
    module, _, name = config.getoption("--drop-in").partition(":")
    drop_in = getattr(importlib.import_module(module), name)
    stable_baselines3.SAC = drop_in
    stable_baselines3.sac.SAC = drop_in
    config.pluginmanager.register(Recorder(config, drop_in), "sb3_suite_recorder")


class Recorder:
    """Select the cases that concern SAC, and count in each how often SAC's stand-in is constructed.

    Args:
        config: Pytest's configuration, of the controller or of one worker.
        drop_in: The class that stands in for SAC.
    """

    def __init__(self, config: pytest.Config, drop_in: type[BaseAlgorithm]) -> None:
        self.drop_in = drop_in
        self.case_timeout = config.getoption("--case-timeout")
        self.cases_path = config.getoption("--cases")
        self.cases: dict[str, dict] = {}
        self.constructions = 0
        self._count_constructions()

    def _count_constructions(self) -> None:
        """Count every entry into the constructor, by `load` and in vain too."""
        original = self.drop_in.__init__

        @functools.wraps(original)
        def counted(agent: BaseAlgorithm, *args: object, **kwargs: object) -> None:
            self.constructions += 1
            original(agent, *args, **kwargs)

        self.drop_in.__init__ = counted

    def pytest_make_parametrize_id(self, val: object) -> str | None:
        """Keep the suite's own ids: `test_save_load[SAC]`, whatever stands in for SAC."""
        return "SAC" if val is self.drop_in else None

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Function]) -> None:
        """Deselect the cases that have nothing to do with SAC."""
        config.hook.pytest_deselected(items=[item for item in items if not self._concerns(item)])
        items[:] = [item for item in items if self._concerns(item)]

    def _concerns(self, item: pytest.Function) -> bool:
        """Say whether a case is given SAC, or is given no algorithm and names SAC in its code."""
        callspec = getattr(item, "callspec", None)
        values = callspec.params.values() if callspec else ()
        algorithms = [v for v in values if isinstance(v, type) and issubclass(v, BaseAlgorithm)]
        return self.drop_in in algorithms if algorithms else "SAC" in _names(item.function.__code__)

    def pytest_runtest_setup(self) -> None:
        """Start counting anew."""
        self.constructions = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, None, None]:
        """Interrupt a case that runs for too long."""

        def interrupt(_signal: int, _frame: types.FrameType | None) -> None:
            raise TimeoutError(f"the case ran for more than {self.case_timeout:g} s")

        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, self.case_timeout)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Attach the count and the exception to the report, which xdist sends to the controller."""
        report = yield
        details = {"constructions": self.constructions, "error": "", "where": ""}
        if call.excinfo is not None:
            frames = call.excinfo.traceback
            line = [frame.lineno + 1 for frame in frames if frame.path == item.path][-1:]
            details["error"] = call.excinfo.exconly().splitlines()[0][:200]
            details["where"] = f"line {line[0]}" if line else ""
        report.user_properties.append(("sb3_suite", details))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Merge the reports of setup, call and teardown into one record per case."""
        details = dict(report.user_properties)["sb3_suite"]
        case = self.cases.setdefault(
            report.nodeid,
            {"outcome": "passed", "constructions": 0, "error": "", "where": "", "seconds": 0.0},
        )
        case["constructions"] = max(case["constructions"], details["constructions"])
        case["seconds"] = round(case["seconds"] + report.duration, 2)
        if report.outcome != "passed":
            case |= {"outcome": report.outcome, "error": details["error"]}
            case["where"] = details["where"]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the records; with xdist only the controller has them all."""
        if not hasattr(session.config, "workerinput"):
            self.cases_path.write_text(json.dumps(self.cases, indent=1))


def _names(code: types.CodeType) -> set[str]:
    """Collect the global names that a function and the functions inside it use."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))
