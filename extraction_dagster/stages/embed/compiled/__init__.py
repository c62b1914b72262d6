"""EXTRACTION_COMPILE: a model's network in ONNX Runtime's format, made once and kept."""
