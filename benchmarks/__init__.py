"""Ours against others, side by side in one run: README.md has the rules, the commands and the results."""
