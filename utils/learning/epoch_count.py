"""How many epochs are done of trainings that may stop early, and how many to expect."""

from collections.abc import Mapping


class Epochs:
    """Of each training, by its name, the `most` epochs it may take; those in `ended` have ended after so many."""

    def __init__(self, most: Mapping[str, int], ended: Mapping[str, int]) -> None:
        self.most = most
        self.done = dict.fromkeys(most, 0) | dict(ended)
        self.ended = set(ended)

    def step(self, name: str) -> None:
        self.done[name] += 1

    def end(self, name: str) -> None:
        self.ended.add(name)

    def restart(self, name: str) -> int:
        """Forget a training's epochs, which are done again, and return how many they were."""
        count, self.done[name] = self.done[name], 0
        return count

    @property
    def count(self) -> int:
        """All epochs done."""
        return sum(self.done.values())

    @property
    def expected(self) -> int:
        """All epochs there will be, where the trainings to come take such a share of their most as those that ended
        did on average, and one that takes longer takes one more epoch.
        """
        shares = [self.done[name] / self.most[name] for name in self.ended]
        share = sum(shares) / len(shares) if shares else 1.0
        return sum(
            done if name in self.ended else min(self.most[name], max(done + 1, round(share * self.most[name])))
            for name, done in self.done.items()
        )
