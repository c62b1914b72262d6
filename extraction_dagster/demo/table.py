"""The demo's source table, its query image, and the guard that keeps the demo to its own folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from extraction_dagster.errors import DemoFolderError, DemoTargetError
from extraction_dagster.files import write_atomically
from extraction_dagster.settings import PREFIX, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from extraction_dagster.demo.videos import DemoVideo

_QUERY_CODES = ("bikes", "mountains")  # the first that is there
_QUERY_KEEP = 0.9
_QUERY_JPEG_QUALITY = 40

_INSTA_CONTENT = sa.Table(
    "insta_content",
    sa.MetaData(),
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("platform", sa.Text, nullable=False),
    sa.Column("code", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("is_extracted", sa.Boolean, nullable=False, server_default=sa.text("0")),
    sa.Column("is_embedded", sa.Boolean, nullable=False, server_default=sa.text("0")),
    sa.Column("created_at", sa.DateTime, nullable=False, server_default=sa.func.current_timestamp()),
    sqlite_autoincrement=True,  # a deleted row's id is never given out again
)


def make_table(database: str | sa.Engine, videos: Sequence[DemoVideo]) -> int:
    """Create the SQLite table `insta_content` where it is missing, and add the rows that it lacks.

    Rows that are there, marks included, are left alone, so that a second call changes nothing. The ids are those of
    `DemoVideo.record_id`: 1 to 12, 101 to 112, 201 to 208, and a row inserted later gets the next higher one. `path` is
    relative to the videos folder; `created_at` is UTC.

    Args:
        database: A SQLAlchemy URL of a SQLite database, or an engine of one.
        videos: As `make_videos` returned them.

    Returns:
        The number of rows added.

    Raises:
        DemoFolderError: The database can't be opened or written.
    """
    engine = sa.create_engine(database, hide_parameters=True) if isinstance(database, str) else database
    try:
        with engine.begin() as connection:
            _INSTA_CONTENT.create(connection, checkfirst=True)
            there = set(connection.scalars(sa.select(_INSTA_CONTENT.c.id)))
            missing = [
                {"id": video.record_id, "platform": video.platform, "code": video.code, "path": video.path}
                for video in videos
                if video.record_id not in there
            ]
            if missing:
                connection.execute(sa.insert(_INSTA_CONTENT), missing)
    except sa.exc.DBAPIError as error:
        raise DemoFolderError(engine.url.render_as_string(), str(error.orig)) from error
    finally:
        if isinstance(database, str):
            engine.dispose()
    return len(missing)


@dataclass(frozen=True, slots=True)
class DemoQuery:
    """An image to search with, and the right answer.

    Attributes:
        image: JPEG file.
        record_id: The record whose frame it was.
        path: That record's file, relative to the videos folder.
    """

    image: Path
    record_id: int
    path: str


def choose_query(home: Path, videos: Sequence[DemoVideo]) -> DemoQuery:
    """Write `home/query.jpg`: the middle frame of one clip, cropped to 90 % and compressed hard.

    It is no frame of the collection, pixel by pixel, so that finding its video says something about the vectors.

    Args:
        home: The demo's folder; the videos lie in its folder `videos`.
        videos: As `make_videos` returned them.

    Returns:
        The image and the record that a search for it should give first.

    Raises:
        DemoFolderError: The image can't be written.
    """
    import simplejpeg  # noqa: PLC0415 - only needed here

    by_code = {video.code: video for video in videos}
    video = next(by_code[code] for code in _QUERY_CODES if code in by_code)
    image = home / "query.jpg"
    frame = _middle_frame(home / "videos" / video.path)
    high, wide = (round(side * (1 - _QUERY_KEEP) / 2) for side in frame.shape[:2])  # what is cut off at each side
    cropped = frame[high : frame.shape[0] - high, wide : frame.shape[1] - wide].copy()
    jpeg = simplejpeg.encode_jpeg(cropped, quality=_QUERY_JPEG_QUALITY)
    try:
        write_atomically(image, jpeg, mode=None, durable=False)
    except OSError as error:
        raise DemoFolderError(str(image), error.strerror or type(error).__name__) from error
    return DemoQuery(image, video.record_id, video.path)


def _middle_frame(path: Path) -> np.ndarray:
    """The middle frame in display order: uint8 (H, W, 3), RGB."""
    import av

    with av.open(str(path)) as file:
        num_frames = sum(1 for _ in file.decode(video=0))
        file.seek(0)
        middle = next(frame for number, frame in enumerate(file.decode(video=0)) if number == num_frames // 2)
        return middle.to_ndarray(format="rgb24")


def refuse_foreign_targets(settings: Settings) -> None:
    """Refuse settings that would have the demo write outside its home folder, or read another table.

    Raises:
        DemoTargetError: It names every such setting.
    """
    foreign = [name for name in ("qdrant_url", "postgres_url") if getattr(settings, name) is not None]
    urls = {"source_url": settings.resolved_source_url, "state_url": settings.resolved_state_url}
    foreign += [name for name, url in urls.items() if getattr(settings, name) and not _holds(settings.home, url)]
    folders = {"frames_uri": settings.resolved_frames_uri, "embeddings_uri": settings.resolved_embeddings_uri}
    foreign += [name for name, uri in folders.items() if "://" in uri or not _is_inside(uri, settings.home)]
    own = {name: field for name, field in Settings.model_fields.items() if name.startswith("source_")}
    foreign += [name for name in own if name != "source_url" and getattr(settings, name) != own[name].default]
    if not any((settings.home / "videos").is_relative_to(root) for root in settings.resolved_allowed_roots):
        foreign.append("allowed_roots")
    if foreign:
        raise DemoTargetError(tuple(PREFIX + name.upper() for name in foreign), str(settings.home))


def _holds(home: Path, url: str) -> bool:
    """Whether a URL names a SQLite file in the folder."""
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        return False
    is_file = parsed.get_backend_name() == "sqlite" and parsed.database not in {None, "", ":memory:"}
    return is_file and _is_inside(str(parsed.database), home)


def _is_inside(path: str, home: Path) -> bool:
    return Path(path).absolute().resolve().is_relative_to(home.resolve())
