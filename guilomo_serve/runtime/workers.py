"""A worker without the plugin ends the start of a server with adapters.

vLLM goes on without a plugin that it cannot import, and leaves out one that VLLM_PLUGINS does not
name. In a worker that would be found out with the first adapter, or, by stages of a pipeline that
wait for one another, never: on other machines, above all, where Ray's workers have an environment
of their own.

The seam, for vLLM 0.32: `worker_extension_cls` of `ParallelConfig`, a class by its name, which
`WorkerWrapperBase.init_worker` (v1/worker/worker_base.py) imports after the plugins and before it
makes the worker; where guilomo is not installed that import is the error. A server that has a
--worker-extension-cls of its own keeps it, and is not checked. If the setting is renamed, no worker
is checked, which tests/serve/test_workers.py would say.
"""

from __future__ import annotations

from guilomo_serve import runtime

if not runtime.registered:
    raise RuntimeError(
        "a worker has no guilomo plugin, without which adapters are not served: install the same "
        "guilomo where the worker runs, and leave VLLM_PLUGINS unset there or name guilomo in it"
    )


class HasPlugin:
    """What a worker's class is extended by; it adds nothing."""
