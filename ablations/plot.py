"""Redraw every figure and rewrite every README's table from the CSVs alone: python -m ablations.plot"""

import importlib
import os
from collections.abc import Callable
from types import ModuleType

from ablations import common
from support.report import new_page


def experiments() -> dict[str, ModuleType]:
    """Name -> module of every experiment."""
    names = sorted(path.parent.name for path in common.ROOT.glob("*/__main__.py"))
    return {name: importlib.import_module(f"ablations.{name}.__main__") for name in names}


def with_table(text: str, table: str) -> str:
    """The README's text with this table between its two marks."""
    before, after = text.split(common.START, 1)
    return f"{before}{common.START}{table}\n{common.END}{after.split(common.END, 1)[1]}"


def whole(results: common.Results, module: ModuleType) -> bool:
    """Whether every setting has values at a run's end."""
    return all(any(key[0] == x and key[2] is None for key in results.values_of) for x in module.SETTINGS)


def section(results: common.Results, report: Callable) -> str:
    """The generated part of an experiment's README: table, verdict, origin of the numbers."""
    table, verdict, effect = report(results)
    seeds = len({key[1] for key in results.values_of})
    hardware, date, commit = (" and ".join(sorted(results.made[name])) for name in ("hardware", "date", "commit"))
    made = f"{seeds} seed{'s' if seeds > 1 else ''}, {results.minutes():.1f} minutes of one thread, {hardware}, {date}"
    return f"{table}\n\nVerdict: *{verdict}*. {effect}\n\n{made}, commit {commit}."


def overview(modules: dict[str, ModuleType]) -> str:
    """The table over all experiments."""
    rows = []
    for name, module in modules.items():
        results = common.Results(common.ROOT / name / "results.csv")
        complete = whole(results, module)
        _, verdict, effect = module.report(results) if complete else ("", "not run yet", "")
        minutes = f"{results.minutes():.1f}" if complete else ""
        rows.append([f"[{name}]({name}/README.md)", module.CLAIM, verdict, effect, minutes])
    return common.markdown(["`python -m ablations.`", "claim", "verdict", "effect", "minutes"], rows)


def picture(results: common.Results, draw: Callable, path) -> None:
    page = new_page(6.4, 4.0)
    draw(results, page)
    page.savefig(path, dpi=120)


def finish(name: str, a: common.Args, results: common.Results, report: Callable, draw: Callable) -> None:
    """End an experiment: print table and verdict, draw the figure beside the CSV, and after a full run write the
    READMEs."""
    if not results.added:
        path = os.path.relpath(results.path)
        print(f"nothing to train: {path} has all runs; to repeat them delete it and runs/ablations/{name}")
    print("\n" + section(results, report))
    if a.quick or a.smoke:
        kind = "smoke" if a.smoke else "quick"
        print(f"\nThis verdict is of a {kind} run, and not the claim's: only the full run judges that.")
        picture(results, draw, results.path.with_name("figure.png"))
        print(f"\nresults.csv and figure.png are in {results.path.parent}")
    else:
        main()
    if a.smoke:
        columns, *rows = [line.split(",") for line in results.path.read_text().splitlines()]
        assert columns == [*common.FIELDS] and rows, f"{results.path} lacks columns or rows"
        assert results.path.with_name("figure.png").stat().st_size > 0


def main() -> None:
    modules = {}
    for name, module in experiments().items():
        folder = common.ROOT / name
        if problem := common.lacks_table(folder / "README.md"):
            print(f"{problem}: {name} is left out")
            continue
        modules[name] = module
        results = common.Results(folder / "results.csv")
        table = "Not run yet."
        if whole(results, module):
            picture(results, module.draw, folder / "figure.png")
            table = section(results, module.report)
        readme = folder / "README.md"
        readme.write_text(with_table(readme.read_text(), table))
    readme = common.ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), overview(modules)))


if __name__ == "__main__":
    main()
