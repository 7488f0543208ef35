"""The compiler of a Triton backend that compiles nothing: the interpreter runs the kernels."""

from __future__ import annotations

import triton.backends.compiler as base  # as a module: Triton takes the one subclass it finds here


class Compiler(base.BaseBackend):
    """Says for which target it would be; the rest is never called."""

    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "triton_for_cpu"

    def parse_options(self, options):
        raise NotImplementedError

    def add_stages(self, stages, options, language=None):
        raise NotImplementedError

    def load_dialects(self, context):
        raise NotImplementedError

    def get_module_map(self):
        return {}

    def pack_metadata(self, metadata):
        raise NotImplementedError

    def get_codegen_implementation(self, options):
        raise NotImplementedError
