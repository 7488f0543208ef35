"""The adapter folder: what a LoRA-MoE adapter is on disk, how it is read and written.

    spec.py   the contents of adapter_config.json as checked dataclasses
    base.py   what an adapter needs to know about its base model: fingerprint, linear layers
    files.py  reading and writing a folder

Importing this package needs torch and safetensors, but neither vllm nor peft.
"""

from guilomo_serve.adapter.base import BaseFingerprint, BaseModel, is_linear, linear_sizes
from guilomo_serve.adapter.files import (
    Adapter,
    ModuleWeights,
    check_start,
    is_finite,
    is_guilomo_adapter,
    read_adapter,
    read_config,
    read_spec,
    read_weights,
    replace_folder,
    write_adapter,
)
from guilomo_serve.adapter.spec import (
    CONFIG_FILE,
    FORMAT_VERSION,
    PEFT_TYPE,
    WEIGHTS_FILE,
    AdapterError,
    AdapterSpec,
    Expert,
)

__all__ = [
    "CONFIG_FILE",
    "FORMAT_VERSION",
    "PEFT_TYPE",
    "WEIGHTS_FILE",
    "Adapter",
    "AdapterError",
    "AdapterSpec",
    "BaseFingerprint",
    "BaseModel",
    "Expert",
    "ModuleWeights",
    "check_start",
    "is_finite",
    "is_guilomo_adapter",
    "is_linear",
    "linear_sizes",
    "read_adapter",
    "read_config",
    "read_spec",
    "read_weights",
    "replace_folder",
    "write_adapter",
]
