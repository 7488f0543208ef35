"""Training of searched LoRA-MoE adapters: search, allocation, fine-tuning, evaluation.

lora_moe/           the LoRA-MoE layer as a PEFT method
search/             selection vectors, the bilevel step, the allocation it ends in
data/               rows: from a file to a batch
config.py           one dataclass a stage: the command line, saved runs and docs derive from it
settings.py         a file of settings, for --config
endings.py          how an answer ends, and where generation stops
preview.py          how training will read rows
plan.py             memory and time of a run before it starts
balance.py          the load-balance loss, and how DPO, GRPO and KTO get it
processes.py        the processes that train together, and whether the base is in shards
shards.py           a base of which each process has a part; one in 4 bit, spread by FSDP
zero3.py            a base that DeepSpeed spreads over the processes
base.py             the base model and its tokenizer
adapters.py         the adapter of a PEFT model: put on, filled, taken out
arguments.py        what TRL's trainer is told
loss.py             the loss on the completions of a batch
progress.py         the progress line of a training
trainer.py          that loss and the load-balance loss, on TRL's trainer
checkpoints.py      which checkpoint to go on from, and whether it fits
searching.py        a base and rows to an allocation
finetuning.py       an allocation and rows to an adapter
evaluate.py         answers by generation, and how likely the right ones are
scoring.py          which answers are right
health.py           load, entropy and dead experts of the routers
baseline.py         an allocation without a search, to compare a searched one with
compare.py          two allocations side by side
export.py           an adapter as a plain LoRA
foreign.py          adapters of MoLA, LoRAMoE and HydraLoRA as ours
push.py             an adapter to the Hugging Face Hub
allocation_map.py   an allocation as a table and a heat map
model_card.py       the card of an adapter folder
run_files.py        the files of a run, and a finished run read from them
report.py           the report page of a run
report_pictures.py  its pictures
pictures.py         what all pictures share
run.py              a run: its stages with their files
limits.py           memory or disk that runs out, as an error to act on
versions.py         versions of the packages that a result depends on
cli.py              the command `guilomo-train`
"""

import logging

# It advises, whenever PEFT imports it on a CPU, to install a kernel for 4-bit bases.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
