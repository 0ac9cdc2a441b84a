"""Table and picture of a sweep: python -m docs.plot_sweep "runs/beta-*-seed-*" sweep.png"""

import glob
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from support.report import interval, mean_interval, new_page, table

pattern, picture = sys.argv[1:]
runs = defaultdict(list)  # the value, as the folder's name has it -> results.json of each seed
for path in glob.glob(f"{pattern}/results.json"):
    runs[re.sub("-seed-.*", "", Path(path).parent.name)].append(json.loads(Path(path).read_text()))
assert runs, f"{pattern}: no folder of this pattern holds a results.json"
names = {"after/kl": "KL, nats", "after/gold": "gold reward", "after/eval/rewards/accuracies": "accuracy"}
points = {x: [mean_interval([run[name] for run in seeds]) for name in names] for x, seeds in sorted(runs.items())}
print(table(["run", "seeds", *names.values()], [[x, str(len(runs[x])), *map(interval, y)] for x, y in points.items()]))
page = new_page(6.4, 4.0)
axes = page.add_subplot(xlabel="KL to the reference, nats per answer", ylabel="gold reward")
for x, ((kl, kl_half), (gold, gold_half), _) in points.items():
    bars = {"xerr": kl_half, "yerr": gold_half} if len(runs[x]) > 1 else {}
    axes.errorbar(kl, gold, **bars, marker="o", capsize=3, label=x)
axes.legend(loc="lower right")
page.savefig(picture, dpi=120)
