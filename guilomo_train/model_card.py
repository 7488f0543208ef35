"""The card of an adapter folder, its README.md, and the sentence on how sure its search was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guilomo_serve.adapter import AdapterSpec
from guilomo_train.allocation_map import allocation_of, table


def finding(search: Mapping[str, Any]) -> str:
    """What the record of a search says of its own evidence, as a sentence; "" if nothing.

    Args:
        search: as `SearchResult.record` has it.
    """
    if "told_apart" not in search:  # an estimator that does not weigh its evidence
        return ""
    steps = f"{search['evidence_steps']} steps"
    if search["told_apart"]:
        p = min(value for key, value in search.items() if key.startswith("p_"))
        return f"The data tell layers apart ({steps}; chance shows as much with p = {p:g})."
    return (
        f"Nothing found: the data do not tell layers apart ({steps}; chance shows as much with "
        f"p = {search['p_modules']:.2g}), so each layer got as much. More rows may tell."
    )


def model_card(
    spec: AdapterSpec,
    data: str,
    parameters: int,
    metrics: Mapping[str, Any] | None,
    whole: Sequence[str] = (),
) -> str:
    """The README.md of an adapter folder. Args: whole: modules of the base trained beside it."""
    allocation, stops = allocation_of(spec), spec.stop_token_ids
    lines = [
        "---",
        "library_name: guilomo",
        f"base_model: {spec.base_model_name_or_path}",
        "tags: [lora, mixture-of-experts, guilomo]",
        "---",
        "",
        f"# LoRA-MoE adapter for {Path(spec.base_model_name_or_path).name}",
        "",
        *([f"- Base: commit {spec.revision}"] if spec.revision else []),
        f"- Training data: {data}",
        f"- Experts: {spec.total_experts} in {len(spec.experts)} layers, "
        f"top {spec.top_k} a token; total rank {spec.total_rank}; {parameters:,} parameters",
    ]
    if whole:
        lines.append(f"- Trained whole: {', '.join(whole)}")
    if spec.search is not None:
        found = ", ".join(f"{k} {v}" for k, v in spec.search.items())
        lines.append(f"- Allocation: searched ({found}). {finding(spec.search)}".rstrip())
    if metrics is not None:
        lines.append(
            f"- Evaluation ({metrics['rows']} rows, greedy): exact match "
            f"{metrics['exact_match']:.3f}, accuracy {metrics['accuracy']:.3f} "
            f"(most frequent answer alone: {metrics['majority']:.3f})"
        )
    lines += [
        "",
        "Load it (servers refuse adapters with modules that were trained whole):"
        if whole
        else "Serve it: `guilomo-serve BASE --adapter name=THIS_FOLDER`, or load it:",
        "",
        "```python",
        "import guilomo  # tells PEFT of the method; pip install guilomo",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        *(
            [f"model.generation_config.eos_token_id = {list(stops)}  # end its answers"]
            if stops
            else []
        ),
        "```",
        "",
        "```",
        table(allocation),
        "```",
        "",
    ]
    return "\n".join(lines)
