"""`extraction notify`: try whether notices arrive."""

from extraction_dagster.cli import console
from extraction_dagster.errors import SettingsError
from extraction_dagster.settings import load_settings


def command() -> None:
    """Send a test notice, as EXTRACTION_NOTIFY says: what a failed run would send."""
    from extraction_dagster.notify import RunFailure, deliver, make_notifier

    settings = load_settings()
    notifier = make_notifier(settings)
    if notifier is None:
        raise SettingsError("EXTRACTION_NOTIFY", "none", "log, webhook, slack or module:function")
    error = "The video store is down, for example"
    failure = RunFailure("0000-test", "extraction_job", "1-1000", "video_frames", error, failed_records=0, is_test=True)
    with console.warnings():
        deliver(notifier, failure)
    console.out.print(f"A test notice was delivered ({settings.notify}).")
