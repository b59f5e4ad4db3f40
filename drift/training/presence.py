"""Which ranks are there: heartbeats through the launcher's store, a meeting without a limit, and the end when one is lost.

Collectives are for ranks that come at about the same time, and have a limit of minutes. A rank that samples for hours
while others wait is another matter: `meet` waits for it as long as its heart beats, and says what it waits for. A rank
that was killed or stopped has no heartbeat, and after the limit the others end.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import torch.distributed as dist

from drift.track import Track

SPEAK_AFTER = 30.0  # seconds of waiting before a rank says what it waits for; each next time is five times as far off


class RankLost(RuntimeError):
    """A rank is gone, or did not come in time. `what` happened; `where` the same command goes on from."""

    def __init__(self, what: str, where: str | None = None) -> None:
        self.what, self.where = what, where
        super().__init__(f"{what}; the same command goes on from {where or 'the last stage that was finished'}")


class Presence:
    """This rank's heartbeat, and what the others' say. `close` it.

    store: shared by all ranks. limit: seconds without a heartbeat after which a rank counts as gone.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, limit: float) -> None:
        self.rank, self.world_size, self.limit = rank, world_size, limit
        self.ending = False  # this rank has noticed that something is wrong
        self._store, self._meetings, self._over = store, 0, threading.Event()
        self._every = min(1.0, limit / 5)
        now = time.monotonic()
        self._seen: dict[int, tuple[bytes, float]] = dict.fromkeys(range(world_size), (b"", now))  # beat, since when
        own: Any = store  # torch's type stub lacks clone(), and set(…, bytes)
        threading.Thread(target=self._beat, args=[own.clone()], name="drift-heartbeat", daemon=True).start()

    def close(self) -> None:
        """Ends the heartbeat."""
        self._over.set()

    def meet(self, what: str) -> None:
        """Returns once every rank has come here; all ranks call it in the same order. what: the work of the last to come.

        Raises RankLost when one that has not come has had no heartbeat for `limit` seconds.
        """
        self._meetings += 1
        name, start, speak = f"meeting-{self._meetings}", time.monotonic(), SPEAK_AFTER
        self._store.set(f"{name}/{self.rank}", "here")
        if self._store.add(name, 1) == self.world_size:
            self._store.set(f"{name}/all", "here")
            self._forget(self._meetings - 1)
        pause = 0.001
        while not self._store.check([f"{name}/all"]):  # its `wait` logs a warning whenever it has waited in vain
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
            waited = time.monotonic() - start
            if waited < self._every:
                continue
            missing = [r for r in range(self.world_size) if not self._store.check([f"{name}/{r}"])]
            if gone := [r for r in missing if self._silence(r) > self.limit]:
                raise RankLost(self._report(gone))
            if waited > speak and missing:
                Track(None).say(f"rank {self.rank} waits for {_names(missing)}: {what} ({waited / 60:.0f} min)")
                speak *= 5

    def lost(self) -> str | None:
        """Which ranks are gone by now, in a sentence's beginning, or None. Listens for a few heartbeats."""
        self.ending = True
        try:
            if self._store.check(["lost"]):
                return self._store.get("lost").decode()
            others = [r for r in range(self.world_size) if r != self.rank]
            before = {r: self._last_beat(r) for r in others}
            time.sleep(3 * self._every)
            gone = [r for r in others if self._last_beat(r) == before[r]]
            return self._report(gone) if gone else None
        except dist.DistError:  # the store has ended with the rank or the launcher that held it
            return "the store that the ranks share is gone"

    def _report(self, gone: list[int]) -> str:
        """The first rank to notice decides the words for all: those that end on noticing are not what was lost."""
        text = f"{_names(gone)} {'is' if len(gone) == 1 else 'are'} gone"
        return self._store.compare_set("lost", "", text).decode()

    def _forget(self, meeting: int) -> None:
        """Every rank has left the meeting before the one that all have come to."""
        for key in (f"meeting-{meeting}", *(f"meeting-{meeting}/{r}" for r in (*range(self.world_size), "all"))):
            self._store.delete_key(key)

    def _silence(self, rank: int) -> float:
        """Seconds since the last heartbeat that was heard of."""
        beat, (last, when) = self._last_beat(rank), self._seen[rank]
        if beat != last:
            last, when = self._seen[rank] = beat, time.monotonic()
        return time.monotonic() - when

    def _last_beat(self, rank: int) -> bytes:
        key = f"beat/{rank}"
        return self._store.get(key) if self._store.check([key]) else b""

    def _beat(self, store: dist.Store) -> None:
        count = 0
        with contextlib.suppress(dist.DistError):  # the store is gone, and with it whoever listens
            while not self._over.is_set():
                store.set(f"beat/{self.rank}", str(count))
                count += 1
                self._over.wait(self._every)


def _names(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
