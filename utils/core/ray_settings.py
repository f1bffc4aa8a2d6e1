"""The flags that hand the work to a Ray cluster."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from utils.core.errors import ConfigError
from utils.core.settings import Settings, option


def _is_address(text: str) -> bool:
    try:
        head = urlsplit(f"//{text}")
        return bool(head.hostname and head.port) and head.netloc == text
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class Cluster(Settings):
    """Whether the work is handed to Ray; it changes results at most by rounding."""

    ray: str | None = option(
        None,
        "hand the work to Ray: local starts it on this machine, auto joins this machine's cluster, HOST:PORT the one "
        "with that head",
        metavar="local|auto|HOST:PORT",
    )
    actors: int | None = option(
        None,
        "workers on Ray (default: one per GPU, or per as many processors as this process has threads); if there are "
        "more than GPUs, they share them",
        least=1,
    )
    retries: int | None = option(
        None, "how often another worker on Ray retries a task whose worker has died (default: 2)", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("actors", "retries"):
            if self.ray is None and (value := getattr(self, name)) is not None:
                raise ConfigError(f"--{name} {value}: goes with --ray; give --ray local, auto or HOST:PORT")
        if self.ray not in (None, "local", "auto") and not _is_address(self.ray):
            raise ConfigError(f"--ray {self.ray}: neither local nor auto; of a cluster's head give HOST:PORT")

    @property
    def is_asked_for(self) -> bool:
        return self.ray is not None
