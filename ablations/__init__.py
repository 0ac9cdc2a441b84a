"""Claims of papers as experiments, one command each: `python -m ablations.NAME` (README.md has the table of all).

common.py             the flags, the CSV of results, worker processes, intervals over seeds, the verdict
world.py              eight tokens, answers of at most four: exact KL and reward of every policy and of the optimum
plot.py               every figure and every README's table from the CSVs alone
NAME/__main__.py      an experiment: its criterion, its settings, and calls of the scripts' main or of `rlhf`
NAME/results.csv      the results of the full run, one value per row
NAME/README.md        question, set-up, table, figure, verdict, threats
"""
