"""Count the epochs of trainings that may stop early, and estimate their total for the progress bar."""

from collections.abc import Mapping


class Epochs:
    """The epochs of each training, by its name: `most` is the maximum, `ended` the count of those that have ended."""

    def __init__(self, most: Mapping[str, int], ended: Mapping[str, int]) -> None:
        self.most = most
        self.counts = dict.fromkeys(most, 0) | dict(ended)
        self.ended = set(ended)

    def step(self, name: str) -> None:
        self.counts[name] += 1

    def end(self, name: str) -> None:
        self.ended.add(name)

    def restart(self, name: str) -> int:
        """Set a training's epochs to 0 and return how many they were."""
        count, self.counts[name] = self.counts[name], 0
        return count

    @property
    def count(self) -> int:
        """Return the epochs of all trainings so far."""
        return sum(self.counts.values())

    @property
    def expected(self) -> int:
        """Return the expected total: each unfinished training takes the mean share of its maximum that the ended ones
        took, and at least one more epoch.
        """
        shares = [self.counts[name] / self.most[name] for name in self.ended]
        share = sum(shares) / len(shares) if shares else 1.0
        return sum(
            count if name in self.ended else min(self.most[name], max(count + 1, round(share * self.most[name])))
            for name, count in self.counts.items()
        )
