"""ONNX graphs as differentiable torch functions; imported only by what needs gradients."""
