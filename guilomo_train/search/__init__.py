"""The search for an allocation: how many experts each layer gets, and of which ranks.

selection.py      selection vectors, and what they choose within a budget
estimators.py     how vectors learn from the gradient in the masks
hypergradient.py  that gradient where rows are held out (bilevel, DARTS)
upper.py          a step of the vectors: draw, gradient, estimator
allocation.py     the result as a value
controls.py       values of that type without a search
search.py         the loop that joins them, on the trainer of the fine-tuning
"""
