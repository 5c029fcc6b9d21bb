"""What a rank needs to be one of many in a process of its own."""

import torch.distributed as dist

ROOT_INFO_BYTES = 4108  # HCCL_ROOT_INFO_BYTES


class LoneRankStore(dist.Store):
    """A store that never waits for another rank: what nobody has set reads as the zeros of a root info.

    A communicator begins with rank 0 of its group, which puts a root info into the store for the others. Where this process is
    not rank 0, nobody does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self._values[key] = value

    def get(self, key: str) -> bytes:
        return self._values.get(key, bytes(ROOT_INFO_BYTES))

    def add(self, key: str, amount: int) -> int:
        total = int(self._values.get(key, b"0")) + amount
        self._values[key] = str(total).encode()
        return total

    def check(self, keys: list[str]) -> bool:
        return True

    def wait(self, keys: list[str], timeout: object = None) -> None:
        """Return at once."""
