"""Claims of papers as experiments, one command each: `python -m ablations.NAME` (README.md has the table of all).

common.py             the flags, the CSV of results, runs in processes, intervals over seeds, the verdict
world.py              eight tokens and answers of four: every policy's KL and reward exact, and the best there is
plot.py               every figure and every README's table again, from the CSVs alone
NAME/__main__.py      an experiment: its criterion, its settings, and calls of the scripts' main or of `rlhf`
NAME/results.csv      what the full run found, one value a row
NAME/README.md        question, set-up, table, figure, verdict, threats
"""
