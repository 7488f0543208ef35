"""The search for an allocation: how many experts each layer gets, and of which ranks.

space.py          what can be chosen, and what it costs
selection.py      selection vectors, and what they choose within a budget
evidence.py       what a search has seen of the worth of each entry, and how sure that is
estimators.py     how vectors learn from the gradient in the masks
hypergradient.py  that gradient where rows are held out (bilevel, DARTS)
upper.py          a step of the vectors: draw, gradient, estimator
allocation.py     the result as a value
fill.py           the result from what rank rows are worth; the even one
saliency.py       such worths from one look at the frozen base
controls.py       allocations without a search
trainer.py        the loop that joins them, on the trainer of the fine-tuning
"""
