"""`import guilomo` tells PEFT of LoRA-MoE adapters, and so all that loads adapters through PEFT.

PEFT knows methods that have registered in the process alone, and has no entry point by which an
installed package could; see docs/evaluation.md.
"""

from guilomo_train.lora_moe import LoraMoeConfig

__all__ = ["LoraMoeConfig"]
