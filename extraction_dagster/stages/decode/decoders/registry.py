"""The decoders by name, as the setting `decoder` spells them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extraction_dagster.errors.base import SettingsError

if TYPE_CHECKING:
    from extraction_dagster.stages.decode.decoders.decoder import Decoder


def make_decoder(name: str) -> Decoder:
    """Make the decoder called `name`; only that one's library is imported, and only once it decodes.

    Raises:
        SettingsError: There is no such decoder.
    """
    if name == "pyav":
        from extraction_dagster.stages.decode.decoders.pyav import PyAVDecoder  # noqa: PLC0415 - one backend at a time

        return PyAVDecoder()
    if name == "decord":
        from extraction_dagster.stages.decode.decoders.decord import DecordDecoder  # noqa: PLC0415 - one backend at a time

        return DecordDecoder()
    setting = "EXTRACTION_DECODER"
    raise SettingsError(setting, repr(name), "pyav or decord")
