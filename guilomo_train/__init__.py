"""Training of searched LoRA-MoE adapters: search, allocation, fine-tuning, evaluation.

lora_moe/   the LoRA-MoE layer as a PEFT method
search/     selection vectors, the bilevel step, the allocation it ends in
config.py   one dataclass a stage: the command line, the saved run and the docs derive from it
data.py     rows of a data set as prompt and completion
trainer.py  loss on the completion and the load-balance loss, on TRL's trainer
finetune.py an allocation and data to an adapter folder
evaluate.py answers by generation, compared with what was expected
report.py   tables, heat map, model card
cli.py      the command `guilomo-train`
"""
