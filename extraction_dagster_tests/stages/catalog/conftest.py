"""A videos table on both databases: every test that asks for `database` runs on SQLite and on PostgreSQL."""

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from extraction_dagster.stages.catalog.catalog import Catalog
from extraction_dagster.stages.catalog.database import make_engine


class Database:
    """A database with one videos table, and settings that point at it."""

    def __init__(self, url, settings):
        self.url, self._settings = url, settings
        self.engine = make_engine(url, setting="EXTRACTION_SOURCE_URL")

    def create(self, *columns, name="insta_content", ids=()):
        """Make the table, and insert rows whose path is `<id>.mp4`."""
        table = sa.Table(name, sa.MetaData(), *(column._copy() for column in columns or default_columns()))
        with self.engine.begin() as connection:
            table.create(connection)
        self.insert(*ids)
        return table

    def insert(self, *ids, **values):
        with self.engine.begin() as connection:
            for record_id in ids:
                row = {
                    "id": record_id,
                    "platform": "tube",
                    "code": f"c{record_id}",
                    "path": f"{record_id}.mp4",
                    **values,
                }
                names = ", ".join(row)
                places = ", ".join(f":{name}" for name in row)
                connection.execute(sa.text(f"INSERT INTO insta_content ({names}) VALUES ({places})"), row)

    def execute(self, sql, **values):
        with self.engine.begin() as connection:
            return connection.execute(sa.text(sql), values)

    def rows(self, sql):
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(sql))]

    def settings(self, **overrides):
        return self._settings(**{"source_url": SecretStr(self.url), **overrides})

    def catalog(self, **overrides):
        return Catalog(self.settings(**overrides))


def default_columns():
    return (
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("platform", sa.Text),
        sa.Column("code", sa.Text),
        sa.Column("path", sa.Text),
        sa.Column("is_extracted", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("is_embedded", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("size_bytes", sa.BigInteger),
        sa.Column("is_downloaded", sa.Boolean),
        sa.Column("updated_at", sa.DateTime),
    )


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path, settings):
    url = f"sqlite:///{tmp_path}/source.db" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    database = Database(url, settings)
    yield database
    database.engine.dispose()


@pytest.fixture
def sqlite_database(tmp_path, settings):
    database = Database(f"sqlite:///{tmp_path}/source.db", settings)
    yield database
    database.engine.dispose()
