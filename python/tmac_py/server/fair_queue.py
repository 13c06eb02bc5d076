"""Who is next, where some ask more often than others."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Takes one item of each client in turn; the items of one client in the order they came."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(items) for items in self._waiting.values())

    def push(self, client: str, item: T) -> None:
        """Put ``item`` behind those of ``client``, and a new client behind the others."""
        self._waiting.setdefault(client, deque()).append(item)

    def pop(self) -> T:
        """The oldest item of the client whose turn it is. LookupError if there is none."""
        client, items = next(iter(self._waiting.items()), ("", None))
        if items is None:
            raise LookupError("the queue is empty")
        item = items.popleft()
        self._waiting.move_to_end(client)
        if not items:
            del self._waiting[client]
        return item

    def remove(self, client: str, item: T) -> bool:
        """Take ``item`` out; False if it does not wait."""
        items = self._waiting.get(client)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._waiting[client]
        return True
