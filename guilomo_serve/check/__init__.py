"""`guilomo-serve check MODEL FOLDER`: does vLLM compute what transformers computes?

    command.py   arguments, the table, the verdict
    served.py    vLLM with the plugin in a process of its own: what it is asked and what is recorded
    hf.py        the same adapters on the same base in transformers
    compare.py   what counts as equal

Three things are compared for each prompt: the log-probability of each token, the experts that each
token chooses, and what each served layer adds, by the formula in float64 on the layer's own input.
The last one depends on nothing before the layer, so it holds on a base that is quantised too.
"""
