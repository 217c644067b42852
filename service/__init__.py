"""The service: REST and WebSocket in front of ONNX Runtime.  Never imports torch."""
