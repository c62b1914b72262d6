"""Write `docs/settings.md` out of `settings.py`: `python docs/write_settings.py`, which `make docs` calls."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

from extraction_dagster.settings import PREFIX, RETIRED, Settings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_HEAD = """# Settings

Each setting is an environment variable, or a line of a file `.env` in the working directory; the variable wins.
An empty value counts as unset, but for the columns that may be `empty for none`. A misspelt name is refused.
This page is generated from `extraction_dagster/settings.py` by `make docs`.
"""
_GONE = """
## Settings that are gone

Each is warned of and has no effect; the next release refuses it.

| variable | what holds now |
| --- | --- |"""
_TABLE = "| variable | default | meaning |\n| --- | --- | --- |"
_SECTION_OR_FIELD = re.compile(r"^    # (?P<section>.+)$|^    (?P<field>[a-z]\w*): ", re.MULTILINE)


def settings_page() -> str:
    """The page: a table for each section of the class, in its order."""
    lines = [_HEAD.rstrip()]
    for found in _SECTION_OR_FIELD.finditer(inspect.getsource(Settings)):
        name = found["field"]
        if found["section"]:
            lines += ["", f"## {found['section']}", "", _TABLE]
        elif name in Settings.model_fields:
            info = Settings.model_fields[name]
            meaning = (info.description or "").replace("|", "\\|")
            lines.append(f"| `{PREFIX}{name.upper()}` | {_default(info)} | {meaning} |")
    lines.append(_GONE)
    for retired, holds in RETIRED.items():
        name, equals, value = retired.partition("=")
        lines.append(f"| `{PREFIX}{name.upper()}{equals}{value}` | {holds} |")
    return "\n".join(lines) + "\n"


def _default(info: FieldInfo) -> str:
    if info.default_factory is not None:
        return "see right"
    value = ",".join(info.default) if isinstance(info.default, tuple) else info.default
    return "unset" if value is None or value == "" else f"`{value}`"


if __name__ == "__main__":
    page = Path(__file__).with_name("settings.md")
    page.write_text(settings_page(), "utf-8")
    print(f"Wrote docs/{page.name}")
