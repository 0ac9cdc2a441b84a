"""Compare our scripts with other libraries in the same run. README.md has the rules, the commands and the results."""
