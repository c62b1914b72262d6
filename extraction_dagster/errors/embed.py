"""Errors of models, their devices and their compiled networks. An error of compiling ends no run: it is a warning."""

from extraction_dagster.errors import ExtractionError, PermanentError, one_line


class EmbeddingModelError(PermanentError):
    """No model goes by the name that was set."""

    def __init__(self, name: str, why: str, available: str) -> None:
        super().__init__(f"""No embedding model {name!r}: {why}. Available: {available}. Set EXTRACTION_MODEL to one of
            them.""")


class ModelFilesError(PermanentError):
    """A model's files are missing, damaged or refused; nothing was embedded with them."""

    def __init__(self, model: str, where: str, got: str, expected: str, fix: str) -> None:
        super().__init__(f"""Model {model!r} can't be loaded from {where}: got {one_line(got)}, expected
            {one_line(expected)}. Nothing was written. {fix}""")


class ModelLibraryError(PermanentError):
    """A package that a model needs is not installed."""

    def __init__(self, model: str, package: str, extra: str) -> None:
        super().__init__(f"""Model {model!r} needs the package {package!r}, which is not installed. Nothing was written.
            Install it: pip install 'extraction-dagster[{extra}]'.""")


class EmbeddingDeviceError(PermanentError):
    """The device that was set is not there."""

    def __init__(self, device: str, available: str) -> None:
        super().__init__(f"""Device {device!r} is not available, this machine's torch sees: {available}. Set
            EXTRACTION_DEVICE to one of them, or to auto.""")


class EmbeddingMemoryError(ExtractionError):
    """Not even one frame fits into the device's memory."""

    def __init__(self, model: str, device: str, said: str) -> None:
        super().__init__(f"""Model {model!r} ran out of memory on {device} with a batch of 1 frame, after halving it
            down to that ({said}). Finished shards are kept. Free memory on {device}, or choose a smaller
            EXTRACTION_MODEL or another EXTRACTION_DEVICE, then run the range again.""")


class ModelOutputError(PermanentError):
    """A model gave something else than one vector per frame; a fault of the model, never of a record."""

    def __init__(self, model: str, got: str, expected: str) -> None:
        super().__init__(f"Model {model!r} gave {got}, expected {expected}. Finished shards are kept.")


class InvalidVectorError(ExtractionError):
    """A frame's vector can't be searched: it has NaN, an infinite value, or no length."""

    def __init__(self, record_id: int, frame_number: int, model: str, got: str) -> None:
        super().__init__(f"""Frame {frame_number} of record {record_id} got a vector with {got} from model {model!r},
            expected finite values and a length above zero. No vector of the record was kept; the range goes on.
            'extraction retry {record_id}' tries it again.""")


class QueryImageError(PermanentError):
    """A file given to search is no image that can be embedded."""

    def __init__(self, path: str, got: str, expected: str) -> None:
        super().__init__(f"Image {path!r} can't be searched for: got {got}, expected {expected}.")


class QueryVideoError(PermanentError):
    """A file given to search is no video that can be embedded."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"Video {path!r} can't be searched for: {why}")


class TextSearchError(PermanentError):
    """The model has no side for texts."""

    def __init__(self, model: str) -> None:
        super().__init__(f"""Model {model!r} embeds images only, so that a text can't be searched for. Search with
            --image or --video, or choose a model that puts texts beside images as EXTRACTION_MODEL and load the
            collection with it.""")


class CompileError(ExtractionError):
    """A model can't be compiled."""

    def __init__(self, model: str, why: str, fix: str) -> None:
        self.why = why
        super().__init__(f"""Model {model!r} runs uncompiled: {why}. Its vectors are the same, at more CPU time a frame.
            {fix} EXTRACTION_COMPILE=off ends this message.""")


class ArtifactFolderError(ExtractionError):
    """A compiled network could have been written by somebody else, or its folder can't be used."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"""No compiled model is loaded out of {path}: {why}, expected what this user alone can write.
            The model runs uncompiled, with the same vectors. Remove it, or choose another EXTRACTION_HOME.""")


class CompiledNetworkError(ExtractionError):
    """A compiled network can't be loaded, fails, or gives other vectors than its model."""

    def __init__(self, path: str, why: str) -> None:
        self.why = why
        super().__init__(f"The compiled network {path} can't be used: {why}. The model runs uncompiled.")
