"""The driver of a Triton backend for CPUs: there is one device, and nothing to wait for."""

from __future__ import annotations

import torch
import triton.backends.driver as base  # as a module: Triton takes the one subclass it finds here
from triton.backends.compiler import GPUTarget


class Driver(base.DriverBase):
    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_current_target(self):
        return GPUTarget("cpu", 0, 32)

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        """There is one."""

    def get_current_stream(self, device=None):
        return 0

    def get_device_interface(self):
        return torch.cpu

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError
