"""The rows of other people's tables, from assets/published.json: means, with what is known of their data."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

ASSET = Path(__file__).parent / "assets" / "published.json"


class PublishedTable(NamedTuple):
    """Means by method, then by metric (some are missing).

    same_pairs: of exactly the pairs of the set that the table is shown with; otherwise `data` says of which.
    """

    source: str
    data: str
    same_pairs: bool
    rows: dict[str, dict[str, float]]


def set_names() -> list[str]:
    """The test sets that have published rows."""
    return list(dict.fromkeys(name for table in _read()["tables"] for name in table["sets"]))


def set_of(names: list[str]) -> str | None:
    """The test set that has exactly these pairs, if one is known."""
    return next((name for name, pairs in _read()["pairs"].items() if sorted(pairs) == sorted(names)), None)


def count_of(test_set: str) -> int | None:
    """How many pairs a test set has, if they are known."""
    return len(_read()["pairs"].get(test_set, ())) or None


def tables(test_set: str | None, protocol: str, stretch: bool) -> list[PublishedTable]:
    """The published tables of a test set; none under a protocol other than theirs."""
    if protocol != _read()["protocol"] or stretch:
        return []
    fields = ("source", "data", "same_pairs", "rows")
    return [PublishedTable(*(t[f] for f in fields)) for t in _read()["tables"] if test_set in t["sets"]]


def ablations() -> dict:
    """{"data": text, "full": scores, "tables": {table's number: {row's name: scores}}} of Tables II to VI."""
    return _read()["ablations"]


@cache
def _read() -> dict:
    return json.loads(ASSET.read_text(encoding="utf-8"))
