"""What is shown while something takes long: a bar, and a line with an estimate as soon as the speed is known."""

import time

from tqdm import tqdm

LONG = 60.0  # seconds; what takes longer says so


class Waiting:
    """A progress bar over `total` units of work named `what`; without a name, or where `silent`, nothing is shown.

    The bar appears after two seconds. One line is printed if, at the speed measured after the first units (these warm
    everything up), the rest is expected to take longer than LONG. Without a total there is no estimate.
    """

    def __init__(self, what: str, total: int | None, unit: str, silent: bool = False):
        self.what, self.total, self.done, self.told = what, total, 0, False
        shown = {"desc": what, "unit": unit, "leave": False, "dynamic_ncols": True, "delay": 2}
        self.bar = tqdm(total=total, disable=silent or not what, **shown)
        self.measured: tuple[int, float] | None = None

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def update(self, n: int) -> None:
        """n more units are done."""
        self.done += n
        self.bar.update(n)
        now = time.perf_counter()
        if self.measured is None:
            self.measured = self.done, now
        elif self.total and not self.told and not self.bar.disable and now - self.measured[1] > 1:
            done, since = self.measured
            left = (now - since) / max(self.done - done, 1) * (self.total - self.done)
            self.told = True
            if left > LONG:
                tqdm.write(f"{self.what}: this takes about {left / 60:.0f} minutes more")
