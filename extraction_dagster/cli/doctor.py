"""`extraction doctor`: every setting, and whether everything that a run needs can be used."""

from collections.abc import Callable

import typer
from pydantic import SecretStr
from rich.table import Table

from extraction_dagster.cli import console
from extraction_dagster.errors import ExtractionError
from extraction_dagster.errors.index import CollectionMissingError
from extraction_dagster.settings import PREFIX, Settings, load_settings


def command() -> None:
    """Show every setting, then check the source table, the state, Dagster's instance, the model and the store."""
    settings = load_settings()
    table = Table("setting", "value", "default")
    for name, field in Settings.model_fields.items():
        value, default = getattr(settings, name), field.get_default(call_default_factory=True, validated_data={})
        table.add_row(PREFIX + name.upper(), _shown(value), "" if value == default else _shown(default))
    console.out.print(table)
    checks = {
        "source table and state": _catalog,
        "Dagster's instance": _instance,
        "embedding model": _model,
        "Qdrant": _store,
        "notices": _notices,
    }
    passed = [_passes(name, check, settings) for name, check in checks.items()]
    if not all(passed):
        raise typer.Exit(1)


def _shown(value: object) -> str:
    if value is None or value == ():
        return "-"
    return "(hidden)" if isinstance(value, SecretStr) else str(value)


def _passes(name: str, check: Callable[[Settings], str], settings: Settings) -> bool:
    try:
        console.out.print(f"ok      {name}: {check(settings)}", markup=False)
    except ExtractionError as error:
        console.out.print(f"FAILED  {name}: {error}", markup=False)
        return False
    return True


def _catalog(settings: Settings) -> str:
    from extraction_dagster.stages.catalog.catalog import open_catalog

    with open_catalog(settings) as catalog:
        return f"{catalog.source.name}, {catalog.source.count()} eligible rows"


def _instance(settings: Settings) -> str:
    from extraction_dagster.defs.instance.launching import open_instance
    from extraction_dagster.defs.instance.runs import active_runs

    with open_instance(settings) as instance:
        return f"{len(active_runs(instance))} active runs"


def _model(settings: Settings) -> str:
    from extraction_dagster.stages.embed.models.registry import load_model

    model = load_model(settings)
    return f"{model.name}, {model.dim} dimensions, on {model.device}"


def _store(settings: Settings) -> str:
    from extraction_dagster.stages.index.stage import open_point_store

    with open_point_store(settings) as store:
        try:
            store.open_collection(settings.collection_name)
        except CollectionMissingError:
            return f"collection {settings.collection_name} is made by the first run"
        return f"collection {settings.collection_name}, {store.count()} points"


def _notices(settings: Settings) -> str:
    from extraction_dagster.notify import make_notifier

    if make_notifier(settings) is None:
        return "nobody is told of failed runs (EXTRACTION_NOTIFY)"
    return f"{settings.notify}; 'extraction notify' sends a test"
