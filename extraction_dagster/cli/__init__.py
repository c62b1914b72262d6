"""The `extraction` command."""


def main() -> None:
    """Run the command; importing what it is made of can be interrupted as quietly as everything else."""
    import gc
    import sys

    # What a command imports stays. Looking through it for garbage after each 700 new objects is a tenth of its start.
    gc.set_threshold(50_000)
    try:
        from extraction_dagster.cli.main import run_app
    except KeyboardInterrupt:
        sys.exit(130)
    run_app()
