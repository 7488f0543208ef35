"""What a server with adapters cannot be, refused on vLLM's configuration before its engine starts.

How many adapters may be in memory is bounded where `--max-cpu-loras` is given, by
server/residency.py. vLLM's own default is `--max-loras`, which is one, and nearly every request
would have its adapter read anew.

The seam, for vLLM 0.32: `EngineArgs.create_engine_config` (vllm/engine/arg_utils.py), which every
way into vLLM calls; plugins are loaded by then. If it is renamed, nothing is refused any more,
which tests/serve/test_cli.py would say.
"""

from __future__ import annotations

import sys
from typing import Any

ONE_PROCESS = (
    "the names and versions of adapters are kept by one server process: start several of "
    "guilomo-serve, with one --state postgresql://..., behind a load balancer"
)
_WORKERS = "guilomo_serve.runtime.workers.HasPlugin"  # a name: it is imported by workers alone
BYPASS = "this front end goes around what refuses, counts and administers adapters"


class UnsupportedError(ValueError):
    """A setting with which adapters would not be served, or served wrongly."""


def install() -> None:
    """Has vLLM refuse, and its workers check their plugin; again, it changes nothing."""
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config
    if hasattr(create, "refuses"):
        return

    def create_or_refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        if config.lora_config is not None:
            refuse_unsupported(config)
            parallel = config.parallel_config
            parallel.worker_extension_cls = parallel.worker_extension_cls or _WORKERS
            if (self.max_cpu_loras or 0) <= 0:  # vLLM takes 0 for none given, too
                config.lora_config.max_cpu_loras = sys.maxsize
        return config

    create_or_refuse.refuses = True  # type: ignore[attr-defined]
    setattr(EngineArgs, "create_engine_config", create_or_refuse)  # noqa: B010


def refuse_unsupported(config: Any) -> None:
    """Stops a start-up that would serve adapters wrongly.

    Args:
        config: vLLM's `VllmConfig`, with LoRA.

    Raises:
        UnsupportedError: names the setting and what to set it to.
    """
    from vllm import envs

    parallel, lora, model = config.parallel_config, config.lora_config, config.model_config
    for setting, is_set in (
        (
            f"--data-parallel-external-lb, --data-parallel-hybrid-lb: {ONE_PROCESS}",
            parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb,
        ),
        (
            "--data-parallel-size-local: the engines of a server read adapters from its folders "
            "and run on its machine; leave it out",
            parallel.data_parallel_size_local < parallel.data_parallel_size,
        ),
        (f"--api-server-count: {ONE_PROCESS}", parallel._api_process_count > 1),
        # Its module is imported by that flag alone.
        (f"--grpc: {BYPASS}", "vllm.entrypoints.launchers.grpc_server" in sys.modules),
        (f"VLLM_USE_RUST_FRONTEND: {BYPASS}; unset it", envs.VLLM_USE_RUST_FRONTEND),
        (
            "--fully-sharded-loras: guilomo splits adapters in its own way; leave it out",
            lora.fully_sharded_loras,
        ),
        (
            "--enable-tower-connector-lora: adapters are for the language model alone; leave it "
            "out",
            lora.enable_tower_connector_lora,
        ),
        (
            f"--lora-dtype: expected the model's ({model.dtype}), or leave it out",
            lora.lora_dtype != model.dtype,
        ),
        (
            "--specialize-active-lora: our kernels launch the same for any number of adapters, so "
            "it would capture the same graphs many times; leave it out",
            lora.specialize_active_lora,
        ),
        (
            "VLLM_LORA_ENABLE_DUAL_STREAM: guilomo has kernels of its own; unset it",
            envs.VLLM_LORA_ENABLE_DUAL_STREAM,
        ),
    ):
        if is_set:
            raise UnsupportedError(setting)
