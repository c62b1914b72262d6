"""The `extraction` command."""


def main() -> None:
    """Run the command; importing what it is made of can be interrupted as quietly as everything else."""
    import sys

    try:
        from extraction_dagster.cli.main import run_app
    except KeyboardInterrupt:
        sys.exit(130)
    run_app()
