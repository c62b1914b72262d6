"""The family of errors: they cross processes, and their sentences name the culprit."""

import importlib
import pickle
import pkgutil

import pytest

from extraction_dagster import errors
from extraction_dagster.errors import (
    DemoEncoderError,
    DemoTargetError,
    ExtractionError,
    PartitionKeyError,
    RecordShapeError,
    SettingsError,
)

ONE_OF_EACH = [
    (SettingsError("EXTRACTION_FPS", "'x'", "a number"), False),
    (PartitionKeyError("1..5", "it is not two integers joined by '-'"), False),
    (RecordShapeError("FrameBatch", "data must be uint8", "data int64 (2,)"), False),
    (DemoEncoderError("a.mp4", ("libx264", "mpeg4"), "18.1.0"), True),
    (DemoTargetError(("EXTRACTION_QDRANT_URL",), "/home"), True),
]


@pytest.mark.parametrize(("error", "permanent"), ONE_OF_EACH, ids=lambda value: type(value).__name__)
def test_an_error_crosses_processes_unchanged(error, permanent):
    error.culprit = 42
    error.add_note("seen in a worker")
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(back), str(back), back.culprit, back.permanent) == (type(error), str(error), 42, permanent)
    assert back.__notes__ == ["seen in a worker"]


def test_every_error_of_the_project_is_one_of_the_family():
    names = [found.name for found in pkgutil.iter_modules(errors.__path__, "extraction_dagster.errors.")]
    rooms = [errors, *map(importlib.import_module, names)]
    kinds = {kind for room in rooms for kind in vars(room).values() if isinstance(kind, type)}
    assert len(kinds) >= 90
    assert {kind for kind in kinds if not issubclass(kind, ExtractionError)} == set()


def test_a_sentence_written_over_several_lines_is_one_line_and_keeps_the_breaks_of_what_it_names():
    assert str(SettingsError("EXTRACTION_FPS", "'x\ny'", "a number")) == (
        "Setting EXTRACTION_FPS is 'x\ny', expected a number. Correct it in the environment or in .env; "
        "'extraction doctor --all' lists every setting."
    )


def test_the_sentence_names_the_culprit_and_the_fix():
    assert str(PartitionKeyError("5-1", "the first id must not be greater than the last")) == (
        "'5-1' is not a range of ids: the first id must not be greater than the last. "
        "Expected FIRST-LAST with both ends included, for example 1-1000."
    )
    assert str(DemoTargetError(("EXTRACTION_SOURCE_URL", "EXTRACTION_QDRANT_URL"), "/d/.extraction")) == (
        "The demo writes under '/d/.extraction' only, but EXTRACTION_SOURCE_URL, EXTRACTION_QDRANT_URL lead "
        "elsewhere. Nothing was written. Unset EXTRACTION_SOURCE_URL, EXTRACTION_QDRANT_URL in the environment "
        "and in .env, or run the demo in another folder."
    )
    assert str(DemoEncoderError("a.mp4", ("libx264", "mpeg4"), "18.1.0")) == (
        "Demo clip 'a.mp4' can't be encoded: PyAV 18.1.0 has none of libx264, mpeg4. Nothing was written for it. "
        "Install PyAV's own wheel: pip install --force-reinstall av."
    )
