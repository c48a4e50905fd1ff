"""Files for engines that run models without transformers: GGUF for llama.cpp, ONNX, and OpenVINO."""
