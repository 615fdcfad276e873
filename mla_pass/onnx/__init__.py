"""Everything that reads, writes or runs ONNX."""
