"""An adapter that is refused leaves a server of several processes in step.

vLLM's executor reads the replies of its workers in turn and stops at the first error; the other
replies stay in their queues and are taken for those of the next call. So a worker replies with the
reason in place of an error, and the executor makes an error of it once it has all replies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """A worker's reply to `add_lora` when it cannot take the adapter."""

    reason: str


def install() -> None:
    """Replaces `add_lora` of vLLM's executors and model runners."""
    from vllm.v1.executor import Executor
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    setattr(Executor, "add_lora", _add_in_all_workers)  # noqa: B010
    setattr(LoRAModelRunnerMixin, "add_lora", _add_or_say_why_not)  # noqa: B010


def _add_or_say_why_not(runner: Any, lora_request: Any) -> bool | Refusal:
    """In a worker: `LoRAModelRunnerMixin.add_lora`."""
    runner._ensure_lora_enabled()
    try:
        return runner.lora_manager.add_adapter(lora_request)
    except Exception as e:
        return Refusal(str(e))


def _add_in_all_workers(executor: Any, lora_request: Any) -> bool:
    """In the engine: `Executor.add_lora`. An adapter is in all workers or in none.

    Raises:
        RuntimeError: a worker refuses it.
    """
    replies = executor.collective_rpc("add_lora", args=(lora_request,))
    refusals = [reply.reason for reply in replies if isinstance(reply, Refusal)]
    if refusals:
        executor.collective_rpc("remove_lora", args=(lora_request.lora_int_id,))
        raise RuntimeError(refusals[0])
    return all(replies)
