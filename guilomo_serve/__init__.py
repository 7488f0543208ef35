"""Serving of searched LoRA-MoE adapters in vLLM."""

__version__ = "0.1.0"
