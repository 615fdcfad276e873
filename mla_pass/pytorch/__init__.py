"""Everything that needs torch: ONNX graphs as differentiable functions, and converted models in torch itself."""
