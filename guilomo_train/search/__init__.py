"""The search for an allocation: how many experts each layer gets, and of which ranks.

selection.py      selection vectors, what they choose, and the gradient through the choice
hypergradient.py  the derivative of the validation loss in them (bilevel, DARTS)
allocation.py     the result as a value
controls.py       values of that type without a search
search.py         the loop that joins them, on the trainer of the fine-tuning
"""
