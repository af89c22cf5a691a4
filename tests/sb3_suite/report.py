"""Judge the outcomes of SB3's test-suite and write them as JSON and as a page of the docs."""

import dataclasses
import json
import pathlib
import re
import tomllib

CATEGORIES = (
    "gSDE",
    "images",
    "n-step and HER buffers",
    "optimize_memory_usage",
    "SAC's own arguments and modules",
    "PWM's own defaults",
)
REQUIRED_PERCENT = 85.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One test case that concerns SAC.

    Attributes:
        name: `file::test[parameters]`, as in SB3's suite.
        outcome: "passed", "failed" or "skipped".
        constructions: How often the stand-in for SAC was constructed.
        error: First line of the exception, or the reason of a skip; "" if the case passed.
        where: The line of the test that raised it, if any.
        seconds: Duration of setup, call and teardown.
    """

    name: str
    outcome: str
    constructions: int
    error: str
    where: str
    seconds: float

    @property
    def counted(self) -> bool:
        """Say whether the case is in the denominator.

        A failure counts even if nothing was constructed: SAC would have come to it.
        """
        return self.constructions > 0 or self.outcome == "failed"


@dataclasses.dataclass(frozen=True)
class Allowance:
    """A hand-written reason why some cases may fail or be skipped.

    Attributes:
        cases: Name of a case, where `*` stands for any characters.
        category: One of `CATEGORIES`.
        reason: One sentence for the reader of the docs.
    """

    cases: str
    category: str
    reason: str

    def __post_init__(self) -> None:
        """Refuse a category that the project does not allow."""
        if self.category not in CATEGORIES:
            raise ValueError(f"`category` must be one of {CATEGORIES}, got {self.category!r}.")

    def covers(self, case: Case) -> bool:
        """Say whether the pattern fits the case's whole name."""
        return re.fullmatch(re.escape(self.cases).replace(r"\*", ".*"), case.name) is not None


def read_cases(path: pathlib.Path) -> list[Case]:
    """Read what the plugin recorded, sorted by name."""
    records = json.loads(path.read_text())
    return [Case(name.removeprefix("tests/"), **records[name]) for name in sorted(records)]


def read_allowances(path: pathlib.Path) -> list[Allowance]:
    """Read the table of reasons."""
    return [Allowance(**row) for row in tomllib.loads(path.read_text())["allowed"]]


class Verdict:
    """The outcomes of one run, set against the table of reasons.

    Args:
        cases: All cases that ran.
        allowances: The table of reasons; the first that covers a case is its reason.
        setting: Versions and the like, as they are printed.
    """

    def __init__(self, cases: list[Case], allowances: list[Allowance], setting: dict[str, str]) -> None:
        self.counted = [case for case in cases if case.counted]
        self.others = [case for case in cases if not case.counted]
        self.setting = setting
        self.lost = [case for case in self.counted if case.outcome != "passed"]
        self.reasons = {case.name: next((row for row in allowances if row.covers(case)), None) for case in self.lost}
        self.unexplained = [case for case in self.lost if self.reasons[case.name] is None]
        self.unused = [row for row in allowances if not any(row.covers(case) for case in self.lost)]
        self.totals = {
            outcome: sum(case.outcome == outcome for case in self.counted)
            for outcome in ("passed", "failed", "skipped")
        }

    @property
    def percent(self) -> float:
        """Share of the counted cases that passed, in percent."""
        return 100.0 * self.totals["passed"] / max(len(self.counted), 1)

    @property
    def holds(self) -> bool:
        """Say whether enough cases pass and every other one has its reason."""
        return self.percent >= REQUIRED_PERCENT and not self.unexplained

    def summary(self) -> str:
        """State the totals in one line."""
        totals = ", ".join(f"{number} {outcome}" for outcome, number in self.totals.items())
        return (
            f"{totals} of {len(self.counted)} cases that construct SAC: {self.percent:.1f} % pass "
            f"({REQUIRED_PERCENT:g} % required), {len(self.unexplained)} unexplained"
        )

    def reason(self, case: Case) -> str:
        """Give the category and the reason of a lost case."""
        row = self.reasons[case.name]
        return f"{row.category}: {row.reason}" if row else "**unexplained**"

    def to_json(self) -> str:
        """Give everything that was measured, for machines."""
        return json.dumps(
            {
                "setting": self.setting,
                "totals": {**self.totals, "total": len(self.counted)},
                "percent": round(self.percent, 1),
                "holds": self.holds,
                "cases": [
                    dataclasses.asdict(case) | ({"reason": self.reason(case)} if case in self.lost else {})
                    for case in self.counted
                ],
                "not_counted": [dataclasses.asdict(case) for case in self.others],
            },
            indent=1,
        )

    def to_markdown(self, command: str) -> str:
        """Write the page of the docs.

        Args:
            command: What a reader types to get the page again.
        """
        setting = ", ".join(f"{name} {value}" for name, value in self.setting.items())
        lost = [(*_cells(case), self.reason(case), _exception(case)) for case in self.lost]
        passed = [_cells(case)[:2] for case in self.counted if case.outcome == "passed"]
        others = [(*_cells(case), case.error or "returns at once") for case in self.others]
        return "\n\n".join(
            [
                "# Stable-Baselines3's own test-suite",
                f"Written by `{command}`; don't edit. {setting}.",
                "SB3's tests run unchanged, but `stable_baselines3.SAC` is replaced by the class "
                "named above before they are collected. A case counts if it constructs that class "
                "(`load` included). The tests' own arguments are all that it gets.",
                f"**{self.summary()}.**",
                "## Failed and skipped",
                _table(("file", "case", "outcome", "reason", "exception"), lost),
                "## Passed",
                _table(("file", "case"), passed),
                "## Not counted",
                "These cases name SAC but stop before they construct it, with SB3's own SAC too.",
                _table(("file", "case", "outcome", "why"), others),
            ]
        )


def _cells(case: Case) -> tuple[str, str, str]:
    file, _, test = case.name.partition("::")
    return file, f"`{test}`", case.outcome


def _exception(case: Case) -> str:
    return f"`{case.error}` ({case.where})" if case.error else ""


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return "None."
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    lines = [header, ("---",) * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
