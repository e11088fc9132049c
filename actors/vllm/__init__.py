"""vLLM as generation and judge engine; vllm is imported inside this package only, and only when an engine starts."""
